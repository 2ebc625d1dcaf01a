"""Every command answers with one line: closed pipes, other encodings, folders that exist already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ModelConfig
from pspo_jax.model.huggingface.load import fetch, read_source
from pspo_jax.model.huggingface.save import write_folder
from pspo_jax.system.interrupts import stop_requests
from scripts.make_checkpoint import MARK
from scripts.make_checkpoint import main as make_checkpoint
from tests.conftest import REPO


def child(env, *words, **options):
    return subprocess.run(
        [sys.executable, *words], env=env, cwd=REPO, capture_output=True, text=True, timeout=300, **options
    )


@pytest.mark.parametrize("command", ["report", "export"])
def test_a_run_folder_that_is_not_there_is_one_line(child_env, command, tmp_path):
    words = (
        [str(tmp_path / "no")] if command == "report" else ["--run", str(tmp_path / "no"), "--out", str(tmp_path / "o")]
    )
    done = child(child_env, "-m", f"pspo_jax.{command}", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such folder" in done.stderr


GUARDED = """
import sys
from pspo_jax.config.command_line import run
def main(argv):
    {body}
    return 0
run(main, "a command")
"""


def guarded(env, body, **options):
    return child(env, "-c", GUARDED.format(body=body), **options)


def test_a_reader_that_leaves_gets_no_traceback(child_env):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", GUARDED.format(body="print('x' * 100)")],
            env=child_env,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write)
    assert done.stderr == "" and done.returncode == 1


def test_a_letter_that_the_terminal_lacks_is_escaped(child_env):
    env = child_env | {"PYTHONIOENCODING": "ascii"}
    done = guarded(env, "print('caf\\u00e9'); print('\\u2013', file=sys.stderr)")
    assert done.returncode == 0 and "caf\\xe9" in done.stdout and "\\u2013" in done.stderr


def test_an_interruption_is_one_line(child_env):
    done = guarded(child_env, "raise KeyboardInterrupt")
    assert done.returncode == 130 and done.stderr.count("\n") == 1 and "interrupted" in done.stderr


def test_a_second_sigterm_does_not_interrupt_what_is_saved():
    with stop_requests() as stop:
        assert not stop()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_closed_terminal_asks_to_stop_unless_it_was_to_be_ignored():
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_export_that_fails_leaves_nothing(tmp_path):
    def fill(folder):
        (folder / "part").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="No space left on device; nothing was kept"):
        write_folder(tmp_path / "out", fill)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_replaced(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis").write_text("x")
    with pytest.raises(ConfigError, match="exists already"):
        write_folder(tmp_path / "precious", lambda folder: None)
    for words in ([], ["--force"]):
        with pytest.raises(ConfigError, match=r"exists already|was not made by this script"):
            make_checkpoint([str(tmp_path / "precious"), "--config-only", *words])
    assert (tmp_path / "precious" / "thesis").read_text() == "x"


def test_a_folder_of_its_own_is_replaced_when_asked(tmp_path):
    out = tmp_path / "tiny"
    assert make_checkpoint([str(out), "--config-only"]) == 0
    assert (out / MARK).exists()
    with pytest.raises(ConfigError, match="--force"):
        make_checkpoint([str(out), "--config-only"])
    assert make_checkpoint([str(out), "--config-only", "--force"]) == 0
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(ConfigError, match="leaves it alone"):
        make_checkpoint([str(tmp_path / "link"), "--force"])


def test_report_does_not_write_onto_a_folder(tmp_path):
    from pspo_jax.report import main as report

    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5}) + "\n")
    (run / "config.yaml").write_text("run: {steps: 1}\n")
    with pytest.raises(ConfigError, match=r"--out .*Is a directory"):
        report([str(run), "--out", str(tmp_path)])


def of(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["model.Q4_K_M.gguf", "config.json"], "holds GGUF files"),
        (["config.json", "pytorch_model.bin"], "pytorch_model.bin, pickled weights"),
        (["consolidated.00.pth"], "consolidated.00.pth, pickled weights"),
        (["model.pt", "config.json"], "model.pt, pickled weights"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds adapters"),
        ([], "is an empty folder"),
        (["tokenizer.json", "tokenizer_config.json"], "holds a tokenizer and no model"),
        (["config.json"], "only its config.json"),
        (["model.safetensors"], "no config.json"),
        (["config.yaml", "checkpoints/x"], "is a run folder"),
        (["snapshot/config.json", "snapshot/model.safetensors"], "its folder snapshot does"),
        (["notes.txt"], "name the folder of a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_told_by_what_it_is(tmp_path, names, says):
    folder = of(tmp_path / "it", *names)
    if "config.json" in names:
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ConfigError) as error:
        read_source(ModelConfig(source=str(folder)))
    text = str(error.value)
    assert text.startswith(f"model.source={folder}: ") and says in text and ";" in text and "\n" not in text


@pytest.mark.parametrize(("name", "says"), [("m.gguf", "is a GGUF file"), ("m.safetensors", "is a file")])
@pytest.mark.parametrize("there", [True, False])
def test_a_file_is_told_by_what_it_is(tmp_path, name, says, there):
    if there:
        (tmp_path / name).write_text("x")
    elif name != "m.gguf":
        says = "no such folder"
    with pytest.raises(ConfigError, match=says):
        fetch(str(tmp_path / name), None, "model.source")


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no such folder, and HF_HUB_OFFLINE .*download it elsewhere"):
        fetch("nobody/nothing-of-this-name", None, "model.source")


@pytest.mark.parametrize("script", ["study.py", "bench_step.py", "bench_verify.py", "check_gold.py"])
def test_a_bad_option_of_a_script_is_one_line(child_env, script):
    done = child(child_env, f"scripts/{script}", "--no-such-option")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--help" in done.stderr, done.stderr


def test_a_study_names_the_arm_that_cannot_run(child_env):
    done = child(child_env, "scripts/study.py", "--arm", "grpo", "--arm", "gppo run.steps=x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "gppo" in done.stderr, done.stderr
