"""Tasks of text, alone or in a mixture: prompts from data or a generator, filtered, tokenised and cached."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast, overload

import grain
import numpy as np
from jaxtyping import Int

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.json_fields import labels, mixture
from pspo_jax.config.schema import Config, TaskConfig
from pspo_jax.config.text_fields import parse_strata
from pspo_jax.data.conversations import read_prompt
from pspo_jax.data.files import Record, as_records, heads
from pspo_jax.data.gold_check import NO_VERDICT, REFUSED, check_gold
from pspo_jax.data.image_rows import kept_images, name_images, prompt_images, say_unmarked, text_records
from pspo_jax.data.images.cache import PatchCache, patch_cache
from pspo_jax.data.images.reading import without_images
from pspo_jax.data.loading import NO_IMAGES, Source, cache_folder, first_of_each, from_data
from pspo_jax.data.mixing import SHOWN, Picked, config_of_part, drop_shared, mix, why
from pspo_jax.data.rendering import OWN_SYSTEM, SEVERAL_TURNS
from pspo_jax.data.strata import chosen_rows, difficulties, labels_of
from pspo_jax.data.synthetic.generated import GENERATED, GENERATED_PROMPTS
from pspo_jax.data.task import Demonstrations, LeftOut, PromptDataset, RewardFn, Task, pad_rows
from pspo_jax.data.tokenising import Encode, column_array, tokenised
from pspo_jax.data.tokenizer import TextTokenizer
from pspo_jax.data.wrong_labels import mislabelled
from pspo_jax.verifiers.workers.pool import Pool

if TYPE_CHECKING:
    import datasets

LABEL_COLUMNS = {"text_suite": "kind"}
"""Column that labels a task's prompts one by one, beside a column difficulty. In a mixture with other tasks, all of a
task's prompts have the task's label."""


RowIndex = int | slice | np.ndarray


class PaddedTokens:
    """An array of token ids [N, P] that is read from disk where it is indexed.

    Args:
      records: rows with a list of ids.
      width: P, the padded length.
      pad: the id that fills padding.
    """

    def __init__(self, records: grain.MapDataset, width: int, pad: int):
        self._records = records
        self._pad = pad
        self.shape = (len(records), width)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: RowIndex | tuple[RowIndex, ...]) -> Int[np.ndarray, "*n P"]:
        rows, *within = index if isinstance(index, tuple) else (index,)
        wanted = np.arange(len(self))[rows]
        found = [self._records[int(i)]["ids"] for i in np.atleast_1d(wanted)]
        tokens, _ = pad_rows(found, self.shape[1], self._pad)
        return (tokens if np.ndim(wanted) else tokens[0])[..., *within]


class _Column(Sequence[str]):
    """A text column of all records, read where it is indexed, or at once for a slice."""

    def __init__(self, records: grain.MapDataset, rows: datasets.Dataset, name: str):
        self._records = records
        self._rows = rows
        self._name = name

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, i: int) -> str: ...

    @overload
    def __getitem__(self, i: slice) -> list[str]: ...

    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return list(self._rows[self._name][i])
        # grain wraps indices past the end around to the first row, so that iteration would never end.
        return self._records[range(len(self))[int(i)]][self._name]


def text_task(
    config: Config,
    tokenizer: TextTokenizer,
    reward_fn: RewardFn,
    pool: Pool | None,
    functions: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Task:
    """The task, or the mixture of tasks, of a config.

    Args:
      reward_fn: gives completions their rewards.
      pool: checks gold answers; None = they are not checked, for plans and exports.
      functions: names of the users' functions among the rewards, whose columns the data must have.
      say: told of what takes long.
    Raises:
      ConfigError: the data cannot be read, or leave too few prompts.
    """
    say(tokenizer.stop_line())
    steps = _steps(tokenizer, config, pool, say)
    parts = mixture(config) or [(config, 1.0)]
    shares = np.array([weight for _, weight in parts]) / sum(weight for _, weight in parts)
    trains, heldouts = [], []
    sources: list[Source] = []
    for number, ((part, _), share) in enumerate(zip(parts, shares, strict=True)):
        if config.task.mixture:
            part = config_of_part(part, config.task.heldout_prompts, share)
        train, heldout, found = _split(part, steps, 2 * number)
        trains.append(train)
        heldouts.append(heldout)
        sources += found
    if len(parts) == 1:
        train_pick, heldout_pick = trains[0], heldouts[0]
    else:
        train_pick, heldout_pick = mix(config, [part for part, _ in parts], shares, trains, heldouts)
    _say_bounds(tokenizer, sources, say)
    if steps.patches is not None and pool is not None:
        train_pick, heldout_pick = (
            kept_images(pick, sources, steps.patches, say) for pick in (train_pick, heldout_pick)
        )
    _check_ids(tokenizer, config, train_pick, heldout_pick)
    _check_sizes(config, train_pick, heldout_pick)
    needs = {} if pool is None else pool.required_columns
    _check_functions({name: needs.get(name, []) for name in functions}, sources)
    width = _width(config, train_pick, heldout_pick)
    if config.task.wrong_labels:
        train_pick = mislabelled(train_pick, sources[0].records, config.task, pool)
    columns = sources, width, tokenizer, steps, labels(config)
    return Task(
        name="mixture" if config.task.mixture else config.task.name,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        forbidden=tokenizer.forbidden,
        stop_ids=tokenizer.stop_ids,
        train=_with_strata(config, prompt_dataset(train_pick, *columns)),
        heldout=_with_strata(config, prompt_dataset(heldout_pick, *columns)),
        reward_fn=reward_fn,
        demonstrations=_no_demonstrations,
        encode_prompt=lambda prompt: tokenizer.prompt(read_prompt(prompt), config.prompt),
    )


def _with_strata(config: Config, prompts: PromptDataset) -> PromptDataset:
    """The prompts with the difficulties that task.strata reads, and labelled by stratum if they have no kinds."""
    strata = parse_strata(config.task.strata)
    if not strata:
        return prompts
    assert prompts.column is not None
    difficulty = difficulties(prompts.column, _difficulty_column(config.task))
    if difficulty is None:
        difficulty = np.full(len(prompts.lengths), np.nan, np.float32)
    labelled = config.task.name in LABEL_COLUMNS
    return prompts._replace(difficulty=difficulty, labels=prompts.labels if labelled else labels_of(difficulty, strata))


def _difficulty_column(t: TaskConfig) -> str | None:
    """The column of the records that holds the difficulty; None = one of the usual ones."""
    return None if t.name in GENERATED else t.difficulty_column


def benchmark_prompts(
    source: Source,
    config: Config,
    tokenizer: TextTokenizer,
    pool: Pool | None,
    limit: int,
    say: Callable[[str], None] = lambda _: None,
) -> PromptDataset:
    """All rows of one source that can be verified, in order; at most `limit` of them unless that is 0.

    Raises:
      ConfigError: there is no such row, or a prompt has a token without a row in the embedding.
    """
    steps = _steps(tokenizer, config, pool, say)
    _say_bounds(tokenizer, [source], say)
    pick = _filter(_tokenised(source, config, steps, 0), source, config, steps, duplicates=True)
    pick = pick._replace(keep=pick.keep[: limit or None])
    if steps.patches is not None and pool is not None:
        pick = kept_images(pick, [source], steps.patches, say)
    if not len(pick.keep):
        raise ConfigError(f"{source.name}: holds no row that can be verified ({why(pick.left_out)})")
    _check_ids(tokenizer, config, pick)
    return prompt_dataset(pick, [source], _width(config, pick), tokenizer, steps, (source.kind,))


class _Steps(NamedTuple):
    """What turns the rows of every source into prompts."""

    encode: Encode
    identity: str
    """Hash of tokenizer, template and image processor."""
    patches: PatchCache | None
    """Cache of the images' patches; None = the model reads text alone."""
    pool: Pool | None
    """Verifiers that check gold answers; None = they are not checked, and no image is decoded."""
    say: Callable[[str], None]


def _steps(tokenizer: TextTokenizer, config: Config, pool: Pool | None, say: Callable[[str], None]) -> _Steps:
    """The steps of a config's prompts."""
    visual = tokenizer.visual
    return _Steps(
        lambda prompt, grids=(): tokenizer.prompt(prompt, config.prompt, grids),
        _identity(tokenizer, config),
        None if visual is None else patch_cache(cache_folder(config.task), visual.processor),
        pool,
        say,
    )


def _say_bounds(tokenizer: TextTokenizer, sources: Sequence[Source], say: Callable[[str], None]) -> None:
    """Says which bounds on pixels the images have, if there are any."""
    if tokenizer.visual is not None and any(source.images for source in sources):
        say(tokenizer.visual.line)


def _tokenised(source: Source, c: Config, steps: _Steps, part: int) -> datasets.Dataset:
    """The table of a source's prompts.

    Raises:
      ConfigError: the source has images, and the model reads text alone.
    """
    if source.image_column is not None and steps.patches is None:
        raise ConfigError(
            f"{source.field}={source.name}: has images in its column {source.image_column}, and "
            f"model.source={c.model.source} reads text alone; name a visual checkpoint such as "
            f"Qwen/Qwen2.5-VL-3B-Instruct, or set task.image_column={NO_IMAGES}"
        )
    processor = None if steps.patches is None else steps.patches.processor
    return tokenised(source, steps.encode, steps.identity, cache_folder(c.task), part, steps.say, processor)


def _identity(tokenizer: TextTokenizer, config: Config) -> str:
    """A text that changes with everything on which a prompt's ids depend."""
    p = config.prompt
    # The probe shows that a template has changed though its name has not.
    probe = tokenizer.prompt("{?}", p)
    return json.dumps([tokenizer.identity(), p.template, p.system, p.question, p.prefill, p.thinking, probe])


def _no_demonstrations(seed: int, count: int) -> Iterator[Demonstrations]:
    raise ConfigError("sft.data=None: this task has no demonstrations of its own; set sft.data, or sft.steps 0")


def _split(c: Config, steps: _Steps, part: int) -> tuple[Picked, Picked, list[Source]]:
    """Training and held-out rows of one task, and the sources of the parts `part` and `part + 1`."""
    t = c.task
    if t.name in GENERATED:
        count = (t.train_prompts or GENERATED_PROMPTS) + t.heldout_prompts
        source = GENERATED[t.name](c, t.seed, count, parse_strata(t.strata))
        pick = _filter(_tokenised(source, c, steps, part), source, c, steps._replace(pool=None))
        return (*_hold_out_last(pick, c, source, count), [source, source])
    assert t.train_data is not None
    source = from_data(t.train_data, "task.train_data", t.train_split, t)
    train = _filter(_tokenised(source, c, steps, part), source, c, steps)
    if t.heldout_data is None:
        return (*_hold_out_last(train, c, source, len(train.rows)), [source, source])
    other = from_data(t.heldout_data, "task.heldout_data", t.heldout_split, t)
    heldout = _filter(_tokenised(other, c, steps, part + 1), other, c, steps)
    heldout = heldout._replace(keep=heldout.keep[: t.heldout_prompts])
    train = drop_shared(train, heldout, source.name)
    return _trained_on(train, c, source), heldout, [source, other]


def _hold_out_last(pick: Picked, c: Config, source: Source, count: int) -> tuple[Picked, Picked]:
    """Training and held-out rows of one data set, of whose first `count` rows the last are held out."""
    n = c.task.heldout_prompts
    first, further = pick.keep[pick.keep < count], pick.keep[pick.keep >= count]
    if len(first) <= n:
        reasons = f" ({why(pick.left_out)})" if pick.left_out else ""
        advice = "lower it, or set task.heldout_data" if len(first) > 1 else "change the data"
        raise ConfigError(f"task.heldout_prompts={n}: the data has {len(first)} usable rows{reasons}; {advice}")
    train = pick._replace(keep=np.concatenate([first[:-n], further]))
    return _trained_on(train, c, source), Picked(pick.rows, first[-n:], [])


def _trained_on(pick: Picked, c: Config, source: Source) -> Picked:
    """The rows of `pick` that are trained on: the first task.train_prompts, or the first of each stratum.

    Raises:
      ConfigError: a stratum has too few rows, or the data have no difficulty.
    """
    t, strata = c.task, parse_strata(c.task.strata)
    if not strata:
        return pick._replace(keep=pick.keep[: t.train_prompts or None])
    total = t.train_prompts or (GENERATED_PROMPTS if t.name in GENERATED else 0)
    difficulty = difficulties(as_records(source.records).values, _difficulty_column(t))
    if difficulty is None:
        raise ConfigError(
            f"task.difficulty_column={t.difficulty_column}: task.strata={t.strata!r} needs a column of numbers in "
            f"{source.name}; its columns are {', '.join(source.records.column_names)}"
        )
    return pick._replace(keep=pick.keep[chosen_rows(difficulty[pick.keep], strata, total)])


def _filter(rows: datasets.Dataset, source: Source, c: Config, steps: _Steps, duplicates: bool = False) -> Picked:
    """Rows that are prompts: readable, short enough, not repeated, and with a gold answer that its verifier accepts."""
    reason, pool = np.array(rows["reason"], object), steps.pool
    _check_conversations(reason, source.name, c)
    lengths = column_array(rows, "length")
    reason[(reason == "") & (lengths > c.prompt.max_tokens)] = f"longer than prompt.max_tokens={c.prompt.max_tokens}"
    if source.images is not None and steps.patches is not None:
        say_unmarked(rows, reason, source.name, steps.say)
        name_images(rows, reason, lengths, c.prompt.max_tokens, steps.patches.processor)
    if not duplicates:
        good = np.flatnonzero(reason == "")
        reason[good[~first_of_each(column_array(rows, "question")[good])]] = "duplicate"
    if pool is not None and c.task.check_gold:
        good = np.flatnonzero(reason == "")
        verdicts = check_gold(rows, good, pool, cache_folder(c.task), steps.say)
        reason[good[verdicts == REFUSED]] = "gold answer does not verify itself"
        reason[good[verdicts == NO_VERDICT]] = "gold answer not verified within verifier.deadline"
    keep = np.flatnonzero(reason == "")
    out = np.flatnonzero(reason != "")
    texts = rows.select(out)["text"] if len(out) else []
    left_out = [LeftOut(source.name, int(i), str(reason[i]), text[:SHOWN]) for i, text in zip(out, texts, strict=True)]
    return Picked(rows, keep, left_out)


def _check_conversations(reason: np.ndarray, name: str, c: Config) -> None:
    """Refuses conversations that contradict the config's own prompt."""
    advice = {
        OWN_SYSTEM: (f"prompt.system={c.prompt.system!r}", "drop prompt.system, or these messages"),
        SEVERAL_TURNS: (f"prompt.template={c.prompt.template}", "choose chat"),
    }
    for why_not, (field, what) in advice.items():
        rows = np.flatnonzero(reason == why_not)
        if len(rows):
            raise ConfigError(f"{field}: row {rows[0]} of {name}, one of {len(rows)} such rows, {why_not}; {what}")


def _check_ids(tokenizer: TextTokenizer, config: Config, *picks: Picked) -> None:
    """Refuses prompts with a token for which the embedding has no row."""
    for pick in picks:
        bad = pick.keep[column_array(pick.rows, "largest")[pick.keep] >= tokenizer.vocab_size]
        if not len(bad):
            continue
        row = pick.rows[int(bad[0])]
        token = max(row["ids"])
        raise ConfigError(
            f"model.tokenizer={config.model.tokenizer or config.model.source}: {len(bad)} prompts hold tokens such "
            f"as {tokenizer.decode([token])!r} ({token}), and the embedding has {tokenizer.vocab_size:,} rows; the "
            f"first begins {row['text'][:40]!r}: take them out, or use the checkpoint's own tokenizer"
        )


def _check_sizes(c: Config, train: Picked, heldout: Picked) -> None:
    """Refuses data that leave too few prompts."""
    for pick, name in ((train, "train_data"), (heldout, "heldout_data")):
        if not len(pick.keep):
            raise ConfigError(
                f"task.{name}={getattr(c.task, name)}: leaves no prompt ({why(pick.left_out)}); change the data, "
                "task.answer_transform or prompt.max_tokens"
            )
    if len(train.keep) < c.rollout.prompts and not c.selection.replacement:
        raise ConfigError(
            f"rollout.prompts={c.rollout.prompts}: prompts are drawn without replacement from the {len(train.keep)} "
            f"there are{' (left out: ' + why(train.left_out) + ')' if train.left_out else ''}; lower it"
        )


def _check_functions(needs: dict[str, list[str]], sources: Sequence[Source]) -> None:
    """Refuses a user's function that needs a column which no source has: it would fail on every completion."""
    columns = {name for source in sources for name in source.records.column_names if name != source.image_column}
    for function, needed in needs.items():
        if missing := [name for name in needed if name not in columns]:
            raise ConfigError(
                f"task.function, reward.terms: {function} needs {', '.join(missing)}, which is no column of the data "
                f"({', '.join(sorted(columns))}); give it a default, or name the result of a call in a module of yours"
            )


def _width(config: Config, *picks: Picked) -> int:
    """Padded length of the prompts: a multiple of rollout.prompt_bucket."""
    longest = max(int(column_array(pick.rows, "length")[pick.keep].max()) for pick in picks)
    bucket = config.rollout.prompt_bucket
    return -(-longest // bucket) * bucket


def prompt_dataset(
    pick: Picked,
    sources: list[Source],
    width: int,
    tokenizer: TextTokenizer,
    steps: _Steps,
    names: Sequence[str],
) -> PromptDataset:
    """The kept rows as a data set that reads them from disk through a grain.MapDataset.

    Args:
      sources: the source of each value of the column part.
      width: padded length of the prompts.
      names: labels of the tasks, each of which has two parts; a single task may have LABEL_COLUMNS instead.
    """
    rows = pick.rows.select(pick.keep)
    records = grain.MapDataset.source(rows)
    records_of_part = [text_records(source) for source in sources]
    parts = column_array(rows, "part")

    def columns(i: int) -> Record:
        """The record of a row."""
        record = rows[int(i)]
        found = dict(records_of_part[record["part"]][record["row"]])
        return found if sources[record["part"]].images is None else cast(Record, without_images(found))

    def column(name: str) -> list[object]:
        """The values of a column in all rows."""
        values: np.ndarray = np.full(len(rows), None, object)
        row = column_array(rows, "row")
        for i, source in enumerate(records_of_part):
            here = np.flatnonzero(parts == i)
            if len(here) and any(head in source.column_names for head in heads(name)):
                values[here] = np.array([*source.select(row[here]).values(name), None], object)[:-1]
        return list(values)

    labelled = LABEL_COLUMNS.get(rows[0]["kind"]) if len(names) == 1 else None
    return PromptDataset(
        tokens=PaddedTokens(records, width, tokenizer.pad_token_id),  # type: ignore[arg-type]
        lengths=column_array(rows, "length").astype(np.int32),
        answers=_Column(records, rows, "answer"),
        texts=_Column(records, rows, "text"),
        kinds=_Column(records, rows, "kind"),
        labels=[str(x) for x in column(labelled)] if labelled else [names[part // 2] for part in parts],
        difficulty=np.array(column("difficulty"), np.float32) if labelled else None,
        extras=_Column(records, rows, "extra"),
        columns=columns,
        column=column,
        digests=column_array(rows, "digest").astype(np.uint64),
        identity=steps.identity,
        left_out=tuple(pick.left_out),
        images=prompt_images(rows, sources, tokenizer.visual, steps.patches),
    )


def write_left_out(task: Task, path: Path) -> str | None:
    """Lists the rows that were left out in a JSONL file; gives a line of counts, or None if no row was left out."""
    items = [*task.train.left_out, *task.heldout.left_out]
    if not items:
        return None
    path.write_text("".join(json.dumps(item._asdict()) + "\n" for item in items))
    return f"left out: {why(items)}; listed in {path}"
