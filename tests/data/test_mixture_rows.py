"""A mixture loses no row, leaks none, and tells its tasks apart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.json_fields import labels
from pspo_jax.config.validation import validate
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.rewards.task import make_task
from pspo_jax.selection.metadata import load_metadata
from tests.data.small_tokenizer import CHATML, SPECIAL, write_tokenizer
from tests.helpers import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("t"), CHATML)


@pytest.fixture
def config(tmp_path, folder):
    def make(*items, **fields):
        values = {
            "task__mixture": json.dumps(items),
            "task__cache": str(tmp_path / "prompts"),
            "task__train_prompts": 0,
            "task__heldout_prompts": 20,
            "model__tokenizer": folder,
            "rollout__prompts": 1,
            "prompt__template": "none",
        }
        return tiny_config(**(values | fields))

    return make


@pytest.fixture
def file(tmp_path):
    """A task of rows whose questions begin with a name."""

    def make(name, count, **fields):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"problem": f"{name} {i}", "answer": str(i)}) for i in range(count)))
        return {"name": "math", "train_data": str(path), **fields}

    return make


def made(config):
    validate(config)
    return make_task(config, load_tokenizer(config, None, None))


def texts(task):
    return list(task.train.texts), list(task.heldout.texts), [item.text for item in task.train.left_out]


def accounted(task, total):
    """Every row is in one place, and in one alone."""
    train, heldout, left_out = texts(task)
    assert len(train) + len(heldout) + len(left_out) == total
    assert len({*train, *heldout, *left_out}) == total
    return train, heldout, left_out


def test_what_is_not_evaluated_is_trained_on(config, file):
    train, heldout, left_out = accounted(made(config(file("a", 300), file("b", 300), task__heldout_prompts=200)), 600)
    assert (len(train), len(heldout), len(left_out)) == (400, 200, 0)


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 9)])
@pytest.mark.parametrize("own", [{}, {"heldout_prompts": 40}])
def test_rows_beyond_a_share_are_listed(weights, own, config, file):
    items = [file("a", 100, weight=weights[0], **own), file("b", 200, weight=weights[1])]
    task = made(config(*items))
    train, heldout, _ = accounted(task, 300)
    assert len(heldout) == 20 and {item.reason for item in task.train.left_out} <= {"beyond its share of task.mixture"}
    counts = Counter(text[0] for text in train)
    assert abs(counts["a"] / len(train) - weights[0] / sum(weights)) < 0.02


def test_a_limit_of_prompts_lists_the_rest(config, file):
    train, _, left_out = accounted(made(config(file("a", 60), file("b", 60), task__train_prompts=30)), 120)
    assert len(train) == 30 and len(left_out) == 70
    task = made(config(file("a", 60, train_prompts=5), file("b", 60, weight=2)))
    accounted(task, 120)
    reasons = Counter(item.reason for item in task.train.left_out)
    assert set(reasons) == {"beyond its share of task.mixture", "beyond task.train_prompts of its task"}


def test_a_small_part_holds_out_its_share_alone(config, file):
    _, heldout, _ = accounted(made(config(file("a", 100, weight=9), file("b", 12))), 112)
    assert Counter(text[0] for text in heldout) == {"a": 18, "b": 2}


def test_files_that_share_rows_do_not_leak(config, file):
    part, more = file("a", 100), file("b", 100)
    path = Path(more["train_data"])
    path.write_text(Path(part["train_data"]).read_text() + "\n" + path.read_text())
    train, heldout, _ = texts(made(config(part, {**more, "name": "gsm8k", "answer_transform": "none"})))
    assert len(set(train)) == len(train) > 100 and not set(train) & set(heldout)
    with pytest.raises(ConfigError, match=r"leaves no prompt \(.*duplicate"):
        made(config(part, part))


def test_tasks_of_one_name_are_told_apart(config, file):
    c = config(file("a", 60), file("b", 60), file("c", 60, label="hard"), {"name": "countdown", "train_prompts": 60})
    assert labels(c) == ("math", "math_2", "hard", "countdown")
    task = made(c)
    first = {"math": "a", "math_2": "b", "hard": "c"}
    for prompts in (task.train, task.heldout):
        for label, kind, text in zip(prompts.labels, prompts.kinds, prompts.texts, strict=True):
            assert kind == "countdown" if label == "countdown" else (kind == "math" and text[0] == first[label])
    quotas = tiny_config(selection__quotas="math=0.25,math_2=0.25,hard=0.25,countdown=0.25", rollout__prompts=4)
    task_names, metadata = load_metadata(quotas, task.train)
    assert task_names == ("countdown", "hard", "math", "math_2")
    assert [task_names[k] for k in metadata.task_ids] == list(task.train.labels)


def test_labels_follow_the_names_that_are_taken(config, file):
    assert labels(tiny_config()) == ("arithmetic",)
    assert labels(config(file("a", 9), file("b", 9, label="math"))) == ("math_2", "math")


@pytest.mark.parametrize("label", ["", "a,b", "a=b", 5])
def test_a_label_that_no_quota_can_name_is_refused(label, config, file):
    with pytest.raises(ConfigError, match=r"^task\.mixture: label=.* must be text"):
        validate(config(file("a", 9, label=label)))


def test_a_label_that_stands_twice_is_refused(config, file):
    with pytest.raises(ConfigError, match=r"^task\.mixture: label='x' appears twice"):
        validate(config(file("a", 9, label="x"), file("b", 9, label="x")))


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"train_data": "x"}, "lacks a name; add one of countdown, math"),
        ({"name": "arithmetic"}, "name='arithmetic' is not a text task"),
        ({"name": "maths"}, "name='maths' is not a text task"),
        ({"name": ["math"]}, "is not a text task"),
        ({"name": "countdown", "mixture": "[]"}, "contains another mixture"),
    ],
)
def test_what_an_item_lacks_is_said(item, words, config):
    with pytest.raises(ConfigError) as error:
        validate(config(item))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_prompt_with_a_token_beyond_the_embedding_is_refused(tmp_path, config):
    """As Gemma 3 1B's token of images; without such a prompt its tokenizer is as good as any."""
    image = "<image_soft_token>"
    folder = write_tokenizer(tmp_path / "more", CHATML, special=(*SPECIAL, image))
    path = tmp_path / "x.jsonl"
    fields = {"task__mixture": None, "task__name": "math", "task__train_data": str(path), "model__tokenizer": folder}
    rows = 256 + len(SPECIAL)
    for extra in ("", image):
        path.write_text("\n".join(json.dumps({"problem": f"p{i}{extra}", "answer": "1"}) for i in range(30)))
        c = config(**fields)
        tokenizer = load_tokenizer(c, None, rows)
        if not extra:
            assert len(make_task(c, tokenizer).train.lengths) == 10
            continue
        with pytest.raises(ConfigError, match=rf"^model\.tokenizer=.* 10 prompts hold .*{image}.* {rows} rows"):
            make_task(c, tokenizer)
