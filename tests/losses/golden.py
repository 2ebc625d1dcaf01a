"""The golden losses of TRL 1.16 in this package's terms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pspo_jax.config.presets import LOSSES
from pspo_jax.config.strategies import LossConfig
from pspo_jax.losses import LossInputs, compute_loss

TRL_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def config_of(kw: dict) -> LossConfig:
    """The settings of a golden case: TRL's arguments as fields."""
    kind = kw["loss_type"]
    preset = {name.removeprefix("loss."): value for name, value in LOSSES[kind].items()}
    low, high = kw.get("eps", 0.2), kw.get("eps_hi", kw.get("eps", 0.2))
    preset |= {"clip_low": low, "clip_high": high - 1 if kind == "cispo" else high}
    preset["ratio"] = kw.get("level", "token")
    return LossConfig(
        name=kind,
        **preset,
        delta=kw.get("delta", 0.0),
        kl_coef=kw.get("beta", 0.0),
        kl_unbiased=kw.get("bias", True),
        top_entropy=kw.get("topq", 1.0),
        off_policy_threshold=kw.get("opm", 0.0),
        off_policy="decoupled" if "isr" in kw else "ignored",
    )


def inputs_of(golden: dict, case: dict) -> tuple[jax.Array, jax.Array, LossInputs]:
    """(log_probs, entropies, inputs): behaviour log-probs are such that pi_old / mu is the case's weight."""
    x = {name: jnp.asarray(value, jnp.float32) for name, value in golden["trl_losses"]["inputs"].items()}
    kw = case["kw"]
    old = x["old"] if case["old"] else x["logps"]
    behaviour = old - jnp.log(x["isr"]) if "isr" in kw else x["sampling"] if "samp" in kw else old
    rows = old.shape[0]
    entropy = x["entropies"] if "ent" in kw else jnp.ones_like(old)
    return (
        x["logps"],
        entropy,
        LossInputs(
            mask=x["mask"] > 0,
            counted=jnp.ones(rows, bool),
            advantages=x["adv"],
            loss_weight=jnp.ones(rows),
            old_log_probs=old,
            behaviour_log_probs=behaviour,
            reference_log_probs=x["ref"] if "beta" in kw else None,
        ),
    )


def padded(tree, rows: int):
    """Arrays with `rows` rows; those added are in no batch: their masks are empty, the rest is garbage."""

    def one(x):
        more = [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, more, constant_values=False if x.dtype == bool else -3)

    return jax.tree.map(one, tree)


def evaluate(log_probs, entropy, inputs, config, total, max_length=6):
    """Loss, gradient with respect to log-probs, and metrics."""

    def loss_fn(log_probs):
        return compute_loss(log_probs, entropy, inputs, config, total, max_length)

    (loss, metrics), grad = jax.value_and_grad(loss_fn, has_aux=True)(log_probs)
    return loss, grad, metrics


def part(tree, start: int, stop: int):
    return jax.tree.map(lambda x: x[start:stop], tree)


def scaled(total, kw: dict):
    """TRL divides by its own accumulation: `ga` microbatches of which this is one, of `spg` in the batch."""
    ga, spg = kw.get("ga", 1), kw.get("spg", 1)
    return total._replace(rows=total.rows * ga, tokens=total.tokens * ga / spg)


def replaced(config: LossConfig, **fields) -> LossConfig:
    return dataclasses.replace(config, **fields)


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
