"""Log-probs of completions, and losses composed of a ratio, a surrogate, an aggregation, a KL term and extras."""

from pspo_jax.arrays.rows import LossInputs
from pspo_jax.losses.log_probs import compact_rows, completion_log_probs
from pspo_jax.losses.policy_loss import Denominators, compute_loss, denominators
from pspo_jax.losses.ratios import Surrogate, SurrogateInputs, SurrogateTerms

__all__ = [
    "Denominators",
    "LossInputs",
    "Surrogate",
    "SurrogateInputs",
    "SurrogateTerms",
    "compact_rows",
    "completion_log_probs",
    "compute_loss",
    "denominators",
]
