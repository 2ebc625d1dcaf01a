"""From a Hugging Face `config.json` to an `Architecture`, one function per model family.

transformers reads the file (both layouts of rotary settings, every family's defaults); what is said there and has no
counterpart here is refused by name, before any weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ModelConfig
from pspo_jax.model.architecture import Architecture, Rotary, plain_frequencies


def architecture_of(hf: Any, model: ModelConfig, where: str) -> Architecture:
    """The architecture of a transformers config object.

    Args:
      hf: as `AutoConfig.from_pretrained` returns it.
      policy: gives the types, remat and scan_unroll.
      where: the checkpoint's name, for messages.
    Raises:
      ConfigError: the family or one of its options is not supported.
    """
    family = FAMILIES.get(hf.model_type)
    if family is None:
        raise ConfigError(unknown_family(hf.model_type, where))
    _refuse(hf, where)
    fields: dict[str, Any] = {
        "vocab_size": hf.vocab_size,
        "layers": hf.num_hidden_layers,
        "width": hf.hidden_size,
        "heads": hf.num_attention_heads,
        "kv_heads": hf.num_key_value_heads or hf.num_attention_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "mlp_width": hf.intermediate_size,
        "norm_eps": hf.rms_norm_eps,
        "tied": bool(hf.tie_word_embeddings),
        "biases": _biases(hf),
        "windows": _windows(hf),
        "max_positions": max_positions(hf),
    }
    try:
        if hf.model_type not in _ROTARY_PER_KIND:
            fields["rotaries"] = (rotary(hf.rope_parameters or {}, fields["head_dim"], where),)
            fields["layer_rotary"] = (0,) * hf.num_hidden_layers
        fields |= family(hf, fields, where)
    except KeyError as error:
        raise ConfigError(f"model.source={where}: config.json's rope_parameters lack {error}") from error
    return Architecture(
        **fields,
        param_dtype=model.param_dtype,
        compute_dtype=model.compute_dtype or "float32",
        scan_unroll=model.scan_unroll,
        remat=model.remat or "none",
    )


def unknown_family(model_type: str, where: str) -> str:
    return f"model.source={where}: model_type {model_type!r} is not supported; choose one of {', '.join(FAMILIES)}"


def _qwen2(hf: Any, fields: dict[str, Any], where: str) -> dict[str, Any]:
    return {"biases": ("q", "k", "v")}


def _qwen3(hf: Any, fields: dict[str, Any], where: str) -> dict[str, Any]:
    return {"qk_norm": "head"}


def _smollm3(hf: Any, fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Every few layers have no positions (NoPE)."""
    still = Rotary((0.0,) * (fields["head_dim"] // 2))
    return {
        "rotaries": (*fields["rotaries"], still),
        "layer_rotary": tuple(0 if uses else 1 for uses in hf.no_rope_layers),
    }


def _olmo2(hf: Any, fields: dict[str, Any], where: str) -> dict[str, Any]:
    return {"qk_norm": "projection", "pre_norm": False, "post_norm": True}


def _gemma3(hf: Any, fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Sandwich norms with scale - 1 stored; layers with a window have a rotary embedding of their own."""
    kinds = ("full_attention", "sliding_attention")
    return {
        "qk_norm": "head",
        "post_norm": True,
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "embed_scale": math.sqrt(hf.hidden_size),
        "query_scale": hf.query_pre_attn_scalar**-0.5,
        "rotaries": tuple(rotary(hf.rope_parameters[kind], fields["head_dim"], where) for kind in kinds),
        "layer_rotary": tuple(kinds.index(kind) for kind in hf.layer_types),
    }


FAMILIES: dict[str, Callable[..., dict[str, Any]]] = {
    "llama": lambda hf, fields, where: {},
    "mistral": lambda hf, fields, where: {},
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "gemma3_text": _gemma3,
}
"""model_type -> what the family adds to the common fields."""
_STRETCHED = ("linear", "dynamic", "yarn")
"""Rotary settings whose factor multiplies the positions; those of other types are counted already."""
_WITH_WINDOWS = ("mistral", "qwen2", "qwen3", "smollm3", "gemma3_text")
_WITH_ATTENTION_BIAS = ("llama", "qwen2", "qwen3", "smollm3", "olmo2", "gemma3_text")
_WITH_MLP_BIAS = ("llama", "smollm3")
"""Families that know the options sliding_window, attention_bias and mlp_bias."""
_ROTARY_PER_KIND = ("gemma3_text",)
"""Families whose rope_parameters are keyed by kind of layer."""


def _biases(hf: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = ()
    if getattr(hf, "attention_bias", False):
        names += ("q", "k", "v", "o")
    if getattr(hf, "mlp_bias", False):
        names += ("gate", "up", "down")
    return names


def _windows(hf: Any) -> tuple[int | None, ...]:
    window = getattr(hf, "sliding_window", None)
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def max_positions(hf: Any) -> int | None:
    """Places that the model was made for, prompt and completion together; None = its config does not say.

    A factor of the rotary embedding counts, as vLLM has it, unless the config gives settings for each kind of layer.
    """
    stated = getattr(hf, "max_position_embeddings", None)
    rope = getattr(hf, "rope_parameters", None) or {}
    if not stated or rope.get("rope_type") not in _STRETCHED:
        return stated or None
    base = rope.get("original_max_position_embeddings") or stated
    return max(stated, int(base * rope.get("factor", 1)))


def _refuse(hf: Any, where: str) -> None:
    kind = hf.model_type
    activation = getattr(hf, "hidden_act", None) or getattr(hf, "hidden_activation", None)
    wanted = "gelu_pytorch_tanh" if kind == "gemma3_text" else "silu"
    unsupported = {
        "hidden_act": activation if activation != wanted else None,
        "quantization_config": getattr(hf, "quantization_config", None),
        "attn_logit_softcapping": getattr(hf, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(hf, "final_logit_softcapping", None),
        "use_bidirectional_attention": getattr(hf, "use_bidirectional_attention", None),
        # transformers ignores these options for other families: nothing says whether the model was trained with them.
        "sliding_window": None if kind in _WITH_WINDOWS else getattr(hf, "sliding_window", None),
        "attention_bias": None if kind in _WITH_ATTENTION_BIAS else getattr(hf, "attention_bias", None),
        "mlp_bias": None if kind in _WITH_MLP_BIAS else getattr(hf, "mlp_bias", None),
    }
    for name, value in unsupported.items():
        if value:
            raise ConfigError(f"model.source={where}: config.json has {name}={value!r:.200}, which is not supported")
    kinds = set(getattr(hf, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ConfigError(f"model.source={where}: config.json has layer_types {sorted(kinds)}, not supported")


def rotary(parameters: dict[str, Any], head_dim: int, where: str) -> Rotary:
    """The rotary embedding of a `rope_parameters` dict: default, linear, llama3 or yarn.

    After Su et al. (RoPE), Chen et al. (linear interpolation), the Llama 3.1 release and Peng et al. (YaRN).
    """
    kind = parameters.get("rope_type", "default")
    if set(parameters) & {"full_attention", "sliding_attention"}:
        raise ConfigError(f"model.source={where}: config.json has rope_parameters per kind of layer, not supported")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"model.source={where}: config.json has partial_rotary_factor="
            f"{parameters['partial_rotary_factor']}, which is not supported"
        )
    theta = float(parameters.get("rope_theta", 10_000.0))
    plain = np.array(plain_frequencies(head_dim, theta))
    match kind:
        case "default":
            return Rotary(tuple(plain))
        case "linear":
            return Rotary(tuple(plain / parameters["factor"]))
        case "llama3":
            return Rotary(tuple(_llama3(plain, parameters)))
        case "yarn":
            return _yarn(plain, theta, head_dim, parameters)
    raise ConfigError(
        f"model.source={where}: config.json has rope_type={kind!r}; supported: default, linear, llama3, yarn"
    )


def _llama3(plain: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    turns = p["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * kept + plain / p["factor"] * (1 - kept)


def _yarn(plain: np.ndarray, theta: float, head_dim: int, p: dict[str, Any]) -> Rotary:
    """Pairs that turn often within the original context are kept, those that hardly turn are interpolated."""
    factor, original = p["factor"], p["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        """The pair that makes this many turns over the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(p.get("beta_fast") or 32), pair(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / ((high - low) or 1e-3), 0, 1)
    frequencies = plain * (1 - ramp) + plain / factor * ramp
    return Rotary(tuple(frequencies), _yarn_scale(factor, p))


def _yarn_scale(factor: float, p: dict[str, Any]) -> float:
    """YaRN's attention factor, .1 ln(factor) + 1 unless the config says otherwise."""

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return grown(p["mscale"]) / grown(p["mscale_all_dim"])
    return grown(1)
