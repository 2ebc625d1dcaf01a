"""Rows keep the values of their files: numbers, dates, nulls, objects, and columns inside objects."""

from __future__ import annotations

import datetime
import decimal
import json
import math

import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.data.answers import is_prose
from pspo_jax.data.files import value_at
from pspo_jax.data.loading import from_data, quiet_datasets, read
from pspo_jax.data.tokenising import tokenised
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.rewards.task import make_task
from pspo_jax.verifiers.math_answer import ALTERNATIVES
from tests.data.small_tokenizer import CHATML, write_tokenizer
from tests.helpers import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("t"), CHATML)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(tiny_config(model__tokenizer=folder), None, None)


@pytest.fixture
def config(tmp_path, folder):
    def make(**fields):
        values = {
            "task__name": "math",
            "task__cache": str(tmp_path / "prompts"),
            "task__train_prompts": 0,
            "task__heldout_prompts": 1,
            "model__tokenizer": folder,
            "rollout__prompts": 1,
            "prompt__max_tokens": 4096,
        }
        return tiny_config(**(values | fields))

    return make


@pytest.fixture
def answers(tmp_path, config):
    """Gold answers of a file's text, or why a row has none."""

    def find(text, name="x.jsonl", **fields):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        c = config(**fields)
        source = from_data(str(path), "task.train_data", "train", c.task)
        rows = tokenised(source, lambda *_: [1], "x", tmp_path / "kept", 0)
        return [reason or answer for reason, answer in zip(rows["reason"], rows["answer"], strict=True)]

    return find


def refused(make):
    with pytest.raises(ConfigError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message, message
    return message


LITERALS = [
    ("9223372036854775808123", "9223372036854775808123"),
    ("-18446744073709551617", "-18446744073709551617"),
    ("1" * 5000, "1" * 5000),
    ("0.1000000000000000055", "0.1000000000000000055"),
    ("1e400", "1e400"),
    ("27.0", "27.0"),
    ("1.50", "1.50"),
    ("-0", "-0"),
    ("1E-7", "1E-7"),
    ('"2024-02-29"', "2024-02-29"),
    ('"2024-02-29T10:00:00Z"', "2024-02-29T10:00:00Z"),
    ('"12:30"', "12:30"),
    ('"P1D"', "P1D"),
    ('"007"', "007"),
    ('"1e5"', "1e5"),
    ("true", "true"),
    ("false", "false"),
    ("null", "no gold answer"),
    ("NaN", "no gold answer"),
    ("-Infinity", "no gold answer"),
    ('"NaN"', "NaN"),
    ('""', "no gold answer"),
    ('["9223372036854775808", 9223372036854775808, 2.50, null, NaN]', f"9223372036854775808{ALTERNATIVES}2.50"),
    ('{"a": 1}', "gold answer cannot be read by answer_transform none (an object)"),
    ('"\\ud800"', "gold answer cannot be read by answer_transform none (half a surrogate pair)"),
]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_gold_is_the_text_of_the_file_whatever_the_other_rows_hold(name, answers):
    lines = [f'{{"problem": "p{i}", "answer": {text}}}' for i, (text, _) in enumerate(LITERALS)]
    text = "\n".join(lines) if name.endswith("l") else "[" + ",\n".join(lines) + "]"
    assert answers(text, name) == [gold for _, gold in LITERALS]


def test_a_list_that_a_text_writes_keeps_its_numbers(answers):
    lists = ("[9223372036854775808123, 2.50]", "['a', 1e400, -3.0]", "(1.10, None, True)", "[]", "['x']")
    text = "\n".join(json.dumps({"problem": f"p{i}", "answer": text}) for i, text in enumerate(lists))
    assert answers(text, task__answer_transform="stringified_list") == [
        f"9223372036854775808123{ALTERNATIVES}2.50",
        ALTERNATIVES.join(["a", "1e400", "-3.0"]),
        f"1.10{ALTERNATIVES}true",
        "no gold answer",
        "x",
    ]


def test_csv_fields_are_texts(answers):
    text = "\ufeffproblem,answer\r\np0,007\r\np1,1e5\r\np2,2024-02-29\r\n\r\np3,True\r\n"
    text += 'p4,"1,234"\r\np5,NA\r\np6,\r\np7\r\n'
    expected = ["007", "1e5", "2024-02-29", "True", "1,234", "NA", "no gold answer", "no gold answer"]
    assert answers(text, "x.csv") == expected


@pytest.mark.parametrize(
    "text",
    [
        '\ufeff{"problem": "p0", "answer": 1}\r\n\r\n{"problem": "p1", "answer": 2}\r\n',
        '  [ {"problem": "p0", "answer": 1} , {"problem": "p1", "answer": 2} ]\n',
        '{"problem": "p0", "answer": 1}\n   \n{"answer": 2, "extra": {"a": [1]}, "problem": "p1"}',
    ],
)
def test_marks_blank_lines_and_lists_are_read(text, answers):
    assert answers(text) == answers(text, "x.json") == ["1", "2"]


def test_a_file_of_objects_one_after_the_other(answers):
    assert answers('{"problem": "p0",\n "answer": 1}\n{"problem": "p1",\n "answer": 2}', "x.json") == ["1", "2"]


def test_keys_that_are_missing_and_types_that_differ(answers):
    rows = [
        '{"problem": "p0"}',
        '{"problem": "p1", "answer": "x", "more": 1}',
        '{"answer": 3}',
        '{"problem": 4, "answer": 5}',
    ]
    assert answers("\n".join(rows)) == ["no gold answer", "x", "empty prompt", "5"]


def test_a_key_that_stands_twice_leaves_its_row_out(answers):
    rows = ['{"problem": "p0", "answer": 1, "answer": 2}', '{"problem": "p1", "answer": 3}']
    assert answers("\n".join(rows)) == ["the row is ambiguous: the key 'answer' stands twice", "3"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.jsonl", '{"problem": "a"}\n5\n', "line 2 is no JSON object: '5'"),
        ("x.jsonl", '{"problem": "a"}\n\n{"problem": }\n', "line 3 is not JSON: Expecting value at column 13"),
        ("x.json", '[{"problem": "a"} {"problem": "b"}]', "line 1 is not JSON: a comma is missing"),
        ("x.json", '[{"problem": "a"},\n 5]', "row 2 is no JSON object"),
        ("x.json", '[{"problem": "a"}', "the JSON list of 1 rows is not closed"),
        ("x.json", '[{"problem": "a"}] x', "or text follows it"),
        ("x.json", '{"problem": ["a", "b"], "answer": [1, 2]}', "one JSON object of lists; write a list of rows"),
        ("x.jsonl", "[" * 100_000, "nested too deeply"),
        ("x.csv", "problem,answer\na,1,2\n", "line 2 has 3 fields, the header 2"),
        ("x.csv", "problem,problem\na,1\n", "the header names 'problem' twice"),
        ("x.csv", 'problem,answer\n"a,1\n', "is not CSV"),
        ("x.jsonl", b'\xff\xfe{"problem": "a"}', "is not UTF-8"),
        ("x.jsonl", "\n \n", "holds no rows"),
    ],
)
def test_a_file_that_is_none_is_refused_by_its_line(name, text, words, answers):
    message = refused(lambda: answers(text, name))
    assert "task.train_data=" in message and words in message, message


def test_a_function_is_given_the_values_of_the_row(tmp_path, tokenizer, config):
    row = {"answer": 4, "flag": True, "none": None, "big": 2**70, "tags": ["a", 1, None], "deep": {"x": {"y": 1.5}}}
    other = {"answer": {"a": 1}, "flag": "yes", "deep": {"z": []}, "late": 1}
    lines = [{"problem": f"p{i}", **r} for i, r in enumerate([row, other, {"answer": None}, row, row])]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    fields = {"task__name": "python_function", "task__function": "m:f", "task__train_data": str(tmp_path / "x.jsonl")}
    task = make_task(config(**fields), tokenizer)
    names = dict.fromkeys(["problem", *row, "late"])
    assert [task.train.columns(i) for i in range(4)] == [names | line for line in lines[:4]]
    assert list(task.train.answers) == ["4", '{"a": 1}', "", "4"] and not task.train.left_out
    assert json.loads(task.train.extras[0]) == {"function": "m:f", "answer_column": "answer"}


# --- dotted columns ---

VERL = [
    {
        "data_source": "x",
        "prompt": [{"role": "user", "content": f"p{i}"}],
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "extra_info": {"level": i, "split": "train"},
    }
    for i in range(6)
]


def save(form, rows, folder):
    path = folder / f"x.{form}"
    if form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif form == "parquet":
        quiet_datasets().Dataset.from_list(rows).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_column_inside_an_object(form, tmp_path, tokenizer, config):
    path = save(form, VERL, tmp_path)
    task = make_task(config(task__train_data=path, task__answer_column="reward_model.ground_truth"), tokenizer)
    assert list(task.train.answers) == list("01234") and list(task.train.texts) == [f"p{i}" for i in range(5)]
    assert task.train.column("extra_info.level") == [0, 1, 2, 3, 4] and task.train.columns(2) == VERL[2]
    message = refused(
        lambda: make_task(config(task__train_data=path, task__answer_column="reward_model.gold"), tokenizer)
    )
    assert "task.answer_column=reward_model.gold: there is no such column" in message
    assert "reward_model.style, reward_model.ground_truth, extra_info.level" in message


@pytest.mark.parametrize(
    ("record", "name", "value"),
    [
        ({"a.b": 1, "a": {"b": 2}}, "a.b", 1),
        ({"a": {"b": 2}}, "a.b", 2),
        ({"a.b": {"c": 1}, "a": {"b.c": 2}}, "a.b.c", 1),
        ({"a": {"b.c": 2}}, "a.b.c", 2),
        ({"a": [{"b": 3}, {"b": 4}]}, "a.1.b", 4),
        ({"a": '{"b": 12345678901234567890}'}, "a.b", "12345678901234567890"),
        ({"a": "{b"}, "a.b", None),
        ({"a": None}, "a.b", None),
        ({"a": 1}, "b", None),
    ],
)
def test_dots_in_names(record, name, value):
    assert value_at(record, name) == value


# --- typed tables ---


def test_parquet_keeps_its_types(tmp_path, answers, config):
    import pyarrow
    import pyarrow.parquet

    columns = {
        "decimal": (pyarrow.array([decimal.Decimal("1.10")]), "1.10"),
        "date": (pyarrow.array([datetime.date(2024, 2, 29)]), "2024-02-29"),
        "time": (pyarrow.array([datetime.datetime(2024, 2, 29, 1, 2, 3)]), "2024-02-29 01:02:03"),
        "narrow": (pyarrow.array([0.1], pyarrow.float32()), "0.1"),
        "big": (pyarrow.array([2**63 - 1]), str(2**63 - 1)),
        "bytes": (pyarrow.array([b"12"]), "12"),
        "flag": (pyarrow.array([True]), "true"),
        "missing": (pyarrow.array([math.nan]), "no gold answer"),
    }
    table = pyarrow.table({"problem": ["p"], **{name: column for name, (column, _) in columns.items()}})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    content = (tmp_path / "x.parquet").read_bytes()
    for name, (_, gold) in columns.items():
        assert answers(content, "x.parquet", task__answer_column=name) == [gold], name


# --- what a folder holds ---


def test_files_of_a_folder_are_read_as_they_stand(tmp_path, config):
    data = tmp_path / "data"
    data.mkdir()
    for part in ("train", "test"):
        (data / f"{part}.jsonl").write_text(f'{{"problem": "{part}", "answer": 9223372036854775808}}\n' * 3)
    task = config().task
    rows = read(str(data), "f", "train", task)
    assert [row["answer"] for row in rows] == [2**63] * 3
    assert [row["problem"] for row in read(str(data), "f", "train[1:]+test[:1]", task)] == ["train", "train", "test"]
    assert 'Unknown split "dev"' in refused(lambda: read(str(data), "f", "dev", task))


def test_kept_rows_follow_their_file_and_survive_a_cut(tmp_path, config):
    path, kept = tmp_path / "x.jsonl", tmp_path / "prompts"
    for answer in (1, 2):
        path.write_text(json.dumps({"problem": "p", "answer": answer}))
        assert read(str(path), "f", "train", config().task)[0]["answer"] == answer
    tables = sorted(kept.glob("rows-*.arrow"))
    assert len(tables) == 2
    for table in tables:
        table.write_bytes(table.read_bytes()[:100])
    assert read(str(path), "f", "train", config().task)[0]["answer"] == 2


# --- prose ---


@pytest.mark.parametrize(
    "gold",
    [
        "Natalia sold 48/2 = 24 clips in May. Altogether 72 clips.",
        "She has 5 apples.\nShe eats two\n#### 3",
        "The answer is 24.",
        "Therefore, x = 3",
        "We first notice that the sum of both numbers must be even",
    ],
)
def test_a_solution_in_words_is_no_gold(gold, answers):
    assert is_prose(gold)
    row = json.dumps({"problem": "p", "answer": gold})
    assert answers(row) == ["gold answer is prose without a box; name task.answer_transform or task.answer_column"]
    assert answers(row, task__check_gold=False) == [gold]
    assert answers(row, task__answer_transform="none")[0].startswith("gold answer is prose")


@pytest.mark.parametrize(
    "gold",
    [
        "72",
        "all real numbers",
        "no solution",
        "\\text{the set of all even integers that are larger than two}",
        "\\begin{pmatrix} 16/49 \\\\ 48/49 \\end{pmatrix}",
        "$f(x)=a x+b$, where $b$ is any integer",
        "It is so: \\boxed{5} because the sum is odd. Hence we are done.",
        "-(ab + ac + bc)",
        "St. Petersburg",
    ],
)
def test_an_answer_in_words_is_gold(gold):
    assert not is_prose(gold)
