"""Rows of files and folders become prompts, are left out with a reason, or are refused; tokenised rows are kept."""

from __future__ import annotations

import json
import shutil

import datasets
import numpy as np
import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.data.loading import TRANSFORMS, from_data, quiet_datasets, read
from pspo_jax.data.text import write_left_out
from pspo_jax.data.tokenizer import TextTokenizer, load_tokenizer
from pspo_jax.rewards.task import make_task
from pspo_jax.verifiers.math_answer import ALTERNATIVES
from tests.conftest import DATA, EVERY_ROW, every_row
from tests.helpers import tiny_config

MATH, TOKENIZER = DATA / "math", DATA / "tokenizers" / "qwen2.5-small"

ROWS = [{"problem": f"What is {i} + {i}?\nThink.", "answer": f"{2 * i}", "level": i % 3} for i in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_config(model__tokenizer=str(TOKENIZER)), None, None)


@pytest.fixture
def config(tmp_path):
    def make(**fields):
        values = {
            "task__name": "math",
            "task__cache": str(tmp_path / "prompts"),
            "task__train_prompts": 0,
            "task__heldout_prompts": 2,
            "model__tokenizer": str(TOKENIZER),
            "rollout__prompts": 4,
            "prompt__max_tokens": 2048,
        }
        return tiny_config(**(values | fields))

    return make


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def whole(task):
    """Questions, answers and token ids of both sets, training first."""
    sets = (task.train, task.heldout)
    tokens = [row[:n].tolist() for s in sets for row, n in zip(s.tokens, s.lengths, strict=True)]
    return [t for s in sets for t in s.texts], [a for s in sets for a in s.answers], tokens


# --- sources ---


def save_as(form, folder):
    """ROWS in a form; what task.train_data names."""
    datasets = quiet_datasets()
    data = datasets.Dataset.from_list(ROWS)
    match form:
        case "json":
            (folder / "x.json").write_text(json.dumps(ROWS))
        case "parquet":
            data.to_parquet(folder / "x.parquet")
        case "csv":
            data.to_csv(folder / "x.csv")
        case "arrow":
            data.save_to_disk(folder / "saved")
            shutil.copyfile(folder / "saved" / "data-00000-of-00001.arrow", folder / "x.arrow")
        case "Dataset":
            data.save_to_disk(folder / "x.Dataset")
        case "DatasetDict":
            datasets.DatasetDict({"train": data, "other": data.select([0])}).save_to_disk(folder / "x.DatasetDict")
        case "folder":
            (folder / "x.folder").mkdir()
            jsonl(folder / "x.folder" / "train.jsonl", ROWS)
    return str(folder / f"x.{form}")


@pytest.mark.parametrize("form", ["json", "parquet", "csv", "arrow", "Dataset", "DatasetDict", "folder"])
def test_every_format_gives_the_prompts_of_jsonl(form, tmp_path, tokenizer, config):
    expected = make_task(config(task__train_data=jsonl(tmp_path / "x.jsonl", ROWS)), tokenizer)
    found = make_task(config(task__train_data=save_as(form, tmp_path)), tokenizer)
    assert whole(found) == whole(expected)
    assert found.train.fingerprint() == expected.train.fingerprint()
    texts, answers, tokens = whole(found)
    assert texts == [row["problem"] for row in ROWS] and answers == [row["answer"] for row in ROWS]
    assert tokens == [tokenizer.prompt(text, config().prompt) for text in texts]
    for record, row in ((found.train.columns(3), ROWS[3]), (found.heldout.columns(1), ROWS[11])):
        assert {k: str(v) for k, v in record.items()} == {k: str(v) for k, v in row.items()}  # CSV has no types


def test_lines_are_cut_at_newlines_alone(tmp_path, config):
    odd = "one\u2028two\u2029three\x85four"
    rows = read(jsonl(tmp_path / "x.jsonl", [{"problem": odd, "answer": "\u2028 1"}]), "f", "train", config().task)
    assert len(rows) == 1 and rows[0]["problem"] == odd


def test_columns_are_mapped(tmp_path, config):
    rows = [{"problem": "no", "answer": "no", "q": f"yes {i}", "a": f"\\boxed{{{i}}}"} for i in range(3)]
    path = jsonl(tmp_path / "x.jsonl", rows)
    fields = {"task__prompt_column": "q", "task__answer_column": "a", "task__answer_transform": "boxed"}
    source = from_data(path, "f", "train", config(**fields).task)
    assert [source.convert(r)[:2] for r in source.records] == [("yes 0", "0"), ("yes 1", "1"), ("yes 2", "2")]


def test_columns_may_have_the_names_of_the_tables_own(tmp_path, tokenizer, config):
    own = {"text": "t", "kind": 1, "extra": None, "reason": "r", "digest": "d", "ids": [1], "part": 9, "row": 9}
    rows = [{"question": f"q{i}", "answer": i} | own for i in range(8)]
    task = make_task(config(task__train_data=jsonl(tmp_path / "x.jsonl", rows)), tokenizer)
    assert list(task.train.texts) == [f"q{i}" for i in range(6)] and list(task.train.kinds) == ["math"] * 6
    assert task.train.columns(2) == rows[2]


@pytest.mark.parametrize(
    ("name", "value", "gold"),
    [
        ("none", " x ", "x"),
        ("none", 27.0, "27.0"),
        ("none", 0, "0"),
        ("gsm8k", "1 #### 2\n#### 1,234 ", "1234"),
        ("gsm8k", "#### -5.5", "-5.5"),
        ("gsm8k", "1234", ValueError),
        ("stringified_list", ["1\n", None, " 2", "1"], f"1{ALTERNATIVES}2"),
        ("stringified_list", "['x', \"y\"]", f"x{ALTERNATIVES}y"),
        ("stringified_list", "(1, 2)", f"1{ALTERNATIVES}2"),
        ("stringified_list", "3", ValueError),
        ("stringified_list", "[1", SyntaxError),
        ("boxed", "\\boxed{1} so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("boxed", "\\boxed{1} \\boxed{2", ValueError),
        ("boxed", "2", ValueError),
    ],
)
def test_answer_transforms(name, value, gold):
    if isinstance(gold, str):
        assert TRANSFORMS[name](value) == gold
    else:
        with pytest.raises(gold):
            TRANSFORMS[name](value)


NATIVE = {
    "gsm8k_test": ("gsm8k", (40, 1319), ["18", "3", "70000"]),
    "gsm8k_train": ("gsm8k", (50, 7473), ["72", "10", "5"]),
    "math_train": ("math", (20, 7474), ["0"]),
    "math500": ("math", (24, 500), ["\\left( 3, \\frac{\\pi}{2} \\right)", "p - q"]),
    "aime24": ("math", (4, 30), ["204"]),
    "amc23": ("math", (4, 40), ["27.0"]),
    "minerva": ("math", (8, 272), ["9.6"]),
    "olympiadbench": ("math", (10, 675), ["2"]),
}
"""Task, rows of the sample and of the whole data set, and the first answers."""


@pytest.mark.parametrize("folder", [MATH, pytest.param(EVERY_ROW, marks=every_row)], ids=["sample", "every row"])
@pytest.mark.parametrize("name", NATIVE)
def test_native_columns(folder, name, tokenizer, config):
    kind, counts, first = NATIVE[name]
    count = counts[folder != MATH]
    path = folder / f"{name}.jsonl"
    fields = {"task__name": kind, "task__train_data": str(path), "prompt__template": "none", "rollout__prompts": 2}
    task = make_task(config(**fields), tokenizer)
    texts, answers, _ = whole(task)
    assert answers[: len(first)] == first and all(answers)
    left = task.train.left_out
    assert len(texts) + len(left) == count and not task.heldout.left_out
    rows = [json.loads(line) for line in path.open()]
    out = {item.row for item in left}
    assert texts == [r.get("problem") or r["question"] for i, r in enumerate(rows) if i not in out]
    unanswered = [i for i, r in enumerate(rows) if r["answer"] in (None, "")]
    assert [item.row for item in left if item.reason == "no gold answer"] == unanswered
    assert len(unanswered) == (4 if name == "math_train" else 0)  # two null, two empty
    if name in ("minerva", "olympiadbench"):  # lists; one of minerva's has the same member twice
        golds = [dict.fromkeys(a.strip() for a in r["answer"]) for i, r in enumerate(rows) if i not in out]
        assert answers == [ALTERNATIVES.join(gold) for gold in golds]


# --- what is left out ---


def test_rows_are_left_out_counted_and_listed(tmp_path, tokenizer, config):
    rows = [{"question": f"good {i}", "answer": f"#### {i}"} for i in range(10)]
    bad = {
        3: ({"question": "long " * 200, "answer": "#### 1"}, "longer than prompt.max_tokens=100"),
        4: ({"question": "null", "answer": None}, "no gold answer"),
        5: ({"question": "empty", "answer": "####  "}, "no gold answer"),
        6: ({"question": "unreadable", "answer": "seven"}, "gold answer cannot be read by answer_transform gsm8k"),
        7: ({"question": "good 0", "answer": "#### 99"}, "duplicate"),
        8: ({"question": " ", "answer": "#### 1"}, "empty prompt"),
        9: ({"question": "held", "answer": "#### 1"}, "also held out"),
    }
    for place, (row, _) in bad.items():
        rows.insert(place, row)
    data, held = (
        jsonl(tmp_path / "x.jsonl", rows),
        jsonl(tmp_path / "y.jsonl", [{"question": "held", "answer": "#### 2"}]),
    )
    fields = {"task__name": "gsm8k", "task__train_data": data, "task__heldout_data": held, "prompt__max_tokens": 100}
    task = make_task(config(**fields), tokenizer)
    assert sorted(item[:3] for item in task.train.left_out) == [(data, i, why) for i, (_, why) in sorted(bad.items())]
    assert list(task.train.texts) == [f"good {i}" for i in range(10)]
    assert len(task.train.texts) + len(task.train.left_out) == len(rows)
    assert list(task.heldout.texts) == ["held"]
    line = write_left_out(task, tmp_path / "left_out.jsonl")
    assert line.startswith("left out: 2 no gold answer, ") and line.count("1 ") == 5
    listed = [json.loads(text) for text in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert {item["row"]: item["text"] for item in listed} == {
        i: (row["question"] or "")[:200] for i, (row, _) in bad.items()
    }


def test_nothing_left_out_is_no_line(tmp_path, tokenizer, config):
    task = make_task(config(task__train_data=jsonl(tmp_path / "x.jsonl", ROWS)), tokenizer)
    assert write_left_out(task, tmp_path / "left_out.jsonl") is None and not (tmp_path / "left_out.jsonl").exists()


def test_prompt_sets_are_read_as_sequences_and_arrays(tmp_path, tokenizer, config):
    train = make_task(config(task__train_data=jsonl(tmp_path / "x.jsonl", ROWS)), tokenizer).train
    n, width = train.tokens.shape
    everything = train.tokens[:]
    assert (n, width) == (10, everything.shape[1]) and width % 16 == 0 and everything.dtype == np.int32
    for index in (3, -1, slice(2, 5), [4, 1, 4], np.array([7, 0]), np.arange(10) > 6, (2, slice(0, 3)), ([1, 2], 0)):
        np.testing.assert_array_equal(train.tokens[index], everything[index])
    for column in (train.answers, train.tokens):  # or iteration would never end
        with pytest.raises(IndexError):
            column[10]
    for i, length in enumerate(train.lengths):
        assert (everything[i, length:] == tokenizer.pad_token_id).all()
    assert list(train.answers) == [row["answer"] for row in ROWS[:10]] and train.answers[-1] == "18"
    assert [len(list(column)) for column in (train.tokens, train.texts, train.kinds, train.extras)] == [10] * 4


# --- the cache ---


class Counting(TextTokenizer):
    """The tokenizer, which counts the questions that it encodes."""

    calls = 0

    def encode(self, text):
        self.calls += "What is" in text
        return super().encode(text)


def counting(t):
    return Counting(t.hf, t.folder, t.stop_ids, t.vocab_size)


def test_tokenised_prompts_are_found_again(tmp_path, tokenizer, config):
    c = config(task__train_data=jsonl(tmp_path / "x.jsonl", ROWS))
    first, second = counting(tokenizer), counting(tokenizer)
    one, two = make_task(c, first), make_task(c, second)
    assert first.calls == len(ROWS) and second.calls == 0
    assert whole(one) == whole(two) and one.train.fingerprint() == two.train.fingerprint()


def test_the_cache_is_for_one_template_tokenizer_and_data(tmp_path, tokenizer, config):
    path = jsonl(tmp_path / "x.jsonl", ROWS)
    make_task(config(task__train_data=path), tokenizer)
    for field in (
        {"template": "r1"},
        {"system": "Hm."},
        {"prefill": "<think>"},
        {"question": "boxed"},
        {"thinking": True},
    ):
        t = counting(tokenizer)
        make_task(config(task__train_data=path, **{f"prompt__{k}": v for k, v in field.items()}), t)
        assert t.calls == len(ROWS), field

    folder = shutil.copytree(TOKENIZER, tmp_path / "t", copy_function=shutil.copyfile)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocabulary["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    other = counting(load_tokenizer(config(model__tokenizer=str(folder)), None, None))
    make_task(config(task__train_data=path), other)
    assert other.calls == len(ROWS)

    for changed in ([*ROWS[:-1], ROWS[-1] | {"answer": "0"}], ROWS[1:]):
        t = counting(tokenizer)
        found = make_task(config(task__train_data=jsonl(tmp_path / "x.jsonl", changed)), t)
        assert t.calls == len(changed) and whole(found)[1] == [row["answer"] for row in changed]

    t = counting(tokenizer)
    found = make_task(config(task__train_data=path, task__answer_column="level"), t)
    assert t.calls == len(changed) and whole(found)[1] == [str(row["level"]) for row in changed]


# --- multiple choice ---


def test_numbers_that_are_options_are_no_places(tmp_path, tokenizer, config):
    """Options 1 to 4 with the answer given as an option's text: an index would be one letter off."""
    rows = [{"question": f"q{i}", "choices": ["1", "2", "3", "4"], "answer": 1 + i % 4} for i in range(12)]
    fields = {"task__name": "multiple_choice", "task__heldout_prompts": 2}
    said = []
    task = make_task(config(task__train_data=jsonl(tmp_path / "x.jsonl", rows), **fields), tokenizer, say=said.append)
    assert list(task.train.answers)[:4] == list("ABCD")
    assert any("are read as the options' text (task.choices_answer)" in line for line in said)
    indices = config(task__train_data=jsonl(tmp_path / "y.jsonl", rows[:3] + rows[4:7]), **fields)
    with pytest.raises(ConfigError, match=r"fit as text and as index.* set task.choices_answer"):
        make_task(indices, tokenizer)


def test_multiple_choice_of_a_file(tmp_path, tokenizer, config):
    labelled = [
        {"question": f"q{i}", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "ABC"[i % 3]}
        for i in range(7)
    ]
    labelled.append(labelled[0] | {"question": "q7", "answerKey": "X"})
    fields = {"task__name": "multiple_choice", "task__answer_column": "answerKey"}
    task = make_task(config(task__train_data=jsonl(tmp_path / "x.jsonl", labelled), **fields), tokenizer)
    assert list(task.train.answers) == list("ABCAB") and task.train.texts[0] == "q0\nA. a\nB. b\nC. c"
    assert [json.loads(e) for e in task.train.extras] == [{"options": 3, "texts": ["a", "b", "c"]}] * 5
    assert [item.row for item in task.train.left_out] == [7] and task.train.columns(1) == labelled[1]


# --- what is refused ---


def refused(make):
    """The message of a ConfigError: one line."""
    with pytest.raises(ConfigError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message, message
    return message


BROKEN = '{"problem": "a", "answer": "1"}\n{"problem": \n'


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.jsonl", "", ["holds no rows"]),
        ("x.json", "[]", ["holds no rows"]),
        ("x.csv", "problem,answer\n", ["holds no rows"]),
        ("x.parquet", "", ["cannot be read", "0 bytes"]),
        ("x.jsonl", BROKEN, ["cannot be read", "JSON", "name a file"]),
        ("x.json", BROKEN, ["cannot be read", "JSON", "name a file"]),
        ("x.arrow", BROKEN, ["cannot be read", "name a file"]),
        ("x.parquet", BROKEN, ["cannot be read", "name a file"]),
        ("x.txt", "a", ["of what format", ".jsonl, .json, .parquet, .csv or .arrow"]),
        ("x.jsonl", None, ["cannot be read", "name a file"]),
        ("x.arrow", None, ["cannot be read", "name a file"]),
        ("x", None, ["no such file or folder", "name a file"]),
    ],
)
def test_bad_files_are_named(name, text, words, tmp_path, tokenizer, config, capfd):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    message = refused(lambda: make_task(config(task__train_data=str(path)), tokenizer))
    assert all(word in message for word in [f"task.train_data={path}: ", *words]), message
    assert capfd.readouterr() == ("", "")


def test_folder_of_a_script_is_named(tmp_path, config):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "s.py").write_text("")
    message = refused(lambda: read(str(tmp_path / "s"), "task.train_data", "train", config().task))
    assert message.startswith(f"task.train_data={tmp_path / 's'}: cannot be read (Dataset scripts")


def test_unknown_splits_are_named(tmp_path, tokenizer, config):
    folder = save_as("DatasetDict", tmp_path)
    message = refused(lambda: make_task(config(task__train_data=folder, task__train_split="no"), tokenizer))
    assert message == f"task.train_data={folder}: has no split no; it has train, other"
    folder = save_as("folder", tmp_path)
    message = refused(lambda: make_task(config(task__heldout_data=folder, task__train_data=folder), tokenizer))
    assert f"task.heldout_data={folder}" in message and 'Unknown split "test"' in message and "['train']" in message


@pytest.mark.parametrize("field", ["task.prompt_column", "task.answer_column", "task.choices_column"])
def test_unknown_columns_are_named(field, tmp_path, tokenizer, config):
    path = jsonl(tmp_path / "x.jsonl", ROWS)
    fields = {field.replace(".", "__"): "no", "task__name": "multiple_choice", "task__train_data": path}
    message = refused(lambda: make_task(config(**fields), tokenizer))
    assert message == f"{field}=no: there is no such column in {path}; its columns are problem, answer, level"
    bare = jsonl(tmp_path / "y.jsonl", [{"a": 1, "b": 2}])
    message = refused(lambda: make_task(config(task__train_data=bare), tokenizer))
    assert "task.prompt_column=None" in message and "problem, question, prompt" in message and "a, b" in message


def test_no_usable_row_and_too_few(tmp_path, tokenizer, config):
    good = jsonl(tmp_path / "good.jsonl", ROWS)
    none = jsonl(tmp_path / "none.jsonl", [{"problem": f"p{i}", "answer": None} for i in range(5)])

    def message(**fields):
        return refused(lambda: make_task(config(**{f"task__{k}": v for k, v in fields.items()}), tokenizer))

    assert "has 0 usable rows (5 no gold answer)" in message(train_data=none)
    assert message(train_data=none, heldout_data=good).startswith(
        f"task.train_data={none}: leaves no prompt (5 no gold answer); change "
    )
    assert f"task.heldout_data={none}: leaves no prompt" in message(train_data=good, heldout_data=none)
    assert "(12 also held out)" in message(train_data=good, heldout_data=good, heldout_prompts=99)
    assert message(train_data=good, heldout_prompts=9) == (
        "rollout.prompts=4: prompts are drawn without replacement from the 3 there are; lower it"
    )
    assert message(train_data=good, heldout_prompts=12).startswith(
        "task.heldout_prompts=12: the data has 12 usable rows; lower it"
    )
    assert "task.cache=/proc/x" in message(train_data=good, cache="/proc/x")


def test_a_hub_id_without_network(monkeypatch, tokenizer, config):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    quiet_datasets()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(lambda: make_task(config(task__train_data="someone/something"), tokenizer))
    assert message.startswith("task.train_data=someone/something: no such file or folder, and HF_HUB_OFFLINE forbids")


def test_a_cached_file_that_was_cut_off_is_made_anew(tmp_path, tokenizer, config):
    path = jsonl(tmp_path / "x.jsonl", ROWS)
    whole = make_task(config(task__train_data=path), tokenizer).train.fingerprint()
    (cached,) = tmp_path.rglob("prompts-*.arrow")
    cached.write_bytes(cached.read_bytes()[:100])
    assert make_task(config(task__train_data=path), tokenizer).train.fingerprint() == whole
    assert len(cached.read_bytes()) > 100


def test_columns_that_are_no_text_are_left_out_and_named(tmp_path, tokenizer, config):
    rows = [{"problem": {"a": i}, "answer": "1"} for i in range(3)]
    with pytest.raises(ConfigError, match=r"3 column problem is no text \(an object, not text\)"):
        make_task(config(task__train_data=jsonl(tmp_path / "x.jsonl", rows)), tokenizer)
    rows = [*ROWS, {"problem": "?", "answer": "1", "level": 1}]
    table = datasets.Dataset.from_dict(
        {"problem": [r["problem"].encode() for r in rows[:-1]] + [b"\xff"], "answer": [r["answer"] for r in rows]}
    )
    table.to_parquet(tmp_path / "x.parquet")
    task = make_task(config(task__train_data=str(tmp_path / "x.parquet")), tokenizer)
    assert task.train.texts[0] == ROWS[0]["problem"]
    assert [item.row for item in task.train.left_out] == [12] and "utf-8" in task.train.left_out[0].reason


def test_a_file_that_is_not_utf8_is_named(tmp_path, tokenizer, config):
    path = tmp_path / "x.jsonl"
    path.write_bytes("".join(json.dumps(r) + "\n" for r in ROWS).encode() + b'{"problem": "gr\xfcn", "answer": "1"}\n')
    with pytest.raises(ConfigError, match=r"^task.train_data=[^\n]*x.jsonl: [^\n]*$") as error:
        make_task(config(task__train_data=str(path)), tokenizer)
    assert "utf-8" in str(error.value).lower()
