"""Divergences over the whole vocabulary: against NumPy and torch, in chunks as in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config.schema import ModelConfig
from pspo_jax.losses.divergence import Predictor, chunked_divergence, divergence_of
from pspo_jax.model import built_in, transformer
from pspo_jax.model.interface import MASKED
from tests.helpers import slow_except
from tests.losses.test_log_probs import head_policy
from tests.model.checkpoints import torch

KINDS = ("forward_kl", "reverse_kl", "jsd")


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def in_numpy(log_p, log_q, kind, beta):
    p, q = np.exp(log_p), np.exp(log_q)

    def kl(a, b):
        return np.where(a > 0, a * (np.log(np.maximum(a, 1e-300)) - np.log(np.maximum(b, 1e-300))), 0).sum(-1)

    m = beta * q + (1 - beta) * p
    return {"forward_kl": kl(q, p), "reverse_kl": kl(p, q), "jsd": beta * kl(q, m) + (1 - beta) * kl(p, m)}[kind]


@given(st.integers(0, 2**31 - 1), st.integers(2, 9), st.floats(0.05, 0.95), st.booleans())
def test_every_divergence_is_numpy_s_and_0_at_the_teacher(seed, v, beta, masks):
    """With ids that neither may draw, too."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (2, v))
    if masks:
        logits[:, 0] = MASKED
    log_p, log_q = log_softmax(logits)
    for kind in KINDS:
        found = float(divergence_of(jnp.float32(log_p), jnp.float32(log_q), kind, beta))
        assert found == pytest.approx(float(in_numpy(log_p, log_q, kind, beta)), rel=1e-4, abs=2e-6)
        assert found > -2e-6
        same = float(divergence_of(jnp.float32(log_p), jnp.float32(log_p), kind, beta))
        assert same == pytest.approx(0, abs=2e-6)


def in_torch(log_p, log_q, kind, beta):
    """Divergences [R, T] by torch's own kl_div, as TRL's GKDTrainer calls it."""
    if kind == "forward_kl":
        return torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    if kind == "reverse_kl":
        return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    b = torch.tensor(beta)
    log_m = torch.logsumexp(torch.stack([log_p + torch.log(1 - b), log_q + torch.log(b)]), 0)
    of_teacher = torch.nn.functional.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    of_policy = torch.nn.functional.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    return beta * of_teacher + (1 - beta) * of_policy


@pytest.mark.parametrize(
    ("kind", "rows"), slow_except([("jsd", 6_000)], [(k, n) for k in KINDS for n in (11, 4_000, 6_000)], several=True)
)
def test_values_and_gradients_are_torch_s(kind, rows):
    """In chunks of few columns, some of which nobody needs, with a teacher of fewer or more rows than the policy.

    The policy never draws an id that the teacher lacks.
    """
    r, t, v, beta = 3, 13, 5_000 if rows > 11 else 11, 0.3
    rng = np.random.default_rng(0)

    def array(*shape):
        return np.float32(0.5 * rng.normal(size=shape))

    hidden, head, of_teacher, teacher_head = array(r, t, 8), array(8, v), array(r, t, 6), array(6, rows)
    head[:, -1], weight = 0, array(r, t)
    shared = np.arange(v) < rows
    targets, live = rng.integers(0, min(v, rows) - 1, (r, t)), np.arange(t) < np.array([[5], [3], [6]])

    def ours(params, hidden, of_teacher, valid):
        masked = head_policy(v)._replace(logits=lambda p, h: jnp.where(shared, h @ p["head"], MASKED))
        policy = Predictor(masked, params, hidden)
        teacher = Predictor(head_policy(rows), {"head": teacher_head}, of_teacher)
        found = chunked_divergence(policy, teacher, targets, kind, beta, 0.7, logits_mib=1, valid=valid)
        total = (jnp.where(live, weight * found.divergence, 0) + jnp.where(live, found.log_probs, 0)).sum()
        return total, found

    x, w = torch.tensor(hidden, requires_grad=True), torch.tensor(head, requires_grad=True)
    theirs = torch.tensor(of_teacher @ teacher_head / 0.7)[..., :v]
    log_q = torch.log_softmax(torch.nn.functional.pad(theirs, (0, v - theirs.shape[-1]), value=MASKED), -1)
    log_p = torch.log_softmax(torch.where(torch.tensor(shared), x @ w, MASKED) / 0.7, -1)
    divergence = in_torch(log_p, log_q, kind, beta)
    index = torch.tensor(targets)[..., None]
    log_probs = log_p.gather(-1, index)[..., 0]
    mask = torch.tensor(live)
    ((torch.tensor(weight) * divergence + log_probs) * mask).sum().backward()
    run = jax.jit(jax.grad(ours, argnums=(0, 1, 2), has_aux=True))
    for valid in (None, live):
        (by_params, by_hidden, by_teacher), found = run({"head": head}, hidden, of_teacher, valid)
        np.testing.assert_allclose(found.divergence[live], divergence.detach()[mask], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.log_probs[live], log_probs.detach()[mask], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.teacher_log_probs[live], log_q.gather(-1, index)[..., 0][mask], rtol=1e-4)
        np.testing.assert_allclose(by_params["head"], w.grad, rtol=1e-3, atol=2e-5)
        np.testing.assert_allclose(by_hidden, x.grad, rtol=1e-3, atol=2e-5)
        assert not np.asarray(by_teacher).any()


@pytest.mark.slow
def test_logits_never_materialise():
    """Gradient at Qwen2.5's vocabulary in chunks of 1,024 tokens: logits of 64 rows of 4,096 would need 2 x 159 GB.

    What it takes is the logits of a few chunks of both and the head's gradient, whatever the number of rows.
    """
    t, d, e, v, rows = 4096, 256, 512, 151_936, 152_064
    spec = jax.ShapeDtypeStruct

    def model(width, vocab):
        shape = ModelConfig(layers=1, width=width, heads=2, kv_heads=2, head_dim=width // 2, mlp_width=64)
        return transformer(built_in(shape, vocab))

    def loss(hidden, head, of_teacher, teacher_head, targets):
        policy = Predictor(model(d, v), {"head": head}, hidden)
        teacher = Predictor(model(e, rows), {"head": teacher_head}, of_teacher)
        mib = 4 * 1024 * (v + rows) // 2**20 + 1
        return chunked_divergence(policy, teacher, targets, "jsd", logits_mib=mib).divergence.sum()

    def peak(r):
        heads = spec((d, v), jnp.float32), spec((e, rows), jnp.float32)
        states = spec((r, t, d), jnp.float32), spec((r, t, e), jnp.float32)
        args = states[0], heads[0], states[1], heads[1], spec((r, t), jnp.int32)
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args).compile()
        return program.memory_analysis().temp_size_in_bytes

    few, many = peak(8), peak(64)
    states = 4 * t * (d + e)
    assert few <= 8e9
    # Hidden states are laid out by chunk: a copy of them, and the policy's gradient.
    assert many - few <= 3 * 56 * states
