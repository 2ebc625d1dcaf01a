"""Quotas: batches are divided exactly over steps, and quotas that cannot be met are refused in one line."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.text_fields import parse_quotas
from pspo_jax.selection.engine.quotas import Shares, shares_of

KINDS = ("math", "gsm8k", "logic")
KINDS_9 = tuple("abcdefghi")
PARTS = st.lists(st.integers(1, 1000), min_size=1, max_size=8)


def divisions(shares, batch, steps):
    """Prompts [steps, slots] of each slot in successive batches."""
    carry, found = jnp.zeros(shares.slots, jnp.int32), []
    for _ in range(steps):
        counts, carry = shares.divide(carry, batch)
        found.append(np.asarray(counts))
    return np.stack(found)


def reduced(parts):
    """Shares in proportion to these parts."""
    return Shares((), tuple(part // math.gcd(*parts) for part in parts))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=3, max_size=5), st.integers(1, 40))
def test_over_any_number_of_batches_each_slot_has_its_share_to_less_than_one(parts, batch):
    shares = reduced(parts)
    counts = divisions(shares, batch, 12)
    assert (counts.sum(axis=1) == batch).all() and counts.min() >= 0
    for step, total in enumerate(counts.cumsum(axis=0), 1):
        for slot, part in enumerate(parts):
            assert abs(int(total[slot]) - Fraction(step * batch * part, sum(parts))) < 1
    assert all(counts[:, slot].max() <= shares.most(batch, slot) for slot in range(shares.slots))


def test_a_share_of_much_less_than_a_prompt_is_drawn_over_steps():
    shares = shares_of("math=0.003, gsm8k=0.9", KINDS)
    counts = divisions(shares, 16, 125)
    assert counts.sum(axis=0).tolist() == [6, 1800, 194]
    # Spread out, not all at the end: never a whole prompt behind or ahead.
    assert abs(counts[:, 0].cumsum() - np.arange(1, 126) * 0.048).max() < 1


def test_many_shares_are_exact_after_a_long_time():
    shares = shares_of(
        ", ".join(f"{name}=0.0{digit}" for name, digit in zip("abcdefgh", "12345678", strict=True)), KINDS_9
    )
    carry = jnp.zeros(shares.slots, jnp.int32)
    step = jax.jit(lambda carry: shares.divide(carry, 7))
    total = np.zeros(shares.slots, int)
    for _ in range(1000):
        counts, carry = step(carry)
        total += np.asarray(counts)
    assert total.tolist() == [70, 140, 210, 280, 350, 420, 490, 560, 4480]


def test_a_part_of_a_batch_is_divided_within_what_the_batch_gives_each_slot():
    shares = shares_of("math=0.25, gsm8k=0.25", KINDS)
    carry, total = jnp.zeros((2, 3), jnp.int32), np.zeros(3, int)
    for _ in range(40):
        counts, first = shares.divide(carry[0], 5)
        uniform, second = shares.divide_within(carry[1], 2, counts)
        carry, total = jnp.stack([first, second]), total + np.asarray(uniform)
        assert int(uniform.sum()) == 2 and (uniform <= counts).all()
    assert abs(total - np.array([20, 20, 40])).max() <= 1


@pytest.mark.parametrize(
    ("parts", "batch", "want"),
    [
        ((1,), 7, [7]),
        ((1, 1), 8, [4, 4]),
        ((1, 1), 7, [4, 3]),
        ((1, 1, 1), 10, [4, 3, 3]),
        ((1, 2, 7), 10, [1, 2, 7]),
        ((29, 71), 100, [29, 71]),
        ((29, 71), 200, [58, 142]),
        ((9, 1), 1, [1, 0]),
        ((1, 9), 1, [0, 1]),
    ],
)
def test_the_first_batch(parts, batch, want):
    assert divisions(Shares((), parts), batch, 1)[0].tolist() == want


@pytest.mark.parametrize(
    ("parts", "batch", "want"),
    [((1, 1), 8, [4, 4]), ((1, 1), 7, [4, 4]), ((1, 99), 16, [2, 16]), ((2, 3), 4, [3, 4]), ((1, 2), 2, [2, 2])],
)
def test_no_batch_takes_more_than_the_most(parts, batch, want):
    shares = Shares((), parts)
    assert [shares.most(batch, slot) for slot in range(2)] == want
    assert divisions(shares, batch, 50).max(axis=0).tolist() <= want


@pytest.mark.parametrize("quotas", ["", "  ", ",", " , "])
@pytest.mark.parametrize("task_names", [(), KINDS], ids=["unnamed", "named"])
def test_no_quotas_are_one_slot_with_the_whole_batch(quotas, task_names):
    shares = shares_of(quotas, task_names)
    assert shares.slots == 1 and shares.most(8, 0) == 8
    assert shares.slot(jnp.arange(max(len(task_names), 1), dtype=jnp.int8)).tolist() == [0] * max(len(task_names), 1)


@pytest.mark.parametrize(
    ("quotas", "slot_of_task", "parts"),
    [
        ("math=0.5", (0, 1, 1), (1, 1)),
        ("logic=0.25", (1, 1, 0), (1, 3)),
        ("logic=0.25, math=0.5", (1, 2, 0), (1, 2, 1)),
        ("logic=.2,gsm8k=.3,math=.5,", (2, 1, 0), (2, 3, 5)),
        # Where all tasks are named, it is their proportions that count.
        ("math=0.2, gsm8k=0.1, logic=0.1", (0, 1, 2), (2, 1, 1)),
    ],
)
def test_each_task_has_its_slot_and_others_share_the_last(quotas, slot_of_task, parts):
    shares = shares_of(quotas, KINDS)
    assert shares.slot_of_task == slot_of_task
    assert shares.parts == parts
    assert shares.slot(jnp.asarray([2, 0, 1, 0], jnp.int8)).tolist() == [slot_of_task[i] for i in (2, 0, 1, 0)]


def test_padding_has_any_slot():
    shares = shares_of("logic=0.25, math=0.5", KINDS)
    assert 0 <= int(shares.slot(jnp.asarray([-1], jnp.int8))[0]) < shares.slots


def test_the_only_task_has_the_whole_batch():
    assert shares_of("math=0.3", ("math",)).parts == (1,)


def test_shares_may_sum_to_a_hair_above_one():
    assert 0.2 + 0.4 + 0.3 + 0.1 > 1
    assert shares_of("a=0.2, b=0.4, c=0.3, d=0.1", tuple("abcd")).parts == (2, 4, 3, 1)


def test_a_share_too_fine_to_be_exact_is_rounded_and_not_lost():
    shares = shares_of("math=0.0000000001, gsm8k=0.333333333333", KINDS)
    assert min(shares.parts) == 1 and shares.share(1) == pytest.approx(1 / 3, abs=1e-8)


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
    with pytest.raises(ConfigError, match=r"gsm8k=2.* is not task=share"):
        shares_of("math=0.5, gsm8k=2", KINDS)
    with pytest.raises(ConfigError, match="more than 1"):
        shares_of("math=0.6, gsm8k=0.6", KINDS)
    with pytest.raises(ConfigError, match="unnamed"):
        shares_of("math=0.6", ())
