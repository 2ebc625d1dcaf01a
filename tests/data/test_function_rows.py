"""Users' functions get the values of their rows and the text of a completion, through tasks and real workers."""

import shutil

import numpy as np
import pytest
import transformers

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.rewards import VerifierConfig
from pspo_jax.data.gold_check import ACCEPTED, NO_VERDICT, REFUSED
from pspo_jax.data.synthetic.arithmetic import TOKENIZER
from pspo_jax.data.task import CompletionBatch
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.rewards.task import make_task
from pspo_jax.verifiers.workers.pool import Pool
from tests.data.test_text import jsonl
from tests.helpers import tiny_config

pytestmark = pytest.mark.xdist_group("pool")

FUNCTIONS = """
import json, time

def same(completion, answer, tag):
    return float(json.dumps(answer) == json.dumps(tag))

def all_same(completions, answer, tag, **kwargs):
    return [float(json.dumps(a) == json.dumps(b)) for a, b in zip(answer, tag)]

def talks(completions, prompts, **kwargs):
    return [float(p[-1]["role"] == "user") + len(c[0]["content"]) for p, c in zip(prompts, completions)]

def logs(completions, log_metric, log_extra, **kwargs):
    log_metric("length", len(completions[0]))
    log_extra("shout", [c.upper() + "!" for c in completions])
    return [0.0] * len(completions)

def boom(completion):
    raise ValueError("no")

def penalty(completion):
    if completion.startswith("1"):
        time.sleep(30)
    return -1
"""
NAMES = [line[4 : line.index("(")] for line in FUNCTIONS.splitlines() if line.startswith("def ")]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("module")
    (folder / "row_rewards.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with Pool(VerifierConfig(workers=2, wall_limit=1.0), [f"row_rewards:{name}" for name in NAMES]) as entered:
            yield entered


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small tokenizer of characters, with a chat template."""
    path = tmp_path_factory.mktemp("tokenizer")
    hf = TOKENIZER.to_hf()
    hf.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    hf.save_pretrained(path)
    return path


@pytest.fixture
def config(folder, tmp_path):
    def make(**fields):
        values = {
            "task__cache": str(tmp_path / "prompts"),
            "task__train_prompts": 0,
            "task__heldout_prompts": 1,
            "prompt__template": "none",
            "model__tokenizer": str(folder),
            "rollout__prompts": 1,
            "rollout__max_new_tokens": 8,
        }
        return tiny_config(**(values | fields))

    return make


def rewards_of(config, pool, rows, texts, wants_reward=True):
    """Scores of the texts [B][G] as completions of the training rows."""
    tokenizer = load_tokenizer(config, None, None)
    task = make_task(config, tokenizer, pool)
    ids = [[[*tokenizer.encode(text), task.stop_ids[0]] for text in group] for group in texts]
    lengths = np.array([[len(one) for one in group] for group in ids])
    tokens = np.zeros((*lengths.shape, lengths.max()), np.int32)
    for place, one in ((place, one) for place, group in enumerate(ids) for one in enumerate(group)):
        tokens[place, one[0], : len(one[1])] = one[1]
    return task.reward_fn(
        CompletionBatch(task.train, np.array(rows), tokens, lengths, np.ones(lengths.shape, bool), 1, wants_reward)
    )()


@pytest.mark.parametrize("value", [4, True, ["red", "blue"], {"low": 1, "high": [2]}, None, 2.5, "text"], ids=str)
def test_a_function_gets_the_answer_of_its_row(tmp_path, config, pool, value):
    rows = [{"problem": f"{i}+1", "answer": value, "tag": value} for i in range(3)]
    c = config(
        task__name="python_function",
        task__function="row_rewards:same",
        task__train_data=jsonl(tmp_path / "rows.jsonl", rows),
        reward__terms="accuracy, row_rewards:all_same",
    )
    scores = rewards_of(c, pool, [0, 1], [["1", "2"], ["3", "4"]])
    assert not scores.errors and scores.reward.tolist() == [[2, 2], [2, 2]]


def test_a_term_gets_the_value_of_a_row_that_math_verifies(tmp_path, config, pool):
    rows = [{"problem": f"{i}+1", "answer": [i + 1, 77], "tag": [i + 1, 77]} for i in range(3)]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    c = config(task__name="math", task__train_data=data, reward__terms="accuracy, row_rewards:all_same")
    scores = rewards_of(c, pool, [0], [["1", "77", "5"]])
    assert not scores.errors and scores.reward.tolist() == [[2, 2, 1]]


@pytest.mark.parametrize("conversation", [True, False])
def test_messages_reach_functions_that_read_them(tmp_path, config, pool, conversation):
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}+1"}] if conversation else f"{i}+1", "answer": str(i + 1)}
        for i in range(3)
    ]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    c = config(task__name="math", task__train_data=data, reward__terms="row_rewards:talks")
    scores = rewards_of(c, pool, [0], [["1", "22"]])
    assert not scores.errors and scores.reward.tolist() == [[2, 3]]


def test_what_functions_log_is_kept(tmp_path, config, pool):
    rows = [{"problem": f"{i}+1", "answer": "9"} for i in range(3)]
    fields = {"task__name": "math", "task__train_data": jsonl(tmp_path / "rows.jsonl", rows)}
    scores = rewards_of(
        config(**fields, reward__terms="accuracy, row_rewards:logs"), pool, [0, 1], [["1", "2"], ["3", "4"]]
    )
    assert scores.logged == {"length": [1, 1]} and scores.columns == {"shout": [["1!", "2!"], ["3!", "4!"]]}


def test_a_function_that_hangs_or_raises_has_no_verdict_for_the_completion(tmp_path, config, pool):
    rows = [{"problem": f"{i}+1", "answer": "9"} for i in range(3)]
    fields = {"task__name": "math", "task__train_data": jsonl(tmp_path / "rows.jsonl", rows)}
    c = config(**fields, reward__terms="accuracy, row_rewards:penalty, row_rewards:boom=0")
    scores = rewards_of(c, pool, [0], [["1", "2", "9"]])
    np.testing.assert_array_equal(scores.reward, [[np.nan, -1, 0]])
    assert scores.failed["row_rewards:penalty"].tolist() == [[True, False, False]]
    assert scores.failed["row_rewards:boom"].all() and not scores.failed["accuracy"].any()
    assert scores.missing["row_rewards:boom"] == {"ValueError: no": 3}
    (reason,) = scores.missing["row_rewards:penalty"]
    assert reason.startswith("deadline") and "verifier.wall_limit" in reason
    assert list(rewards_of(c, pool, [0], [["1", "2", "9"]], wants_reward=False).failed) == [
        "accuracy"
    ]  # as evaluation asks


def test_a_function_that_needs_a_column_of_no_row_is_refused(tmp_path, config, pool):
    rows = [{"problem": str(i), "answer": "1"} for i in range(3)]
    c = config(
        task__name="math",
        task__train_data=jsonl(tmp_path / "rows.jsonl", rows),
        reward__terms="accuracy, row_rewards:same",
    )
    with pytest.raises(ConfigError) as error:
        make_task(c, load_tokenizer(c, None, None), pool)
    text = str(error.value)
    assert "row_rewards:same needs tag, which is no column of the data (answer, problem)" in text and "\n" not in text


def test_special_tokens_of_the_answer_are_verified(tmp_path, folder, config):
    """Only stop and padding tokens are no part of a completion."""
    added = tmp_path / "added"
    shutil.copytree(folder, added)
    hf = transformers.AutoTokenizer.from_pretrained(added)
    hf.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<answer>", "</answer>"]})
    hf.save_pretrained(added)
    tokenizer = load_tokenizer(config(model__tokenizer=str(added)), None, None)
    ids = tokenizer.encode("<think>1</think><answer>2</answer>")
    assert len(ids) == 6
    ends = [tokenizer.stop_ids[0], tokenizer.pad_token_id]
    assert tokenizer.completion_text(ids + ends) == "<think>1</think><answer>2</answer>"


def test_only_verdicts_on_gold_answers_are_remembered(tmp_path, config):
    """A row that missed the deadline of an earlier start is asked again; what was refused is not."""
    rows = [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(9)]
    c = config(task__name="math", task__train_data=jsonl(tmp_path / "rows.jsonl", rows))
    tokenizer = load_tokenizer(c, None, None)
    with Pool(VerifierConfig(workers=1)) as pool:
        assert not make_task(c, tokenizer, pool).train.left_out
        (path,) = (tmp_path / "prompts").glob("golds-*.npy")
        remembered = np.load(path)
        assert remembered.tolist() == [ACCEPTED] * 9
        remembered[[2, 5]] = NO_VERDICT, REFUSED
        np.save(path, remembered)
        left = make_task(c, tokenizer, pool).train.left_out
        assert [(item.row, item.reason) for item in left] == [(5, "gold answer does not verify itself")]
        assert np.load(path).tolist() == [ACCEPTED] * 5 + [REFUSED] + [ACCEPTED] * 3
