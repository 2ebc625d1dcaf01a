"""reasoning-gym's datasets as a task: questions in turn, verified by the dataset that made them."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.validation import validate
from pspo_jax.data.task import CompletionBatch
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.rewards.task import make_task
from pspo_jax.rewards.text_reward import make_pool
from tests.conftest import DATA
from tests.helpers import tiny_config

if find_spec("reasoning_gym") is None:
    pytest.skip("reasoning-gym is not installed", allow_module_level=True)
TOKENIZER = DATA / "tokenizers" / "qwen2.5-small"
pytestmark = pytest.mark.xdist_group("pool")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_config(model__tokenizer=str(TOKENIZER)), None, None)


@pytest.fixture(scope="module")
def pool():
    """The pool of such a task: it imports reasoning-gym once, before it forks its workers."""
    fields = {"task__name": "reasoning_gym", "verifier__workers": 1, "verifier__deadline": 60.0}
    with make_pool(tiny_config(**fields)) as entered:
        yield entered


@pytest.fixture
def config(tmp_path):
    def make(**fields):
        values = {
            "task__name": "reasoning_gym",
            "task__dataset": "leg_counting, chain_sum",
            "task__cache": str(tmp_path),
            "task__train_prompts": 10,
            "task__heldout_prompts": 4,
            "model__tokenizer": str(TOKENIZER),
            "rollout__prompts": 4,
        }
        return tiny_config(**(values | fields))

    return make


def test_datasets_take_turns(tokenizer, config):
    task = make_task(config(task__seed=3), tokenizer)
    assert (len(task.train.lengths), len(task.heldout.lengths)) == (10, 4)
    import reasoning_gym

    made = {name: reasoning_gym.create_dataset(name, size=7, seed=3) for name in ("leg_counting", "chain_sum")}
    entries = [made[name][i] for i in range(7) for name in made]
    assert [*task.train.texts, *task.heldout.texts] == [e["question"] for e in entries]
    assert [*task.train.answers, *task.heldout.answers] == [e["answer"] for e in entries]
    extras = [json.loads(e) for e in (*task.train.extras, *task.heldout.extras)]
    assert [(e["dataset"], e["index"]) for e in extras] == [(name, i) for i in range(7) for name in made]
    assert task.train.columns(3)["dataset"] == "chain_sum" and set(task.train.kinds) == {"reasoning_gym"}


def test_options_and_seeds_reach_the_datasets(tokenizer, config):
    def train(**fields):
        return make_task(config(task__dataset="chain_sum", **fields), tokenizer).train

    options = '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'
    small = train(task__options=options)
    assert all(-9 <= int(a) <= 18 for a in small.answers) and any(abs(int(a)) > 18 for a in train().answers)
    assert json.loads(small.extras[0])["options"] == json.loads(options) | {"size": 14, "seed": 0}
    prints = [train(**f).fingerprint() for f in ({}, {}, {"task__seed": 1}, {"task__options": options})]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_questions_that_come_twice_are_left_out(tokenizer, config):
    options = '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "allow_negation": false}'
    fields = {"task__dataset": "chain_sum", "task__options": options, "task__train_prompts": 500}
    task = make_task(config(**fields), tokenizer)
    left = task.train.left_out
    assert {item.reason for item in left} == {"duplicate"} and len(set(task.train.texts)) == len(task.train.texts)
    assert len(task.train.texts) + len(task.heldout.texts) + len(left) == 504
    assert not set(task.train.texts) & set(task.heldout.texts)


def test_completions_are_verified_by_their_dataset(tokenizer, config, pool):
    import reasoning_gym

    task = make_task(config(), tokenizer, pool)
    rows = [0, 1, 2, 3]
    gold = [task.train.answers[i] for i in rows]
    texts = [
        [f"So <answer>{a}</answer>", f"<think>no</think>{a}", "<answer>word</answer>", f"\\boxed{{{a}}}"] for a in gold
    ]
    ids = [[[*tokenizer.encode(t), task.stop_ids[0]] for t in row] for row in texts]
    lengths = np.array([[len(i) for i in row] for row in ids])
    tokens = np.zeros((4, 4, lengths.max()), np.int32)
    for b, g in np.ndindex(4, 4):
        tokens[b, g, : lengths[b, g]] = ids[b][g]
    ended = np.ones((4, 4), bool)
    ended[:, 3] = False
    scores = task.reward_fn(CompletionBatch(task.train, np.array(rows), tokens, lengths, ended, 0))()
    wrong = [
        reasoning_gym.create_dataset(name, size=7, seed=0).score_answer("word", {"answer": a, "metadata": {}})
        for name, a in zip(["leg_counting", "chain_sum"] * 2, gold, strict=True)
    ]
    np.testing.assert_allclose(scores.reward, [[1, 1, w, 0] for w in wrong], rtol=1e-6)
    np.testing.assert_allclose(scores.verdicts, scores.reward)
    assert [row[0] for row in scores.answers] == gold


@pytest.mark.filterwarnings("ignore:randrange")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dataset": None}, ["task.dataset=None", "leg_counting"]),
        ({"dataset": "no_such"}, ["task.dataset=no_such: ", "it has ", "leg_counting"]),
        ({"dataset": " ,"}, ["task.dataset=' ,': has an empty entry"]),
        ({"options": "{"}, ["task.options='{': is not JSON", "max_animals"]),
        ({"options": "[]"}, ["task.options='[]': must be a JSON object"]),
        ({"options": '{"colour": 1}'}, ['task.options={"colour": 1}: leg_counting refuses', "'colour'", "change"]),
        ({"options": '{"max_animals": -1}'}, ["task.options=", "leg_counting refuses", "max_animals must be"]),
        ({"options": '{"max_animals": 3.5}'}, ["task.options=", "leg_counting refuses", "integer"]),
    ],
)
def test_bad_settings_are_named(fields, words, tokenizer, config):
    with pytest.raises(ConfigError) as error:
        c = config(**{"task__dataset": "leg_counting"} | {f"task__{k}": v for k, v in fields.items()})
        validate(c)
        make_task(c, tokenizer)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message
