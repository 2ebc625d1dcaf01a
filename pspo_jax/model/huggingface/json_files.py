"""JSON files of a checkpoint, whose values are checked before anything uses them: one line names file, field, value."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pspo_jax.config.fields import ConfigError

SIDE_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
"""Files beside config.json that are read when they are there."""
_SHOWN = 80
"""Characters of a wrong value in a message."""


class _Kind(NamedTuple):
    """What a field may be."""

    words: str
    holds: Callable[[Any], bool]


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list) and all(map(holds, x))


def _is_text(x: Any) -> bool:
    return isinstance(x, str)


_COUNT = _Kind("a whole number above 0", lambda x: _whole(x) and x > 0)
_POSITIVE = _Kind("a number above 0", lambda x: _number(x) and x > 0)
_TRUTH = _Kind("true or false", lambda x: isinstance(x, bool))
_TEXT = _Kind("text", _is_text)
_TEXTS = _Kind("a list of texts", _list_of(_is_text))
_WHOLES = _Kind("a list of whole numbers", _list_of(_whole))
_OBJECT = _Kind("an object", lambda x: isinstance(x, dict))
_IDS = _Kind("a token's id or a list of them", lambda x: all(_whole(i) and i >= 0 for i in _listed(x)))
_DTYPE = _Kind(
    "float32, float16 or bfloat16",
    lambda x: isinstance(x, str) and x.removeprefix("torch.") in ("float32", "float16", "bfloat16", "float64", "auto"),
)


def _listed(x: Any) -> list[Any]:
    return x if isinstance(x, list) else [x]


def _nullable(kind: _Kind) -> _Kind:
    return _Kind(f"{kind.words}, or null", lambda x: x is None or kind.holds(x))


_CONFIG: dict[str, _Kind] = {
    "model_type": _TEXT,
    "architectures": _nullable(_TEXTS),
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), _COUNT),
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings"), _COUNT),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), _nullable(_COUNT)),
    **dict.fromkeys(("max_window_layers", "no_rope_layer_interval"), _Kind("a whole number", _whole)),
    **dict.fromkeys(("rms_norm_eps", "query_pre_attn_scalar"), _POSITIVE),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "partial_rotary_factor"), _nullable(_POSITIVE)),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), _TRUTH),
    "use_sliding_window": _TRUTH,
    **dict.fromkeys(("hidden_act", "hidden_activation"), _nullable(_TEXT)),
    **dict.fromkeys(("torch_dtype", "dtype"), _nullable(_DTYPE)),
    "layer_types": _nullable(_TEXTS),
    "no_rope_layers": _nullable(_WHOLES),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config", "auto_map"), _nullable(_OBJECT)),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), _nullable(_IDS)),
}
"""Fields of config.json that something here depends on; a family's default stands for one that is absent."""
_IDS_OF_GENERATION = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), _nullable(_IDS))
_ROPE = {"rope_type": _TEXT, "type": _TEXT, "truncate": _TRUTH, "finetuned": _TRUTH}
_ROPE |= dict.fromkeys(("mscale", "mscale_all_dim"), _nullable(_Kind("a number", _number)))
"""What a rotary embedding's settings are; all others are numbers above 0."""
_ROPE_LISTS = ("mrope_section", "long_factor", "short_factor")
"""Settings of kinds that are refused by their name."""
_ROPE_BY_LAYER = ("full_attention", "sliding_attention")


def read_json(path: Path, where: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      where: the field and its value that led here, for messages.
    Raises:
      ConfigError: it cannot be read, or holds something else.
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
    """Raise ConfigError for one of these files that is no JSON object, or whose token ids are no ids."""
    for name in names:
        path = folder / name
        if path.exists():
            found = read_json(path, where)
            if name == "generation_config.json":
                _check(found, _IDS_OF_GENERATION, name, where)


def read_model_config(folder: Path, where: str) -> dict[str, Any]:
    """config.json, with every field that is known here of its type and in its range.

    Raises:
      ConfigError: names the first field that is not.
    """
    raw = read_json(folder / "config.json", where)
    if "model_type" not in raw:
        raise ConfigError(f"{where}: config.json has no model_type; is it a model's folder?")
    _check(raw, _CONFIG, "config.json", where)
    for name in ("rope_scaling", "rope_parameters"):
        _check_rope(raw.get(name) or {}, name, where)
    _check_shapes(raw, where)
    code = {k: v for k, v in (raw.get("auto_map") or {}).items() if k.startswith(("AutoModel", "AutoConfig"))}
    if code:
        raise ConfigError(
            f"{where}: config.json has auto_map={_shown(code)}: the model is code of its own, which is not run; choose "
            "a checkpoint of one of the supported families without it"
        )
    return raw


def _check(raw: dict[str, Any], kinds: dict[str, _Kind], file: str, where: str) -> None:
    for name, kind in kinds.items():
        if name in raw and not kind.holds(raw[name]):
            raise _wrong(where, file, name, raw[name], kind.words)


def _check_rope(parameters: dict[str, Any], field: str, where: str) -> None:
    for name, value in parameters.items():
        if name in _ROPE_BY_LAYER and isinstance(value, dict):
            _check_rope(value, f"{field}.{name}", where)
            continue
        kind = _ROPE.get(name) or _nullable(_POSITIVE)
        if name not in _ROPE_LISTS and not kind.holds(value):
            raise _wrong(where, "config.json", f"{field}.{name}", value, kind.words)


def _check_shapes(raw: dict[str, Any], where: str) -> None:
    """Heads divide the width and each other, and lists have an entry a layer."""
    heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise _wrong(where, "config.json", "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    width = raw.get("hidden_size")
    if heads and width and not raw.get("head_dim") and width % heads:
        raise _wrong(where, "config.json", "hidden_size", width, f"a multiple of num_attention_heads={heads}")
    if (raw.get("head_dim") or 0) % 2:
        raise _wrong(where, "config.json", "head_dim", raw["head_dim"], "even")
    layers = raw.get("num_hidden_layers")
    for name in ("layer_types", "no_rope_layers"):
        found = raw.get(name)
        if found and layers and len(found) != layers:
            raise ConfigError(
                f"{where}: config.json has {len(found)} {name} for num_hidden_layers={layers}; one for each is needed"
            )


def _wrong(where: str, file: str, name: str, value: Any, words: str) -> ConfigError:
    return ConfigError(f"{where}: {file} has {name}={_shown(value)}; it must be {words}")


def _shown(value: Any) -> str:
    """A JSON value as it stands in a file, shortened."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
