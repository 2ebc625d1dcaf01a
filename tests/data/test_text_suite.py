"""The text suite: its answers by a separate parser of the questions, its verdicts, and its kinds in selection and
evaluation."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pspo_jax.arrays.state import Rollouts
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.rewards import VerifierConfig
from pspo_jax.config.validation import validate
from pspo_jax.data.synthetic.text_suite import KINDS, generate
from pspo_jax.data.synthetic.text_suite_words import CATEGORIES, COLORS, NOUNS
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.evaluation.benchmarks import MADE, benchmark_source
from pspo_jax.evaluation.heldout import evaluate
from pspo_jax.rewards.task import make_task
from pspo_jax.rewards.text_reward import _request
from pspo_jax.selection.metadata import load_metadata
from pspo_jax.verifiers.workers.pool import Pool
from pspo_jax.verifiers.workers.process import VERIFIERS
from tests.data.small_tokenizer import CHATML, write_tokenizer
from tests.helpers import tiny_config

NAMES = tuple(KINDS)
SEEDS = st.integers(0, 2**31)


def added(a, b):
    return str(int(a) + int(b))


def larger(a, b):
    return max(a, b, key=Fraction)


def counted(letter, phrase):
    return str(sum(character == letter for character in phrase))


def capitals(phrase):
    return "".join(chr(ord(c) - 32) if "a" <= c <= "z" else c for c in phrase)


def belonging(category, *words):
    (right,) = [letter for letter, word in zip("AB", words, strict=True) if word in CATEGORIES[category]]
    return right


NUMBER = r" Reply with the number only\."
PARSERS = {
    "first_letter": (r'What is the first letter of the word "([A-Z])[a-z]+"\?', str),
    "compare": (r"What is the larger number: (\d\d) or (\d\d)\?", larger),
    "compare_decimals": (r"What is the larger number: (\d\.\d+) or (\d\.\d+)\?", larger),
    "add_small": (rf"What is (\d+) \+ (\d+)\?{NUMBER}", added),
    "add": (rf"What is (\d\d) \+ (\d\d)\?{NUMBER}", added),
    "add_carry": (rf"What is (\d\d) \+ (\d\d)\?{NUMBER}", added),
    "equation": (r"What is (\d+) \+ (\d+)\? Write the whole equation\.", lambda a, b: f"{a} + {b} = {added(a, b)}"),
    "count_letters": (rf'How many times does the letter "([a-z])" occur in "([a-z ]+)"\?{NUMBER}', counted),
    "uppercase": (r'Write "([a-z ]+)" in capital letters and nothing else\.', capitals),
    "brackets": (r'Write "([a-z ]+)" in square brackets and nothing else\.', lambda phrase: f"[{phrase}]"),
    "multiple_choice": (
        r"Which of these is (an? [a-z ]+)\?\nA\. (\w+)\nB\. (\w+)\nAnswer with the letter only\.",
        belonging,
    ),
    "word_problem": (rf"(.*){NUMBER}", lambda story: story_value(story)),
}
"""Pattern of a kind's questions, and the answer from the groups of its match."""


def story_value(story):
    a, b = (int(number) for number in re.findall(r"\d+", story))
    signs = [
        sign
        for words, sign in (("buys|evening", "+"), ("gives away|takes", "-"), ("boxes", "*"))
        if re.search(words, story)
    ]
    assert len(signs) == 1
    return str({"+": a + b, "-": a - b, "*": a * b}[signs[0]])


def solved(kind, question):
    pattern, answer = PARSERS[kind]
    found = re.fullmatch(pattern, question)
    assert found, (kind, question)
    return answer(*found.groups())


def verdict(row, completion):
    """The verdict on a completion, by the verifier in this process."""
    extra = {"verifier": KINDS[row.kind].verifier}
    if row.item.options:
        extra |= {"options": len(row.item.options), "texts": list(row.item.options)}
    request = _request("text_suite", row.item.answer, extra, completion)
    return 0.0 if request is None else VERIFIERS[request.kind](**request.arguments).score


def wrong_answers(row):
    """Answers that are not right, and that differ little from the right one."""
    answer = row.item.answer
    match row.kind:
        case "multiple_choice":
            return [letter for letter in "ABC" if letter != answer] + [w for w in row.item.options]
        case "uppercase":
            return [answer.lower(), answer.title(), f"{answer}.", f"[{answer}]"]
        case "brackets":
            return [answer[1:-1], answer[:-1], f"({answer[1:-1]})", answer.upper(), f"{answer} "[::-1]]
        case "equation":
            left, number = answer.split(" = ")
            return [number, f"{left} = {int(number) + 1}", answer.replace(" ", ""), f"{answer}.", f"{number} = {left}"]
        case "first_letter":
            return [chr(ord(answer) + 1), f"{answer}{answer}", "", "I do not know."]
    off = Fraction(answer) + Fraction(1, 10) if "." in answer else int(answer) + 1
    return [str(float(off)) if "." in answer else str(off), f"-{answer}", f"1{answer}", "", "I do not know."]


def candidates(row):
    """The answers among which a completion that knows nothing could choose."""
    match row.kind:
        case "multiple_choice":
            return list("AB")
        case "compare" | "compare_decimals":
            return re.findall(r"\d+(?:\.\d+)?", row.item.question)
    return [row.item.answer, wrong_answers(row)[0]]


@given(SEEDS, st.sampled_from(NAMES))
@example(0, "count_letters")
def test_answers_are_those_of_a_separate_parser(seed, kind):
    for row in generate(seed, 8, (kind,)):
        assert row.kind == kind and row.item.answer == solved(kind, row.item.question)


@given(SEEDS, st.sampled_from(NAMES))
def test_a_row_s_own_answer_is_right_and_a_changed_one_is_wrong(seed, kind):
    for row in generate(seed, 2, (kind,)):
        answer = row.item.answer
        assert verdict(row, answer) == 1 and verdict(row, f"<think>\n1 or 2\n</think>\n\n{answer}") == 1
        right_word = dict(zip("AB", row.item.options, strict=False)).get(answer)
        assert [w for w in wrong_answers(row) if w != right_word and verdict(row, w)] == []


@given(SEEDS, st.sampled_from(NAMES), st.randoms())
def test_a_list_of_candidates_is_wrong(seed, kind, order):
    (row,) = generate(seed, 1, (kind,))
    found = candidates(row)
    order.shuffle(found)
    for between in (" or ", ", ", " and ", " ", "\n", "\n\n", " / ", "; "):
        assert not verdict(row, between.join(found)), between.join(found)


def test_letters_may_have_their_option_s_text():
    (row,) = generate(0, 1, ("multiple_choice",))
    right = "AB".index(row.item.answer)
    for text in (f"{row.item.answer}.", f"({row.item.answer})", f"{row.item.answer}. {row.item.options[right]}"):
        assert verdict(row, text) == 1, text
    assert verdict(row, f"{row.item.answer}. {row.item.options[right - 1]}") == 0


@given(SEEDS, st.lists(st.sampled_from(NAMES), min_size=1, unique=True), st.integers(0, 60))
def test_questions_are_distinct_and_kinds_take_turns(seed, kinds, count):
    rows = generate(seed, count, kinds)
    assert [row.kind for row in rows] == [kinds[i % len(kinds)] for i in range(count)]
    assert len({row.item.question for row in rows}) == len(rows)
    assert rows == generate(seed, count + 5, kinds)[:count]


@given(SEEDS, st.sampled_from(NAMES))
def test_a_kind_s_questions_do_not_depend_on_the_other_kinds(seed, kind):
    assert generate(seed, 3, (kind,)) == [row for row in generate(seed, 3 * len(NAMES), NAMES) if row.kind == kind]


@given(SEEDS, SEEDS)
def test_seeds_differ(one, other):
    assume(one != other)
    assert generate(one, 40, NAMES) != generate(other, 40, NAMES)


def test_questions_are_the_same_on_every_machine():
    """A change of the generator changes this value, and the data of every run with it."""
    text = json.dumps([[row.kind, row.item.question, row.item.answer] for row in generate(0, 500, NAMES)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "2bc2799fa0a9df8a"


def test_both_orders_of_a_pair_are_one_question():
    for kind in ("compare", "add", "add_carry"):
        pairs = [tuple(sorted(re.findall(r"\d+", row.item.question))) for row in generate(0, 600, (kind,))]
        assert len(set(pairs)) == len(pairs)


def test_answers_are_spread():
    """No kind can be solved by one answer, nor by the place of an answer."""
    for kind in NAMES:
        rows = generate(1, 80 if kind == "first_letter" else 250, (kind,))
        most = Counter(row.item.answer for row in rows).most_common(1)[0][1] / len(rows)
        assert most < 0.65, kind
        if kind.startswith("compare"):
            first = sum(re.search(r"[\d.]*\d", row.item.question)[0] == row.item.answer for row in rows) / len(rows)
            assert 0.4 < first < 0.6


def test_a_kind_carries_if_its_name_says_so():
    for kind, carries in (("add", False), ("add_carry", True)):
        for row in generate(0, 300, (kind,)):
            a, b = map(int, re.findall(r"\d+", row.item.question))
            assert (a % 10 + b % 10 > 9) == carries and min(a, b) > 9


def test_no_word_is_of_two_categories():
    assert len(set(NOUNS)) == len(NOUNS) and not set(NOUNS) & set(COLORS)


def test_kinds_without_more_questions_are_passed():
    pairs = 2 * 9 * 20 - 9 * 9
    rows = generate(0, 1000, ("equation", "count_letters"))
    assert Counter(row.kind for row in rows) == {"equation": pairs, "count_letters": 1000 - pairs}
    with pytest.raises(ValueError, match=f"^equation have {pairs} different questions$"):
        generate(0, pairs + 1, ("equation",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("t"), CHATML)


@pytest.fixture
def config(tmp_path, folder):
    def make(**fields):
        values = {
            "task__name": "text_suite",
            "task__cache": str(tmp_path / "prompts"),
            "task__train_prompts": 60,
            "task__heldout_prompts": 24,
            "model__tokenizer": folder,
            "rollout__prompts": 4,
        }
        return tiny_config(**(values | fields))

    return make


def made(config, pool=None):
    validate(config)
    return make_task(config, load_tokenizer(config, None, None), pool)


def test_the_task_holds_out_other_questions_of_every_kind(config):
    task = made(config())
    assert (len(task.train.lengths), len(task.heldout.lengths)) == (60, 24) and not task.train.left_out
    assert not set(task.train.texts) & set(task.heldout.texts)
    assert Counter(task.heldout.labels) == dict.fromkeys(NAMES, 2)
    assert Counter(task.train.labels) == dict.fromkeys(NAMES, 5)
    for prompts in (task.train, task.heldout):
        rows = zip(prompts.labels, prompts.texts, prompts.answers, strict=True)
        assert all(solved(kind, text) == answer for kind, text, answer in rows)
    first = task.tokenizer.decode(task.train.tokens[0][: task.train.lengths[0]].tolist())
    assert first == f"<|im_start|>user\n{task.train.texts[0]}<|im_end|>\n<|im_start|>assistant\n"
    columns = task.train.columns(0)
    assert columns["kind"] == task.train.labels[0] and columns["difficulty"] == KINDS[columns["kind"]].difficulty


def test_settings_change_the_questions(config):
    base = made(config())
    few = made(config(task__kinds="add, compare"))
    assert set(few.train.labels) == set(few.heldout.labels) == {"add", "compare"}
    prints = [made(config(**f)).train.fingerprint() for f in ({}, {"task__seed": 1}, {"task__kinds": "add,compare"})]
    assert len(set(prints)) == 3 and base.train.fingerprint() == prints[0]
    more = made(config(task__train_prompts=200))
    assert list(more.heldout.texts) == list(base.heldout.texts) and set(base.train.texts) < set(more.train.texts)


def test_selectors_read_kinds_and_difficulties(config):
    task = made(config())
    names, metadata = load_metadata(config(selection__quotas="add=0.5,compare=0.25"), task.train)
    assert names == tuple(sorted(NAMES)) and [names[i] for i in metadata.task_ids] == list(task.train.labels)
    _, metadata = load_metadata(config(algorithm__name="curriculum", selection__name="curriculum"), task.train)
    assert (
        metadata.difficulty.tolist()
        == task.train.difficulty.tolist()
        == [KINDS[kind].difficulty for kind in task.train.labels]
    )
    assert sorted(kind.difficulty for kind in KINDS.values()) == list(range(1, len(KINDS) + 1))


def test_in_a_mixture_the_suite_is_one_task(config):
    mixture = [
        {"name": "text_suite", "kinds": "add,compare", "train_prompts": 60},
        {"name": "countdown", "train_prompts": 60, "label": "numbers"},
    ]
    task = made(config(task__name="arithmetic", task__mixture=json.dumps(mixture)))
    assert set(task.train.labels) == {"text_suite", "numbers"}
    assert {
        text.split()[0] for text, k in zip(task.train.texts, task.train.kinds, strict=True) if k == "text_suite"
    } == {"What"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kinds": "add,maths"}, ["task.kinds='add,maths': 'maths' is no kind", "choose all, or among", "compare"]),
        ({"kinds": "all,add"}, ["'all' is no kind"]),
        ({"kinds": "add,add"}, ["task.kinds='add,add': add appears twice"]),
        ({"kinds": ""}, ["task.kinds='': has an empty entry"]),
        ({"kinds": "add,"}, ["task.kinds='add,': has an empty entry"]),
        ({"kinds": "equation", "train_prompts": 500}, ["task.train_prompts=500: equation have 279", "lower it"]),
        ({"kinds": "add", "name": "countdown"}, ["task.kinds=add: task.name=countdown does not read it"]),
        ({"numbers": "3"}, ["task.numbers=3: task.name=text_suite does not read it"]),
    ],
)
def test_bad_settings_are_named(fields, words, config):
    with pytest.raises(ConfigError) as error:
        made(config(**{f"task__{name}": value for name, value in fields.items()}))
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.xdist_group("pool")
def test_held_out_accuracy_is_reported_by_kind(config):
    """Of a policy that answers two kinds right, and of a third every other question."""
    c = config(task__kinds="add,uppercase,multiple_choice,compare", eval__samples=2)
    with Pool(VerifierConfig(workers=1, deadline=60)) as pool:
        task = made(c, pool)
        labels, answers = list(task.heldout.labels), list(task.heldout.answers)
        places = {kind: [i for i, label in enumerate(labels) if label == kind] for kind in set(labels)}
        right = {*places["add"], *places["uppercase"], *places["multiple_choice"][::2]}
        assert len(places["multiple_choice"]) == 6

        def sample(params, prompts, key, settings):
            texts = [answers[i] if i in right else "?" for i in np.asarray(prompts.ids)]
            ids = [[*task.tokenizer.encode(text), task.stop_ids[0]] for text in texts]
            lengths = np.array([[len(row)] for row in ids])
            tokens = np.zeros((len(ids), 1, lengths.max()), np.int32)
            for i, row in enumerate(ids):
                tokens[i, 0, : len(row)] = row
            tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
            zero, ended = jnp.zeros(tokens.shape), jnp.ones(lengths.shape, bool)
            return Rollouts(prompts, tokens, zero > 0, zero, zero, lengths, ended, jnp.float32(1))

        scores = evaluate(
            sample, None, task, c, jax.random.key(0), 8, lambda prompts: jax.tree.map(jnp.asarray, prompts)
        )
    shares = {"add": 1.0, "uppercase": 1.0, "multiple_choice": 0.5, "compare": 0.0}
    assert scores.pop("greedy") == scores.pop("sampled") == pytest.approx(15 / 24) and scores.pop("no_verdict") == 0
    assert scores == pytest.approx({f"{kind}/{k}": v for kind in ("greedy", "sampled") for k, v in shares.items()})


def test_the_benchmark_has_every_kind_equally_often(config):
    _, count = MADE["text_suite"]
    records = benchmark_source("text_suite", None, config()).records
    assert Counter(records["kind"]) == dict.fromkeys(NAMES, count // len(NAMES))
    assert len(set(records["question"])) == count
