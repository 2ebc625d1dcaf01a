"""Wrong gold answers for a share of the training rows of a text task, which their verifier takes for the right ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import TaskConfig
from pspo_jax.config.text_fields import parse_strata
from pspo_jax.data.files import Records, as_records
from pspo_jax.data.mixing import Picked
from pspo_jax.data.strata import difficulties, stratum_of, wrong_label_draws, wrong_rows
from pspo_jax.data.task import ANSWER_COLUMN, digest
from pspo_jax.data.tokenising import column_array
from pspo_jax.distributed import processes
from pspo_jax.verifiers.math_answer import ALTERNATIVES, final_answer
from pspo_jax.verifiers.workers.pool import Pool, Request

if TYPE_CHECKING:
    import datasets

_TRIES = 100
"""Other rows that are tried for a wrong answer before the data are refused."""
_BY_MATH = ("math", "gsm8k")
"""Kinds whose verifier accepts answers that are written in different ways."""


class _Labels(NamedTuple):
    """Gold answers of the rows that are trained on."""

    answers: Shaped[np.ndarray, "n"]
    extras: Shaped[np.ndarray, "n"]
    """Further arguments of the verifier."""
    groups: Int[np.ndarray, "n"]
    """Number of each row's group, in which answers have the same form."""
    members: tuple[Int[np.ndarray, "_"], ...]
    """The rows of each group."""


def mislabelled(pick: Picked, records: datasets.Dataset | Records, t: TaskConfig, pool: Pool | None) -> Picked:
    """The rows with task.wrong_labels of their gold answers replaced by wrong ones.

    A wrong answer is another option of the question (multiple_choice), another target (countdown), or the answer of
    another row which the verifier does not accept for the right one.

    Args:
      records: the records of the rows.
      pool: judges whether answers of mathematics differ; None = by their text alone, for plans and exports.
    Raises:
      ConfigError: for a row, no other answer is found that is wrong.
    """
    rows, keep = pick.rows, pick.keep
    chosen = rows.select(keep)
    answers, extras = (np.array(list(chosen[name]), object) for name in ("answer", "extra"))
    groups = np.zeros(len(keep), int)
    records = as_records(records)
    if t.name == "text_suite":
        kinds = np.array(records.values("kind"))
        groups = np.unique(kinds[column_array(rows, "row")[keep]], return_inverse=True)[1]
    strata = parse_strata(t.strata)
    difficulty = difficulties(records.values, t.difficulty_column if t.train_data else None) if strata else None
    stratum = None if difficulty is None else stratum_of(difficulty[column_array(rows, "row")[keep]], strata)
    wrong = np.flatnonzero(wrong_rows(t.wrong_labels, t.seed, len(keep), stratum))
    members = tuple(np.flatnonzero(groups == group) for group in range(groups.max() + 1))
    labels = _Labels(answers, extras, groups, members)
    others = _wrong_answers(labels, wrong, str(chosen[0]["kind"]), t, pool)
    return pick._replace(rows=_replaced(rows, keep[wrong], others))


def _wrong_answers(
    labels: _Labels, wrong: Int[np.ndarray, "w"], kind: str, t: TaskConfig, pool: Pool | None
) -> list[str]:
    """A wrong answer for each of the rows `wrong`."""
    rng = wrong_label_draws(t.seed)
    out = [""] * len(wrong)
    open_places = np.arange(len(wrong))
    for _ in range(_TRIES):
        for place in open_places:
            out[place] = _candidate(labels, int(wrong[place]), kind, t, rng)
        differ = _differ(labels.answers[wrong[open_places]], [out[i] for i in open_places], kind, pool)
        open_places = open_places[~differ]
        if not len(open_places):
            return out
    raise ConfigError(
        f"task.wrong_labels={t.wrong_labels:g}: no other answer is wrong for {len(open_places)} rows, such as the one "
        f"whose answer is {labels.answers[wrong[open_places[0]]][:40]!r}; lower it, or add rows with other answers"
    )


def _candidate(labels: _Labels, row: int, kind: str, t: TaskConfig, rng: np.random.Generator) -> str:
    """An answer that may be wrong for a row."""
    extra = json.loads(labels.extras[row])
    if kind == "countdown":
        return str(1 + (extra["target"] - 1 + int(rng.integers(1, t.max_target))) % t.max_target)
    if "options" in extra:
        letters = [chr(ord("A") + i) for i in range(extra["options"])]
        others = [letter for letter in letters if letter != labels.answers[row]]
        return others[int(rng.integers(len(others)))]
    same_form = labels.members[labels.groups[row]]
    return str(labels.answers[same_form[int(rng.integers(len(same_form)))]])


def _differ(right: Sequence[str], wrong: Sequence[str], kind: str, pool: Pool | None) -> Bool[np.ndarray, "w"]:
    """Whether the verifier, with the answers `wrong` as gold, refuses the answers `right`."""
    out = np.array([a != b for a, b in zip(right, wrong, strict=True)], bool)
    if kind not in _BY_MATH or pool is None:
        return out
    asked = [(i, wrong[i], text) for i in np.flatnonzero(out).tolist() for text in right[i].split(ALTERNATIVES)]
    found: np.ndarray | None = None
    if processes.is_primary():  # one process decides for all, as two might find their deadlines missed for others
        requests = [
            Request("math", {"gold": gold, "answer": final_answer(f"\\boxed{{{text}}}") or text})
            for _, gold, text in asked
        ]
        found = np.array([reply.score == 0 for reply in pool.submit(requests).result()], np.int8)
    refused = processes.from_primary(f"wrong_labels/{digest(json.dumps(asked).encode(), '')}", found)
    for (i, _, _), is_refused in zip(asked, refused, strict=True):
        out[i] &= bool(is_refused)
    return out


def _replaced(rows: datasets.Dataset, which: Int[np.ndarray, "w"], answers: Sequence[str]) -> datasets.Dataset:
    """The table with other answers in the rows `which`. Their digests differ too, as the data are others."""
    columns = {name: list(rows[name]) for name in ("answer", "extra")}
    digests = column_array(rows, "digest").astype(np.uint64)
    for row, answer in zip(which.tolist(), answers, strict=True):
        extra = json.loads(columns["extra"][row])
        extra.pop(ANSWER_COLUMN, None)  # for functions, the answer is this one and not the column's
        if "target" in extra:
            extra["target"] = int(answer)
        columns["answer"][row], columns["extra"][row] = answer, json.dumps(extra)
        digests[row] = digest(int(digests[row]).to_bytes(8, "little"), answer)
    out = rows.remove_columns(["answer", "extra", "digest"])
    for name, values in columns.items():
        out = out.add_column(name, values)
    return out.add_column("digest", digests)
