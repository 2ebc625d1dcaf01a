"""Rows of a dataset, by datasets: read from a file, a folder or the hub, and mapped to questions and gold answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ChoicesAnswer, TaskConfig
from pspo_jax.data.answers import PROSE, any_text, gold_text, is_prose, missing
from pspo_jax.data.answers import TRANSFORMS as TRANSFORMS
from pspo_jax.data.choices import letter_of, options_of, reading_of
from pspo_jax.data.conversations import Conversation, read_prompt, transcript
from pspo_jax.data.files import Literal, Rows, heads, joined, read_files, rows_of, value_at
from pspo_jax.data.rendering import PromptError
from pspo_jax.data.task import ANSWER_COLUMN, digest

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
AS_TEXT = ("json", "csv")
"""Formats that `files` reads."""
PROMPT_COLUMNS = ("problem", "question", "prompt", "messages", "conversations")
ANSWER_COLUMNS = ("answer", "solution", "target")
_LAYOUT = "3"
"""Version of the cached rows; to be raised with their columns or with what `Source.convert` makes of a record."""
_SAID_FROM = 20_000
_LOOKED_AT = 1000
"""Rows in which a dotted column is looked for."""
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
    """A datasets.Dataset, or `files.Rows`."""
    convert: Callable[..., Question]
    """(record, the same with exact numbers) -> its question."""
    settings: str
    """What `convert` depends on, for the cache."""
    field: str = "task"
    """The field that names it."""
    prompt: Callable[[dict[str, Any], Question], str | Conversation] | None = None
    """What the policy is given for a record; None = the question's text."""
    note: str = ""
    """A line to say at the start, such as how gold answers are read."""


def quiet() -> Any:
    """The datasets package, without its progress bars."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised too
    return datasets


def read(data: str, field: str, split: str, config: TaskConfig) -> Rows:
    """The rows that `data` names.

    Raises:
      ConfigError: it is not there, cannot be read, or holds no rows.
    """
    datasets = quiet()
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
            found = _load(datasets, str(path), split, config, None)
        else:
            found = _load(datasets, data, split, config, config.revision)
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
    return rows_of(found)


def _read_file(datasets: Any, path: Path, field: str, config: TaskConfig) -> Any:
    if path.suffix == ".arrow":
        return datasets.Dataset.from_file(str(path))
    if path.suffix not in READERS:
        raise ConfigError(f"{field}={path}: of what format? It must be {', '.join(READERS)} or .arrow, unpacked")
    if (form := READERS[path.suffix]) in AS_TEXT:
        return read_files([path], form, cache_folder(config))
    return datasets.load_dataset(form, data_files=str(path), split="train")


def _load(datasets: Any, name: str, split: str, config: TaskConfig, revision: str | None) -> Any:
    """A split of a folder or of the hub; its JSON and CSV files are read as they stand, and not by datasets."""
    builder = datasets.load_dataset_builder(name, config.subset, revision=revision)
    if builder.name not in AS_TEXT or getattr(builder.config, "field", None) is not None:
        return datasets.load_dataset(name, config.subset, split=split, revision=revision)
    files = {str(part): list(found) for part, found in builder.config.data_files.items()}
    manager = datasets.DownloadManager(dataset_name=name, download_config=datasets.DownloadConfig())

    def rows(part: str) -> Rows | None:
        paths = [Path(file) for file in manager.iter_files(manager.download_and_extract(files[part]))]
        return read_files(paths, builder.name, cache_folder(config))

    if split in files:
        return rows(split)
    if names := [part for part in files if part in split]:  # such as train[:100], or train+test
        found = {part: rows(part) for part in names}
        sizes = {part: 0 if table is None else len(table) for part, table in found.items()}
        pieces = [
            table.select(range(piece.from_ or 0, sizes[piece.splitname] if piece.to is None else piece.to))
            for piece in datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
            if (table := found[piece.splitname]) is not None
        ]
        return joined(pieces)
    raise ValueError(f'Unknown split "{split}". Should be one of {list(files)}.')


def from_data(data: str, field: str, split: str, c: TaskConfig) -> Source:
    """A source whose columns the config maps."""
    records = read(data, field, split, c)
    prompt = _column(records, c.prompt_column, PROMPT_COLUMNS, "task.prompt_column", data)
    needs_answer = c.name != "python_function"
    assert prompt is not None
    answer = _column(records, c.answer_column, ANSWER_COLUMNS, "task.answer_column", data, optional=not needs_answer)
    transform = c.answer_transform or ("gsm8k" if c.name == "gsm8k" else None)
    choices = c.choices_column if c.name == "multiple_choice" else None
    if choices is not None:
        _column(records, choices, (), "task.choices_column", data)
    reading = _choices_reading(records, answer, c, data) if choices is not None and answer is not None else None
    given = {"function": c.function} if c.name == "python_function" else {}
    finds_prose = c.check_gold and c.name in ("math", "gsm8k")

    def convert(record: dict[str, Any], exact: dict[str, Any] | None = None) -> Question:
        exact = record if exact is None else exact
        try:
            text = transcript(_prompt(record, exact, prompt))
        except (TypeError, UnicodeError) as error:
            return Question("", "", {}, f"column {prompt} is no text ({error})")
        if not text.strip():
            return Question(text, "", {}, "empty prompt")
        if answer is None:
            return Question(text, "", given)
        own = {ANSWER_COLUMN: answer} if transform in (None, "none") else {}
        if c.name == "python_function":
            gold = any_text(value_at(exact, answer), value_at(record, answer), transform)
            return Question(text, gold, given | own)
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
        return with_choices(text, gold, value_at(exact, choices), reading) if choices else Question(text, gold, own)

    def prompt_of(record: dict[str, Any], question: Question) -> str | Conversation:
        """The conversation, with what has been added to its last turn's text, such as options."""
        found = _prompt(record, record, prompt)
        if isinstance(found, str):
            return question.text
        added = question.text.removeprefix(transcript(found))
        return [*found[:-1], {**found[-1], "content": found[-1]["content"] + added}]

    settings = json.dumps([prompt, answer, transform, choices, given, finds_prose, reading])
    note = (
        f"{data}: the answers in {answer} are read as the options' {reading} (task.choices_answer)" if reading else ""
    )
    return Source(data, c.name, records, convert, settings, field, prompt_of, note)


def _prompt(record: dict[str, Any], exact: dict[str, Any], name: str) -> str | Conversation:
    """A record's prompt; a number as the file writes it, and what stands in a conversation by its type."""
    value = value_at(exact, name)
    return read_prompt(value if isinstance(value, Literal) else value_at(record, name))


def _unreadable(transform: str | None, value: Any, error: Exception) -> str:
    what = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else ""
    why = "half a surrogate pair" if isinstance(error, UnicodeError) else what
    return f"{_BAD_ANSWER} by answer_transform {transform or 'none'}{f' ({why})' if why else ''}"


def _column(
    records: Any, wanted: str | None, usual: Sequence[str], field: str, data: str, optional: bool = False
) -> str | None:
    names = records.column_names
    if wanted is None:
        found = [name for name in usual if name in names]
        if found:
            return found[0]
        if optional:
            return None
        problem = f"there is none of {', '.join(usual)}"
    elif wanted in names or (any(head in names for head in heads(wanted)) and _somewhere(records, wanted)):
        return wanted
    else:
        problem = "there is no such column"
    inside = [f"{k}.{inner}" for k, v in records[0].items() if isinstance(v, dict) for inner in v]
    columns = ", ".join([*names, *inside])
    raise ConfigError(f"{field}={wanted}: {problem} in {data}; its columns are {columns}")


def _somewhere(records: Any, name: str) -> bool:
    """Whether a dotted name leads to something in one of the first rows."""
    first = range(min(len(records), _LOOKED_AT))
    return any(value_at(records[i], name) is not None for i in first)


def with_choices(text: str, gold: str, cell: Any, reading: ChoicesAnswer | None) -> Question:
    """A question with its lettered options; gold, which `reading` tells how to take, becomes the letter."""
    options = options_of(cell)
    if isinstance(options, str):
        return Question(text, gold, {}, options)
    letter = letter_of(gold, options, reading) if reading else None
    if letter is None:
        return Question(text, gold, {}, f"{_BAD_ANSWER}: names no one option by its {reading or 'letter'}")
    lines = [f"{name}. {option}" for name, option in zip(options.letters, options.texts, strict=True)]
    return Question("\n".join([text, *lines]), letter, {"options": len(options.texts), "texts": options.texts})


def _choices_reading(records: Rows, answer: str, c: TaskConfig, data: str) -> ChoicesAnswer | None:
    """How the gold answers of a column name options: as the config says, or the one way that fits them all."""
    if c.choices_answer is not None:
        return c.choices_answer
    cells = zip(records.values(answer), records.values(c.choices_column), strict=True)
    rows = [(str(gold).strip(), options_of(cell)) for gold, cell in cells if not missing(gold)]
    found = [(gold, options) for gold, options in rows if not isinstance(options, str)]
    return reading_of(found, f"task.answer_column={answer} of {data}")


def tokenised(
    source: Source,
    encode: Callable[[str | Conversation], list[int]],
    identity: str,
    folder: Path,
    part: int,
    say: Callable[[str], None] = lambda _: None,
) -> Any:
    """`source` as a datasets.Dataset with columns text, answer, kind, extra, reason, ids, their length, the largest of
    them, part, row, digest (hash of kind, prompt and answer) and question (of the prompt).

    It is kept in `folder` and found again when data, settings and tokenizer are the same.
    """
    datasets = quiet()
    features = _features(datasets)
    records = rows_of(source.records)
    if source.note:
        say(source.note)

    def prepare(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        names = list(batch)
        out: dict[str, list[Any]] = {name: [] for name in features}
        for place, index in enumerate(indices):
            row = {name: batch[name][place] for name in names}
            q, prompt, ids = _encoded(source, records, row, encode)
            written = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
            line = (q.text, q.answer, source.kind, json.dumps(q.extra, default=str), q.reason)
            hashes = (digest(f"{source.kind}\0{written}".encode(), q.answer), digest(written.encode(), ""))
            numbers = (len(ids), max(ids, default=-1), ids, part, index)
            for name, item in zip(features, (*line, *hashes, *numbers), strict=True):
                out[name].append(item)
        return out | {name: np.array(out[name], np.uint64) for name in ("digest", "question")}

    key = hashlib.sha256(
        "\0".join([_LAYOUT, records.table._fingerprint, source.settings, source.kind, identity, str(part)]).encode()
    ).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"prompts-{key}.arrow"
    if path.exists() and not _readable(datasets, path):
        path.unlink()
    if not path.exists() and len(records) >= _SAID_FROM:
        say(f"tokenising {len(records):,} prompts of {source.name} (once; they are kept in {folder})")
    with _utf8(source.field, source.name):
        return records.table.map(
            prepare,
            batched=True,
            with_indices=True,
            remove_columns=records.table.column_names,
            features=features,
            new_fingerprint=key,
            cache_file_name=str(path),
            load_from_cache_file=True,
        )


def _features(datasets: Any) -> Any:
    """The columns of `tokenised` and their types."""
    texts = dict.fromkeys(("text", "answer", "kind", "extra", "reason"), "string")
    hashes = dict.fromkeys(("digest", "question"), "uint64")
    columns = {name: datasets.Value(dtype) for name, dtype in (texts | hashes).items()}
    columns |= {name: datasets.Value("int32") for name in ("length", "largest")}
    columns["ids"] = datasets.Sequence(datasets.Value("int32"))
    return datasets.Features(**columns, part=datasets.Value("int32"), row=datasets.Value("int64"))


def _encoded(
    source: Source, records: Rows, row: dict[str, Any], encode: Callable[[str | Conversation], list[int]]
) -> tuple[Question, str | Conversation, list[int]]:
    """A row's question, what the policy is given for it, and its ids; none of these if it is left out."""
    try:
        plain, exact = records.plain(row), records.exact(row)
    except ValueError as error:
        return Question("", "", {}, f"the row is ambiguous: {error}"), "", []
    q = source.convert(plain, exact) if source.prompt else source.convert(plain)
    try:
        (q.text + q.answer).encode()
    except UnicodeEncodeError:
        reason = q.reason or "half a surrogate pair in the question or the answer"
        return Question("", "", {}, reason), "", []
    if q.reason:
        return q, q.text, []
    prompt = source.prompt(plain, q) if source.prompt else q.text
    try:
        return q, prompt, encode(prompt)
    except PromptError as error:
        return q._replace(reason=str(error)), prompt, []


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


def cache_folder(config: TaskConfig) -> Path:
    """Where tokenised prompts, and the rows of files, are kept.

    Raises:
      ConfigError: it cannot be written.
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
    """True where a value stands for the first time."""
    out = np.zeros(len(values), bool)
    out[np.unique(values, return_index=True)[1]] = True
    return out
