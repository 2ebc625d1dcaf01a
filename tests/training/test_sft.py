"""`python -m pspo_jax.sft`: its page's commands, on a language model and on the embedded policy."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from pspo_jax.config import command_line
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import PromptConfig
from pspo_jax.data.demonstrations import demonstration_task, read_examples
from pspo_jax.data.synthetic.arithmetic import TOKENIZER
from pspo_jax.export import main as export
from pspo_jax.sft import main as sft
from pspo_jax.sft import read_config
from pspo_jax.training.architectures import architecture_for
from pspo_jax.training.supervised import settings
from tests.conftest import DATA
from tests.model.checkpoints import VOCABULARIES

QWEN = DATA / "tokenizers" / "qwen2.5-small"
ROWS = [
    {"prompt": "What is 1+1?", "completion": "It is 2."},
    {"messages": [{"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": "It is 2."}]},
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "Goodbye"},
        ]
    },
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny checkpoint of random weights with the first ranks of Qwen's vocabulary."""
    from scripts.make_checkpoint import SHAPES, make

    folder = tmp_path_factory.mktemp("base") / "tiny"
    fields = VOCABULARIES[QWEN.name] | {"num_hidden_layers": 1, "hidden_size": 16}
    make(folder, SHAPES["tiny"] | fields, "float32", QWEN, False)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "d.jsonl", ROWS * 2)


def flags(base, data, folder, *more):
    return ["--model.source", str(base), "--sft.data", str(data), "--run.dir", str(folder), *more]


def test_a_language_model_needs_no_other_data(base, data, tmp_path, capsys):
    folder = tmp_path / "sft"
    assert sft(flags(base, data, folder)) == 0
    out = capsys.readouterr().out
    assert f"--model.source {folder / 'model'}" in out and "--sft.steps 3 --sft.batch 8" in out
    before, after = (load_file(f / "model.safetensors") for f in (base, folder / "model"))
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    assert export(["--run", str(folder), "--out", str(tmp_path / "hf")]) == 0
    copied = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(np.array_equal(copied[name], after[name]) for name in after)
    assert (tmp_path / "hf" / "tokenizer.json").exists()
    with pytest.raises(ConfigError, match=r"--dtype: .* holds one finished model"):
        export(["--run", str(folder), "--out", str(tmp_path / "no"), "--dtype", "float16"])


def test_training_with_the_same_settings_finds_it(base, data, tmp_path):
    """Its key does not hold the task of RL, whose data supervised fine-tuning does not read."""
    same = ["--sft.steps", "3", "--sft.batch", "8", "--sft.learning_rate", "1e-5", "--sft.warmup", "0"]
    rl = write(tmp_path / "rl.jsonl", [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(40)])
    one = read_config(flags(base, data, tmp_path / "a"))
    other = command_line.parse(
        flags(base, data, tmp_path / "b", "--task.name", "math", "--task.train_data", str(rl), *same), "train", ""
    )
    source, tokenizer, _ = architecture_for(one)
    task = demonstration_task(one, tokenizer)
    assert settings(one, task, source.fingerprint()) == settings(other, task, source.fingerprint())


def test_rows_of_every_form_become_the_template(base, data):
    config = read_config(flags(base, data, "x"))
    _, tokenizer, _ = architecture_for(config)
    found = read_examples(
        data, tokenizer, lambda text: tokenizer.prompt(text, config.prompt), tokenizer.stop_ids, config.prompt
    )
    texts = [(tokenizer.decode(row.prompt), tokenizer.decode(row.completion)) for row in found[: len(ROWS)]]
    assert texts[0][0].endswith("<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n")
    assert texts[0][1].startswith("It is 2.") and found[0].completion[-1] in tokenizer.stop_ids
    assert texts[1][0].endswith(texts[0][0].removeprefix("<|im_start|>system\n")[-20:])
    assert (
        texts[1][1] == "It is 2.<|im_end|>" and texts[2][1] == "Hello<|im_end|>" and texts[3][1] == "Goodbye<|im_end|>"
    )
    assert "Be brief." in texts[3][0] and "Hello<|im_end|>" in texts[3][0]


@pytest.mark.parametrize(
    "row",
    [
        "text",
        {"prompt": "a"},
        {"prompt": 3, "completion": "b"},
        {"messages": []},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
        {"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]},
        {"messages": "a"},
    ],
)
def test_a_row_of_another_form_is_named(tmp_path, row):
    path = write(tmp_path / "d.jsonl", [{"prompt": "1", "completion": "2"}, row])
    with pytest.raises(ConfigError, match=r'line 2: needs \{"prompt"') as error:
        read_examples(path, TOKENIZER, TOKENIZER.encode, (TOKENIZER.eos_token_id,), PromptConfig())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "says"), [(b"", "contains no rows"), (b"\xff\n", "is not UTF-8")])
def test_a_file_without_rows_is_refused(base, tmp_path, content, says):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        read_config(flags(base, tmp_path / "d.jsonl", tmp_path))


def test_nothing_to_learn_from_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match=r"sft\.data=None: a language model needs demonstrations"):
        read_config(["--model.source", str(base), "--run.dir", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"sft\.steps=0: leaves nothing to train"):
        read_config(["--sft.steps", "0"])


@pytest.mark.slow
def test_adapters_are_merged_into_the_model(base, data, tmp_path):
    folder = tmp_path / "lora"
    assert sft(flags(base, data, folder, "--lora.rank", "2", "--sft.learning_rate", "0.01", "--sft.steps", "2")) == 0
    before, after = (load_file(f / "model.safetensors") for f in (base, folder / "model"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and not any("norm" in name or "embed" in name for name in changed)


def test_the_embedded_policy_learns_its_tasks_demonstrations(tmp_path, capsys):
    small = ["--model.layers", "1", "--model.width", "16", "--model.heads", "2", "--model.kv_heads", "2"]
    words = ["--run.dir", str(tmp_path / "sft"), "--sft.steps", "2", "--model.mlp_width", "16", *small]
    assert sft(words) == 0
    assert (tmp_path / "sft" / "cold_start").exists() and "--run.dir beside it" in capsys.readouterr().out
