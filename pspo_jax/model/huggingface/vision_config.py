"""From the `vision_config` of a checkpoint's config.json to a `Vision`, for Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pspo_jax.arrays.images import PatchLayout
from pspo_jax.config.fields import ConfigError
from pspo_jax.model.architecture import CLIP_MEAN, CLIP_STD, Rotary, Vision, axes_of
from pspo_jax.model.huggingface.json_files import read_json
from pspo_jax.system.json_values import Json

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Files beside config.json that may say how images are prepared."""
_TOKEN_FIELDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
"""Fields of config.json with ids that stand for images and videos, or surround them."""
_ROTARY_BASE = 10_000.0
_UNITS_ACROSS = 4
"""Units along each side of a window in the layout of a tower that attends to whole images alone."""


class TowerConfig(Protocol):
    """The attributes of a `vision_config` that both families have."""

    depth: int
    hidden_size: int
    num_heads: int
    hidden_act: str
    in_channels: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    rope_parameters: Mapping[str, object] | None


class Qwen2VLTower(TowerConfig, Protocol):
    embed_dim: int
    """Width of the tower; `hidden_size` is that of its outputs."""
    mlp_ratio: float


class Qwen25VLTower(TowerConfig, Protocol):
    intermediate_size: int
    out_hidden_size: int
    window_size: int
    """Pixels along each side of a window."""
    fullatt_block_indexes: Sequence[int]


def qwen2_vl_tower(hf: Qwen2VLTower, width: int, where: str) -> Vision:
    """The tower of Qwen2-VL: LayerNorm, a plain MLP, and attention to the whole image in every block.

    Args:
      hf: the `vision_config`.
      width: width of the language model.
      where: the checkpoint's name, for messages.
    Raises:
      ConfigError: a setting is not supported.
    """
    _refuse(hf, hf.embed_dim, "embed_dim", "quick_gelu", where)
    _check_width("hidden_size", hf.hidden_size, width, where)
    merge = hf.spatial_merge_size
    return Vision(
        layers=hf.depth,
        width=hf.embed_dim,
        heads=hf.num_heads,
        mlp_width=int(hf.embed_dim * hf.mlp_ratio),
        whole_image=tuple(range(hf.depth)),
        layout=PatchLayout(merge, merge * _UNITS_ACROSS),
        patch=hf.patch_size,
        channels=hf.in_channels,
        frames=hf.temporal_patch_size,
        mean=_per_channel(hf, CLIP_MEAN),
        std=_per_channel(hf, CLIP_STD),
        gated=False,
        layer_norm=True,
    )


def qwen25_vl_tower(hf: Qwen25VLTower, width: int, where: str) -> Vision:
    """The tower of Qwen2.5-VL: RMSNorm, a gated MLP, and attention within windows in most blocks; see above."""
    _refuse(hf, hf.hidden_size, "hidden_size", "silu", where)
    _check_width("out_hidden_size", hf.out_hidden_size, width, where)
    merge = hf.spatial_merge_size
    across = hf.window_size // merge // hf.patch_size
    if across < 1:
        raise _unsupported(where, "window_size", hf.window_size, f"at least {merge * hf.patch_size}, one token's side")
    return Vision(
        layers=hf.depth,
        width=hf.hidden_size,
        heads=hf.num_heads,
        mlp_width=hf.intermediate_size,
        whole_image=tuple(hf.fullatt_block_indexes),
        layout=PatchLayout(merge, merge * across),
        patch=hf.patch_size,
        channels=hf.in_channels,
        frames=hf.temporal_patch_size,
        mean=_per_channel(hf, CLIP_MEAN),
        std=_per_channel(hf, CLIP_STD),
    )


def _per_channel(hf: TowerConfig, rgb: tuple[float, ...]) -> tuple[float, ...]:
    """A value for each channel where no processor states it: 0.5 where the channels are not red, green and blue."""
    return rgb if hf.in_channels == len(rgb) else (0.5,) * hf.in_channels


def _refuse(hf: TowerConfig, width: int, width_field: str, activation: str, where: str) -> None:
    """Raise ConfigError for a setting of a tower that has no counterpart here."""
    if hf.hidden_act != activation:
        raise _unsupported(where, "hidden_act", repr(hf.hidden_act), f"{activation!r}")
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(hf, name), int):
            raise _unsupported(where, name, getattr(hf, name), "one number")
    if width % (4 * hf.num_heads):
        raise _unsupported(where, width_field, width, f"a multiple of 4 num_heads = {4 * hf.num_heads}")
    base = (hf.rope_parameters or {}).get("rope_theta", _ROTARY_BASE)
    if base != _ROTARY_BASE:
        raise _unsupported(where, "rope_theta", base, f"{_ROTARY_BASE:g}")


def _check_width(name: str, found: int, width: int, where: str) -> None:
    if found != width:
        raise _unsupported(where, name, found, f"the width of the language model, hidden_size={width}")


def _unsupported(where: str, name: str, value: object, words: str) -> ConfigError:
    return ConfigError(f"model.source={where}: config.json has vision_config.{name}={value}; it must be {words}")


def on_three_axes(rotary: Rotary, sections: object, where: str) -> Rotary:
    """The rotary embedding with an axis for each pair: time, row and column have so many pairs, in this order.

    Args:
      sections: the value of `mrope_section`.
    Raises:
      ConfigError: it is not three numbers whose sum is the number of pairs.
    """
    pairs = len(rotary.frequencies)
    if (
        not isinstance(sections, list | tuple)
        or len(sections) != 3
        or not all(isinstance(n, int) and n >= 0 for n in sections)
        or sum(sections) != pairs
    ):
        raise ConfigError(
            f"model.source={where}: config.json has mrope_section={sections}; it must be three whole numbers with the "
            f"sum {pairs}, half the width of a head"
        )
    return dataclasses.replace(rotary, axes=axes_of(sections))


def image_token_ids(hf: object) -> tuple[int, ...]:
    """Ids that stand for images and videos or surround them, which no completion may hold."""
    found = (getattr(hf, name, None) for name in _TOKEN_FIELDS)
    return tuple(sorted({i for i in found if isinstance(i, int)}))


def with_processor(v: Vision, folder: Path, where: str) -> Vision:
    """The tower with the mean and standard deviation of the checkpoint's image processor, if it has one.

    Raises:
      ConfigError: the processor's file is damaged, or its values are not supported.
    """
    name, found = _processor(folder, f"model.source={where}")
    factor = found.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ConfigError(f"model.source={where}: {name} has rescale_factor={factor}; only 1/255 is supported")
    mean = _channels(found.get("image_mean"), v.mean, f"{name} has image_mean", where)
    std = _channels(found.get("image_std"), v.std, f"{name} has image_std", where)
    return dataclasses.replace(v, mean=mean, std=std)


def _channels(value: Json, default: tuple[float, ...], what: str, where: str) -> tuple[float, ...]:
    """A number above 0 for each channel; `default`, which has as many, for None."""
    if value is None:
        return default
    numbers = [float(x) for x in value if isinstance(x, int | float) and x > 0] if isinstance(value, list) else []
    if not isinstance(value, list) or not len(value) == len(numbers) == len(default):
        raise ConfigError(
            f"model.source={where}: {what}={value}; it must be {len(default)} numbers above 0, one for each channel"
        )
    return tuple(numbers)


def _processor(folder: Path, where: str) -> tuple[str, Mapping[str, Json]]:
    """The file with the image processor's settings, and the settings; as in transformers, the first of two goes."""
    if (folder / PROCESSOR_FILES[0]).exists():
        nested = read_json(folder / PROCESSOR_FILES[0], where).get("image_processor")
        if isinstance(nested, dict):
            return PROCESSOR_FILES[0], nested
    path = folder / PROCESSOR_FILES[1]
    return path.name, read_json(path, where) if path.exists() else {}
