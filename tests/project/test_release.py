"""What a release consists of: one version, declared dependencies and extras, commands, recipes, the wheel itself."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml

import pspo_jax
from pspo_jax.config.recipes import recipe_names
from tests.conftest import REPO

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SOURCES = sorted((REPO / "pspo_jax").rglob("*.py"))


def test_the_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"] and re.fullmatch(r"\d+\.\d+\.\d+", pspo_jax.__version__)
    assert yaml.safe_load((REPO / "CITATION.cff").read_text())["version"] == pspo_jax.__version__
    changes = (REPO / "CHANGELOG.md").read_text()
    assert f"## [{pspo_jax.__version__}]" in changes or f"The first release will be {pspo_jax.__version__}." in changes


def test_extras_that_texts_name_exist():
    pages = [REPO / "README.md", *(REPO / "docs").rglob("*.md"), *SOURCES, *(REPO / "pspo_jax" / "recipes").iterdir()]
    pages += [path for path in (REPO / "scripts").iterdir() if path.is_file()]
    named = {
        extra.strip()
        for page in pages
        for found in re.findall(r"(?:pspo-jax|['\"]\.)\[([a-z0-9_, ]+)\]", page.read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    assert {"gym", "gcs", "plot", "plan", "cuda13", "tpu"} <= named
    assert named <= set(EXTRAS)


def names_of(requirements: list[str]) -> set[str]:
    """Normalised names of the distributions in a list of requirements."""
    return {re.split(r"[\[<>=;! ]", r, maxsplit=1)[0].lower().replace("_", "-") for r in requirements}


def imported(path: Path) -> set[str]:
    """First parts of the modules that a file imports when it runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def test_all_imports_are_declared():
    declared = names_of(PROJECT["dependencies"]) | names_of([r for e in EXTRAS if e != "test" for r in EXTRAS[e]])
    known = importlib.metadata.packages_distributions()
    implied = {"pyarrow": "datasets", "tokenizers": "transformers", "aiohttp": "gcsfs", "google": "gcsfs"}
    implied |= {"mlflow": "mlflow"}  # tests install mlflow-skinny, which has the same module
    implied |= {"sympy": "math-verify", "mpmath": "math-verify"}
    missing = set()
    for module in set().union(*map(imported, SOURCES)) - set(sys.stdlib_module_names) - {"pspo_jax", ""}:
        owners = {name.lower().replace("_", "-") for name in known.get(module, [module])}
        if not owners & declared and implied.get(module) not in declared:
            missing.add(module)
    assert missing == set()


def test_commands_are_those_of_python_m(monkeypatch, capsys):
    names = {path.stem for path in (REPO / "pspo_jax").glob("*.py")} - {"__init__"}
    assert set(PROJECT["scripts"]) == {f"pspo-{name}" for name in names}
    for name in names:
        command = resolve_name(PROJECT["scripts"][f"pspo-{name}"])
        for argv, shown in (
            ([f"/somewhere/bin/pspo-{name}", "--help"], f"usage: pspo-{name} "),
            ([f"/somewhere/pspo_jax/{name}.py", "--help"], f"usage: python -m pspo_jax.{name} "),
        ):
            monkeypatch.setattr("sys.argv", argv)
            with pytest.raises(SystemExit) as ended:
                command()
            assert ended.value.code == 0
            assert shown in capsys.readouterr().out


def test_public_ci_runs_what_a_contributor_runs():
    jobs = yaml.safe_load((REPO / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.M))
    assert {line.partition(" ")[2] for line in lines if line.startswith("make ")} == {"lint", "docs", "test"} <= targets
    supported = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3" in c}
    assert set(jobs["test"]["strategy"]["matrix"]["python"]) == supported


def run(*words: object, **more) -> str:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=500, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The wheel and the source distribution, built from what git has."""
    pytest.importorskip("build", reason="build is a test dependency; install '.[test]'")
    folder = tmp_path_factory.mktemp("dist")
    tree, out = folder / "tree", folder / "out"
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=REPO).splitlines()
    for name in files:
        here, there = REPO / name, tree / name
        if not here.exists() or name.startswith("tests/data/"):
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        if here.is_symlink():  # the package's link to the recipes
            there.symlink_to(here.readlink())
        else:
            there.write_bytes(here.read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree)
    return out


def test_distributions_hold_the_package_and_nothing_else(dist):
    pytest.importorskip("twine", reason="twine is a test dependency; install '.[test]'")
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, source)
    assert wheel.name == f"pspo_jax-{pspo_jax.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    ours = {
        p.relative_to(REPO).as_posix() for p in (REPO / "pspo_jax").rglob("*") if p.suffix in (".py", ".html", ".yaml")
    } | {f"pspo_jax/recipes/{p.name}" for p in (REPO / "configs").glob("*.yaml")}
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == ours | {"pspo_jax/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in info)
    with tarfile.open(source) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    assert ours | {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"} <= inside
    assert not any(name.startswith("tests/") for name in inside)
    assert wheel.stat().st_size < 2e6


@pytest.mark.slow
def test_the_wheel_alone_trains(dist, tmp_path, child_env):
    """In a new environment that has the wheel, beside the dependencies of this one, and in an empty folder."""
    venv.create(tmp_path / "clean", with_pip=True)
    bin_folder = tmp_path / "clean" / "bin"
    (wheel,) = dist.glob("*.whl")
    run(bin_folder / "pip", "install", "--no-deps", "--no-index", wheel)
    (packages,) = (tmp_path / "clean" / "lib").glob("python*/site-packages")
    others = [path for path in sys.path if path.endswith("-packages")]
    (packages / "others.pth").write_text("\n".join(others))  # links to checkouts in them are not followed
    empty = tmp_path / "empty"
    empty.mkdir()
    env = {k: v for k, v in child_env.items() if k != "PYTHONPATH"}
    place = run(bin_folder / "python", "-c", "import pspo_jax; print(pspo_jax.__file__)", cwd=empty, env=env)
    assert Path(place.strip()).is_relative_to(packages)
    run(bin_folder / "pspo-train", "--run.steps", "2", "--sft.steps", "20", cwd=empty, env=env)
    assert (empty / "runs" / "default" / "report.html").exists()
    shown = run(
        bin_folder / "pspo-train", "--config", "pspo_qwen25_math_1p5b", "--run.print_config=true", cwd=empty, env=env
    )
    assert yaml.safe_load(shown)["model"]["source"] == "Qwen/Qwen2.5-Math-1.5B"
    assert run(bin_folder / "pspo-train", "--recipe", "grpo", cwd=empty, env=env).startswith("# ")
    for name in recipe_names():
        assert (packages / "pspo_jax" / "recipes" / f"{name}.yaml").exists()
    run(bin_folder / "pspo-evaluate", "--run", "runs/default", "--steps", "latest", cwd=empty, env=env)
    run(bin_folder / "pspo-export", "--run", "runs/default", "--out", "model", cwd=empty, env=env)
    assert (empty / "model" / "model.safetensors").exists()
    run(bin_folder / "pspo-report", "runs/default", "--out", "page.html", cwd=empty, env=env)
