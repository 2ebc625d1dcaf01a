"""Quotas: a batch is divided by largest remainders, and what cannot be divided is refused in one line."""

from fractions import Fraction

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.fields import ConfigError
from pspo_jax.selection.quotas import Shares, parse_quotas, shares_of

KINDS = ("math", "gsm8k", "logic")
PARTS = st.lists(st.integers(1, 1000), min_size=1, max_size=8)


def largest_remainders(shares, batch):
    """Whole prompts of each share, then one more for those that lack most, in their order."""
    counts = [int(share * batch) for share in shares]
    lacks = [share * batch - count for share, count in zip(shares, counts, strict=True)]
    for _ in range(batch - sum(counts)):
        most = lacks.index(max(lacks))
        counts[most], lacks[most] = counts[most] + 1, -1
    return counts


@given(PARTS, st.integers(1, 4096))
def test_counts_sum_to_the_batch_and_are_within_one_of_their_shares(parts, batch):
    shares = [Fraction(part, sum(parts)) for part in parts]
    got = Shares((), tuple(map(float, shares))).counts(batch)
    assert sum(got) == batch
    assert all(abs(count - share * batch) < 1 for count, share in zip(got, shares, strict=True))


@given(PARTS, st.integers(1, 4096))
def test_counts_equal_plain_largest_remainders(parts, batch):
    shares = [Fraction(part, sum(parts)) for part in parts]
    got = Shares((), tuple(map(float, shares))).counts(batch)
    want = largest_remainders(shares, batch)

    def lacks(counts):
        return sorted(share * batch - count for count, share in zip(counts, shares, strict=True))

    # Equal remainders are not always equal as floats, so which of them is rounded up is open.
    assert lacks(got) == lacks(want)


@given(st.integers(1, 999), st.integers(1, 999), st.integers(1, 512))
def test_quotas_written_as_decimals_give_their_counts(first, second, batch):
    if first + second >= 1000:
        first, second = min(first, 499), min(second, 499)
    shares = shares_of(f"math={first / 1000}, logic={second / 1000}", KINDS)
    exact = [Fraction(first, 1000), Fraction(second, 1000), 1 - Fraction(first + second, 1000)]
    got = shares.counts(batch)
    assert sum(got) == batch
    assert all(abs(count - share * batch) < 1 for count, share in zip(got, exact, strict=True))
    if all((share * batch).denominator == 1 for share in exact):
        assert got == [share * batch for share in exact]


@pytest.mark.parametrize(
    ("share", "batch", "want"),
    [
        ((1.0,), 7, [7]),
        ((0.5, 0.5), 8, [4, 4]),
        ((0.5, 0.5), 7, [4, 3]),
        ((1 / 3, 1 / 3, 1 / 3), 10, [4, 3, 3]),
        ((0.1, 0.2, 0.7), 10, [1, 2, 7]),
        ((0.29, 0.71), 100, [29, 71]),
        ((0.46, 0.44, 0.1), 5, [2, 2, 1]),
        ((0.9, 0.1), 1, [1, 0]),
        ((0.1, 0.9), 1, [0, 1]),
    ],
)
def test_counts(share, batch, want):
    assert Shares((), share).counts(batch) == want


@pytest.mark.parametrize("quotas", ["", "  ", ",", " , "])
@pytest.mark.parametrize("kinds", [(), KINDS], ids=["unnamed", "named"])
def test_no_quotas_are_one_slot_with_the_whole_batch(quotas, kinds):
    shares = shares_of(quotas, kinds)
    assert shares.slots == 1 and shares.counts(8) == [8]
    assert shares.slot(jnp.arange(max(len(kinds), 1), dtype=jnp.int8)).tolist() == [0] * max(len(kinds), 1)


@pytest.mark.parametrize(
    ("quotas", "of_kind", "share"),
    [
        ("math=0.5", (0, 1, 1), (0.5, 0.5)),
        ("logic=0.25", (1, 1, 0), (0.25, 0.75)),
        ("logic=0.25, math=0.5", (1, 2, 0), (0.25, 0.5, 0.25)),
        ("logic=.2,gsm8k=.3,math=.5,", (2, 1, 0), (0.2, 0.3, 0.5)),
        # Where all tasks are named, it is their proportions that count.
        ("math=0.2, gsm8k=0.1, logic=0.1", (0, 1, 2), (0.5, 0.25, 0.25)),
    ],
)
def test_each_task_has_its_slot_and_others_share_the_last(quotas, of_kind, share):
    shares = shares_of(quotas, KINDS)
    assert shares.of_kind == of_kind
    assert shares.share == pytest.approx(share) and sum(shares.share) == pytest.approx(1)
    assert shares.slot(jnp.asarray([2, 0, 1, 0], jnp.int8)).tolist() == [of_kind[i] for i in (2, 0, 1, 0)]


def test_padding_has_any_slot():
    shares = shares_of("logic=0.25, math=0.5", KINDS)
    assert 0 <= int(shares.slot(jnp.asarray([-1], jnp.int8))[0]) < shares.slots


def test_the_only_task_has_the_whole_batch():
    assert shares_of("math=0.3", ("math",)).counts(9) == [9]


def test_shares_may_sum_to_a_hair_above_one():
    assert 0.2 + 0.4 + 0.3 + 0.1 > 1
    assert shares_of("a=0.2, b=0.4, c=0.3, d=0.1", tuple("abcd")).counts(20) == [4, 8, 6, 2]


@given(st.dictionaries(st.text("abc_-0", min_size=1), st.integers(1, 100), min_size=1, max_size=9))
def test_parsing_gives_back_what_was_written(named):
    shares = {name: n / 1000 for name, n in named.items()}
    assert parse_quotas(" ,".join(f" {name} = {share}" for name, share in shares.items())) == shares


@pytest.mark.parametrize(
    "quotas",
    [
        "math",
        "0.5",
        "math=",
        "=0.5",
        "math=x",
        "math==0.5",
        "math=0.5=0.5",
        "math:0.5",
        "math=0.5 gsm8k=0.5",
        "math=0.5;gsm8k=0.5",
        "math=0.5\ngsm8k=0.5",
        "math=0",
        "math=-0.1",
        "math=1.1",
        "math=50%",
        "math=nan",
        "math=inf",
        "math=0.2, math=0.2",
        "math=0.6, gsm8k=0.6",
        "math=0.5, gsm8k=0.4, logic=0.11",
        # No such task.
        "maths=0.5",
        "Math=0.5",
        "math=0.5, other=0.5",
        "ma\nth=0.5",
        # Nothing for logic.
        "math=1",
        "math=0.5, gsm8k=0.5",
    ],
)
def test_bad_quotas_are_refused_in_one_line_that_names_the_field(quotas):
    with pytest.raises(ConfigError) as caught:
        shares_of(quotas, KINDS)
    message = str(caught.value)
    assert "selection.quotas" in message and len(message.splitlines()) == 1


def test_a_refusal_names_what_is_wrong_and_what_there_is():
    with pytest.raises(ConfigError, match=r"no task 'maths'; .*math, gsm8k, logic"):
        shares_of("maths=0.5", KINDS)
    with pytest.raises(ConfigError, match="nothing for gsm8k, logic"):
        shares_of("math=1", KINDS)
    with pytest.raises(ConfigError, match=r"gsm8k=2.* is no task=share"):
        shares_of("math=0.5, gsm8k=2", KINDS)
    with pytest.raises(ConfigError, match="more than 1"):
        shares_of("math=0.6, gsm8k=0.6", KINDS)
    with pytest.raises(ConfigError, match="unnamed"):
        shares_of("math=0.6", ())
