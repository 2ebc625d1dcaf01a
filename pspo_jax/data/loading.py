"""Data sets read by the datasets package from a file, a folder or the hub, and mapped to questions and gold answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ChoicesAnswer, TaskConfig
from pspo_jax.data.answers import PROSE, any_text, gold_text, is_prose, missing
from pspo_jax.data.answers import TRANSFORMS as TRANSFORMS
from pspo_jax.data.choices import letter_of, read_options, reading_of
from pspo_jax.data.conversations import IMAGE_PLACE, Conversation, content_of, image_parts, read_prompt, transcript
from pspo_jax.data.files import Literal, Record, Records, as_records, heads, joined, read_files, value_at
from pspo_jax.data.hub_data import local_files, read_layout, split_parts
from pspo_jax.data.images.reading import files_stamp, listed_images, part_image
from pspo_jax.data.task import ANSWER_COLUMN
from pspo_jax.model.huggingface.hub import Repository

if TYPE_CHECKING:
    import datasets

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
AS_TEXT = ("json", "csv")
"""Formats that `files` reads."""
IMAGE_COLUMNS = ("images", "image")
VIDEO_COLUMNS = ("videos", "video")
NO_IMAGES = "off"
"""Value of task.image_column for which no images are read."""
PROMPT_COLUMNS = ("problem", "question", "prompt", "messages", "conversations")
ANSWER_COLUMNS = ("answer", "solution", "target")
_PROBED_ROWS = 1000
"""Rows in which a dotted column is looked for."""
_BAD_ANSWER = "gold answer cannot be read"


class Question(NamedTuple):
    """A row as a question with its gold answer, or the reason why it is none."""

    text: str
    answer: str
    extra: dict[str, object]
    """Further arguments of the verifier."""
    reason: str = ""
    """Why the row is left out; "" = it is not left out."""


class Convert(Protocol):
    """The question of a record; `exact` is the same record with numbers as its file writes them."""

    def __call__(self, record: Record, exact: Record | None = None) -> Question: ...


class Source(NamedTuple):
    """Records, and the function that makes a question of each."""

    name: str
    """Name of the source in messages and lists."""
    kind: str
    """Name of the task that verifies it."""
    records: datasets.Dataset | Records
    convert: Convert
    settings: str
    """Text that changes with everything that `convert` depends on, for the cache."""
    field: str = "task"
    """The config field that names it."""
    prompt: Callable[[Record, Question], str | Conversation] | None = None
    """The model's prompt for a record and its question; None = the question's text."""
    note: str = ""
    """A line to print at the start, such as how gold answers are read."""
    image_column: str | None = None
    """Column of a prompt's images; None = there is none."""
    images: Callable[[Record], list[object]] | None = None
    """The images of a record, as `image_bytes` reads them; None = no record has any."""


def quiet_datasets() -> ModuleType:
    """The datasets package, without its progress bars."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised too
    return datasets


def read(data: str, field: str, split: str, config: TaskConfig) -> Records:
    """The records of a file, a folder or a hub id.

    Raises:
      ConfigError: the data are not there, cannot be read, or hold no rows.
      StorageError: the data are on the hub, which does not answer now.
    """
    datasets = quiet_datasets()
    path = Path(data).expanduser()
    empty = f"{field}={data}: holds no rows; name another"
    try:
        if path.suffix in (*READERS, ".arrow") or path.is_file():
            found = _read_file(datasets, path, field, config)
        elif path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
        elif path.is_dir() or data.startswith((".", "/", "~")):
            if not path.is_dir():
                raise FileNotFoundError("no such file or folder")
            found = _load_folder(datasets, str(path), split, config)
        else:
            found = _load_hub(
                datasets, Repository(data, field, config.revision, "task.revision", "dataset"), split, config
            )
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field}={data}: is not UTF-8 ({error}); convert it") from error
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
    if found is None or not len(found):
        raise ConfigError(empty)
    return as_records(found, path.parent if path.is_file() else path if path.is_dir() else None)


def _read_file(datasets: ModuleType, path: Path, field: str, config: TaskConfig) -> datasets.Dataset | Records | None:
    """The rows of one file."""
    if path.suffix == ".arrow":
        return datasets.Dataset.from_file(str(path))
    if path.suffix not in READERS:
        raise ConfigError(f"{field}={path}: of what format? It must be {', '.join(READERS)} or .arrow, unpacked")
    if (form := READERS[path.suffix]) in AS_TEXT:
        return read_files([path], form, cache_folder(config))
    return datasets.load_dataset(form, data_files=str(path), split="train")


def _load_folder(datasets: ModuleType, name: str, split: str, config: TaskConfig) -> datasets.Dataset | Records | None:
    """A split of a folder of files."""
    builder = datasets.load_dataset_builder(name, config.subset)
    if builder.name not in AS_TEXT or getattr(builder.config, "field", None) is not None:
        return datasets.load_dataset(name, config.subset, split=split)
    files = {str(part): [str(file) for file in found] for part, found in builder.config.data_files.items()}
    return _text_split(datasets, builder.name, files, split, config)


def _load_hub(
    datasets: ModuleType, repo: Repository, split: str, config: TaskConfig
) -> datasets.Dataset | Records | None:
    """A split of a data set on the hub, or in the cache of the hub's client."""
    layout = read_layout(datasets, repo, config.subset, cache_folder(config))
    files = local_files(repo, layout, split_parts(split, layout.files))
    if layout.reader in AS_TEXT and layout.records_field is None:
        return _text_split(datasets, layout.reader, files, split, config)
    features = None if layout.features is None else datasets.Features.from_dict(layout.features)
    field = {} if layout.records_field is None else {"field": layout.records_field}
    return datasets.load_dataset(layout.reader, data_files=files, split=split, features=features, **field)


def _text_split(
    datasets: ModuleType, form: str, files: Mapping[str, Sequence[str]], split: str, config: TaskConfig
) -> Records | None:
    """A split, such as train[:100] or train+test, of JSON or CSV files, read by `files`, which changes no value.

    Args:
      files: local paths by split.
    """
    manager = datasets.DownloadManager(download_config=datasets.DownloadConfig())

    def rows(part: str) -> Records | None:
        """All rows of a split; compressed files are unpacked."""
        paths = [Path(file) for file in manager.iter_files(manager.download_and_extract(list(files[part])))]
        return read_files(paths, form, cache_folder(config))

    names = split_parts(split, files)
    if names == [split]:
        return rows(split)
    found = {part: rows(part) for part in names}
    sizes = {part: 0 if table is None else len(table) for part, table in found.items()}
    pieces = [
        table.select(range(piece.from_ or 0, sizes[piece.splitname] if piece.to is None else piece.to))
        for piece in datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
        if (table := found[piece.splitname]) is not None
    ]
    return joined(pieces)


def from_data(data: str, field: str, split: str, c: TaskConfig) -> Source:
    """The source of data whose columns the config maps to questions and gold answers.

    Raises:
      ConfigError: the data cannot be read, a column is missing, or the gold answers name options in several ways.
    """
    records = read(data, field, split, c)
    prompt = _column(records, c.prompt_column, PROMPT_COLUMNS, "task.prompt_column", data)
    assert prompt is not None
    optional = c.name == "python_function"
    answer = _column(records, c.answer_column, ANSWER_COLUMNS, "task.answer_column", data, optional)
    transform = c.answer_transform or ("gsm8k" if c.name == "gsm8k" else None)
    choices = c.choices_column if c.name == "multiple_choice" else None
    reading = _choices_reading(records, answer, c, data) if choices is not None and answer is not None else None
    given: dict[str, object] = {"function": c.function} if c.name == "python_function" else {}
    finds_prose = c.check_gold and c.name in ("math", "gsm8k")

    def convert(record: Record, exact: Record | None = None) -> Question:
        """The question in a record, or the reason why the record is left out."""
        exact = record if exact is None else exact
        try:
            text = transcript(_prompt(record, exact, prompt))
        except (TypeError, UnicodeError) as error:
            return Question("", "", {}, f"column {prompt} is no text ({error})")
        if not text.strip():
            return Question(text, "", {}, "empty prompt")
        if answer is None:
            return Question(text, "", given)
        column: dict[str, object] = {ANSWER_COLUMN: answer} if transform in (None, "none") else {}
        if c.name == "python_function":
            gold = any_text(value_at(exact, answer), value_at(record, answer), transform)
            return Question(text, gold, given | column)
        value = value_at(exact, answer)
        if missing(value):
            return Question(text, "", {}, "no gold answer")
        try:
            gold = gold_text(value, transform)
        except (ValueError, SyntaxError, TypeError) as error:
            return Question(text, str(value)[:200], {}, _unreadable(transform, value, error))
        if not gold.strip():
            return Question(text, "", {}, "no gold answer")
        if finds_prose and transform in (None, "none") and isinstance(value, str) and is_prose(gold):
            return Question(text, gold[:200], {}, f"{PROSE}; name task.answer_transform or task.answer_column")
        return with_choices(text, gold, value_at(exact, choices), reading) if choices else Question(text, gold, column)

    def prompt_of(record: Record, question: Question) -> str | Conversation:
        """The conversation, with the text that the question adds to its last turn, such as options."""
        found = _prompt(record, record, prompt)
        if isinstance(found, str) and IMAGE_PLACE not in found:
            return question.text
        added = question.text.removeprefix(transcript(found))
        if isinstance(found, str):
            return found + added
        return [*found[:-1], {**found[-1], "content": content_of(found[-1]) + added}]

    read_as = f"{data}: the answers in {answer} are read as the options' {reading} (task.choices_answer)"
    note = read_as if reading else ""
    column, images, stamp = _images(records, prompt, c, field, data)
    settings = json.dumps([prompt, answer, transform, choices, given, finds_prose, reading, column, stamp])
    return Source(data, c.name, records, convert, settings, field, prompt_of, note, column, images)


def _prompt(record: Record, exact: Record, name: str) -> str | Conversation:
    """A record's prompt. A number is taken as the file writes it, a value inside a conversation by its type."""
    value = value_at(exact, name)
    return read_prompt(value if isinstance(value, Literal) else value_at(record, name))


def _image_column(records: Records, c: TaskConfig, field: str, data: str) -> str | None:
    """The column of images: the config's, or the first of the usual ones that has any.

    Raises:
      ConfigError: the config's column is not there, or holds videos.
    """
    for name in VIDEO_COLUMNS:
        if c.image_column is None and _holds_any(records, name):
            raise ConfigError(
                f"{field}={data}: has videos in its column {name}, and only still images are read; "
                f"task.image_column={NO_IMAGES} trains on the text alone"
            )
    if c.image_column is not None:
        return _column(records, c.image_column, (), "task.image_column", data)
    return next((name for name in IMAGE_COLUMNS if _holds_any(records, name)), None)


def _holds_any(records: Records, name: str) -> bool:
    """Whether there is a column of this name, with an image or a video in some row."""
    return name in records.column_names and any(listed_images(value_at(record, name)) for record in records)


def _images(
    records: Records, prompt: str, c: TaskConfig, field: str, data: str
) -> tuple[str | None, Callable[[Record], list[object]] | None, str]:
    """The column of images, the function from a record to its images, and a stamp of the files that they name.

    The images are those in the column, or else those within the conversation.
    """
    if c.image_column == NO_IMAGES:
        return None, None, ""
    column = _image_column(records, c, field, data)
    first = range(min(len(records), _PROBED_ROWS))
    texts = records if column is None else records.without(column)
    within = any(image_parts(value_at(texts[i], prompt)) for i in first)
    if column is None and not within:
        return None, None, ""

    def images(record: Record) -> list[object]:
        found = [] if column is None else listed_images(value_at(record, column))
        held = [part_image(part) for part in image_parts(value_at(record, prompt))] if within else []
        return found or [image for image in held if image is not None]

    return column, images, _stamp(records, column, images)


def _stamp(records: Records, column: str | None, images: Callable[[Record], list[object]]) -> str:
    """A text that changes when an image file changes that a record names."""
    if column is not None and column in records.table.column_names:
        return files_stamp(_without_bytes(records.table, column), records.folder({}))
    stamps = (files_stamp(images(records.plain(row)), records.folder(row)) for row in records.table)
    return hashlib.sha256("".join(stamps).encode()).hexdigest()


def _without_bytes(table: datasets.Dataset, column: str) -> list[object]:
    """The images of a column that do not hold their own bytes; the bytes of the others are not read."""
    import pyarrow
    import pyarrow.compute

    values = table.select_columns([column]).with_format("arrow")[:][column]
    while pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
        values = pyarrow.compute.list_flatten(values)
    if pyarrow.types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0:
        values = values.filter(pyarrow.compute.is_null(pyarrow.compute.struct_field(values, "bytes")))
    elif pyarrow.types.is_binary(values.type) or pyarrow.types.is_large_binary(values.type):
        return []
    return list(values.to_pylist())


def _unreadable(transform: str | None, value: object, error: Exception) -> str:
    """The reason to leave out a row whose gold answer cannot be read."""
    what = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else ""
    why = "half a surrogate pair" if isinstance(error, UnicodeError) else what
    return f"{_BAD_ANSWER} by answer_transform {transform or 'none'}{f' ({why})' if why else ''}"


def _column(
    records: Records, wanted: str | None, usual: Sequence[str], field: str, data: str, optional: bool = False
) -> str | None:
    """The name of a column: the wanted one, or the first of the usual ones; None if it is optional and not there."""
    names = records.column_names
    if wanted is None:
        found = [name for name in usual if name in names]
        if found:
            return found[0]
        if optional:
            return None
        problem = f"there is none of {', '.join(usual)}"
    elif wanted in names or (any(head in names for head in heads(wanted)) and _leads_somewhere(records, wanted)):
        return wanted
    else:
        problem = "there is no such column"
    inside = [f"{k}.{inner}" for k, v in records[0].items() if isinstance(v, dict) for inner in v]
    columns = ", ".join([*names, *inside])
    raise ConfigError(f"{field}={wanted}: {problem} in {data}; its columns are {columns}")


def _leads_somewhere(records: Records, name: str) -> bool:
    """Whether a dotted name leads to a value in one of the first rows."""
    first = range(min(len(records), _PROBED_ROWS))
    return any(value_at(records[i], name) is not None for i in first)


def with_choices(text: str, gold: str, cell: object, reading: ChoicesAnswer | None) -> Question:
    """A question with its lettered options; its answer is the letter of the option that gold names by `reading`."""
    options = read_options(cell)
    if isinstance(options, str):
        return Question(text, gold, {}, options)
    letter = letter_of(gold, options, reading) if reading else None
    if letter is None:
        return Question(text, gold, {}, f"{_BAD_ANSWER}: names no one option by its {reading or 'letter'}")
    lines = [f"{name}. {option}" for name, option in zip(options.letters, options.texts, strict=True)]
    return Question("\n".join([text, *lines]), letter, {"options": len(options.texts), "texts": options.texts})


def _choices_reading(records: Records, answer: str, c: TaskConfig, data: str) -> ChoicesAnswer | None:
    """The way in which a column's gold answers name options: the config's, or the one that fits all of them."""
    _column(records, c.choices_column, (), "task.choices_column", data)
    if c.choices_answer is not None:
        return c.choices_answer
    cells = zip(records.values(answer), records.values(c.choices_column), strict=True)
    rows = [(str(gold).strip(), read_options(cell)) for gold, cell in cells if not missing(gold)]
    found = [(gold, options) for gold, options in rows if not isinstance(options, str)]
    return reading_of(found, f"task.answer_column={answer} of {data}")


def cache_folder(config: TaskConfig) -> Path:
    """The folder in which tokenised prompts and the rows of files are kept.

    Raises:
      ConfigError: the folder cannot be written.
    """
    folder = Path(config.cache) if config.cache else Path.home() / ".cache" / "pspo_jax" / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"task.cache={folder}: {error.strerror}; name a folder that can be written") from error
    return folder


def first_of_each(values: np.ndarray) -> np.ndarray:
    """True where a value occurs for the first time."""
    out = np.zeros(len(values), bool)
    out[np.unique(values, return_index=True)[1]] = True
    return out
