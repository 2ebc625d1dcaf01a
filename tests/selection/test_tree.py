"""The tree: the best k equal a full sort, levels equal a rebuild, and draws have their exact probabilities."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pspo_jax.arrays.per_prompt import FANOUT, padded_rows
from pspo_jax.selection.engine import tree

PROMPTS = {"one block": 100, "blocks": 1000, "superblocks": 40_000}
CLASSES = 4
"""Classes: the third has few members, and the last has none."""
SEEDS = st.integers(0, 2**32 - 1)

build_maxima = jax.jit(tree.build_maxima, static_argnums=3)
build_sums = jax.jit(tree.build_sums, static_argnums=2)
update_maxima, update_sums = jax.jit(tree.update_maxima), jax.jit(tree.update_sums)
top = jax.jit(tree.top, static_argnums=5)
top_pairs = jax.jit(tree.top_pairs, static_argnums=2)


# Programs with many draws are worth LLVM's optimisations, which the suite does without.
fast_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
)


@functools.partial(fast_jit, static_argnums=5)
def descend(levels, value, label, cls, key, size):
    return tree.descend(levels, tree.Leaves(value, label, cls), key, size)


@functools.partial(jax.jit, static_argnums=5)
def draw(levels, value, label, cls, key, k):
    return tree.draw(levels, tree.Leaves(value, label, cls), key, k)


@functools.partial(fast_jit, static_argnums=5)
def draw_many(levels, value, label, cls, keys, k, taken):
    return jax.vmap(lambda key: tree.draw(levels, tree.Leaves(value, label, cls), key, k, taken))(keys)


def labels(rng, prompts):
    label = np.full(padded_rows(prompts), -1, np.int8)
    label[:prompts] = rng.choice(CLASSES, prompts, p=[0.6, 1 - 0.6 - 5 / prompts, 5 / prompts, 0])
    return label


def keys_and_ties(rng, rows, key_values, tie_values):
    """Keys and ties of few distinct values, which include both zeros and the keys of ineligible prompts."""
    pool = np.concatenate([rng.normal(size=key_values), [0.0, -0.0, -1e30, -2e30]])[:key_values]
    return (rng.choice(pool, rows).astype(np.float32), rng.integers(1, tie_values + 1, rows).astype(np.float32))


def sorted_top(key, tie, label, cls, k):
    members = np.flatnonzero(label == cls)
    return np.sort(members[np.lexsort((members, -tie[members], -key[members]))[:k]])


def assert_top(key, tie, label, k, classes=CLASSES):
    levels = build_maxima(key, tie, label, classes)
    for cls in range(classes):
        rows, keys, ties = (np.asarray(x) for x in top(levels, cls, key, tie, label, k))
        assert rows.shape == keys.shape == ties.shape == (k,)
        want, found = sorted_top(key, tie, label, cls, k), keys > -np.inf
        np.testing.assert_array_equal(rows[found], want)
        np.testing.assert_array_equal(keys[found], key[want])
        np.testing.assert_array_equal(ties[found], tie[want])


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@given(SEEDS, st.sampled_from([1, 2, 5, 1000]), st.sampled_from([1, 3, 1000]), st.sampled_from([1, 17, 200]))
def test_top_equals_a_full_sort(prompts, seed, key_values, tie_values, k):
    rng = np.random.default_rng(seed)
    label = labels(rng, prompts)
    assert_top(*keys_and_ties(rng, len(label), key_values, tie_values), label, k)


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("spread", ["first rows", "last rows", "one a block", "in one block"])
def test_top_finds_the_best_wherever_they_are(prompts, spread):
    label = labels(np.random.default_rng(0), prompts)
    row = np.arange(len(label))
    key = {
        "first rows": -row,
        "last rows": row,
        "one a block": row % FANOUT == 77,
        "in one block": row // FANOUT == prompts // FANOUT // 2,
    }[spread]
    assert_top(key.astype(np.float32), np.ones(len(label), np.float32), label, 17)


def test_top_of_more_than_there_are_rows_is_all_of_them():
    label = np.where(np.arange(128) < 100, 0, -1).astype(np.int8)
    key, tie = keys_and_ties(np.random.default_rng(0), 128, 5, 5)
    rows, keys, _ = top(build_maxima(key, tie, label, 1), 0, key, tie, label, 200)
    assert np.asarray(rows)[np.asarray(keys) > -np.inf].tolist() == list(range(100))


@given(SEEDS, st.sampled_from([1, 2, 4, 50]), st.sampled_from([1, 2, 50]), st.sampled_from([1, 9, 130]))
def test_top_pairs_equals_a_full_sort(seed, key_values, tie_values, k):
    rng = np.random.default_rng(seed)
    key, tie = keys_and_ties(rng, 130, key_values, tie_values)
    key = np.where(rng.random(130) < 0.3, -np.inf, key).astype(np.float32)
    want = np.sort(np.lexsort((np.arange(130), -tie, -key))[:k])
    np.testing.assert_array_equal(top_pairs(key, tie, k), want)


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@given(SEEDS, st.booleans())
def test_updated_levels_equal_rebuilt_ones(prompts, seed, whole):
    rng = np.random.default_rng(seed)

    def weights(n):
        # Sums of small whole numbers are exact in any order; of others, equal but for the order of the additions.
        return rng.integers(0, 9, n) if whole else 10 ** rng.uniform(-30, 30, n) * (rng.random(n) < 0.7)

    label = labels(rng, prompts)
    key, tie = keys_and_ties(rng, len(label), 50, 3)
    weight = weights(len(label)).astype(np.float32)
    maxima, sums = build_maxima(key, tie, label, CLASSES), build_sums(weight, label, CLASSES)
    for _ in range(3):
        rows = np.concatenate([rng.integers(0, prompts, 150), rng.integers(0, min(prompts, FANOUT), 50)])
        key[rows], tie[rows] = keys_and_ties(rng, 200, 50, 3)
        weight[rows] = weights(200)
        label[rows] = rng.integers(0, CLASSES, 200)
        blocks = rows // FANOUT
        assert len(set(blocks.tolist())) < len(blocks)
        keys, ties, values, own = (x.reshape(-1, FANOUT)[blocks] for x in (key, tie, weight, label))
        maxima, sums = update_maxima(maxima, blocks, keys, ties, own), update_sums(sums, blocks, values, own)
    jax.tree.map(np.testing.assert_array_equal, maxima, build_maxima(key, tie, label, CLASSES))
    for got, want in zip(sums, build_sums(weight, label, CLASSES), strict=True):
        np.testing.assert_allclose(got, want, rtol=0 if whole else 1e-6)


def test_block_rows_are_the_leaves_of_a_block_or_of_the_last():
    leaves = np.arange(5 * FANOUT)
    want = leaves.reshape(5, FANOUT)[[3, 0, 3, 4, 4]]
    np.testing.assert_array_equal(tree.block_rows(jnp.asarray(leaves), jnp.asarray([3, 0, 3, 4, 9])), want)


def test_levels_are_the_maxima_and_sums_of_their_blocks():
    rng = np.random.default_rng(0)
    label = labels(rng, 40_000)
    key, tie = keys_and_ties(rng, len(label), 5, 1000)
    weight = rng.integers(0, 9, len(label)).astype(np.float32)
    maxima, sums = build_maxima(key, tie, label, CLASSES), build_sums(weight, label, CLASSES)
    for cls in range(CLASSES):
        for size, keys, ties, totals in (
            (FANOUT, maxima.key_one, maxima.tie_one, sums.one),
            (FANOUT**2, maxima.key_two, maxima.tie_two, sums.two),
        ):
            own = (label == cls).reshape(-1, size)
            largest = np.where(own, key.reshape(-1, size), -np.inf).max(1)
            of_those = own & (key.reshape(-1, size) == largest[:, None])
            np.testing.assert_array_equal(keys[cls], largest)
            np.testing.assert_array_equal(ties[cls], np.where(of_those, tie.reshape(-1, size), -np.inf).max(1))
            np.testing.assert_array_equal(totals[cls], np.where(own, weight.reshape(-1, size), 0).sum(1))


def fit(seen, p):
    """p-value of the counts, with the rarest of them added up."""
    seen, want = np.asarray(seen, float), np.asarray(p) * np.sum(seen)
    rare = want < 5
    if rare.any():
        seen, want = (np.append(x[~rare], x[rare].sum()) for x in (seen, want))
    if want[-1] == 0:
        assert seen[-1] == 0
        seen, want = seen[:-1], want[:-1]
    return stats.chisquare(seen, want * seen.sum() / want.sum()).pvalue


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_descend_draws_in_proportion_to_weight_and_never_weight_zero(prompts):
    rng = np.random.default_rng(1)
    label = labels(rng, prompts)
    weight = (rng.uniform(0.2, 2, len(label)) * (rng.random(len(label)) < 0.6)).astype(np.float32)
    weight[: min(prompts // 4, 2 * FANOUT**2)] = 0  # whole blocks and a superblock without weight
    levels = build_sums(weight, label, CLASSES)
    for cls in (0, 1):
        own = np.where(label == cls, weight, 0).astype(float)
        rows = np.asarray(descend(levels, weight, label, cls, jax.random.key(cls), 100_000))
        seen = np.bincount(rows, minlength=len(label))
        assert seen[own == 0].sum() == 0
        per = len(label) // 1024 or 1  # bins with enough expected draws
        assert fit(seen.reshape(-1, per).sum(1), own.reshape(-1, per).sum(1) / own.sum()) > 1e-3


def test_descend_without_any_weight_is_minus_one():
    rng = np.random.default_rng(1)
    label = labels(rng, 1000)
    weight = np.where(label == 1, 0, 1).astype(np.float32)
    levels = build_sums(weight, label, CLASSES)
    for cls in (1, 3):
        assert (np.asarray(descend(levels, weight, label, cls, jax.random.key(0), 50)) == -1).all()
        assert (np.asarray(draw(levels, weight, label, cls, jax.random.key(0), 5)) == -1).all()


@pytest.mark.parametrize("length", [FANOUT, 640], ids=["a block", "superblocks of ten million prompts"])
def test_no_number_leads_to_weight_zero(length):
    rng = np.random.default_rng(2)
    for _ in range(5):
        weight = (rng.gamma(0.3, 1, length) * (rng.random(length) < 0.5)).astype(np.float32)
        share = np.cumsum(weight.astype(float)) / weight.sum(dtype=float)
        # The numbers that jax.random.uniform can give near the steps of the cumulative sum.
        u = np.clip(np.floor(share * 2**23)[:, None] + np.arange(-4, 5), 0, 2**23 - 1).ravel() / 2**23
        inverse = jax.jit(tree._inverse)
        assert (weight[np.asarray(inverse(weight, jnp.asarray(u, jnp.float32)))] > 0).all()
        if length == FANOUT:
            many = jnp.broadcast_to(weight, (len(u), length))
            assert (weight[np.asarray(inverse(many, jnp.asarray(u, jnp.float32)))] > 0).all()


def spread(weights, classes, size=3 * FANOUT):
    """Leaves with these weights on rows far apart, and their rows; the last ten leaves are padding."""
    value, label = np.zeros(size, np.float32), np.zeros(size, np.int8)
    rows = np.linspace(5, size - 20, len(weights)).astype(int)
    value[rows], label[rows] = weights, classes
    label[-10:] = -1
    return value, label, rows


def successive(weights, k):
    """Probability of each ordered k of some rows in successive draws without replacement."""
    out = {}
    for order in itertools.permutations(weights, k):
        # Sums anew, since one less a weight that is nearly all of it would be rounding.
        left = [sum(w for row, w in weights.items() if row not in order[:i]) for i in range(k)]
        out[order] = np.prod([weights[row] / total for row, total in zip(order, left, strict=True)])
    return out


def assert_successive(drawn, rows, weights, k):
    """Whether ordered draws follow the enumeration."""
    want = successive({int(r): float(w) for r, w in zip(rows, weights, strict=True) if w > 0}, k)
    counts = dict.fromkeys(want, 0)
    for order in map(tuple, np.asarray(drawn).tolist()):
        counts[order] += 1  # KeyError: not k distinct rows with weight
    assert fit(list(counts.values()), list(want.values())) > 1e-3


@pytest.mark.parametrize(
    ("cls", "weights", "taken", "k"),
    [
        (0, [1.0, 0.1, 0.0, 3.0, 0.4], [], 3),
        (1, [2e-30, 1e-30, 3e-30, 1e-30], [], 3),
        # One row holds nearly all: the rounds find none of the others, or some.
        (0, [1e-6, 3e-6, 1e6, 2e-6, 1e-6], [], 3),
        (0, [0.001, 0.002, 1.0, 0.001], [], 3),
        (1, [0.5, 9.0, 1.0, 2.0, 5.0, 3.0], [1, 4], 3),
        # Two rows are left for three draws.
        (0, [3e-6, 1e6, 0.0, 1e-6, 2e6], [1, 4], 2),
    ],
    ids=["even", "tiny", "one of 1e12", "one of 1000", "some taken", "taken hold all"],
)
def test_draws_are_successive_draws_without_replacement(monkeypatch, cls, weights, taken, k):
    # With small blocks, a few rows are under several superblocks, and many draws cost little.
    monkeypatch.setattr(tree, "FANOUT", 8)
    # The other class has as much weight, among the same rows.
    both = np.repeat(weights, 2)
    value, label, rows = spread(both, np.arange(len(both)) % 2, 3 * 8 * 8)
    rows = rows[cls::2]
    held = np.append(rows[taken], [-1] * (2 - len(taken))).astype(np.int32)
    keys = jax.random.split(jax.random.key(3), 20_000)
    drawn = np.asarray(draw_many(tree.build_sums(value, label, 2), value, label, cls, keys, 3, held))
    assert (drawn[:, k:] == -1).all()
    assert_successive(drawn[:, :k], rows, [0 if i in taken else w for i, w in enumerate(weights)], k)


def test_fewer_rows_with_weight_than_draws_leave_gaps_at_the_end():
    value, label, rows = spread([1.0, 0.0, 3.0, 2.0], 0)
    drawn = draw(build_sums(value, label, 1), value, label, 0, jax.random.key(0), 6).tolist()
    assert set(drawn[:3]) == set(rows[[0, 2, 3]].tolist()) and drawn[3:] == [-1, -1, -1]


def test_more_draws_than_rows_are_all_rows():
    label = np.where(np.arange(128) < 100, 0, -1).astype(np.int8)
    weight = np.ones(128, np.float32)
    drawn = draw(build_sums(weight, label, 1), weight, label, 0, jax.random.key(0), 200).tolist()
    assert sorted(drawn[:100]) == list(range(100)) and drawn[100:] == [-1] * 100


@pytest.mark.slow
def test_draws_across_classes_are_by_weigh_and_member():
    """Exploration draws every eligible row of a quota's pools with the same probability."""
    value, label, rows = spread([0.001, 100.0, 7.0, 1.0, 5.0, 0.0], [0, 1, 1, 2, 0, 1])

    def some(value):
        return (value > 0).astype(jnp.float32)

    levels = build_sums(some(value), label, 3)
    merged = tree.Sums(*(x[:2].sum(0, keepdims=True) for x in levels))
    leaves = tree.Leaves(jnp.asarray(value), jnp.asarray(label), 0, some, lambda label: label < 2)
    keys = jax.random.split(jax.random.key(6), 20_000)
    drawn = fast_jit(jax.vmap(lambda key: tree.draw(merged, leaves, key, 2)))(keys)
    assert_successive(drawn, rows, [1, 1, 1, 0, 1, 0], 2)


@pytest.mark.parametrize("heavy", [0, 3], ids=["even", "three rows hold all"])
def test_draws_of_many_rows_are_distinct_and_have_weight(heavy):
    rng = np.random.default_rng(7)
    label = labels(rng, 40_000)
    weight = (rng.uniform(0.2, 2, len(label)) * (rng.random(len(label)) < 0.6)).astype(np.float32)
    most = np.flatnonzero((label == 0) & (weight > 0))[5_000 : 5_000 + heavy]
    weight[most] = 1e20
    drawn = np.asarray(draw(build_sums(weight, label, CLASSES), weight, label, 0, jax.random.key(0), 64))
    assert len(set(drawn.tolist())) == 64
    assert ((weight > 0) & (label == 0))[drawn].all()
    assert set(drawn[:heavy].tolist()) == set(most.tolist())


def test_draws_depend_on_the_key_alone():
    value, label, _ = spread(np.ones(100), 0)
    levels = build_sums(value, label, 1)
    first, again, other = (draw(levels, value, label, 0, jax.random.key(seed), 9).tolist() for seed in (0, 0, 1))
    assert first == again != other


SHAPE = re.compile(r"\b[a-z]+\d+\[([\d,]*)\]")
DEFINED = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = (.*?[\])}]) ([\w-]+)\(")


def instructions(function, *args):
    """Opcode, most elements of its results and operands, and text of each instruction of a compiled program."""
    found, size = [], {}
    for line in jax.jit(function).lower(*args).compile().as_text().splitlines():
        if match := DEFINED.match(line):
            name, result, opcode = match.groups()
            size[name] = max((elements(dims) for dims in SHAPE.findall(result)), default=0)
            operands = [size.get(x, 0) for x in re.findall(r"%([\w.-]+)", line[match.end() :])]
            found.append((opcode, size[name], max([size[name], *operands]), line))
    return found


def elements(dims):
    return int(np.prod([int(n) for n in dims.split(",") if n]))


def longest_sort(found):
    return max(n for opcode, _, n, line in found if opcode in ("sort", "topk") or '"TopK"' in line)


MILLIONS = padded_rows(2_000_000)
LEAVES = jax.ShapeDtypeStruct((MILLIONS,), jnp.float32)
LABELS = jax.ShapeDtypeStruct((MILLIONS,), jnp.int8)


def test_a_full_sort_would_be_noticed():
    assert longest_sort(instructions(lambda key: jax.lax.top_k(key, 64), LEAVES)) == MILLIONS
    assert longest_sort(instructions(jnp.sort, LEAVES)) == MILLIONS


def test_top_computes_nothing_as_long_as_the_data():
    levels = jax.eval_shape(lambda key, label: tree.build_maxima(key, key, label, 2), LEAVES, LABELS)
    found = instructions(lambda *a: tree.top(a[0], 1, *a[1:], 64), levels, LEAVES, LEAVES, LABELS)
    assert longest_sort(found) <= 64 * FANOUT
    assert {opcode for opcode, size, _, _ in found if size > 200_000} <= {"parameter", "bitcast", "reshape"}


def test_a_change_of_few_rows_computes_nothing_as_long_as_the_data():
    def update(levels, leaves, label, blocks):
        of_blocks = tree.block_rows(leaves, blocks), tree.block_rows(label, blocks)
        return tree.update_maxima(levels[0], blocks, of_blocks[0], *of_blocks), tree.update_sums(
            levels[1], blocks, *of_blocks
        )

    levels = jax.eval_shape(
        lambda x, label: (tree.build_maxima(x, x, label, 2), tree.build_sums(x, label, 2)), LEAVES, LABELS
    )
    found = instructions(update, levels, LEAVES, LABELS, jax.ShapeDtypeStruct((64,), jnp.int32))
    assert {opcode for opcode, size, _, _ in found if size > 200_000} <= {"parameter", "bitcast", "reshape"}


def test_draw_sorts_nothing_as_long_as_the_data():
    levels = jax.eval_shape(lambda x, label: tree.build_sums(x, label, 2), LEAVES, LABELS)
    key = jax.eval_shape(lambda: jax.random.key(0))
    found = instructions(lambda s, v, x, k: tree.draw(s, tree.Leaves(v, x, 1), k, 64), levels, LEAVES, LABELS, key)
    assert longest_sort(found) <= 64 * FANOUT
