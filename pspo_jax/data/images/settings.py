"""The image processor of a checkpoint, from its files and the config's bounds on pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import PromptConfig
from pspo_jax.data.images.processor import ImageProcessor
from pspo_jax.model.huggingface.json_files import read_json
from pspo_jax.system.json_values import Json

_KINDS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil", "Qwen2_5_VLImageProcessor")
"""Names of the image processors whose patches `processor` makes."""
_ALWAYS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
"""Steps of the processor that are always taken."""
_BICUBIC = 3


def is_visual(folder: Path, where: str) -> bool:
    """Whether the config.json of a folder, if there is one, describes a model with a vision tower."""
    return (folder / "config.json").exists() and "vision_config" in read_json(folder / "config.json", where)


def read_processor(folder: Path, prompt: PromptConfig, where: str) -> tuple[ImageProcessor, str]:
    """The image processor of a checkpoint, and a line that says which bounds on pixels it has.

    As in transformers, processor_config.json goes before preprocessor_config.json if it has an image processor, and
    settings that neither has are the defaults of `ImageProcessor`.

    Args:
      where: the config field that names the checkpoint, with its value, for messages.
    Raises:
      ConfigError: a file has another kind of processor, a step or a value that is not supported, or bounds that no
        image meets.
    """
    name, found = _settings(folder, where)
    kind = found.get("image_processor_type", _KINDS[0])
    if kind not in _KINDS:
        raise ConfigError(f"{where}: {name} has image_processor_type={kind}; supported are {', '.join(_KINDS)}")
    for step in _ALWAYS:
        if found.get(step, True) is not True:
            raise ConfigError(f"{where}: {name} has {step}={found[step]}; only true is supported")
    if found.get("resample", _BICUBIC) != _BICUBIC:
        raise ConfigError(f"{where}: {name} has resample={found['resample']}; only {_BICUBIC}, bicubic, is supported")
    default = ImageProcessor()
    smallest, largest = _bounds(found)
    processor = ImageProcessor(
        prompt.min_pixels or _whole(smallest, default.min_pixels, "min_pixels", name, where),
        prompt.max_pixels or _whole(largest, default.max_pixels, "max_pixels", name, where),
        _whole(found.get("patch_size"), default.patch_size, "patch_size", name, where),
        _whole(found.get("merge_size"), default.merge_size, "merge_size", name, where),
        _number(found.get("rescale_factor"), default.rescale_factor, "rescale_factor", name, where),
        _channels(found.get("image_mean"), default.mean, "image_mean", name, where),
        _channels(found.get("image_std"), default.std, "image_std", name, where),
    )
    if processor.min_pixels > processor.max_pixels:
        raise ConfigError(
            f"prompt.min_pixels={prompt.min_pixels}, prompt.max_pixels={prompt.max_pixels}: images would have at least "
            f"{processor.min_pixels:,} and at most {processor.max_pixels:,} pixels, with the bounds of {where}; change "
            "one of them"
        )
    bounds = f"images have {processor.min_pixels:,} to {processor.max_pixels:,} pixels"
    if name:
        return processor, bounds
    missing = f"{where} has no preprocessor_config.json, whose settings are replaced by transformers' defaults"
    return processor, f"{bounds} ({missing}; prompt.min_pixels and prompt.max_pixels change the bounds)"


def _settings(folder: Path, where: str) -> tuple[str, Mapping[str, Json]]:
    """The file that has the image processor's settings, and the settings; "" if there is none."""
    if (folder / "processor_config.json").exists():
        nested = read_json(folder / "processor_config.json", where).get("image_processor")
        if isinstance(nested, dict):
            return "processor_config.json", nested
    if (folder / "preprocessor_config.json").exists():
        return "preprocessor_config.json", read_json(folder / "preprocessor_config.json", where)
    return "", {}


def _bounds(found: Mapping[str, Json]) -> tuple[Json, Json]:
    """The smallest and the largest number of pixels, as a file writes them; None = it does not."""
    size = found.get("size")
    size = size if isinstance(size, dict) else {}
    smallest, largest = found.get("min_pixels"), found.get("max_pixels")
    smallest = size.get("shortest_edge") if smallest is None else smallest
    return smallest, size.get("longest_edge") if largest is None else largest


def _whole(value: Json, default: int, name: str, file: str, where: str) -> int:
    """A whole number above 0; `default` for None."""
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where}: {file} has {name}={value}; it must be a whole number above 0")
    return value


def _number(value: Json, default: float, name: str, file: str, where: str) -> float:
    """A number above 0; `default` for None."""
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"{where}: {file} has {name}={value}; it must be a number above 0")
    return float(value)


def _channels(
    value: Json, default: tuple[float, float, float], name: str, file: str, where: str
) -> tuple[float, float, float]:
    """Three numbers above 0, one for each channel; `default` for None."""
    if value is None:
        return default
    if not isinstance(value, list) or len(value) != 3:
        raise ConfigError(f"{where}: {file} has {name}={value}; it must be a list of three numbers")
    red, green, blue = (_number(x, 0.0, name, file, where) for x in value)
    return red, green, blue
