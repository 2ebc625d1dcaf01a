"""Shaping terms against published patterns and plain-Python loops, by hand, and on long adversarial texts."""

import ast
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.rewards import shaping
from pspo_jax.rewards.shaping import (
    cosine,
    format_geo3k,
    format_open_r1,
    format_open_rs,
    geo3k,
    length_kimi,
    reasoning_steps,
    repetition,
    soft_overlong,
    tag_count,
)

pytestmark = pytest.mark.filterwarnings("error")

GOOD = "<think>\na\n</think>\n<answer>\nb\n</answer>"
TEXT_TERMS = (format_geo3k, format_open_r1, format_open_rs, tag_count, reasoning_steps, repetition)
PUBLISHED_FORMAT = re.compile(r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$", re.DOTALL | re.MULTILINE)
PUBLISHED_GEO3K = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
PUBLISHED_STEPS = re.compile(r"(Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,)")

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FILLERS = ("\n", "\r", "x", " ", "\n</think>\n<answer>\n", "\n</answer>", "<think>\n")
tagged = st.lists(st.sampled_from(TAGS + FILLERS), max_size=14).map("".join)
fill = st.sampled_from(("",) * 8 + ("x", "\n", "\n\n", *TAGS))
# Near misses: each part may be lacking or be followed by something else.
PARTS = ("<think>\n", "\n</think>\n", "<answer>\n", "\n</answer>")
near = st.tuples(*(st.tuples(st.sampled_from((p,) * 6 + (p.strip(),)), fill) for p in PARTS)).map(
    lambda parts: "".join(a + b for a, b in parts)
)
stepped = st.lists(
    st.sampled_from(("Step 3:", "Step :", "3.", "12.", "\n", "-", "*", "First,", "Second,", "Next,", "Finally,", "x"))
).map("".join)


@st.composite
def groups(draw):
    """Verdicts and lengths [B, G]."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 6)))
    size = shape[0] * shape[1]
    right = draw(st.lists(st.sampled_from((0.0, 1.0, 0.5, math.nan)), min_size=size, max_size=size))
    length = draw(st.lists(st.integers(0, 40), min_size=size, max_size=size))
    return np.reshape(right, shape).astype(np.float32), np.reshape(length, shape).astype(np.int32)


def same(got, want, atol=1e-6):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=atol)


def starts(text, tag):
    """How often the tag occurs, overlaps counted."""
    return sum(text.startswith(tag, i) for i in range(len(text)))


# Text terms


@given(st.one_of(tagged, near))
@settings(max_examples=300)
def test_formats_match_their_definitions(text):
    assert format_open_r1(text) == bool(PUBLISHED_FORMAT.match(text))
    assert format_open_rs(text) == (len(re.findall("\n</think>\n", text)) == 1)
    pieces = [len(text.split(tag)) for tag in ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")]
    assert tag_count(text) == pieces.count(2) / 4


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (GOOD, 1),
        (GOOD + "\nand more", 1),  # `$` also matches before a newline
        (GOOD + " ", 0),
        (GOOD + "x\n</answer>", 1),
        ("\n" + GOOD, 0),
        ("<think>\n" + GOOD, 1),  # a dot matches a tag
        (GOOD + GOOD, 1),
        ("<think>\n\n</think>\n<answer>\n\n</answer>", 1),
        ("<think>\n</think>\n<answer>\n</answer>", 0),  # one newline is not two
        ("<think>\n\n</think>\n<answer>\n</answer>", 0),
        (GOOD.replace("\n<answer>", "<answer>"), 0),
        ("", 0),
    ],
)
def test_format_open_r1_by_hand(text, score):
    assert format_open_r1(text) == score


@pytest.mark.parametrize(
    ("text", "rs", "tags"),
    [
        ("a\n</think>\nb", 1, 0.25),
        ("a</think>b", 0, 0),
        ("\n</think>\n</think>\n", 1, 0.25),  # they share a newline
        ("\n</think>\n\n</think>\n", 0, 0),
        # The one newline between </think> and <answer> serves both tags.
        (GOOD, 1, 1.0),
        ("<think>\n" + GOOD, 1, 0.75),
    ],
)
def test_tags_by_hand(text, rs, tags):
    assert (format_open_rs(text), tag_count(text)) == (rs, tags)


@given(st.lists(st.sampled_from(("<think>", "</think>", "\\boxed{", "}", "\n", "x", "{")), max_size=9).map("".join))
@settings(max_examples=300)
def test_the_format_of_geo3k_matches_its_definition(text):
    for whole in (text, f"<think>{text}", f"<think>{text}</think>{text}\\boxed{{{text}}}"):
        assert format_geo3k(whole) == (PUBLISHED_GEO3K.fullmatch(whole) is not None)


@given(groups(), st.data())
def test_geo3k_is_accuracy_or_a_tenth_for_the_format(group, data):
    verdicts, _ = group
    some = st.sampled_from(
        ("<think>a</think>\\boxed{1}", "\\boxed{1}", "<think></think>\n\\boxed{}\n", "<think>\\boxed{1}")
    )
    texts = [[data.draw(some) for _ in row] for row in verdicts]
    want = [
        [v if math.isnan(v) or v >= 1 else 0.1 * bool(PUBLISHED_GEO3K.fullmatch(t)) for v, t in zip(*pair, strict=True)]
        for pair in zip(verdicts.tolist(), texts, strict=True)
    ]
    same(geo3k(verdicts, texts), np.array(want))


@given(stepped)
def test_reasoning_steps_match_the_published_pattern(text):
    assert reasoning_steps(text) == min(1.0, len(PUBLISHED_STEPS.findall(text)) / 3)


@pytest.mark.parametrize(
    ("text", "signs"),
    [("", 0), ("1. a\n2. b", 1), ("\n1. a", 0), ("- a\n- b\n* c", 2), ("First, Step 12: Finally, Next,", 3)],
)
def test_reasoning_steps_by_hand(text, signs):
    assert reasoning_steps(text) == signs / 3


@given(st.lists(st.sampled_from(("a", "A", "b", "c"))), st.integers(1, 4), st.floats(-2, 0))
def test_repetition_matches_a_loop(words, ngram, penalty):
    seen, repeats, total = [], 0, 0
    for end in range(ngram, len(words) + 1):
        gram = " ".join(words[end - ngram : end]).lower()
        total += 1
        repeats += gram in seen
        seen.append(gram)
    want = penalty * repeats / total if total else 0.0
    got = repetition("\n ".join(words), ngram, penalty)
    assert got == pytest.approx(want, abs=1e-12)
    assert penalty <= got <= 0 and (got != 0 or math.copysign(1, got) == 1)


def test_repetition_by_hand():
    assert repetition("a b c A B\tC") == pytest.approx(-0.25)  # abc bca cab abc
    assert repetition("a b") == 0.0
    assert repetition("a a a a a", ngram=2, max_penalty=-2.0) == pytest.approx(-1.5)


@pytest.mark.parametrize("term", TEXT_TERMS)
@pytest.mark.parametrize(
    "text",
    [
        "\n</think>\n" * 100_000,
        "<think>\n" + "\n</think>\n" * 100_000,
        "<think>\n" + "\n</think>\n<answer>\n" * 50_000,
        "<think>\n" + "\n</think>\n<answer>\n" * 25_000 + "\n</answer>x" * 50_000,
        "<think>\n" * 125_000,
        "\n" * 1_000_000,
        "Step " + "1" * 1_000_000,
        "1" * 1_000_000,
        "Step 1" * 170_000,
        "a " * 500_000,
    ],
    ids=range(10),
)
def test_a_megabyte_is_scored(term, text):
    assert -1.0 <= term(text) <= 1.0


# Array terms


@given(groups(), st.integers(1, 30), st.booleans(), st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
def test_cosine_matches_a_loop(group, limit, clamp, right_range):
    right, length = group
    got = cosine(right, length, limit, right_range, (-0.5, 0.0), clamp)
    want = np.empty(right.shape)
    for at, verdict in np.ndenumerate(right):
        at_limit, at_zero = right_range if verdict == 1 else (-0.5, 0.0)
        share = length[at] / limit
        weight = math.cos(math.pi / 2 * (min(1, share) if clamp else share)) ** 2
        want[at] = math.nan if math.isnan(verdict) else at_limit * (1 - weight) + at_zero * weight
    same(got, want)


def test_cosine_by_hand():
    right = np.array([[1, 1, 1, 1, 0, 0, 0.9, math.nan]], np.float32)
    length = np.array([[0, 50, 100, 200, 0, 100, 50, 0]])
    same(cosine(right, length, 100), [[1.0, 0.75, 0.5, 0.5, 0.0, -0.5, -0.25, math.nan]])
    same(cosine(right, length, 100, clamp=False), [[1.0, 0.75, 0.5, 1.0, 0.0, -0.5, -0.25, math.nan]])


@given(st.integers(1, 200), st.sampled_from((0.0, 1.0)))
def test_cosine_falls_with_length_to_the_limit(limit, verdict):
    length = np.arange(2 * limit + 1)[None]
    got = cosine(np.full(length.shape, verdict, np.float32), length, limit)[0]
    assert (np.diff(got[: limit + 1]) < 0).all()
    assert (got[limit:] == got[limit]).all()


@given(groups())
def test_length_kimi_matches_a_loop(group):
    right, length = group
    want = []
    for verdicts, lengths in zip(right.tolist(), length.tolist(), strict=True):
        known = sorted(n for v, n in zip(verdicts, lengths, strict=True) if not math.isnan(v))
        row = []
        for v, n in zip(verdicts, lengths, strict=True):
            if math.isnan(v):
                row.append(math.nan)
            elif known[0] == known[-1]:
                row.append(0.0)
            else:
                lam = (known[-1] - n) / (known[-1] - known[0]) - 0.5
                row.append(lam if v == 1 or lam < 0 else 0.0)
        want.append(row)
    same(length_kimi(right, length), want)


def test_length_kimi_by_hand():
    nan = math.nan
    right = np.array([[1, 1, 0, 0, nan], [1, 0, 0.5, nan, nan], [nan] * 5], np.float32)
    length = np.array([[10, 20, 10, 30, 900], [7, 7, 7, 1, 9], [1, 2, 3, 4, 5]])
    same(length_kimi(right, length), [[0.5, 0, 0, -0.5, nan], [0, 0, 0, nan, nan], [nan] * 5])


@given(groups(), st.integers(0, 30), st.integers(0, 10))
def test_soft_overlong_matches_a_loop(group, room, cache):
    length = group[1]
    limit = room + cache
    want = np.empty(length.shape)
    for at, n in np.ndenumerate(length):
        if n <= room:
            want[at] = 0.0
        elif n <= limit:
            want[at] = (room - n) / cache
        else:
            want[at] = -1.0
    same(soft_overlong(length, limit, cache), want)


def test_soft_overlong_by_hand():
    length = np.array([[0, 80, 85, 90, 100, 101, 500]])
    same(soft_overlong(length, 100, 20), [[0, 0, -0.25, -0.5, -1, -1, -1]])
    same(soft_overlong(length, 100, 0), [[0, 0, 0, 0, 0, -1, -1]])
    assert not np.signbit(soft_overlong(length[:, :2], 100, 20)).any()


@given(groups(), st.randoms(use_true_random=False), st.booleans())
def test_order_in_a_group_is_irrelevant_and_ranges_hold(group, random, clamp):
    right, length = group
    order = random.sample(range(right.shape[1]), right.shape[1])
    terms = {
        lambda r, n: cosine(r, n, 15, clamp=clamp): (-0.5, 1.0),
        length_kimi: (-0.5, 0.5),
        lambda r, n: soft_overlong(n, 20, 8): (-1.0, 0.0),
    }
    for term, (low, high) in terms.items():
        got = term(right, length)
        np.testing.assert_array_equal(term(right[:, order], length[:, order]), got[:, order])
        judged = got[~np.isnan(got)]
        assert ((low <= judged) & (judged <= high)).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: repetition("a b c", ngram=0),
        lambda: cosine(np.ones((1, 1)), np.ones((1, 1), int), 0),
        lambda: soft_overlong(np.ones((1, 1), int), 10, 11),
        lambda: soft_overlong(np.ones((1, 1), int), 10, -1),
    ],
)
def test_a_limit_without_meaning_is_refused(call):
    with pytest.raises(ValueError, match="it must be"):
        call()


def test_it_stays_off_jax():
    tree = ast.parse(Path(shaping.__file__).read_text())
    names = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    plain = {"__future__", "collections.abc", "re", "itertools", "numpy", "jaxtyping"}
    assert names <= plain | {"pspo_jax.verifiers.boxed"}
