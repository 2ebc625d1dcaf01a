"""Configuration of a teacher: a second model from which the policy learns on its own completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pspo_jax.config.fields import Range


@dataclass(frozen=True)
class TeacherConfig:
    """On-policy distillation: a frozen model whose reverse KL on the policy's own completions is their advantage."""

    source: str | None = None
    """Teacher: a folder in Hugging Face's format, a hub id, or the folder of a training run. Its tokenizer must have
    the same tokens as the policy's. None = no teacher."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None = its main branch."""
    step: str = "latest"
    """Checkpoint of a training run: a step's number, latest, best, or cold_start, which is the run's model after its
    supervised steps."""
    weight: Annotated[float, Range(above=0.0)] = 1.0
    """Factor of each token's advantage by the teacher, which is the token's log-probability under the teacher minus
    that under the policy, in nats."""
    reward_weight: Annotated[float, Range(0.0)] = 0.0
    """Factor of a completion's advantage by its reward, to which the teacher's is added; 0 = rewards are only
    logged, and the policy learns from the teacher alone."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """Type in which the teacher's weights are held; None = model.compute_dtype."""
