"""Rows of a dataset, by datasets: read from a file, a folder or the hub, and mapped to questions and gold answers."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pspo_jax.config import Config, ConfigError, TaskConfig
from pspo_jax.rewards.math import ALTERNATIVES
from pspo_jax.tasks.base import OWN_ANSWER, digest

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
PROMPT_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "solution", "target")
_LAYOUT = "2"
"""Of the cached rows; to be raised with their columns or with what `Source.convert` makes of a record."""
_SAID_FROM = 20_000
_BAD_ANSWER = "gold answer cannot be read"


class Question(NamedTuple):
    """A row, or why it is none."""

    text: str
    answer: str
    extra: dict[str, Any]
    reason: str = ""
    """Why the row is left out; "" = it is not."""


class Source(NamedTuple):
    """Records and how each becomes a question."""

    name: str
    """What messages and lists call it."""
    kind: str
    """Name of the task that verifies it."""
    records: Any
    """A datasets.Dataset."""
    convert: Callable[[dict[str, Any]], Question]
    settings: str
    """What `convert` depends on, for the cache."""
    field: str = "task"
    """The field that names it."""


def quiet() -> Any:
    """The datasets package, without its progress bars."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised too
    return datasets


def read(data: str, field: str, split: str, config: TaskConfig) -> Any:
    """The datasets.Dataset that `data` names.

    Raises:
      ConfigError: it is not there, cannot be read, or holds no rows.
    """
    datasets = quiet()
    path = Path(data)
    empty = f"{field}={data}: holds no rows; name another"
    try:
        if path.suffix in (*READERS, ".arrow") or path.is_file():
            found = _read_file(datasets, path, field)
        elif path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
        elif path.is_dir() or data.startswith((".", "/", "~")):
            if not path.is_dir():
                raise FileNotFoundError("no such file or folder")
            found = datasets.load_dataset(str(path), config.subset, split=split)
        else:
            found = datasets.load_dataset(data, config.subset, split=split, revision=config.revision)
    except ConfigError:
        raise
    except StopIteration as error:
        raise ConfigError(empty) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        if "corresponds to no data" in reason:  # a header alone, or []
            raise ConfigError(empty) from error
        raise ConfigError(f"{field}={data}: cannot be read ({reason}); name a file, a folder or a hub id") from error
    if isinstance(found, dict):
        if split not in found:
            raise ConfigError(f"{field}={data}: has no split {split}; it has {', '.join(found)}")
        found = found[split]
    if not len(found):
        raise ConfigError(empty)
    return found


def _read_file(datasets: Any, path: Path, field: str) -> Any:
    if path.suffix == ".arrow":
        return datasets.Dataset.from_file(str(path))
    if path.suffix not in READERS:
        raise ConfigError(f"{field}={path}: of what format? It must be {', '.join(READERS)} or .arrow, unpacked")
    return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")


def from_data(data: str, field: str, split: str, c: TaskConfig) -> Source:
    """A source whose columns the config maps."""
    records = read(data, field, split, c)
    prompt = _column(records, c.prompt_column, PROMPT_COLUMNS, "task.prompt_column", data)
    needs_answer = c.name != "python_function"
    assert prompt is not None
    answer = _column(records, c.answer_column, ANSWER_COLUMNS, "task.answer_column", data, optional=not needs_answer)
    with _utf8(field, data):
        transform = c.answer_transform or ("gsm8k" if c.name == "gsm8k" else _guess(records, answer))
    choices = c.choices_column if c.name == "multiple_choice" else None
    if choices is not None:
        _column(records, choices, (), "task.choices_column", data)

    given = {"function": c.function} if c.name == "python_function" else {}

    def convert(record: dict[str, Any]) -> Question:
        try:
            text = _text(record[prompt])
        except (TypeError, UnicodeDecodeError) as error:
            return Question("", "", {}, f"column {prompt} is no text ({error})")
        if not text.strip():
            return Question(text, "", {}, "empty prompt")
        if answer is None:
            return Question(text, "", given)
        own = _own_answer(record[answer], transform) if c.name != "multiple_choice" else {}
        if own and not needs_answer:  # a function judges any value, also an object or null
            return Question(text, json.dumps(record[answer]), given | own)
        if record[answer] is None:
            return Question(text, "", {}, "no gold answer")
        try:
            gold = TRANSFORMS[transform](_gold_value(record[answer]))
        except (ValueError, SyntaxError, TypeError):
            return Question(text, str(record[answer])[:200], {}, f"{_BAD_ANSWER} by answer_transform {transform}")
        if not gold.strip():
            return Question(text, "", {}, "no gold answer")
        return with_choices(text, gold, record[choices]) if choices else Question(text, gold, given | own)

    settings = json.dumps([prompt, answer, transform, choices, given])
    return Source(data, c.name, records, convert, settings, field)


def _own_answer(value: Any, transform: str) -> dict[str, Any]:
    """A row's answer as it stands, where JSON has that and its text alone would lose its type."""
    if isinstance(value, str) or transform not in ("none", "stringified_list"):
        return {}
    try:
        return {OWN_ANSWER: json.loads(json.dumps(value))}
    except (TypeError, ValueError):
        return {}


def _column(
    records: Any, wanted: str | None, usual: Sequence[str], field: str, data: str, optional: bool = False
) -> str | None:
    if wanted is None:
        found = [name for name in usual if name in records.column_names]
        if found:
            return found[0]
        if optional:
            return None
        problem = f"there is none of {', '.join(usual)}"
    elif wanted in records.column_names:
        return wanted
    else:
        problem = "there is no such column"
    raise ConfigError(f"{field}={wanted}: {problem} in {data}; its columns are {', '.join(records.column_names)}")


def _guess(records: Any, answer: str | None) -> str:
    """Lists are alternatives; all else stands as it is."""
    first = next((r for r in records[:100][answer] if r is not None), None) if answer else None
    return "stringified_list" if isinstance(first, list) else "none"


def _text(value: Any) -> str:
    """A prompt column as text: a string, or messages whose last user turn counts."""
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, dict):
        raise TypeError("an object, not text")
    if isinstance(value, list):
        turns = [m["content"] for m in value if isinstance(m, dict) and m.get("role") == "user"]
        return str(turns[-1]) if turns else ""
    return "" if value is None else str(value)


def _gold_value(value: Any) -> Any:
    """Bytes as text; ValueError for an object, whose text would be Python's."""
    if isinstance(value, dict):
        raise ValueError("an object is no answer")
    return value.decode() if isinstance(value, bytes) else value


def _after_hashes(value: Any) -> str:
    head, mark, tail = str(value).rpartition("####")
    if not mark:
        raise ValueError(f"no #### in {head!r}")
    return tail.strip().replace(",", "")


def _members(value: Any) -> str:
    found = value if isinstance(value, list) else ast.literal_eval(str(value))
    if not isinstance(found, list | tuple):
        raise ValueError(f"{value!r} is no list")
    return ALTERNATIVES.join(dict.fromkeys(str(v).strip() for v in found if v is not None))


def _in_box(value: Any) -> str:
    head, box, tail = str(value).rpartition("\\boxed{")
    depth = 1
    for i, char in enumerate(tail if box else ""):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if not depth:
            return tail[:i].strip()
    raise ValueError(f"no \\boxed{{}} in {head!r}")


TRANSFORMS: dict[str, Callable[[Any], str]] = {
    "none": lambda value: str(value).strip(),
    "gsm8k": _after_hashes,
    "stringified_list": _members,
    "boxed": _in_box,
}


def with_choices(text: str, gold: str, options: Any) -> Question:
    """A question with its lettered options; gold as letter, index or text becomes the letter."""
    if isinstance(options, dict):  # as in ai2_arc: {"text": [...], "label": [...]}
        labels, options = [str(x) for x in options.get("label", [])], options.get("text", [])
        if gold in labels:
            gold = str(labels.index(gold))
    if isinstance(options, str):  # as in a CSV file
        try:
            options = ast.literal_eval(options)
        except (ValueError, SyntaxError):
            options = None
        if not isinstance(options, list | tuple):
            return Question(text, gold, {}, "options are no list")
    options = [str(o) for o in options or []]
    letters = [chr(ord("A") + i) for i in range(len(options))]
    if not 2 <= len(options) <= 26:
        return Question(text, gold, {}, f"{len(options)} options")
    if gold in letters:
        letter = gold
    elif gold.isdecimal() and int(gold) < len(options):
        letter = letters[int(gold)]
    elif gold in options:
        letter = letters[options.index(gold)]
    else:
        return Question(text, gold, {}, f"{_BAD_ANSWER}: neither letter, index nor option")
    lines = [f"{name}. {option}" for name, option in zip(letters, options, strict=True)]
    return Question("\n".join([text, *lines]), letter, {"options": len(options)})


def tokenised(
    source: Source,
    encode: Callable[[str], list[int]],
    identity: str,
    folder: Path,
    part: int,
    say: Callable[[str], None] = lambda _: None,
) -> Any:
    """`source` as a datasets.Dataset with columns text, answer, kind, extra, reason, ids, their length, part, row,
    digest (hash of kind, text and answer) and question (of the text).

    It is kept in `folder` and found again when data, settings and tokenizer are the same.
    """
    datasets = quiet()
    value, sequence = datasets.Value, datasets.Sequence
    features = datasets.Features(
        text=value("string"),
        answer=value("string"),
        kind=value("string"),
        extra=value("string"),
        reason=value("string"),
        digest=value("uint64"),
        question=value("uint64"),
        length=value("int32"),
        ids=sequence(value("int32")),
        part=value("int32"),
        row=value("int64"),
    )

    def prepare(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        names = list(batch)
        out: dict[str, list[Any]] = {name: [] for name in features}
        for place, index in enumerate(indices):
            q = source.convert({name: batch[name][place] for name in names})
            content = f"{source.kind}\0{q.text}".encode()
            ids = [] if q.reason else encode(q.text)
            line = (q.text, q.answer, source.kind, json.dumps(q.extra), q.reason)
            hashes = (digest(content, q.answer), digest(q.text.encode(), ""))
            for name, item in zip(features, (*line, *hashes, len(ids), ids, part, index), strict=True):
                out[name].append(item)
        return out | {name: np.array(out[name], np.uint64) for name in ("digest", "question")}

    key = hashlib.sha256(
        "\0".join([_LAYOUT, source.records._fingerprint, source.settings, source.kind, identity, str(part)]).encode()
    ).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"prompts-{key}.arrow"
    if path.exists() and not _readable(datasets, path):
        path.unlink()
    if not path.exists() and len(source.records) >= _SAID_FROM:
        say(f"tokenising {len(source.records):,} prompts of {source.name} (once; they are kept in {folder})")
    with _utf8(source.field, source.name):
        return source.records.map(
            prepare,
            batched=True,
            with_indices=True,
            remove_columns=source.records.column_names,
            features=features,
            new_fingerprint=key,
            cache_file_name=str(path),
            load_from_cache_file=True,
        )


@contextmanager
def _utf8(field: str, data: str) -> Iterator[None]:
    """datasets decodes text only where it is read, and then raises what no message of ours would name."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field}={data}: is not UTF-8 ({error}); convert it") from error


def _readable(datasets: Any, path: Path) -> bool:
    """Whether a cached file is whole; a full disk or a kill may have cut it off."""
    import pyarrow

    try:
        return len(datasets.Dataset.from_file(str(path))) >= 0
    except (pyarrow.ArrowException, OSError):
        return False


def numbers(rows: Any, name: str) -> np.ndarray:
    """A numeric column as one array, without a Python object per row."""
    return np.asarray(rows.with_format("numpy")[name][:])


def cache_folder(config: Config) -> Path:
    """Where tokenised prompts are kept.

    Raises:
      ConfigError: it cannot be written.
    """
    folder = Path(config.task.cache) if config.task.cache else Path.home() / ".cache" / "pspo_jax" / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"task.cache={folder}: {error.strerror}; name a folder that can be written") from error
    return folder


def first_of_each(values: np.ndarray) -> np.ndarray:
    """True where a value stands for the first time."""
    out = np.zeros(len(values), bool)
    out[np.unique(values, return_index=True)[1]] = True
    return out
