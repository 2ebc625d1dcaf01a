"""Exports that go to a hub, and the whole way round: train from a hub, push, and load what was pushed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ModelConfig
from pspo_jax.export import main as export
from pspo_jax.model.huggingface.load import read_source, read_tensor
from pspo_jax.system.storage import StorageError
from tests.hub.checkpoints import tiny_files

ID = "me/pushed"


@pytest.fixture
def finished(tmp_path):
    """A folder of supervised fine-tuning alone, whose model is copied."""
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    for name, data in tiny_files().items():
        (model / name).write_bytes(data)
    (tmp_path / "run" / "config.yaml").write_text("run: {steps: 1}\n")
    return tmp_path / "run"


@pytest.fixture
def push(finished, tmp_path):
    """Export to a new folder and push it; the words of the command line may be replaced."""

    def go(*words, name=ID):
        assert export(["--run", str(finished), "--out", str(tmp_path / "out"), "--push-to", name, *words]) == 0

    return go


def complaint(push, *args, **more):
    with pytest.raises((ConfigError, StorageError)) as error:
        push(*args, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("private", [False, True])
def test_a_push_makes_the_repository_and_says_where_it_is(hub, push, monkeypatch, capsys, private):
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    push(*(["--private"] if private else []), name=ID if private else "pushed")
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/{ID}"
    repo = hub.repos["models", ID]
    assert repo.private == private
    pushed = repo.commits[repo.refs["main"]]
    assert {name: pushed[name] for name in tiny_files()} == tiny_files()
    assert len(hub.objects) == 1  # the weights went by the way of large files
    source = read_source(ModelConfig(source=ID))
    wanted = load(tiny_files()["model.safetensors"])
    for tensor in source.tensors.values():
        np.testing.assert_array_equal(read_tensor(tensor), wanted[tensor.name])


def test_a_push_that_is_refused_writes_nothing(hub, push, monkeypatch, tmp_path):
    log_in = "log in by hf auth login, or set HF_TOKEN"
    assert complaint(push) == f"--push-to {ID}: the hub needs a token to write; {log_in}"
    assert complaint(push, name="a b") == (
        "--push-to a b: is no hub id; write OWNER/NAME, of letters, digits, '-', '_' and '.'"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert complaint(push) == (
        f"--push-to {ID}: the account of this machine's token may not write there; name one of its own ids, or "
        f"{log_in} as another account, with a token that may write"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert complaint(push) == f"--push-to {ID}: the hub does not accept the token of this machine; {log_in}"
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    hub.add("models", ID, {})
    assert complaint(push, "--private").startswith(f"--private: {ID} exists already and is public; make it private at ")
    hub.fault = lambda method, path: 503
    assert complaint(push) == f"--push-to {ID}: the hub {hub.url} cannot be reached (HTTP status 503); try again later"
    assert not (tmp_path / "out").exists()


def test_private_belongs_to_a_push(finished, tmp_path):
    with pytest.raises(ConfigError, match="--private: belongs to --push-to"):
        export(["--run", str(finished), "--out", str(tmp_path / "out"), "--private"])


def test_an_upload_that_fails_leaves_the_export(hub, push, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    hub.fault = lambda method, path: 500 if "/commit/" in path else None
    out = tmp_path / "out"
    assert complaint(push) == (
        f"--push-to {ID}: the upload failed (HTTP status 500), also when it was tried again; the export itself is in "
        f"{out}, and hf upload {ID} {out} . sends it"
    )
    assert (out / "model.safetensors").read_bytes() == tiny_files()["model.safetensors"]


@pytest.mark.slow
def test_a_run_from_the_hub_goes_back_to_it(hub, monkeypatch, tmp_path):
    """Model and data come at a revision, a step is trained, and the export loads from the hub with its own weights."""
    import pspo_jax as pj

    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    rows = [{"question": f"{a}+{b}=", "answer": f"#### {2 + 3 * (a % 2)}"} for a in range(10, 20) for b in (1, 2)]
    for kind, name, files in (
        ("models", "org/base", tiny_files()),
        ("datasets", "org/rows", {"train.jsonl": "\n".join(map(json.dumps, rows)).encode()}),
    ):
        repo = hub.add(kind, name, files, private=True, readers={"me"})
        repo.refs["v1"] = repo.refs["main"]
        repo.commit({"README.md": b"empty"})
    fields = {
        "run.dir": str(tmp_path / "run"),
        "run.steps": 1,
        "task.name": "gsm8k",
        "task.train_data": "org/rows",
        "task.revision": "v1",
        "task.heldout_prompts": 4,
        "task.cache": str(tmp_path / "cache"),
        "model.source": "org/base",
        "model.revision": "v1",
        "prompt.template": "none",
        "reward.require_end": False,
        "lora.rank": 2,
        "rollout.prompts": 8,
        "rollout.group_size": 4,
        "rollout.max_new_tokens": 4,
        "verifier.workers": 1,
        "eval.every": 0,
        "log.report": False,
        "log.to": "none",
    }
    assert pj.train(pj.replace(pj.Config(), fields)).finished
    words = ["--run", str(tmp_path / "run"), "--push-to", ID, "--private"]
    assert export([*words, "--out", str(tmp_path / "whole")]) == 0
    pushed = hub.repos["models", ID].commits[hub.repos["models", ID].refs["main"]]
    assert "base_model: org/base" in pushed["README.md"].decode()
    source = read_source(ModelConfig(source=ID))
    wanted = load((tmp_path / "whole" / "model.safetensors").read_bytes())
    for tensor in source.tensors.values():
        np.testing.assert_array_equal(read_tensor(tensor), wanted[tensor.name])
    words[3] = "me/adapter"
    assert export([*words, "--out", str(tmp_path / "adapter"), "--adapter-only"]) == 0
    pushed = hub.repos["models", "me/adapter"].commits[hub.repos["models", "me/adapter"].refs["main"]]
    adapter = json.loads(pushed["adapter_config.json"])
    assert (adapter["base_model_name_or_path"], adapter["r"]) == ("org/base", 2)
    assert pushed["adapter_model.safetensors"] == (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
