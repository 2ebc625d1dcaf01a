"""Log-probs of completions, and the loss on them."""

from pspo_jax.objective.log_probs import completion_log_probs, pack_rows
from pspo_jax.objective.losses import Denominators, denominators, policy_loss, token_losses

__all__ = [
    "Denominators",
    "completion_log_probs",
    "denominators",
    "pack_rows",
    "policy_loss",
    "token_losses",
]
