"""From a Hugging Face `config.json` to an `Architecture`, with one row of `FAMILIES` for each model family.

transformers reads the file: it knows both layouts of rotary settings and the defaults of every family. A setting that
has no counterpart in `Architecture` is refused by its name, before any weight is read. docs/extending/model.md shows
how to add a family.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypedDict, cast

import numpy as np

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ModelConfig
from pspo_jax.model.architecture import Architecture, Rotary, plain_frequencies
from pspo_jax.model.huggingface.vision_config import (
    Qwen2VLTower,
    Qwen25VLTower,
    image_token_ids,
    on_three_axes,
    qwen2_vl_tower,
    qwen25_vl_tower,
)


class RopeParameters(TypedDict, total=False):
    """The settings of a rotary embedding in config.json; which ones are present depends on `rope_type`."""

    rope_type: str
    rope_theta: float
    partial_rotary_factor: float
    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float
    beta_fast: float | None
    beta_slow: float | None
    truncate: bool
    attention_factor: float | None
    mscale: float | None
    mscale_all_dim: float | None
    mrope_section: Sequence[int]


class HfConfig(Protocol):
    """The attributes of a transformers config object that every supported family has."""

    model_type: str
    vocab_size: int
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: RopeParameters | dict[str, RopeParameters] | None


class SmolLM3Config(HfConfig, Protocol):
    no_rope_layers: Sequence[int]
    """For each layer, 1 if its positions are encoded, else 0."""


class Gemma3Config(HfConfig, Protocol):
    query_pre_attn_scalar: float
    layer_types: Sequence[str]


class VisualConfig(Protocol):
    """A config with the language model's and the tower's inside, whatever the layout of config.json."""

    tie_word_embeddings: bool
    vision_config: Qwen2VLTower | Qwen25VLTower

    def get_text_config(self) -> HfConfig: ...


class FamilyFn(Protocol):
    """Completes the architecture that all families have in common for one family.

    Args:
      hf: the config, as transformers reads it; for a family of `_WITH_VISION`, a `VisualConfig`.
      common: the architecture with everything that is read alike for all families. For a family of
        `_ROTARY_BY_LAYER_TYPE`, it has no rotary embeddings yet.
      where: the checkpoint's name, for messages.
    Raises:
      ConfigError: a setting is not supported.
      KeyError: a rotary setting is missing.
    """

    def __call__(self, hf: HfConfig, common: Architecture, where: str, /) -> Architecture: ...


def architecture_of(hf: HfConfig, model: ModelConfig, where: str) -> Architecture:
    """The architecture of a transformers config object.

    Args:
      hf: as `AutoConfig.from_pretrained` returns it.
      model: gives the types, remat and scan_unroll.
      where: the checkpoint's name, for messages.
    Raises:
      ConfigError: the family or one of its options is not supported.
    """
    family = FAMILIES.get(hf.model_type)
    if family is None:
        raise ConfigError(unknown_family(hf.model_type, where))
    whole = hf
    if hf.model_type in _WITH_VISION:
        hf = cast(VisualConfig, hf).get_text_config()
    _refuse(hf, whole.model_type, where)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    try:
        rotaries: tuple[Rotary, ...] = ()
        if whole.model_type not in _ROTARY_BY_LAYER_TYPE:
            rotaries = (rotary(cast(RopeParameters, hf.rope_parameters or {}), head_dim, where),)
        common = Architecture(
            vocab_size=hf.vocab_size,
            layers=hf.num_hidden_layers,
            width=hf.hidden_size,
            heads=hf.num_attention_heads,
            kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
            head_dim=head_dim,
            mlp_width=hf.intermediate_size,
            rotaries=rotaries,
            layer_rotary=(0,) * hf.num_hidden_layers,
            windows=_windows(hf),
            norm_eps=hf.rms_norm_eps,
            tied=bool(whole.tie_word_embeddings),
            biases=_biases(hf),
            max_positions=max_positions(hf),
            param_dtype=model.param_dtype,
            compute_dtype=model.compute_dtype or "float32",
            scan_unroll=model.scan_unroll,
            remat=model.remat or "none",
        )
        return family(whole, common, where)
    except KeyError as error:
        raise ConfigError(f"model.source={where}: config.json's rope_parameters lack {error}") from error


def unknown_family(model_type: str, where: str) -> str:
    """The message that a model_type is not supported, with the supported ones."""
    return f"model.source={where}: model_type {model_type!r} is not supported; choose one of {', '.join(FAMILIES)}"


def _llama(hf: HfConfig, common: Architecture, where: str) -> Architecture:
    """Llama and Mistral have nothing beyond the common architecture."""
    return common


def _qwen2(hf: HfConfig, common: Architecture, where: str) -> Architecture:
    """Biases on q, k and v."""
    return dataclasses.replace(common, biases=("q", "k", "v"))


def _qwen3(hf: HfConfig, common: Architecture, where: str) -> Architecture:
    """Norms over each head of q and k."""
    return dataclasses.replace(common, qk_norm="head")


def _smollm3(hf: HfConfig, common: Architecture, where: str) -> Architecture:
    """Every few layers, positions are not encoded (NoPE)."""
    no_positions = Rotary((0.0,) * (common.head_dim // 2))
    return dataclasses.replace(
        common,
        rotaries=(*common.rotaries, no_positions),
        layer_rotary=tuple(0 if encoded else 1 for encoded in cast(SmolLM3Config, hf).no_rope_layers),
    )


def _olmo2(hf: HfConfig, common: Architecture, where: str) -> Architecture:
    """Norms on the outputs of attention and MLP instead of their inputs, and over all heads of q and of k together."""
    return dataclasses.replace(common, qk_norm="projection", pre_norm=False, post_norm=True)


def _gemma3(hf: HfConfig, common: Architecture, where: str) -> Architecture:
    """Norms on inputs and outputs, stored as scale - 1; layers with a window have a rotary embedding of their own."""
    hf = cast(Gemma3Config, hf)
    settings = cast(Mapping[str, RopeParameters], hf.rope_parameters)
    return dataclasses.replace(
        common,
        qk_norm="head",
        post_norm=True,
        norm_offset=1.0,
        activation="gelu_tanh",
        embed_scale=math.sqrt(hf.hidden_size),
        query_scale=hf.query_pre_attn_scalar**-0.5,
        rotaries=tuple(rotary(settings[layer_type], common.head_dim, where) for layer_type in _LAYER_TYPES),
        layer_rotary=tuple(_LAYER_TYPES.index(layer_type) for layer_type in hf.layer_types),
    )


def _visual(hf: HfConfig, common: Architecture, where: str) -> Architecture:
    """Biases on q, k and v, positions on three axes, and a vision tower."""
    whole = cast(VisualConfig, hf)
    settings = cast(RopeParameters, whole.get_text_config().rope_parameters or {})
    rotary = on_three_axes(common.rotaries[0], settings["mrope_section"], where)
    if hf.model_type == "qwen2_vl":
        vision = qwen2_vl_tower(cast(Qwen2VLTower, whole.vision_config), common.width, where)
    else:
        vision = qwen25_vl_tower(cast(Qwen25VLTower, whole.vision_config), common.width, where)
    return dataclasses.replace(
        common, biases=("q", "k", "v"), rotaries=(rotary,), vision=vision, forbidden=image_token_ids(hf)
    )


FAMILIES: dict[str, FamilyFn] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "gemma3_text": _gemma3,
    "qwen2_vl": _visual,
    "qwen2_5_vl": _visual,
}
"""The supported values of `model_type`, each with the function that completes its architecture."""
_LAYER_TYPES = ("full_attention", "sliding_attention")
"""Supported entries of config.json's layer_types."""
_FACTOR_STRETCHES_CONTEXT = ("linear", "dynamic", "yarn")
"""Values of rope_type whose factor multiplies max_position_embeddings; for other types, that number includes it."""
_WITH_VISION = ("qwen2_vl", "qwen2_5_vl")
"""Families with a vision tower, whose config holds one of the language model and one of the tower."""
_WITH_WINDOWS = ("mistral", "qwen2", "qwen3", "smollm3", "gemma3_text", *_WITH_VISION)
"""Families whose transformers code reads sliding_window."""
_WITH_ATTENTION_BIAS = ("llama", "qwen2", "qwen3", "smollm3", "olmo2", "gemma3_text")
"""Families whose transformers code reads attention_bias."""
_WITH_MLP_BIAS = ("llama", "smollm3")
"""Families whose transformers code reads mlp_bias."""
_WITH_GELU = ("gemma3_text",)
"""Families whose MLP has the tanh approximation of GELU; the others have SiLU."""
_ROTARY_BY_LAYER_TYPE = ("gemma3_text",)
"""Families whose rope_parameters have an entry for each type of layer."""


def _biases(hf: HfConfig) -> tuple[str, ...]:
    """Projections whose bias is stated by an option of config.json."""
    names: tuple[str, ...] = ()
    if getattr(hf, "attention_bias", False):
        names += ("q", "k", "v", "o")
    if getattr(hf, "mlp_bias", False):
        names += ("gate", "up", "down")
    return names


def _windows(hf: HfConfig) -> tuple[int | None, ...]:
    """For each layer, the number of tokens that a query sees; None = all before it."""
    window = getattr(hf, "sliding_window", None)
    layer_types = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)


def max_positions(hf: HfConfig) -> int | None:
    """Length of a row, in tokens, that the model was made for; None = its config does not say.

    The factor of the rotary embedding multiplies it, as in vLLM, unless the config has settings for each type of layer.
    """
    stated = getattr(hf, "max_position_embeddings", None)
    rope = getattr(hf, "rope_parameters", None) or {}
    if not stated or rope.get("rope_type") not in _FACTOR_STRETCHES_CONTEXT:
        return stated or None
    base = rope.get("original_max_position_embeddings") or stated
    return max(stated, int(base * rope.get("factor", 1)))


def _refuse(hf: HfConfig, family: str, where: str) -> None:
    """Raise ConfigError for a setting of config.json that has no counterpart here.

    Args:
      hf: the config of the language model.
      family: model_type of the whole checkpoint.
    """
    activation = getattr(hf, "hidden_act", None) or getattr(hf, "hidden_activation", None)
    supported = "gelu_pytorch_tanh" if family in _WITH_GELU else "silu"
    unsupported = {
        "hidden_act": activation if activation != supported else None,
        "quantization_config": getattr(hf, "quantization_config", None),
        "attn_logit_softcapping": getattr(hf, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(hf, "final_logit_softcapping", None),
        "mrope_section": None if family in _WITH_VISION else (hf.rope_parameters or {}).get("mrope_section"),
        "use_bidirectional_attention": getattr(hf, "use_bidirectional_attention", None),
        # transformers ignores these options in other families, so it is unknown whether the model was trained with
        # them.
        "sliding_window": None if family in _WITH_WINDOWS else getattr(hf, "sliding_window", None),
        "attention_bias": None if family in _WITH_ATTENTION_BIAS else getattr(hf, "attention_bias", None),
        "mlp_bias": None if family in _WITH_MLP_BIAS else getattr(hf, "mlp_bias", None),
    }
    for name, value in unsupported.items():
        if value:
            raise ConfigError(f"model.source={where}: config.json has {name}={value!r:.200}, which is not supported")
    unknown = set(getattr(hf, "layer_types", None) or []) - set(_LAYER_TYPES)
    if unknown:
        raise ConfigError(f"model.source={where}: config.json has layer_types {sorted(unknown)}, not supported")


def rotary(parameters: RopeParameters, head_dim: int, where: str) -> Rotary:
    """The rotary embedding of a `rope_parameters` dict: default, linear, llama3 or yarn.

    The formulas are those of Su et al. (RoPE), Chen et al. (linear interpolation), the Llama 3.1 release and Peng et
    al. (YaRN).

    Args:
      head_dim: width of a head, h.
      where: the checkpoint's name, for messages.
    Raises:
      ConfigError: the settings are of another type, or for a part of a head.
    """
    rope_type = parameters.get("rope_type", "default")
    if set(parameters) & set(_LAYER_TYPES):
        raise ConfigError(f"model.source={where}: config.json has rope_parameters per type of layer, not supported")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"model.source={where}: config.json has partial_rotary_factor="
            f"{parameters['partial_rotary_factor']}, which is not supported"
        )
    theta = float(parameters.get("rope_theta", 10_000.0))
    plain = np.array(plain_frequencies(head_dim, theta))
    match rope_type:
        case "default":
            return Rotary(tuple(plain))
        case "linear":
            return Rotary(tuple(plain / parameters["factor"]))
        case "llama3":
            return Rotary(tuple(_llama3(plain, parameters)))
        case "yarn":
            return _yarn(plain, theta, head_dim, parameters)
    raise ConfigError(
        f"model.source={where}: config.json has rope_type={rope_type!r}; supported: default, linear, llama3, yarn"
    )


def _llama3(plain: np.ndarray, p: RopeParameters) -> np.ndarray:
    """Frequencies of the Llama 3.1 release: long wavelengths are stretched, short ones kept, others interpolated."""
    turns = p["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * kept + plain / p["factor"] * (1 - kept)


def _yarn(plain: np.ndarray, theta: float, head_dim: int, p: RopeParameters) -> Rotary:
    """YaRN: frequencies of pairs that turn often within the original context are kept, the slowest are interpolated."""
    factor, original = p["factor"], p["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        """Index of the pair that makes so many turns within the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(p.get("beta_fast") or 32), pair(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / ((high - low) or 1e-3), 0, 1)
    frequencies = plain * (1 - ramp) + plain / factor * ramp
    return Rotary(tuple(frequencies), _yarn_scale(factor, p))


def _yarn_scale(factor: float, p: RopeParameters) -> float:
    """YaRN's attention factor: 0.1 ln(factor) + 1, unless the config states another."""

    def factor_for(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    stated = p.get("attention_factor")
    if stated is not None:
        return float(stated)
    weight, weight_all = p.get("mscale"), p.get("mscale_all_dim")
    if weight and weight_all:
        return factor_for(weight) / factor_for(weight_all)
    return factor_for(1)
