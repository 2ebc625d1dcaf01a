"""Packed rows: bins hold what they may, and give the results of padded rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.arrays.rows import Rows
from pspo_jax.config.defaults import replace
from pspo_jax.config.presets import LOSSES
from pspo_jax.distributed.mesh import batch_sharding, make_mesh, params_shardings
from pspo_jax.losses.log_probs import compact_rows
from pspo_jax.losses.packing import (
    ROWS_PER_BIN,
    assign_bins,
    assign_shared_bins,
    choose_bin_shape,
    loss_lengths,
    padded_length,
)
from pspo_jax.losses.policy_loss import denominators
from pspo_jax.model import transformer
from pspo_jax.model.attention.xla import block_size
from pspo_jax.training.scoring import (
    assign,
    padded_tokens,
    score,
    score_some,
    shape_of_bins,
    shares_prompts,
    uses_packing,
)
from pspo_jax.training.splitting import split_microbatches
from pspo_jax.training.update import loss_gradient
from tests.helpers import relative, slow_except, tiny_config, tiny_policy

R, P, T, G = 24, 9, 20, 4


def rows_with(seed=0, masked=(), r=R):
    """Rows of random tokens and lengths, a third as long as they may be in the mean; four of a prompt."""
    rng = np.random.default_rng(seed)
    lengths = np.repeat(rng.integers(1, P + 1, r // G), G)
    completion_lengths = np.clip(rng.geometric(3 / T, r), 1, T)
    completion_lengths[0], completion_lengths[list(masked)] = T, 0
    tokens = rng.integers(0, 13, (r, T))
    prompts = np.where(np.arange(P) < lengths[:, None], np.repeat(rng.integers(0, 13, (r // G, P)), G, axis=0), 14)

    def log_probs():
        return np.float32(-rng.gamma(2.0, 0.7, (r, T)))

    old = log_probs()
    rows = Rows(
        group=np.repeat(np.arange(r // G, dtype=np.int32), G),
        prompts=np.int32(prompts),
        lengths=np.int32(lengths),
        tokens=np.int32(tokens),
        mask=np.arange(T) < completion_lengths[:, None],
        counted=np.ones(r, bool),
        advantages=np.float32(rng.normal(size=r)),
        loss_weight=np.float32(rng.uniform(0.5, 1, r)),
        old_log_probs=old,
        behaviour_log_probs=old + np.float32(0.1) * log_probs(),
        reference_log_probs=log_probs(),
        stale=np.repeat(rng.random(r) < 0.3, T).reshape(r, T),
        sampling_log_probs=old,
    )
    return jax.device_put(rows)


denominators_of = jax.jit(denominators, static_argnames="count_masked")


@functools.cache
def gradient_of(config, **model_fields):
    """A compiled `loss_gradient` of a config: a function of params, rows and denominators."""
    model = tiny_policy(**model_fields)[0]
    temperature = jnp.float32(0.9)
    return jax.jit(lambda p, rows, total: loss_gradient(model, lambda w, _: w, p, rows, temperature, config, total))


@functools.cache
def score_of(config, windows=None):
    """A compiled `score`, or `score_some`, of a config: a function of params, rows and the wanted rows, None = all."""
    model, _, a = tiny_policy()
    model = model if windows is None else transformer(dataclasses.replace(a, windows=windows))

    def score_rows(params, rows, wanted=None):
        one = jnp.float32(1)
        if wanted is None:
            return score(model, params, rows, one, config)
        return score_some(model, params, rows, wanted, one, config)

    return jax.jit(score_rows)


def bins_of(rows, config):
    """The bins of rows, in one compiled program."""
    model = tiny_policy()[0]
    return jax.jit(lambda rows: assign(model, rows, loss_lengths(rows), config))(rows)


@jax.jit
def perturbed(params):
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(3), x.shape), params)


assign_jitted = jax.jit(assign_bins, static_argnums=(3, 4))
assign_shared_jitted = jax.jit(assign_shared_bins, static_argnums=(3, 4, 5))
NEEDS = st.integers(0, 17)
MANY = st.sampled_from([1, 7, 40])
"""Numbers of rows, or of groups: each is another program to compile."""


@given(MANY.flatmap(lambda n: st.lists(NEEDS, min_size=n, max_size=n)), st.sampled_from([0, 3]))
def test_bins_hold_every_row_once_and_no_more_than_fits(needs, more):
    r, length = len(needs), 17
    needs = np.asarray(needs)
    bins = assign_jitted(jnp.ones(r, jnp.int32), jnp.asarray(needs, jnp.int32), jnp.arange(r), length, r + more)
    assert int(bins.num_tokens) == sum(needs) and bins.owns_prompt.all()
    rows = np.asarray(bins.rows)
    placed = rows[rows < r]
    assert sorted(placed) == [i for i, n in enumerate(needs) if n]
    sizes = [sum(needs[i] for i in bin_ if i < r) for bin_ in rows]
    count = int(bins.num_bins)
    assert max(sizes) <= length and all(s > 0 for s in sizes[:count]) and not any(sizes[count:])
    # First-fit decreasing, naively.
    room: list[list[int]] = []
    for i in sorted(range(r), key=lambda i: -needs[i]):
        if needs[i]:
            fits = (b for b in room if sum(needs[j] for j in b) + needs[i] <= length and len(b) < ROWS_PER_BIN)
            home = next(fits, None)
            if home is None:
                room.append([i])
            else:
                home.append(i)
    assert [[i for i in bin_ if i < r] for bin_ in rows[:count]] == room


GROUP = st.tuples(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=3, max_size=3))


@given(MANY.flatmap(lambda n: st.lists(GROUP, min_size=n, max_size=n)))
def test_groups_share_a_prompt_in_a_bin(groups):
    """Every row once, a prompt once for neighbours of its group, and in a bin that holds it where there is room."""
    prompts = np.repeat([p for p, _ in groups], 3)
    completion_lengths = np.array([c for _, cs in groups for c in cs])
    r, length = len(prompts), 17
    args = jnp.asarray(prompts, jnp.int32), jnp.asarray(completion_lengths, jnp.int32)
    bins = assign_jitted(*args, jnp.arange(r) // 3, length, r)
    rows, owners = np.asarray(bins.rows), np.asarray(bins.owns_prompt)
    assert sorted(rows[rows < r]) == [i for i in range(r) if completion_lengths[i]]
    used = 0
    for bin_, owns in zip(rows, owners, strict=True):
        held = [i for i in bin_ if i < r]
        assert [bool(x) for x in owns[: len(held)]] == [
            k == 0 or held[k] // 3 != held[k - 1] // 3 for k in range(len(held))
        ]
        length_of_bin = sum(
            completion_lengths[i] - 1 + (prompts[i] if x else 0) for i, x in zip(held, owns, strict=False)
        )
        assert length_of_bin <= length
        used += length_of_bin
    assert int(bins.num_tokens) == used
    alone = assign_jitted(*args, jnp.arange(r), length, r)
    assert used <= int(alone.num_tokens)
    assert int(assign_shared_jitted(*args, jnp.arange(r) // 3, length, r).num_bins) == min(
        int(bins.num_bins), int(alone.num_bins)
    )


def both(loss="grpo", masked=(), seed=0, model_fields=None, **fields):
    """What `loss_gradient` returns, packed and padded: gradients, metrics, sampler mismatch, token utilisation."""
    fields = {"loss__name": loss, "loss__microbatch_rows": 4} | fields
    config = tiny_config(**fields)
    model_fields = model_fields or {}
    params = perturbed(tiny_policy(**model_fields)[1])
    rows = rows_with(seed, masked)
    if not config.loss.kl_coef:
        rows = rows.replace(reference_log_probs=None)
    args = params, rows, denominators_of(rows, count_masked=config.loss.count_masked)
    packed, padded = (replace(config, {"loss.packing": packing}) for packing in (True, False))
    # Padded rows share nothing, so one program serves whether or not packed rows share prompts.
    padded = replace(padded, {"loss.share_prompts": None})
    return gradient_of(packed, **model_fields)(*args), gradient_of(padded, **model_fields)(*args)


SOME = ("gspo",)
"""Ratios and weights by row; packing ends before the loss begins, so the others are alike."""
OTHERS = sorted(set(LOSSES) - set(SOME))


@pytest.mark.parametrize("loss", [*SOME, *(pytest.param(x, marks=pytest.mark.slow) for x in OTHERS)])
def test_every_loss_is_the_padded_one(loss):
    """Loss, metrics and gradients to 1e-5."""
    packed, padded = both(loss, loss__kl_coef=0.05, loss__entropy_coef=0.01)
    for a, b in zip(jax.tree.leaves(packed[1:3]), jax.tree.leaves(padded[1:3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert relative(packed[0], padded[0]) < 1e-5
    assert packed[3].computed < padded[3].computed * 0.5
    assert packed[3].needed < padded[3].needed


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"masked": (3, 5)}, id="without tokens"),
        pytest.param({"masked": tuple(range(R))}, id="no tokens at all", marks=pytest.mark.slow),
        pytest.param(
            {"model_fields": {"qkv_bias": True, "kv_heads": 1, "remat": "full"}}, id="remat", marks=pytest.mark.slow
        ),
        pytest.param({"loss__logits_mib": 1, "loss__microbatch_rows": 24}, id="one microbatch", marks=pytest.mark.slow),
        pytest.param({"loss__share_prompts": False}, id="prompts not shared", marks=pytest.mark.slow),
    ],
)
def test_odd_batches_are_the_padded_ones(fields):
    packed, padded = both(**fields)
    np.testing.assert_allclose(packed[1].loss, padded[1].loss, rtol=1e-5, atol=1e-6)
    if float(size(padded[0])):
        assert relative(packed[0], padded[0]) < 1e-5
    else:
        assert float(size(packed[0])) == 0


def size(tree):
    return sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tree))


def test_scores_are_the_padded_ones():
    _, params, _ = tiny_policy()
    rows, config = rows_with(1, masked=(2,)), tiny_config(loss__microbatch_rows=4)
    on = replace(config, {"loss.packing": True})
    packed, padded = (score_of(c)(params, rows) for c in (on, config))
    for a, b in zip(packed, padded, strict=True):
        np.testing.assert_allclose(jnp.where(rows.mask, a, 0), jnp.where(rows.mask, b, 0), atol=1e-5)
    wanted = jnp.repeat(jnp.asarray([True, False, True, False, False, True]), G)
    packed, padded = (score_of(c)(params, rows, wanted) for c in (on, config))
    np.testing.assert_allclose(jnp.where(rows.mask, packed, 0), jnp.where(rows.mask, padded, 0), atol=1e-5)


@pytest.mark.slow
def test_rows_split_over_minibatches_share_with_their_own_group_alone():
    """Rows of a group need not stand side by side, nor be whole groups."""
    _, params, _ = tiny_policy()
    config = tiny_config(loss__microbatch_rows=2)
    part = jax.tree.map(lambda x: x[1], split_microbatches(rows_with(3), 3))
    on = replace(config, {"loss.packing": True})
    assert not bins_of(part, on).owns_prompt.all()
    packed, padded = (score_of(c)(params, part)[0] for c in (on, config))
    np.testing.assert_allclose(jnp.where(part.mask, packed, 0), jnp.where(part.mask, padded, 0), atol=1e-5)


def test_windows_reach_into_a_shared_prompt_by_position():
    _, params, _ = tiny_policy()
    rows, config = rows_with(4), tiny_config(loss__microbatch_rows=4)
    packed, padded = (
        score_of(c, windows=(None, 6))(params, rows)[0] for c in (replace(config, {"loss.packing": True}), config)
    )
    np.testing.assert_allclose(jnp.where(rows.mask, packed, 0), jnp.where(rows.mask, padded, 0), atol=1e-5)


def test_a_row_sees_only_itself():
    """Another row's tokens in the same bin change nothing."""
    _, params, _ = tiny_policy()
    rows, config = rows_with(), tiny_config(loss__microbatch_rows=8, loss__packing=True)
    other = rows.replace(tokens=rows.tokens.at[7:].set((rows.tokens[7:] + 1) % 13))
    assert int(assign_jitted(rows.lengths, loss_lengths(rows), rows.group, P + T - 1, R).num_bins) < 10
    a, b = (score_of(config)(params, x)[0] for x in (rows, other))
    np.testing.assert_array_equal(a[:7], b[:7])
    assert float(jnp.abs(a - b)[7:].max()) > 0.1


@pytest.mark.slow
def test_many_short_completions_of_a_short_prompt():
    """The last token of a shared prompt predicts a token of every row: there may be more predictions than tokens."""
    r = 16
    rows = rows_with(2, r=r)
    rows = rows.replace(
        group=jnp.zeros(r, jnp.int32),
        prompts=jnp.full((r, P), 3),
        lengths=jnp.ones(r, jnp.int32),
        mask=jnp.broadcast_to(jnp.arange(T) < 2, (r, T)),
    )
    _, params, _ = tiny_policy()
    config = tiny_config(loss__microbatch_rows=4)
    on = replace(config, {"loss.packing": True})
    planned = bins_of(rows, on)
    assert (int(planned.num_bins), int(planned.num_tokens)) == (1, 1 + r) and 2 * r > P + T - 1
    packed, padded = (score_of(c)(params, rows)[0] for c in (on, config))
    np.testing.assert_allclose(packed[:, :2], padded[:, :2], atol=1e-5)


def test_packing_is_chosen_for_long_completions():
    model, _, _ = tiny_policy()
    rows, config = rows_with(), tiny_config(loss__microbatch_rows=4)
    long = dataclasses.replace(rows, tokens=jnp.zeros((R, 256), jnp.int32))
    assert not uses_packing(model, rows, config) and uses_packing(model, long, config)
    assert not uses_packing(model, long, replace(config, {"loss.packing": False}))
    assert not uses_packing(model, long, replace(config, {"loss.microbatch_rows": 0}))
    assert not uses_packing(model._replace(packs=False), long, config)
    with pytest.raises(ValueError, match=r"loss.packing=true: this model's `hidden` takes no packed rows"):
        uses_packing(model._replace(packs=False), rows, replace(config, {"loss.packing": True}))
    with pytest.raises(ValueError, match=r"loss.share_prompts=true: this model's `hidden` cannot"):
        shares_prompts(model._replace(shares=False), replace(config, {"loss.share_prompts": True}))


MESHES = [(2, 1, 2, 2, 1), (2, 2, 1, 2, 1), (2, 1, 4, 1, 1), (4, 2, 1, 1, 2), (8, 1, 1, 1, 4)]


@pytest.mark.parametrize("mesh", slow_except([(2, 1, 2, 2, 1)], MESHES), ids=str)
def test_a_mesh_changes_nothing(mesh):
    """Packed on eight devices, along context and over slices too, against padded on one."""
    config = tiny_config(loss__name="gspo", loss__microbatch_rows=8)
    model, params, _ = tiny_policy(scan_unroll=1)
    rows = rows_with().replace(reference_log_probs=None)
    total = denominators_of(rows)

    def run(packing, params, rows):
        c = replace(config, {"loss.packing": packing})
        return jax.jit(lambda p, x: loss_gradient(model, lambda w, _: w, p, x, jnp.float32(1), c, total))(params, rows)

    names = ("mesh.data", "mesh.fsdp", "mesh.context", "mesh.tensor", "mesh.slices")
    grid = make_mesh(replace(config, dict(zip(names, mesh, strict=True))))
    padded = run(False, params, rows)
    with jax.set_mesh(grid):
        split = jax.device_put(params, params_shardings(grid, params, model.axes))
        packed = run(True, split, jax.device_put(rows, batch_sharding(grid)))
    assert relative(packed[0], padded[0]) < 1e-5
    np.testing.assert_allclose(packed[1].loss, padded[1].loss, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rows_at_a_time", [0, 64])
def test_a_whole_minibatch_at_a_time_computes_no_more_bins_than_an_eighth_beyond_those_needed(rows_at_a_time):
    config = tiny_config(loss__packing=True, loss__microbatch_rows=rows_at_a_time)
    model, params, _ = tiny_policy()
    rows = rows_with(r=64)
    args = params, rows, denominators_of(rows)
    packed, padded = (gradient_of(replace(config, {"loss.packing": x}))(*args) for x in (True, False))
    assert relative(packed[0], padded[0]) < 1e-5
    needed = int(bins_of(rows, config).num_bins)
    shape = shape_of_bins(model, rows, config)
    b = shape.at_a_time
    assert needed < 20 and b * shape.length <= 8 * (P + T - 1)
    assert int(packed[3].computed) == -(-needed // b) * b * shape.length
    assert int(padded[3].computed) == 64 * (P + T)


def test_long_padded_rows_are_counted_as_they_are_computed():
    """The length of so long a bin is rounded up for attention; that of padded rows is not."""
    rows = rows_with()
    longer = rows.replace(prompts=jnp.pad(rows.prompts, ((0, 0), (0, 1100 - P)), constant_values=14))
    assert shape_of_bins(tiny_policy()[0], longer, tiny_config(loss__packing=True)).length % 128 == 0
    assert padded_tokens(longer) == compact_rows(longer.prompts, longer.lengths, longer.tokens).size == R * (1100 + T)


@given(st.integers(1, 1500), st.integers(1, 1500), st.integers(2, 32), st.integers(1, 64), st.sampled_from([1, 2, 8]))
def test_a_microbatch_of_bins_takes_no_more_room_than_its_rows(prompt, completion, group_size, rows, shards):
    """Tokens, and tokens with scores, are at most those of the rows; the mesh divides the bins; every row fits."""
    shape = choose_bin_shape(prompt, completion, group_size, rows * shards, shards)
    alone = padded_length(prompt + completion - 1)
    assert alone <= shape.length <= padded_length(prompt + group_size * (completion - 1))
    assert shape.at_a_time >= shards and shape.at_a_time % shards == 0
    assert shape.at_a_time * shape.length <= rows * shards * alone
    of_bin, of_row = (x + x * block_size(x, 1) / 512 for x in (shape.length, alone))
    assert shape.at_a_time * of_bin <= rows * shards * of_row


@pytest.mark.parametrize(
    ("sizes", "length"),
    [((64, 12, 8), 152), ((64, 12, 4), 108), ((256, 2048, 8), 2304), ((9, 1, 8), 9)],
    ids=("a group of short completions", "a smaller group", "long completions", "completions of one token"),
)
def test_a_bin_is_as_long_as_sharing_wants(sizes, length):
    assert choose_bin_shape(*sizes, rows=64, shards=1).length == length


def test_enough_tokens_bound_a_microbatch():
    at_once = [choose_bin_shape(64, 12, 8, 64, 2, enough=n).at_a_time for n in (1, 304, 305, 609, None)]
    assert at_once[:4] == [2, 2, 4, 6] and at_once[4] > 20


def test_a_group_of_short_completions_shares_one_prompt():
    """Eight completions of 12 tokens behind a prompt of 50, of at most 64, stand in one bin."""
    shape = choose_bin_shape(64, 12, 8, 8, 1)
    assert shape.length * shape.at_a_time <= 8 * 75
    prompts, completions = jnp.full(64, 50), jnp.full(64, 12)
    found = assign_shared_jitted(prompts, completions, jnp.arange(64) // 8, shape.length, 64, shape.rows)
    assert int(found.num_bins) == 8 and int(found.num_tokens) == 8 * (50 + 8 * 11)
    before = assign_shared_jitted(prompts, completions, jnp.arange(64) // 8, 75, 64)
    assert int(before.num_bins) == 32
