"""Configuration of a teacher: a second model from which the policy learns on its own completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pspo_jax.config.fields import Range


@dataclass(frozen=True)
class TeacherConfig:
    """On-policy distillation: a frozen model whose distribution the policy learns on its own completions."""

    source: str | None = None
    """Teacher: a folder in Hugging Face's format, a hub id, or the folder of a training run. Its tokenizer must have
    the same tokens as the policy's. None = no teacher."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None = its main branch."""
    step: str = "latest"
    """Checkpoint of a training run: a step's number, latest, best, or cold_start, which is the run's model after its
    supervised steps."""
    divergence: Literal["sampled", "forward_kl", "reverse_kl", "jsd"] = "sampled"
    """Divergence from the teacher that is minimised in each state that the policy comes to. sampled estimates the
    reverse KL by the drawn token alone, as its advantage. The others are a term of the loss, and exact sums over the
    whole vocabulary: KL(teacher || policy) (forward_kl), KL(policy || teacher) (reverse_kl), or the generalised
    Jensen-Shannon divergence (jsd)."""
    jsd_beta: Annotated[float, Range(above=0.0, below=1.0)] = 0.5
    """jsd: share of the teacher in the mixture to which both are compared; near 0 the divergence is like the forward
    KL, near 1 like the reverse KL."""
    weight: Annotated[float, Range(above=0.0)] = 1.0
    """Factor of the divergence. With sampled, it is the factor of each token's advantage by the teacher, which is the
    token's log-probability under the teacher minus that under the policy, in nats."""
    reward_weight: Annotated[float, Range(0.0)] = 0.0
    """Factor of a completion's advantage by its reward, beside what the teacher teaches; 0 = rewards are only logged,
    and the policy learns from the teacher alone."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """Type in which the teacher's weights are held; None = model.compute_dtype."""
