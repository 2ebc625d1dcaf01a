"""A run is evaluated, exported and reported on whatever devices there are, not on those that it was trained on."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import pytest

from pspo_jax.config import command_line
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.evaluate import main as evaluate
from pspo_jax.export import main as export
from pspo_jax.report import main as report
from pspo_jax.runs.access import choose_steps, read_config
from pspo_jax.training.setup import place_state, prepare
from tests import xla
from tests.checkpoint.records import saved
from tests.distributed.processes import free_port
from tests.helpers import tiny_config

TRAINED_ON = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__context": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a checkpoint of eight devices, whose config names other processes and a folder that is gone."""
    folder = tmp_path_factory.mktemp("runs") / "eight"
    folder.mkdir()
    config = tiny_config(run__dir=str(folder), **TRAINED_ON)
    setup = prepare(config)
    with jax.set_mesh(setup.mesh):
        init = jax.jit(setup.model.init, out_shardings=setup.shardings.params)
        with saved(setup, place_state(setup, init(jax.random.key(0))), folder, step=1):
            pass
    elsewhere = {
        "distributed.coordinator": "10.0.0.2:9876",
        "distributed.processes": 2,
        "run.compilation_cache": "/proc/no-such-folder",
    }
    (folder / "config.yaml").write_text(command_line.to_yaml(replace(config, elsewhere)))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5}) + "\n")
    return folder


def lines(out):
    return (out / "step_1" / "arithmetic.jsonl").read_text()


@pytest.fixture(scope="module")
def evaluated(run):
    """Its results on this process's eight devices."""
    out = run.parent / "on8"
    assert evaluate(["--run", str(run), "--temperature", "0", "--batch", "5", "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_one_device_finds_what_eight_find(run, evaluated, child_env, tmp_path):
    words = ["--run", str(run), "--temperature", "0", "--out", str(tmp_path / "on1")]
    done = subprocess.run(
        [sys.executable, "-m", "pspo_jax.evaluate", *words],
        env=child_env | {"XLA_FLAGS": xla.flags(1)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "on1") == lines(evaluated)
    assert "tokens/s" in done.stdout and "step 1 arithmetic: " in done.stdout


def test_a_batch_that_the_devices_do_not_divide_is_filled_up(evaluated):
    records = [json.loads(line) for line in lines(evaluated).splitlines()[1:]]
    assert [r["problem"] for r in records] == list(range(16))


def test_mesh_flags_are_obeyed(run, evaluated, tmp_path):
    words = ["--run", str(run), "--temperature", "0", "--mesh.tensor", "2", "--mesh.data", "1", "--out"]
    assert evaluate([*words, str(tmp_path / "split")]) == 0
    assert lines(tmp_path / "split") == lines(evaluated)
    with pytest.raises(ConfigError, match=r"^mesh\.data=9 x .*needs 9 devices"):
        evaluate(["--run", str(run), "--mesh.data", "9", "--out", str(tmp_path / "no")])


def test_export_and_both_reports_need_no_mesh(run, tmp_path):
    assert export(["--run", str(run), "--out", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert report([str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert report([str(run), "--prompts"]) == 0
    assert (run / "prompts.parquet").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.yaml").unlink(), "holds no config.yaml"),
        (lambda f: (f / "config.yaml").write_text("run: ["), "its config.yaml is damaged"),
        (lambda f: (f / "config.yaml").write_bytes(b"\xff\xfe\x00"), "its config.yaml is damaged"),
        (lambda f: (f / "config.yaml").write_text("- 3\n"), "its config.yaml is damaged"),
        (lambda f: f.rename(f.with_name("moved")), "no such folder"),
    ],
)
@pytest.mark.parametrize("command", [evaluate, export])
def test_a_damaged_run_folder_is_one_line(run, tmp_path, damage, says, command):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.yaml").write_text((run / "config.yaml").read_text())
    damage(copy)
    with pytest.raises(ConfigError) as error:
        command(["--run", str(copy), "--out", str(tmp_path / "out")])
    assert says in str(error.value) and str(copy) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_best_of_what_was_never_evaluated_is_refused(run):
    with pytest.raises(ConfigError, match=r"--step best: none of the checkpoints \[1\] has been evaluated"):
        choose_steps(run, "best")


def test_what_belongs_to_the_training_machine_is_left_behind(run):
    config = read_config(run)
    assert config.mesh.context == config.mesh.data * -1 == config.distributed.processes == 1
    assert config.distributed.coordinator is config.run.compilation_cache is None
    assert read_config(run, ["--mesh.context", "4"]).mesh.context == 4


def two_processes(env, command, *words, devices=2):
    """The exit codes and the outputs of a command that is started as two processes."""
    words = [*words, "--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.processes", "2"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", f"pspo_jax.{command}", *words, "--distributed.process", str(number)],
            env=env | {"XLA_FLAGS": xla.flags(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    return [process.returncode for process in started], outputs


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), ("--mesh.slices", "2", "--mesh.fsdp", "2")], ids=["data", "slices"])
def test_two_processes_share_an_evaluation(run, evaluated, child_env, tmp_path, mesh):
    words = ["--run", str(run), "--temperature", "0", "--out", str(tmp_path / "two"), *mesh]
    codes, outputs = two_processes(child_env, "evaluate", *words)
    assert codes == [0, 0], outputs
    assert lines(tmp_path / "two") == lines(evaluated)
    scores = [json.loads((out / "results.json").read_text()) for out in (tmp_path / "two", evaluated)]
    assert scores[0] == scores[1]
    assert "written to" in outputs[0] and "written to" not in outputs[1]


@pytest.mark.slow
def test_two_processes_export_once(run, child_env, tmp_path):
    """Process 0 writes the files that one process writes, and a refusal ends both."""
    assert export(["--run", str(run), "--out", str(tmp_path / "one")]) == 0
    codes, outputs = two_processes(child_env, "export", "--run", str(run), "--out", str(tmp_path / "two"))
    assert codes == [0, 0], outputs
    assert str(tmp_path / "two") in outputs[0] and str(tmp_path / "two") not in outputs[1]
    one, two = (sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in ("one", "two"))
    assert one == two and all((tmp_path / "one" / p).read_bytes() == (tmp_path / "two" / p).read_bytes() for p in one)
    codes, outputs = two_processes(child_env, "export", "--run", str(run), "--out", str(tmp_path / "two"))
    assert codes == [2, 1] and all("exists already; name a new folder" in text for text in outputs), (codes, outputs)


def test_export_reads_no_field_of_the_config_but_those_of_processes(run, tmp_path):
    with pytest.raises(ConfigError, match=r"--mesh\.fsdp: export knows no such flag; --help lists"):
        export(["--run", str(run), "--out", str(tmp_path / "no"), "--mesh.fsdp", "2"])
