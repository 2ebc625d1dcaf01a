"""Models and tokenizers from a hub: what is fetched, what is kept, what carries on, and what each refusal says."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load

from pspo_jax.config import command_line
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ModelConfig
from pspo_jax.model.huggingface.load import fetch, read_source, read_tensor
from pspo_jax.system.storage import StorageError
from tests.hub.checkpoints import tiny_files

WEIGHTS = "model.safetensors"


def complaint(name="org/tiny", **fields):
    """The message that a checkpoint is refused with."""
    with pytest.raises((ConfigError, StorageError)) as error:
        read_source(ModelConfig(source=name, **fields))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_and_its_tokenizer_come_once_at_the_revision_that_is_asked_for(hub):
    files = tiny_files()
    repo = hub.add("models", "org/tiny", files | {"pytorch_model.bin": b"not read"})
    repo.refs["v1"] = repo.refs["main"]
    repo.commit({"config.json": b"{}"})
    source = read_source(ModelConfig(source="org/tiny", revision="v1"))
    wanted = load(files[WEIGHTS])
    assert {t.name for t in source.tensors.values()} == set(wanted)
    for tensor in source.tensors.values():
        np.testing.assert_array_equal(read_tensor(tensor), wanted[tensor.name])
    assert (source.folder / "tokenizer.json").read_bytes() == files["tokenizer.json"]
    assert hub.downloads("pytorch_model.bin") == []
    before = len(hub.downloads())
    assert read_source(ModelConfig(source="org/tiny", revision="v1")).fingerprint() == source.fingerprint()
    assert len(hub.downloads()) == before
    assert "config.json has no model_type" in complaint()  # the main branch is another commit


def test_a_tokenizer_alone_leaves_the_weights_where_they_are(hub):
    hub.add("models", "org/tiny", tiny_files())
    folder = fetch("org/tiny", None, "model.tokenizer", weights=False)
    assert (folder / "tokenizer.json").exists() and not (folder / WEIGHTS).exists()
    assert hub.downloads(WEIGHTS) == []


def test_a_cut_connection_carries_on_within_the_file(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # the client keeps whole chunks
    files = tiny_files()
    hub.add("models", "org/tiny", files)
    hub.cut[WEIGHTS] = [1000, 2000]
    source = read_source(ModelConfig(source="org/tiny"))
    assert (source.folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert [span for _, span in hub.downloads(WEIGHTS)] == ["", "bytes=1000-", "bytes=3000-"]


def test_a_download_that_failed_fetches_only_what_is_missing(hub, capfd, monkeypatch):
    """The hub breaks down at the weights; the next command asks for these alone."""
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits longer and longer between its own attempts
    hub.add("models", "org/tiny", tiny_files())
    hub.fault = lambda method, path: 503 if path.endswith(WEIGHTS) else None
    assert complaint() == (
        "model.source=org/tiny: the download failed (HTTP status 503), also when it was tried again; the same command "
        "fetches what is missing"
    )
    assert capfd.readouterr().err.count("model.source=org/tiny: HTTP status 503; it is tried again in 0 s\n") == 2
    hub.fault = lambda method, path: None
    hub.requests.clear()
    assert read_source(ModelConfig(source="org/tiny")).architecture.layers == 2
    assert [path for path, _ in hub.downloads()] == [path for path, _ in hub.downloads(WEIGHTS)]


def test_a_short_outage_is_waited_for(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.add("models", "org/tiny", tiny_files())
    left = [503, 502]
    hub.fault = lambda method, path: left.pop() if left and path.endswith(WEIGHTS) else None
    assert read_source(ModelConfig(source="org/tiny")).architecture.layers == 2


def test_without_a_network_the_cache_is_enough(hub, offline):
    hub.add("models", "org/tiny", tiny_files())
    online = read_source(ModelConfig(source="org/tiny"))
    offline()
    hub.requests.clear()
    assert read_source(ModelConfig(source="org/tiny")).fingerprint() == online.fingerprint()
    assert hub.requests == []


def test_a_hub_that_is_gone_leaves_the_cache(hub, monkeypatch):
    hub.add("models", "org/tiny", tiny_files())
    online = read_source(ModelConfig(source="org/tiny"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    assert read_source(ModelConfig(source="org/tiny")).fingerprint() == online.fingerprint()


def test_a_gated_model_is_read_by_whom_it_lets(hub, monkeypatch):
    hub.add("models", "org/tiny", tiny_files(), gated=True, readers={"me"})
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    assert read_source(ModelConfig(source="org/tiny")).architecture.layers == 2


LOG_IN = "log in by hf auth login, or set HF_TOKEN"
CASES = {
    "missing": (
        2,
        "model.source=org/none: no such folder, and the hub shows no model of this id; check the spelling, or it may "
        f"be private: {LOG_IN}",
    ),
    "missing, logged in": (
        2,
        "model.source=org/none: no such folder, and the hub shows no model of this id; check the spelling, or it is "
        "private to another account",
    ),
    "gated": (
        2,
        "model.source=org/gated: is gated, and this machine is not logged in; accept its terms at URL/org/gated, then "
        f"{LOG_IN}",
    ),
    "gated, logged in": (
        2,
        "model.source=org/gated: is gated, and the account of this machine's token may not read it; ask for access at "
        f"URL/org/gated, or {LOG_IN} as another account",
    ),
    "wrong token": (
        2,
        f"model.source=org/tiny: the hub does not accept the token of this machine; {LOG_IN} anew",
    ),
    "wrong revision": (
        2,
        "model.revision=v9: org/tiny has no such branch, tag or commit; choose among main, v1, or drop it for the main "
        "branch",
    ),
    "no id": (
        2,
        "model.source=org/a--b: no such folder, and no hub id either, such as Qwen/Qwen2.5-0.5B; name one of them",
    ),
    "offline": (
        2,
        "model.source=org/tiny: no such folder, and HF_HUB_OFFLINE forbids to ask the hub, whose cache CACHE lacks "
        "files of it; "
        "unset HF_HUB_OFFLINE, or download it elsewhere (hf download org/tiny --local-dir DIR) and name DIR",
    ),
    "offline, a part": (
        2,
        "model.source=org/tiny: no such folder, and HF_HUB_OFFLINE forbids to ask the hub, whose cache CACHE lacks "
        "files of it; unset HF_HUB_OFFLINE, or download it elsewhere (hf download org/tiny --local-dir DIR) and "
        "name DIR",
    ),
    "no hub": (
        1,
        "model.source=org/tiny: no such folder, and the hub http://127.0.0.1:9 cannot be reached ([Errno 111] "
        "Connection refused); once it answers, the same command carries on; without a network, download it elsewhere "
        "(hf download org/tiny --local-dir DIR) and name DIR",
    ),
    "refused": (2, "model.source=org/tiny: the hub refuses it (HTTP status 451); see URL/org/tiny"),
    "no place": (
        2,
        "model.source=org/tiny: the cache CACHE cannot be written (Not a directory); set HF_HOME to a folder that can "
        "be written",
    ),
}
"""Exit code and message of each case; URL and CACHE stand for the hub's address and the cache's folder."""


@pytest.mark.parametrize("case", CASES)
def test_each_refusal_is_one_line_that_says_what_to_do(hub, case, monkeypatch, offline, tmp_path, capsys):
    repo = hub.add("models", "org/tiny", tiny_files())
    repo.refs["v1"] = repo.refs["main"]
    hub.add("models", "org/gated", tiny_files(), gated=True, readers={"me"})
    name = {"missing": "org/none", "gated": "org/gated", "no id": "org/a--b"}.get(case.partition(",")[0], "org/tiny")
    if case.endswith("logged in"):
        monkeypatch.setenv("HF_TOKEN", "hf_other")
    if case == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    if case == "offline, a part":
        fetch(name, None, "model.tokenizer", weights=False)
    if case.startswith("offline"):
        offline()
    if case == "no hub":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    if case == "refused":
        hub.fault = lambda method, path: 451
    if case == "no place":
        (tmp_path / "hub_cache").write_text("a file")
    model = ModelConfig(source=name, revision="v9" if case == "wrong revision" else None)
    codes = []
    monkeypatch.setattr("os._exit", codes.append)  # where the exit code is 1; SystemExit has the others
    try:
        command_line.run(lambda _: read_source(model) and 0, "pspo_jax.train")
    except SystemExit as error:
        codes.append(error.code)
    code, said = CASES[case]
    assert codes == [code]
    told = capsys.readouterr().err.replace(hub.url, "URL").replace(str(tmp_path / "hub_cache"), "CACHE")
    assert told.splitlines()[-1] == f"pspo_jax.train: error: {said}"
