"""Tasks of text from end to end: gold answers checked, mixtures, fingerprints, and completions rewarded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.rewards import VerifierConfig
from pspo_jax.config.validation import validate
from pspo_jax.data.loading import from_data
from pspo_jax.data.synthetic.countdown import generate
from pspo_jax.data.task import CompletionBatch
from pspo_jax.data.text import benchmark_prompts
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.rewards.task import make_task
from pspo_jax.verifiers.workers.pool import Pool
from tests.conftest import DATA, REPO
from tests.helpers import tiny_config

TOKENIZER = DATA / "tokenizers" / "qwen2.5-small"
pytestmark = pytest.mark.xdist_group("pool")

ROWS = [{"problem": f"What is {i} + {i}?", "answer": f"{2 * i}"} for i in range(40)]
CHOICES = [{"question": f"Letter {i}?", "choices": ["x", "y", "z"], "answer": "xyz"[i % 3]} for i in range(40)]
SCORER = '''
SEEN = ("prompt", "completion", "token_ids", "answer", "step", "level", "tags")

def score(**given):
    """The level of the row, if all is there."""
    assert set(given) == set(SEEN) | {"problem"}, sorted(given)
    assert given["prompt"] == given["problem"] and given["answer"] == given["tags"][0]
    assert given["step"] == 7 and all(isinstance(i, int) for i in given["token_ids"])
    return given["level"] / 10 if given["answer"] in given["completion"] else None

def longest(completions, **columns):
    return [float(len(c) == max(map(len, completions))) for c in completions]

def opinion(completion):
    return None if "quiet" in completion else 2
'''


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_config(model__tokenizer=str(TOKENIZER)), None, None)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Workers that know the functions of a module in the folder where they were started."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "scorer_of_tests.py").write_text(SCORER)
    functions = [f"scorer_of_tests:{name}" for name in ("score", "longest", "opinion")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with Pool(VerifierConfig(workers=2, deadline=30), functions) as entered:
            yield entered


@pytest.fixture
def config(tmp_path):
    def make(**fields):
        values = {
            "task__name": "math",
            "task__cache": str(tmp_path / "prompts"),
            "task__train_prompts": 0,
            "task__heldout_prompts": 4,
            "model__tokenizer": str(TOKENIZER),
            "rollout__prompts": 4,
            "rollout__max_new_tokens": 64,
        }
        return tiny_config(**(values | fields))

    return make


@pytest.fixture
def data(tmp_path):
    return jsonl(tmp_path / "math.jsonl", ROWS)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rewards_of(task, rows, texts, ended=True, step=7):
    """Scores of the texts [B][G] as completions of the training rows; `ended` is one truth value or [B][G]."""
    ended = np.broadcast_to(ended, (len(rows), len(texts[0])))
    ids = [
        [task.tokenizer.encode(text) + [task.stop_ids[0]] * bool(end) for text, end in zip(*pair, strict=True)]
        for pair in zip(texts, ended, strict=True)
    ]
    lengths = np.array([[len(i) for i in row] for row in ids])
    tokens = np.zeros((*lengths.shape, lengths.max()), np.int32)
    for b, row in enumerate(ids):
        for g, found in enumerate(row):
            tokens[b, g, : len(found)] = found
    return task.reward_fn(CompletionBatch(task.train, np.array(rows), tokens, lengths, ended, step))()


# --- gold answers ---


def test_gold_answers_that_do_not_verify_are_left_out(tmp_path, tokenizer, config, pool):
    rows = [*ROWS[:10], {"problem": "Go on.", "answer": "\\ldots"}, {"problem": "Text.", "answer": "\\text{}"}]
    data = jsonl(tmp_path / "x.jsonl", rows)
    task = make_task(config(task__train_data=data), tokenizer, pool)
    assert [item[1:] for item in task.train.left_out] == [
        (10, "gold answer does not verify itself", "Go on."),
        (11, "gold answer does not verify itself", "Text."),
    ]
    assert len(task.train.texts) + len(task.heldout.texts) + len(task.train.left_out) == len(rows)
    again = make_task(config(task__train_data=data), tokenizer, pool)  # from what was remembered
    assert again.train.left_out == task.train.left_out and again.train.fingerprint() == task.train.fingerprint()
    unchecked = make_task(config(task__train_data=data, task__check_gold=False), tokenizer, pool)
    assert not unchecked.train.left_out
    broken = jsonl(tmp_path / "y.jsonl", rows[10:])
    for fields in ({"task__train_data": broken}, {"task__train_data": data, "task__heldout_data": broken}):
        with pytest.raises(ConfigError, match=r"^[^\n]*\(2 gold answer does not verify itself\)[^\n]*$"):
            make_task(config(**fields), tokenizer, pool)


def test_benchmark_keeps_the_order_and_repeats(tmp_path, tokenizer, config, pool):
    rows = [ROWS[3], ROWS[1], {"problem": "Go on.", "answer": "\\ldots"}, ROWS[3], ROWS[2]]
    c = config()
    source = from_data(jsonl(tmp_path / "x.jsonl", rows), "eval.data", "test", c.task)
    prompts = benchmark_prompts(source, c, tokenizer, pool, 0)
    assert list(prompts.answers) == ["6", "2", "6", "4"] and [item.row for item in prompts.left_out] == [2]
    assert list(benchmark_prompts(source, c, tokenizer, pool, 2).answers) == ["6", "2"]
    assert len(prompts.tokens) == 4 and prompts.tokens.shape[1] % 16 == 0 and prompts.columns(3) == rows[4]


def test_a_process_without_a_row_of_a_batch_has_no_rewards(data, config, tokenizer, pool):
    """The last held-out batch may be so small that all its rows belong to other processes."""
    task = make_task(config(task__train_data=data, reward__terms="accuracy=1, length=0.5"), tokenizer, pool)
    none = np.zeros((0, 4), np.int32)
    batch = CompletionBatch(task.train, none[:, 0], np.zeros((0, 4, 6), np.int32), none, none.astype(bool), 1)
    found = task.reward_fn(batch)()
    assert found.verdicts.shape == found.reward.shape == (0, 4)


# --- fingerprints ---


def test_fingerprint_depends_on_prompts_answers_order_and_template(tmp_path, tokenizer, config):
    def prints(rows=ROWS, **fields):
        task = make_task(config(task__train_data=jsonl(tmp_path / "x.jsonl", rows), **fields), tokenizer)
        return task.train.fingerprint(), task.train.content()

    first, content = prints()
    assert prints()[0] == first
    answer, prompt = ({**ROWS[3], **change} for change in ({"answer": "7"}, {"problem": "What is 9 + 3?"}))
    changed = [
        prints([*ROWS[:3], answer, *ROWS[4:]]),
        prints([*ROWS[:3], prompt, *ROWS[4:]]),
        prints([ROWS[1], ROWS[0], *ROWS[2:]]),
        prints(prompt__template="r1"),
        prints(prompt__prefill="x"),
        prints(prompt__prefill="y"),  # of the same length
    ]
    assert len({first, *(found for found, _ in changed)}) == 7
    for _, found in changed[:2]:
        assert np.flatnonzero(found != content).tolist() == [3]
    order = [1, 0, *range(2, 36)]
    np.testing.assert_array_equal(changed[2][1], content[order])
    for _, found in changed[3:]:  # content is the question's and the answer's, whatever stands around them
        np.testing.assert_array_equal(found, content)


def test_fingerprint_is_the_same_in_another_process(tmp_path, tokenizer, config, data, child_env):
    mixture = json.dumps([{"name": "math", "train_data": data}, {"name": "countdown", "train_prompts": 20}])
    code = f"""
from pspo_jax.rewards.task import make_task
from pspo_jax.data.tokenizer import load_tokenizer
from tests.helpers import tiny_config
c = tiny_config(task__mixture={mixture!r}, task__cache={str(tmp_path / "other")!r}, task__train_prompts=0,
                task__heldout_prompts=4, model__tokenizer={str(TOKENIZER)!r}, rollout__prompts=4)
print(make_task(c, load_tokenizer(c, None, None)).train.fingerprint())
"""
    task = make_task(config(task__mixture=mixture), tokenizer)
    env = child_env | {"HF_DATASETS_CACHE": str(tmp_path / "hf"), "PYTHONHASHSEED": "5"}
    child = subprocess.run([sys.executable, "-c", code], env=env, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert child.stdout.strip() == task.train.fingerprint(), child.stderr


# --- mixtures ---


@pytest.fixture
def mixture(tmp_path, data):
    choices = jsonl(tmp_path / "choices.jsonl", CHOICES)

    def make(weights=(3, 2, 1), **counts):
        tasks = [
            {"name": "math", "train_data": data},
            {"name": "multiple_choice", "train_data": choices, "heldout_prompts": 6},
            {"name": "countdown", "train_prompts": 30, "numbers": "3", "max_target": 50},
        ]
        return {"task__mixture": json.dumps([t | {"weight": w} for t, w in zip(tasks, weights, strict=True)]), **counts}

    return make


@pytest.mark.parametrize(("weights", "total"), [((3, 2, 1), 0), ((3, 2, 1), 30), ((1, 1, 1), 20), ((0.5, 0.1, 0.1), 0)])
def test_weights_are_shares_of_prompts(weights, total, tokenizer, config, mixture):
    task = make_task(config(**mixture(weights, task__train_prompts=total, task__heldout_prompts=4)), tokenizer)
    names = ("math", "multiple_choice", "countdown")
    for prompts in (task.train, task.heldout):
        n, counts = len(prompts.lengths), Counter(prompts.kinds)
        for name, weight in zip(names, weights, strict=True):
            assert abs(counts[name] - n * weight / sum(weights)) <= 1, (counts, weights)
        assert len(set(prompts.texts)) == n
    assert not set(task.train.texts) & set(task.heldout.texts)
    if total:
        assert total - 3 < len(task.train.lengths) <= total
    else:  # as many as there are of the scarcest: 40 rows of a file less those held out, or 30 problems
        held, counts = Counter(task.heldout.kinds), Counter(task.train.kinds)
        there = {name: 30 if name == "countdown" else 40 - held[name] for name in names}
        assert any(counts[name] == there[name] for name in names), (counts, held)


def test_rows_of_a_mixture_keep_what_is_theirs(tokenizer, config, mixture):
    c = config(**mixture())
    validate(replace(c, {"task.name": "arithmetic"}))  # with a mixture, nothing reads the task's own name
    train = make_task(c, tokenizer).train
    answers = {r["problem"]: r["answer"] for r in ROWS}
    seen = Counter()
    for i, kind in enumerate(train.kinds):
        extra, record, text = json.loads(train.extras[i]), train.columns(i), train.texts[i]
        seen[kind, i < len(train.lengths) // 2] += 1
        match kind:
            case "math":
                assert extra == {"answer_column": "answer"} and record == {"problem": text, "answer": answers[text]}
                assert train.answers[i] == answers[text]
            case "multiple_choice":
                assert extra == {"options": 3, "texts": ["x", "y", "z"]} and text == "\n".join(
                    [record["question"], "A. x", "B. y", "C. z"]
                )
                assert train.answers[i] == {"x": "A", "y": "B", "z": "C"}[record["answer"]]
            case "countdown":
                assert extra == record and len(record["numbers"]) == 3 and record["target"] <= 50
                assert train.answers[i] == str(record["target"])
        ids = train.tokens[i, : train.lengths[i]].tolist()
        assert ids == tokenizer.prompt(text, c.prompt)
    assert len(seen) == 6  # shuffled: each kind in both halves


def test_mixture_follows_its_seed(tokenizer, config, mixture):
    tasks = json.dumps(json.loads(mixture()["task__mixture"])[:2])  # countdown's problems have the seed too

    def texts(seed):
        return list(make_task(config(task__mixture=tasks, task__seed=seed), tokenizer).train.texts)

    assert texts(0) == texts(0) != texts(1)


def test_tasks_of_a_mixture_hold_out_for_each_other(tmp_path, tokenizer, config, data):
    """The same questions in two files: none is trained on twice, and none that is evaluated on."""
    other = jsonl(tmp_path / "other.jsonl", ROWS[::-1] + [{"problem": "New?", "answer": "1"}] * 2 + CHOICES_AS_MATH)
    tasks = json.dumps([{"name": "math", "train_data": data}, {"name": "math", "train_data": other}])
    task = make_task(config(task__mixture=tasks), tokenizer)
    texts = list(task.train.texts)
    assert len(set(texts)) == len(texts) > 30 and not set(texts) & set(task.heldout.texts)
    reasons = {item.reason for item in task.train.left_out}
    assert reasons == {"also held out", "duplicate", "beyond its share of task.mixture"}
    same = json.dumps([{"name": "math", "train_data": data}] * 2)
    with pytest.raises(ConfigError, match=r"^task.mixture: .*math.jsonl leaves no prompt \(.*38 duplicate"):
        make_task(config(task__mixture=same), tokenizer)


CHOICES_AS_MATH = [{"problem": f"Count to {i}.", "answer": str(i)} for i in range(30)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "must be a list of tasks"),
        ("5", "must be a list of tasks"),
        ("[5]", "must be a list of tasks"),
        ('{"name": "math"}', "must be a list of tasks"),
        ('[{"name": "countdown", "weight": "much"}]', "must be a list of tasks"),
        ("[]", "needs at least one task, and weights above 0"),
        ('[{"name": "countdown", "weight": 0}]', "weights above 0"),
        ('[{"weight": 1}]', "{'weight': 1}: lacks a name; add one of countdown, math"),
        ('[{"name": "arithmetic"}]', "is not a text task"),
        ('[{"name": "countdown", "mixture": "[]"}]', "contains another mixture"),
        ('[{"name": "countdown", "colour": 1}]', "task.colour: there is no such field"),
        ('[{"name": "math"}]', "task.train_data=None: task.name=math needs data"),
        ('[{"name": "countdown", "numbers": "x"}]', "task.numbers='x': must be numbers from 2 to 6"),
        ('[{"name": "python_function", "train_data": "x"}]', "task.function=None"),
        ('[{"name": "reasoning_gym"}]', "task.dataset=None"),
    ],
)
def test_bad_mixtures_are_named(text, words, config):
    with pytest.raises(ConfigError) as error:
        validate(config(task__mixture=text))
    message = str(error.value)
    assert words in message and "task." in message and "\n" not in message, message


def test_each_row_has_its_own_verifier(tmp_path, tokenizer, config, mixture, pool):
    scored = jsonl(
        tmp_path / "s.jsonl", [{"problem": f"s{i}", "level": 5, "tags": ["t"], "answer": "t"} for i in range(20)]
    )
    own = {"name": "python_function", "function": "scorer_of_tests:score", "train_data": scored}
    tasks = [*json.loads(mixture()["task__mixture"]), own]
    task = make_task(config(task__mixture=json.dumps(tasks)), tokenizer, pool)
    known = {(p.numbers, p.target): p.solution for p in generate(0, 34, (3,), max_target=50)}
    rows = [list(task.train.kinds).index(kind) for kind in ("math", "multiple_choice", "countdown", "python_function")]
    gold = [task.train.answers[i] for i in rows]
    record = task.train.columns(rows[2])
    solution = known[tuple(record["numbers"]), record["target"]]
    wrong = next(x for x in "ABC" if x != gold[1])
    texts = [
        [f"\\boxed{{{gold[0]}}}", "\\boxed{-5}", f"<answer>{solution}</answer>"],
        [f"The answer is {gold[1]}.", f"\\boxed{{{wrong}}}", gold[0]],
        [f"<answer>{solution}</answer>", "<answer>1+1</answer>", f"\\boxed{{{gold[0]}}} or nothing <answer>"],
        ["t", "t!", "t?"],
    ]
    scores = rewards_of(task, rows, texts)
    np.testing.assert_allclose(scores.reward, [[1, 0, 0], [1, 0, 0], [1, 0.1, 0.1], [0.5, 0.5, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(scores.verdicts, [[1, 0, 0], [1, 0, 0], [1, 0, 0], [0.5, 0.5, 0.5]])
    assert scores.answers[1][:2] == [gold[1], wrong] and scores.answers[2][0] == solution
    assert not scores.reasons and not scores.errors


# --- rewards ---


def test_right_wrong_and_cut_off(tokenizer, config, data, pool):
    texts = [
        ["It is \\boxed{0}.", "It is \\boxed{1}.", "", "It is \\boxed{0}."],
        ["2", "<answer>2</answer> 3", "3", "2"],
    ]
    ended = [[True, True, True, False]] * 2
    task = make_task(config(task__train_data=data), tokenizer, pool)
    scores = rewards_of(task, [0, 1], texts, ended)
    assert scores.reward.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]] == scores.verdicts.tolist()
    assert scores.reward.dtype == np.float32 and not scores.reasons
    assert (
        scores.answers[0][2:] == [None, None] and scores.answers[1][0] == scores.answers[1][1] != scores.answers[1][2]
    )
    lenient = make_task(config(task__train_data=data, reward__require_end=False), tokenizer, pool)
    assert rewards_of(lenient, [0, 1], texts, ended).verdicts.tolist() == [[1, 0, 0, 1], [1, 1, 0, 1]]


def test_no_verdict_is_nan(tmp_path, tokenizer, config, pool):
    rows = [{"problem": "Go on.", "answer": "\\ldots"}, *ROWS[:10]]
    fields = {"task__train_data": jsonl(tmp_path / "x.jsonl", rows), "task__check_gold": False}
    task = make_task(config(reward__terms="accuracy, repetition=0.5, length", **fields), tokenizer, pool)
    scores = rewards_of(task, [0, 1], [["\\boxed{3}", "none"], ["\\boxed{0}", "\\boxed{0} it is, it is, it is"]])
    assert np.isnan(scores.reward[0]).all() and np.isnan(scores.verdicts[0]).all()
    assert np.isnan(scores.terms["length"][0]).all() and scores.terms["repetition"][0].tolist() == [0, 0]
    assert sum(scores.reasons.values()) == 2 and scores.verdicts[1].tolist() == [1, 1]


def test_terms_and_weights(tokenizer, config, data, pool):
    terms = "accuracy=2, format=0.5, scorer_of_tests:opinion=0.25, scorer_of_tests:longest, overlong=3"
    c = config(task__train_data=data, reward__terms=terms, prompt__prefill="<think>\n", rollout__max_new_tokens=20)
    task = make_task(c, tokenizer, pool)
    formatted = "so\n</think>\n<answer>\n0\n</answer>"
    texts = [[formatted, "\\boxed{0}", "quiet \\boxed{7}"]]
    scores = rewards_of(task, [0], texts)
    lengths = np.array([len(tokenizer.encode(t)) + 1 for t in texts[0]])
    expected = {
        "accuracy": [1, 1, 0],
        "format": [1, 0, 0],  # the prompt begins with the tag that the completion lacks
        "scorer_of_tests:opinion": [2, 2, np.nan],
        "scorer_of_tests:longest": [1, 0, 0],
        "overlong": np.clip((16 - lengths) / 4, -1, 0),
    }
    assert list(scores.terms) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(scores.terms[name][0], value, err_msg=name)
    value = [2 + 0.5 + 0.5 + 1 + 3 * expected["overlong"][0], 2 + 0.5, 0]
    np.testing.assert_allclose(scores.reward[0], value, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "seen"), [({"prompt__template": "r1"}, 1), ({"prompt__prefill": "<think>"}, 1), ({}, 0)]
)
def test_format_sees_what_the_prompt_began(fields, seen, tokenizer, config, data, pool):
    task = make_task(config(task__train_data=data, reward__terms="format", **fields), tokenizer, pool)
    ids = task.train.tokens[0, : task.train.lengths[0]].tolist()
    assert tokenizer.decode(ids).endswith("<think>") == bool(seen)
    texts = [["\nso\n</think>\n<answer>\n0\n</answer>", "<think>\nso\n</think>\n<answer>\n0\n</answer>"]]
    scores = rewards_of(task, [0], texts)
    assert scores.reward.tolist() == [[seen, 1 - seen]]
    assert scores.terms["accuracy"].tolist() == [[1, 1]]  # reported, though it is no term of the reward


def test_python_function_sees_every_column(tmp_path, tokenizer, config, pool):
    rows = [{"problem": f"p{i}", "answer": f"a{i}", "level": i, "tags": [f"a{i}", "x"]} for i in range(12)]
    fields = {"task__name": "python_function", "task__function": "scorer_of_tests:score"}
    c = config(task__train_data=jsonl(tmp_path / "x.jsonl", rows), **fields)
    validate(c)
    task = make_task(c, tokenizer, pool)
    scores = rewards_of(task, [3, 5], [["a3", "no"], ["x", "it is a5"]], [[True, True], [True, False]])
    np.testing.assert_allclose(scores.verdicts, [[0.3, np.nan], [np.nan, 0.5]], rtol=1e-6)  # it sees what was cut off
    np.testing.assert_allclose(scores.reward, scores.verdicts)
    assert scores.reasons == {"the function returned None": 2} and not scores.errors
    failing = rewards_of(task, [0], [["a0", "a0"]], step=8)
    assert np.isnan(failing.reward).all() and len(failing.errors) == 1 and "AssertionError" in failing.errors[0]


def test_python_function_needs_no_answer(tmp_path, tokenizer, config, pool):
    path = jsonl(tmp_path / "x.jsonl", [{"problem": f"p{i}"} for i in range(10)])
    fields = {"task__name": "python_function", "task__function": "scorer_of_tests:longest"}
    task = make_task(config(task__train_data=path, **fields), tokenizer, pool)
    assert list(task.train.answers) == [""] * 6 and not task.train.left_out
    assert rewards_of(task, [2], [["a", "bbb", "cc"]]).reward.tolist() == [[0, 1, 0]]


def test_a_task_without_verifiers_gives_no_reward(tokenizer, config, data):
    task = make_task(config(task__train_data=data), tokenizer)
    with pytest.raises(RuntimeError, match="without verifiers"):
        rewards_of(task, [0], [["1"]])
    with pytest.raises(ConfigError, match=r"sft\.data=None"):
        task.demonstrations(0, 1)
    assert task.encode_prompt("2?") == tokenizer.prompt("2?", config().prompt)
