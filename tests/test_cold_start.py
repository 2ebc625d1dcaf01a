"""Supervised fine-tuning: from the task's demonstrations and from a JSONL file."""

import json

import jax
import numpy as np
import pytest

from pspo_jax.cold_start import cold_start, dataset, read_jsonl, settings, sft_loss
from pspo_jax.config import ConfigError
from pspo_jax.io.progress import Progress
from pspo_jax.tasks import arithmetic
from tests.helpers import tiny_config, tiny_policy

GOOD = [{"prompt": f"{10 + i}+1=", "completion": f"+1={11 + i}$"} for i in range(40)]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def setup(**fields):
    config = tiny_config(rollout__max_new_tokens=31, **fields)
    task = arithmetic(config.task, config.rollout.prompt_bucket)
    return config, task


def test_it_learns_a_file(tmp_path):
    config, task = setup(sft__data=write(tmp_path / "d.jsonl", GOOD), sft__steps=60, sft__batch=16, sft__warmup=5)
    policy, params, _ = tiny_policy(config)
    data = read_jsonl(tmp_path / "d.jsonl", task, 31)._asdict()
    before = float(sft_loss(policy, params, data, 64))
    params = cold_start(config, task, policy, params, Progress(False), stop=lambda: False)
    assert float(sft_loss(policy, params, data, 64)) < before - 1
    assert settings(config, task)["sft.data"] != config.sft.data


def test_a_token_without_a_row_in_the_embedding_is_refused(tmp_path):
    """Looking it up would give another token's row."""
    _, task = setup()
    write(tmp_path / "d.jsonl", GOOD[:2])
    with pytest.raises(ConfigError, match=r"d.jsonl line 1: .* has the token \d+, and the embedding only 5 rows"):
        read_jsonl(tmp_path / "d.jsonl", task._replace(vocab_size=5), 31)


def test_loss_is_the_mean_over_completion_tokens():
    config, task = setup(sft__steps=1, sft__batch=8)
    policy, params, _ = tiny_policy(config)
    block = next(task.demonstrations(0, 8))._asdict()
    total, count = 0.0, 0
    for i in range(8):
        n, t = int(block["prompt_lengths"][i]), int(block["completion_lengths"][i])
        row = np.concatenate([block["prompts"][i, :n], block["completions"][i, :t]])
        log_probs = jax.nn.log_softmax(policy.logits(params, policy.hidden(params, row[None]))[0])
        total -= float(sum(log_probs[n - 1 + k, row[n + k]] for k in range(t)))
        count += t
    assert float(sft_loss(policy, params, block, 64)) == pytest.approx(total / count, rel=1e-4)


def test_a_stop_ends_it_early():
    config, task = setup(sft__steps=20, sft__batch=4)
    policy, params, _ = tiny_policy(config)
    assert cold_start(config, task, policy, params, Progress(False), stop=lambda: True) is None


def test_epochs_of_a_file_are_shuffled_and_whole(tmp_path):
    config, task = setup(sft__data=write(tmp_path / "d.jsonl", GOOD), sft__batch=4)
    source = dataset(config, task)
    epochs = [[bytes(source[e * 40 + i]["prompts"]) for i in range(40)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "10+1="}, "line 1: needs"),
        ({"prompt": "10+1=", "completion": "x"}, "no token for"),
        ({"prompt": "1" * 40, "completion": "1$"}, "prompt has 40 tokens"),
    ],
)
def test_bad_lines_are_named(tmp_path, record, words):
    _, task = setup()
    write(tmp_path / "d.jsonl", [record])
    with pytest.raises(ConfigError, match=words):
        read_jsonl(tmp_path / "d.jsonl", task, 31)
