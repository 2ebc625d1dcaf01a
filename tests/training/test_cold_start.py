"""Supervised fine-tuning: from the task's demonstrations and from a JSONL file."""

import json
import shutil

import jax
import numpy as np
import pytest

from pspo_jax import __version__
from pspo_jax.checkpoint.damage import DamageError
from pspo_jax.checkpoint.params_folder import load_folder, save_folder
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.data.synthetic.arithmetic import arithmetic
from pspo_jax.system.progress import Progress
from pspo_jax.training.first_params import _find_start
from pspo_jax.training.supervised import cold_start, dataset, file_examples, read_jsonl, settings, sft_loss
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
    model, params, _ = tiny_policy(config)
    examples = file_examples(config, task)
    data = examples._asdict()
    before = float(sft_loss(model, params, data, 64))
    params = cold_start(config, task, model, params, Progress(False), stop=lambda: False, examples=examples)
    assert float(sft_loss(model, params, data, 64)) < before - 1
    assert settings(config, task)["sft.data"] != config.sft.data


def test_a_token_without_a_row_in_the_embedding_is_refused(tmp_path):
    """Looking it up would give another token's row."""
    _, task = setup()
    write(tmp_path / "d.jsonl", GOOD[:2])
    with pytest.raises(ConfigError, match=r"d.jsonl line 1: .* has the token \d+, and the embedding only 5 rows"):
        read_jsonl(tmp_path / "d.jsonl", task._replace(vocab_size=5), 31)


def test_loss_is_the_mean_over_completion_tokens():
    config, task = setup(sft__steps=1, sft__batch=8)
    model, params, _ = tiny_policy(config)
    block = next(task.demonstrations(0, 8))._asdict()
    total, count = 0.0, 0
    for i in range(8):
        n, t = int(block["prompt_lengths"][i]), int(block["completion_lengths"][i])
        row = np.concatenate([block["prompts"][i, :n], block["completions"][i, :t]])
        log_probs = jax.nn.log_softmax(model.logits(params, model.hidden(params, row[None]))[0])
        total -= float(sum(log_probs[n - 1 + k, row[n + k]] for k in range(t)))
        count += t
    assert float(sft_loss(model, params, block, 64)) == pytest.approx(total / count, rel=1e-4)


def test_a_stop_ends_it_early():
    config, task = setup(sft__steps=62, sft__batch=4)
    model, params, _ = tiny_policy(config)
    assert cold_start(config, task, model, params, Progress(False), stop=lambda: True) is None


def test_epochs_of_a_file_are_shuffled_and_whole(tmp_path):
    config, task = setup(sft__data=write(tmp_path / "d.jsonl", GOOD), sft__steps=1, sft__batch=4)
    source, images = dataset(config, task, file_examples(config, task))
    assert images is None
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


class Memory:
    """Keeps what a cold start had reached."""

    def __init__(self):
        self.kept = None

    def load(self, template):
        return (template, 0) if self.kept is None else self.kept

    def save(self, tree, calls):
        self.kept = jax.tree.map(lambda x: x.copy(), tree), calls


def test_a_stopped_one_carries_on_to_the_bit():
    config, task = setup(sft__steps=62, sft__batch=4, sft__warmup=5)

    def train(stop, kept):
        model, params, _ = tiny_policy(config)
        return cold_start(config, task, model, params, Progress(False), stop, None, kept)

    kept = Memory()
    whole = train(lambda: False, None)
    assert train(lambda: True, kept) is None and kept.kept[1] == 1
    jax.tree.map(np.testing.assert_array_equal, train(lambda: False, kept), whole)


def test_settings_hold_what_the_result_depends_on(tmp_path):
    """Lengths, the version and what data hold; not where data are, nor whether neighbours are asked."""
    config, task = setup()
    found = settings(config, task)
    for field, value in (("rollout.max_new_tokens", 12), ("model.width", 8), ("sft.batch", 3), ("run.seed", 5)):
        assert settings(replace(config, {field: value}), task) != found, field
    assert found["version"] == __version__ and found["heldout"] == task.heldout.fingerprint()
    moved = {"task.train_data": "/elsewhere", "model.source": "/elsewhere", "sft.share": False, "run.steps": 3}
    assert settings(replace(config, moved), task) == found
    # Demonstrations are other problems than the training prompts.
    other = replace(config, {"task.strata": "0=0.8, 3+=0.2", "task.wrong_labels": 0.5})
    assert settings(other, arithmetic(other.task, 16)) == found
    other = replace(config, {"task.seed": 3})
    assert settings(other, arithmetic(other.task, 16)) != found


def test_a_neighbours_start_is_taken_if_it_is_whole_and_equal(tmp_path):
    params, said = {"w": jax.numpy.arange(4.0)}, []
    for name, words in (("a", {"lr": 1}), ("b", {"lr": 2}), ("c", {"lr": 2})):
        save_folder(tmp_path / name / "cold_start", params, words)
    own = tmp_path / "own" / "cold_start"
    assert _find_start(own, True, {"lr": 2}, set(), said.append) == "b" and not said
    assert _find_start(own, False, {"lr": 2}, set(), said.append) == ""
    (tmp_path / "b" / "cold_start" / "settings.json").write_text("{")
    assert _find_start(own, True, {"lr": 2}, set(), said.append) == "c"
    assert "b/cold_start: is damaged (settings.json is not JSON); this run does without it" in said[0]
    save_folder(own, params, {"lr": 2})
    (own / "settings.json").write_text("{")
    assert _find_start(own, False, {"lr": 2}, set(), said.append) == ""
    assert "set aside as" in said[-1] and (tmp_path / "own" / "cold_start.before").exists()


def test_a_damaged_start_is_never_trained_on(tmp_path):
    params = {"w": jax.numpy.arange(4096.0)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    save_folder(tmp_path / "p", params, {})
    for number, path in enumerate(sorted(p for p in (tmp_path / "p" / "params").rglob("*") if p.is_file())):
        copy = shutil.copytree(tmp_path / "p", tmp_path / str(number))
        spoilt = copy / path.relative_to(tmp_path / "p")
        spoilt.write_bytes(spoilt.read_bytes()[:-9] + bytes(9))
        try:
            found = load_folder(copy, abstract)
        except DamageError:
            continue
        np.testing.assert_array_equal(found["w"], params["w"], str(path))
