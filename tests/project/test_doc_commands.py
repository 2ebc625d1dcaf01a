"""Commands of README and docs: each is accepted by the program that it calls, and those without a mark are run.

CONTRIBUTING.md describes the mark, `# Needs: ...`, with which a block begins that no test runs.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pspo_jax import evaluate, export, report, sft
from pspo_jax.config import command_line, recipes
from pspo_jax.config.fields import ConfigError
from pspo_jax.planning import memory
from tests.conftest import REPO
from tests.project.pages import (
    PAGES,
    commands,
    fences,
    files_written,
    module_call,
    name_of,
    prose,
    shell_blocks,
)
from tests.runs.processes import SMALL

LANGUAGES = {"bash", "sh", "python", "diff", "json", "yaml", "text"}
NEEDS = {
    "the network",
    "the hub",
    "a GPU",
    "a TPU",
    "several hosts",
    "Google Cloud",
    "minutes",
    "your files",
}
MEASUREMENTS = {"docs/performance.md", "docs/results.md", "docs/results_choice.md"}
"""Pages whose commands repeat measurements of minutes to hours; no block of theirs is run or marked."""
RUN_BY_OTHERS = {"docs/real_weights.md": "tests/runs/test_real_weights.py"}
"""Pages whose blocks another test runs."""
CHARACTERS = [
    "docs/quickstart.md",
    "docs/algorithms.md",
    "docs/configuration.md",
    "docs/losses.md",
    "docs/tasks.md",
    "docs/distributed.md",
    "docs/visual.md",
    "docs/extending/loss.md",
]
"""Pages whose trainings are of embedded tasks; they are run with fewer steps. The later ones read runs of the first."""
WHOLE = ["docs/train_your_model.md"]
"""Pages that are run as they stand."""
FEWER = " ".join(
    f"--{name} {value}" for name, value in (SMALL | {"run.steps": 1, "sft.steps": 20, "eval.samples": 1}).items()
)
"""Flags that stand behind those of a page and override them."""
MADE = {"runs", "weights", "site"}
"""Folders that commands make in a clone."""
PLACES = [path.name for path in REPO.iterdir() if path.name[0] != "." and path.name not in MADE]
ids = {"ids": name_of}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder that has the repository's files and is empty otherwise."""
    folder = tmp_path_factory.mktemp("clone")
    for place in PLACES:
        (folder / place).symlink_to(REPO / place)
    return folder


@pytest.mark.parametrize("page", PAGES, **ids)
def test_blocks_have_a_language_and_known_marks(page):
    for fence in fences(page):
        assert fence.language in LANGUAGES, fence
        assert set(fence.needs) <= NEEDS, fence
        assert "# needs" not in fence.text.lower().removeprefix("# needs: "), fence


def test_every_block_is_run_or_marked():
    run = {name_of(page) for page in PAGES for fence in shell_blocks(page) if not fence.needs}
    assert run == {*MEASUREMENTS, *RUN_BY_OTHERS, *CHARACTERS, *WHOLE}


def test_marks_are_explained():
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert {need for need in NEEDS if f"| {need} |" not in text} == set()


def calls(page: Path) -> list[list[str]]:
    """Calls of the package's programs, in blocks and in the text."""
    scripts = [fence.text for fence in shell_blocks(page)]
    scripts += [" ".join(span.split()) for span in re.findall(r"`(python -m pspo_jax\.[^`]*)`", prose(page))]
    return [call for script in scripts for words in commands(script) if (call := module_call(words))]


def stand_in(run: str) -> Path:
    """A run's folder with the settings that a command of the page has given it, or those of a run of text."""
    folder = Path(run)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists():
        words = ["--task.name", "math", "--task.train_data", "rows.jsonl", "--model.source", "base", "--lora.rank", "8"]
        (folder / "config.yaml").write_text(command_line.to_yaml(command_line.parse(words, "", "")))
    return folder


def accept(call: list[str]) -> None:
    """Read a command line by the program's own parser and checks; raises ConfigError for what it would refuse."""
    program, *argv = call
    match program:
        case "train" if argv[0] == "--recipe":
            Path("mine.yaml").write_text(recipes.recipe(argv[1], argv[0]).read_text())  # the name on all pages
        case "train":
            argv, target = memory.take_target(argv)
            config = command_line.parse(argv, program, "")
            if target is None and not config.run.dir.startswith(("gs:", "/")):
                folder = Path(config.run.dir)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "config.yaml").write_text(command_line.to_yaml(config))
        case "sft":
            Path("examples.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
            sft.read_config(argv)
        case "evaluate":
            args, overrides = evaluate._arguments(argv)
            args.run = args.run and stand_in(args.run)
            data = evaluate._data(args)
            evaluate._benchmarks(args, evaluate._config(args, overrides, data), data)
        case "export":
            stand_in(export._arguments(argv)[0].run)
            with pytest.raises(ConfigError, match="has no checkpoints yet"):
                export.main(argv)
        case "report":
            for word in argv[: argv.index("--out")] if "--out" in argv else argv:
                if not word.startswith("-"):
                    (stand_in(word) / "metrics.jsonl").write_text('{"step": 0}\n')
            if "--prompts" in argv:
                with pytest.raises(ConfigError, match="has no checkpoints yet"):
                    report.main(argv)
            else:
                report.main(argv)
        case _:
            raise AssertionError(f"there is no program pspo_jax.{program}")


@pytest.mark.parametrize("page", PAGES, **ids)
def test_calls_of_the_package_are_accepted(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in PLACES:
        (tmp_path / place).symlink_to(REPO / place)
    for fence in shell_blocks(page):
        for name, text in files_written(fence.text).items():
            Path(name).write_text(text)
    for call in calls(page):
        if len(call) > 1 and not set(call[1:]) <= {"--help", "--help-all"}:
            accept(call)


def test_what_a_program_refuses_is_not_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in (
        "train --run.step 3",
        "train --algorithm.name grpo --selection.floor 0.1",
        "train --config absent.yaml",
        "evaluate --run runs/a --benchmarks absent",
        "sft --model.source Qwen/Qwen2.5-0.5B",
    ):
        with pytest.raises(ConfigError):
            accept(line.split())
    for line in ("export --run runs/a", "report --no-such-flag"):
        with pytest.raises((ConfigError, argparse.ArgumentError)):
            accept(line.split())


def names_of_flags(script: Path) -> str:
    """The text of a script and of the modules beside it that it may take its flags from."""
    return "".join(path.read_text(encoding="utf-8") for path in (script, *script.parent.glob("_*.py")))


@pytest.mark.parametrize("page", PAGES, **ids)
def test_other_programs_know_their_arguments(page):
    """Scripts have the flags, the Makefile the targets, and the package the extras."""
    extras = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    scripts = [fence.text for fence in shell_blocks(page)]
    scripts += [" ".join(span.split()) for span in re.findall(r"`((?:python|scripts/|make |pip )[^`]*)`", prose(page))]
    for words in (words for script in scripts for words in commands(script)):
        programs = [word for word in words[:2] if re.match(r"scripts/\w+\.(py|sh)$", word)]
        for program in programs:
            ours = words[: words.index("--")] if "--" in words else words
            flags = {word.partition("=")[0] for word in ours if re.match(r"--[a-z]", word)}
            unknown = {flag for flag in flags if f"{flag}" not in names_of_flags(REPO / program)}
            assert not unknown - {"--help"}, (program, unknown)
        if words[0] == "make":
            target = words[1]
            assert re.search(rf"^{target}:", makefile, re.M), words
        for extra in (
            name for word in words for part in re.findall(r"\.\[([\w,]+)\]", word) for name in part.split(",")
        ):
            assert extra in extras, words


def run_blocks(page: Path, folder: Path, env: dict[str, str], first: int | None = None) -> str:
    """Run the blocks of a page that have no mark, in their order; returns what they print.

    Args:
      first: how many of the blocks; None = all.
    """
    for fence in fences(page):
        if fence.language == "python" and (name := re.match(r'"""(\w+\.py)"""', fence.text)):
            (folder / name[1]).write_text(fence.text)
    script = "".join([fence.text for fence in shell_blocks(page) if not fence.needs][:first])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def shell(child_env, tmp_path_factory):
    """Environment in which `python` is this interpreter, and trains with a few steps."""
    bin_folder = tmp_path_factory.mktemp("bin")
    python = bin_folder / "python"
    python.write_text(
        '#!/bin/sh\ncase "$2 $3" in *--recipe) ;; pspo_jax.train*) set -- "$@" $FEWER;; esac\n'
        f'exec {shlex.quote(sys.executable)} "$@"\n'
    )
    python.chmod(0o755)
    path = {"PATH": f"{bin_folder}:{child_env['PATH']}", "PYTHONPATH": str(REPO)}
    return child_env | path | {"FEWER": ""}


def test_the_first_commands_run(shell, tmp_path):
    """The demo, with fewer steps, and a table of its prompts."""
    run_blocks(REPO / "docs" / "quickstart.md", tmp_path, shell | {"FEWER": FEWER}, first=1)
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
    said = run_blocks(REPO / "docs" / "algorithms.md", tmp_path, shell)
    assert said.split() == ["runs/demo/prompts.parquet", "runs/demo/prompts.html"]


@pytest.fixture(scope="module")
def demo(clone, shell):
    """A folder in which the commands of the quickstart were run, and what they printed."""
    return clone, run_blocks(REPO / "docs" / "quickstart.md", clone, shell | {"FEWER": FEWER})


@pytest.mark.slow
def test_the_quickstart_runs(demo):
    folder, said = demo
    assert "both.html" in said
    for name in ("runs/demo/report.html", "runs/demo/prompts.html", "runs/grpo/metrics.jsonl", "both.html"):
        assert (folder / name).is_file(), name
    assert "the cold start is that of" in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", CHARACTERS[1:])
def test_commands_of_a_page_run(demo, shell, page):
    folder, _ = demo
    run_blocks(REPO / page, folder, shell | {"FEWER": FEWER})


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_from_ten_rows_to_an_exported_folder(clone, shell):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = run_blocks(REPO / "docs" / "train_your_model.md", clone, shell)
    assert len((clone / "rows.jsonl").read_text().splitlines()) == 10
    assert "-0.01" in said and (clone / "runs/tiny/evaluation/table.md").is_file()
    assert AutoModelForCausalLM.from_pretrained(clone / "tiny").num_parameters() > 0
    assert AutoTokenizer.from_pretrained(clone / "tiny").eos_token_id is not None
