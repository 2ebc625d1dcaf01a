"""The JSON files of a checkpoint, whose values are checked before anything uses them.

A wrong value is reported in one line that names the file, the field and the value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeGuard

from pspo_jax.config.fields import ConfigError
from pspo_jax.system.json_values import Json

SIDE_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
"""Files beside config.json that are read where they exist."""
_SHOWN_CHARACTERS = 80
"""Length up to which a message shows a wrong value."""


class _Rule(NamedTuple):
    """The values that a field may have."""

    words: str
    """The rule in words, after "it must be"."""
    allows: Callable[[Json], bool]


def _number(x: Json) -> TypeGuard[int | float]:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _whole(x: Json) -> TypeGuard[int]:
    return isinstance(x, int) and not isinstance(x, bool)


def _list_of(allows: Callable[[Json], bool]) -> Callable[[Json], bool]:
    return lambda x: isinstance(x, list) and all(map(allows, x))


def _is_text(x: Json) -> bool:
    return isinstance(x, str)


_COUNT = _Rule("a whole number above 0", lambda x: _whole(x) and x > 0)
_POSITIVE = _Rule("a number above 0", lambda x: _number(x) and x > 0)
_TRUTH = _Rule("true or false", lambda x: isinstance(x, bool))
_TEXT = _Rule("text", _is_text)
_TEXTS = _Rule("a list of texts", _list_of(_is_text))
_WHOLES = _Rule("a list of whole numbers", _list_of(_whole))
_OBJECT = _Rule("an object", lambda x: isinstance(x, dict))
_IDS = _Rule("a token's id or a list of them", lambda x: all(_whole(i) and i >= 0 for i in _listed(x)))
_DTYPE = _Rule(
    "float32, float16 or bfloat16",
    lambda x: isinstance(x, str) and x.removeprefix("torch.") in ("float32", "float16", "bfloat16", "float64", "auto"),
)


def _listed(x: Json) -> list[Json]:
    return x if isinstance(x, list) else [x]


def _nullable(rule: _Rule) -> _Rule:
    return _Rule(f"{rule.words}, or null", lambda x: x is None or rule.allows(x))


_CONFIG: dict[str, _Rule] = {
    "model_type": _TEXT,
    "architectures": _nullable(_TEXTS),
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), _COUNT),
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings"), _COUNT),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), _nullable(_COUNT)),
    **dict.fromkeys(("max_window_layers", "no_rope_layer_interval"), _Rule("a whole number", _whole)),
    **dict.fromkeys(("rms_norm_eps", "query_pre_attn_scalar"), _POSITIVE),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "partial_rotary_factor"), _nullable(_POSITIVE)),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), _TRUTH),
    "use_sliding_window": _TRUTH,
    **dict.fromkeys(("hidden_act", "hidden_activation"), _nullable(_TEXT)),
    **dict.fromkeys(("torch_dtype", "dtype"), _nullable(_DTYPE)),
    "layer_types": _nullable(_TEXTS),
    "no_rope_layers": _nullable(_WHOLES),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config", "auto_map"), _nullable(_OBJECT)),
    **dict.fromkeys(("text_config", "vision_config"), _nullable(_OBJECT)),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), _nullable(_IDS)),
}
"""The fields of config.json that this package depends on. An absent one has the default of its family."""
_GENERATION_CONFIG = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), _nullable(_IDS))
_ROPE = {"rope_type": _TEXT, "type": _TEXT, "truncate": _TRUTH, "finetuned": _TRUTH}
_ROPE |= dict.fromkeys(("mscale", "mscale_all_dim"), _nullable(_Rule("a number", _number)))
"""The settings of a rotary embedding that are not numbers above 0."""
_ROPE_LISTS = ("mrope_section", "long_factor", "short_factor")
"""Settings that are lists, which families.py accepts or refuses."""
_VISION_CONFIG: dict[str, _Rule] = {
    **dict.fromkeys(("depth", "hidden_size", "embed_dim", "num_heads", "intermediate_size", "out_hidden_size"), _COUNT),
    **dict.fromkeys(("patch_size", "temporal_patch_size", "spatial_merge_size", "window_size", "in_channels"), _COUNT),
    "mlp_ratio": _POSITIVE,
    "hidden_act": _TEXT,
    "fullatt_block_indexes": _WHOLES,
}
"""The fields of vision_config that this package depends on."""
_ROPE_LAYER_TYPES = ("full_attention", "sliding_attention")
"""Keys of rope_parameters where it has settings for each type of layer."""


def read_json(path: Path, where: str) -> dict[str, Json]:
    """The object in a JSON file.

    Args:
      where: the config field that names the checkpoint, with its value, for messages.
    Raises:
      ConfigError: the file cannot be read, or holds something else than an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {path.name}: {error.strerror}; is it a model's folder?") from error
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: {path.name} cannot be read: it is not JSON ({reason}); fetch it again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: {path.name} is not a JSON object but {_shown(found)}; fetch the file again")
    return found


def check_side_files(folder: Path, where: str, names: Sequence[str] = SIDE_FILES) -> None:
    """Raise ConfigError if one of these files is not a JSON object, or has token ids that are not ids."""
    for name in names:
        path = folder / name
        if path.exists():
            found = read_json(path, where)
            if name == "generation_config.json":
                _check(found, _GENERATION_CONFIG, name, where)


def read_model_config(folder: Path, where: str) -> dict[str, Json]:
    """The object in config.json, after a check of the types and ranges of all fields that are used.

    Args:
      where: the config field that names the checkpoint, with its value, for messages.
    Raises:
      ConfigError: a field has a wrong value; the message names the first.
    """
    raw = read_json(folder / "config.json", where)
    if "model_type" not in raw:
        raise ConfigError(f"{where}: config.json has no model_type; is it a model's folder?")
    _check_model(raw, "config.json", where)
    text, vision = raw.get("text_config"), raw.get("vision_config")
    if isinstance(text, dict):
        _check_model(text, "config.json's text_config", where)
    if isinstance(vision, dict):
        _check(vision, _VISION_CONFIG, "config.json's vision_config", where)
    auto_map = raw.get("auto_map")
    auto_map = auto_map if isinstance(auto_map, dict) else {}
    code: Json = {k: v for k, v in auto_map.items() if k.startswith(("AutoModel", "AutoConfig"))}
    if code:
        raise ConfigError(
            f"{where}: config.json has auto_map={_shown(code)}: the model is code of its own, which is not run; choose "
            "a checkpoint of one of the supported families without it"
        )
    return raw


def _check_model(raw: Mapping[str, Json], file: str, where: str) -> None:
    """Check the fields of a language model; they are the whole file or, of some models with images, a part of it."""
    _check(raw, _CONFIG, file, where)
    for name in ("rope_scaling", "rope_parameters"):
        settings = raw.get(name)
        if isinstance(settings, dict):
            _check_rope(settings, name, where)
    _check_shapes(raw, where)


def _check(raw: Mapping[str, Json], rules: Mapping[str, _Rule], file: str, where: str) -> None:
    for name, rule in rules.items():
        if name in raw and not rule.allows(raw[name]):
            raise _wrong(where, file, name, raw[name], rule.words)


def _check_rope(parameters: Mapping[str, Json], field: str, where: str) -> None:
    for name, value in parameters.items():
        if name in _ROPE_LAYER_TYPES and isinstance(value, dict):
            _check_rope(value, f"{field}.{name}", where)
            continue
        rule = _ROPE.get(name) or _nullable(_POSITIVE)
        if name not in _ROPE_LISTS and not rule.allows(value):
            raise _wrong(where, "config.json", f"{field}.{name}", value, rule.words)


def _check_shapes(raw: Mapping[str, Json], where: str) -> None:
    """Raise ConfigError if heads do not divide the width or each other, or a list has not one entry for each layer."""

    def count(name: str) -> int:
        found = raw.get(name)
        return found if _whole(found) else 0

    heads, kv_heads = count("num_attention_heads"), count("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise _wrong(where, "config.json", "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    width = count("hidden_size")
    if heads and width and not raw.get("head_dim") and width % heads:
        raise _wrong(where, "config.json", "hidden_size", width, f"a multiple of num_attention_heads={heads}")
    if count("head_dim") % 2:
        raise _wrong(where, "config.json", "head_dim", raw["head_dim"], "even")
    layers = count("num_hidden_layers")
    for name in ("layer_types", "no_rope_layers"):
        found = raw.get(name)
        if isinstance(found, list) and found and layers and len(found) != layers:
            raise ConfigError(
                f"{where}: config.json has {len(found)} {name} for num_hidden_layers={layers}; one for each is needed"
            )


def _wrong(where: str, file: str, name: str, value: Json, words: str) -> ConfigError:
    return ConfigError(f"{where}: {file} has {name}={_shown(value)}; it must be {words}")


def _shown(value: Json) -> str:
    """The text of a JSON value, shortened."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
