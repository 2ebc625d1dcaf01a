"""Which configs are refused, each with one line that names the field, the value and the fix."""

from __future__ import annotations

import dataclasses
import datetime
import math
import typing
from typing import Any, Literal

from pspo_jax.algorithms import resolve
from pspo_jax.config import PROJECTIONS, Config, ConfigError, PolicyConfig, Range, embedded, round_prompts
from pspo_jax.mixture import labels, mixture, options
from pspo_jax.objective.ratios import gamma_shape
from pspo_jax.rewards.terms import parse_terms
from pspo_jax.selection import WEIGHTED
from pspo_jax.selection.pools import parse_weights
from pspo_jax.selection.quotas import parse_quotas
from pspo_jax.tasks.stop_ids import stop_texts


def validate(config: Config) -> None:
    """Raise ConfigError for the first field whose value is out of range or contradicts another field."""
    for stage in dataclasses.fields(config):
        _check_fields(stage.name, getattr(config, stage.name))
    _check_relations(config)


def _check_fields(stage: str, section: Any) -> None:
    for name, hint in typing.get_type_hints(type(section), include_extras=True).items():
        _check_field(f"{stage}.{name}", hint, getattr(section, name))


def _check_field(path: str, hint: Any, value: Any) -> None:
    bounds = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)]
    base = hint.__origin__ if bounds else hint
    options = typing.get_args(base) if typing.get_origin(base) is not Literal else (base,)
    allowed = [a for o in options if typing.get_origin(o) is Literal for a in typing.get_args(o)]
    if allowed and value is not None and value not in allowed:
        raise ConfigError(f"{path}={value!r}: choose one of {', '.join(map(str, allowed))}")
    optional = type(None) in options
    if value is None and not optional:
        raise ConfigError(f"{path}=None: must have a value")
    if (base is str or str in options) and not isinstance(value, str | None):
        raise ConfigError(f"{path}={value!r}: must be text")
    for bound in bounds if value is not None else ():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{path}={value!r}: must be a finite number")
        if complaint := bound.complaint(value):
            raise ConfigError(f"{path}={value}: {complaint}")


def _check_relations(c: Config) -> None:
    _check_policy(c)
    _check_prompt(c)
    _check_task(c)
    parse_terms(c.reward)
    if c.task.train_prompts and c.rollout.prompts > c.task.train_prompts:
        raise ConfigError(
            f"rollout.prompts={c.rollout.prompts}: prompts are drawn without replacement from "
            f"task.train_prompts={c.task.train_prompts}; lower the first or raise the second"
        )
    _check_strategies(c)
    if c.policy.heads % c.policy.kv_heads:
        raise ConfigError(f"policy.kv_heads={c.policy.kv_heads}: must divide policy.heads={c.policy.heads}")
    if c.policy.head_dim % 2:
        raise ConfigError(f"policy.head_dim={c.policy.head_dim}: must be even for RoPE")
    if c.rollout.prompts % c.rollout.chunks:
        raise ConfigError(f"rollout.chunks={c.rollout.chunks}: must divide rollout.prompts={c.rollout.prompts}")
    if c.rollout.longest_first and c.rollout.slots is None:
        raise ConfigError("rollout.longest_first=true: the order matters to rollout.slots alone; set these, or not it")
    _check_rounds(c)
    _check_distributed(c)
    _check_objective(c)
    if c.rollout.prompts % c.objective.minibatches:
        raise ConfigError(
            f"objective.minibatches={c.objective.minibatches}: must divide rollout.prompts={c.rollout.prompts}"
        )


def _check_distributed(c: Config) -> None:
    """A process must know its place."""
    d = c.distributed
    if d.coordinator is None:
        if d.processes != 1 or d.process:
            raise ConfigError(
                f"distributed.processes={d.processes}, distributed.process={d.process}: need distributed.coordinator, "
                "the host:port of process 0"
            )
        return
    host, _, port = d.coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"distributed.coordinator={d.coordinator}: must be host:port, such as 10.0.0.2:9876")
    if d.process >= d.processes:
        raise ConfigError(
            f"distributed.process={d.process}: must be less than distributed.processes={d.processes}; they count from 0"
        )


def _check_rounds(c: Config) -> None:
    """Dynamic sampling's rounds."""
    c = resolve(c)
    r = c.rollout
    if r.max_rounds == 1:
        if r.oversampling != 1:
            raise ConfigError(
                f"rollout.oversampling={r.oversampling:g}: is for dynamic sampling, and rollout.max_rounds=1; drop it, "
                "or raise rollout.max_rounds"
            )
        return
    prompts = round_prompts(c)
    field = f"rollout.oversampling={r.oversampling:g}: a round has {prompts} prompts"
    if not prompts or prompts % r.chunks:
        raise ConfigError(f"{field}, which rollout.chunks={r.chunks} must divide; choose another")
    if c.task.train_prompts and prompts > c.task.train_prompts:
        raise ConfigError(f"{field}, more than task.train_prompts={c.task.train_prompts}; lower it")


def _check_objective(c: Config) -> None:
    """Loss and replay settings must go together."""
    c = resolve(c)
    o, r = c.objective, c.replay
    if r.min_age > r.max_age:
        raise ConfigError(f"replay.min_age={r.min_age}: must be at most replay.max_age={r.max_age}")
    for name in ("delta", "dual_clip"):
        value = getattr(o, name)
        if value and o.surrogate != "clip":
            raise ConfigError(
                f"objective.{name}={value:g}: is about the clipped surrogate, and objective.surrogate={o.surrogate}; "
                "drop it, or choose clip"
            )
    if o.delta and o.delta <= 1 + (o.clip_high or 0):
        raise ConfigError(
            f"objective.delta={o.delta:g}: must be greater than 1 + objective.clip_high = {1 + (o.clip_high or 0):g}"
        )
    if o.dual_clip and o.dual_clip <= 1:
        raise ConfigError(f"objective.dual_clip={o.dual_clip:g}: must be greater than 1, or 0 = off")
    for name in ("vespo_positive", "vespo_negative"):
        try:
            gamma_shape(getattr(o, name))
        except ValueError as error:
            raise ConfigError(
                f"objective.{name}={getattr(o, name)!r}: must be k and lambda, such as 2,3 ({error})"
            ) from error
    if o.off_policy == "coupled" and o.old_log_probs == "trainer":
        raise ConfigError(
            "objective.off_policy=coupled: clips around the behaviour policy, whose log-probs are the sampler's; set "
            "objective.old_log_probs=sampler"
        )


def _check_strategies(c: Config) -> None:
    """Selector, credit and forgetting must go together."""
    c = resolve(c)
    s, f = c.selection, c.forgetting
    parse_quotas(s.quotas)
    parse_weights(s.pool_weights)
    for name in ("correction_end", "replacement"):
        if getattr(s, name) and s.name not in WEIGHTED:
            raise ConfigError(
                f"selection.{name}={getattr(s, name)}: selection.name={s.name} does not draw in proportion to weights; "
                f"drop it, or choose one of {', '.join(WEIGHTED)}"
            )
    if s.exploration and not round(s.exploration * c.rollout.prompts):
        raise ConfigError(
            f"selection.exploration={s.exploration:g}: is less than half a prompt of "
            f"rollout.prompts={c.rollout.prompts}, so none would be drawn; set 0, or at least {1 / c.rollout.prompts:g}"
        )
    if s.easy_from <= s.hard_to:
        raise ConfigError(f"selection.easy_from={s.easy_from}: must be greater than selection.hard_to={s.hard_to}")
    if f.low > f.high:
        raise ConfigError(f"forgetting.low={f.low}: must be at most forgetting.high={f.high}")
    if s.difficulty_column is not None and s.name != "curriculum":
        raise ConfigError(
            f"selection.difficulty_column={s.difficulty_column}: selection.name={s.name} does not read it; drop it, or "
            "choose curriculum"
        )
    if c.credit.name == "tracked_baseline" and c.credit.scale == "group":
        raise ConfigError(
            "credit.scale=group: credit.name=tracked_baseline has no use for a group's deviation, which is 0 where "
            "all are right; choose batch or none"
        )
    if c.algorithm.compat == "released" and c.credit.name != "ers":
        raise ConfigError(
            f"algorithm.compat=released: is about ERS, and credit.name={c.credit.name}; choose algorithm.name ers or "
            "pspo"
        )


def _check_policy(c: Config) -> None:
    """Task, checkpoint, tokenizer and adapters must go together."""
    p, own_alphabet = c.policy, embedded(c)
    if own_alphabet and not c.task.train_prompts:
        raise ConfigError(f"task.train_prompts=0: must be at least 1 for task.name={c.task.name}")
    for name in ("source", "tokenizer"):
        if own_alphabet and getattr(p, name) is not None:
            raise ConfigError(
                f"policy.{name}={getattr(p, name)}: task.name=arithmetic has an alphabet of its own; choose a task of "
                "text, such as --task.name gsm8k --task.train_data FILE.jsonl"
            )
    if not own_alphabet and p.source is None and p.tokenizer is None:
        raise ConfigError(f"policy.source=None: task.name={c.task.name} needs a checkpoint, or a policy.tokenizer")
    if not own_alphabet and c.sft.steps and c.sft.data is None:
        raise ConfigError(f"sft.steps={c.sft.steps}: task.name={c.task.name} has no demonstrations; set sft.data or 0")
    if p.source is not None:
        defaults = PolicyConfig()
        for name in p.shape_fields():
            if getattr(p, name) != getattr(defaults, name):
                raise ConfigError(
                    f"policy.{name}={getattr(p, name)}: follows from the checkpoint policy.source={p.source}; drop it"
                )
    if c.lora.rank and p.source is None:
        raise ConfigError(f"lora.rank={c.lora.rank}: adapters need a checkpoint under them; set policy.source")
    unknown = [t for t in c.lora.target_names() if t not in PROJECTIONS]
    if unknown or not c.lora.target_names():
        raise ConfigError(
            f"lora.targets={c.lora.targets!r}: matches no projection{' by ' + ', '.join(unknown) if unknown else ''}; "
            f"choose among {', '.join(PROJECTIONS)}"
        )


def _check_prompt(c: Config) -> None:
    """Date and stop tokens can be read, and have something to act on."""
    if c.prompt.date is not None:
        try:
            datetime.date.fromisoformat(c.prompt.date)
        except ValueError as error:
            raise ConfigError(f"prompt.date={c.prompt.date!r}: must be a day, such as 2026-01-31") from error
    if stop_texts(c.rollout.stop) and embedded(c):
        raise ConfigError(
            f"rollout.stop={c.rollout.stop!r}: task.name={c.task.name} in its own alphabet ends with $ alone; drop it"
        )


def _check_task(c: Config) -> None:
    """Each task has what it needs."""
    t = c.task
    if embedded(c) and c.reward.terms.strip() != "accuracy":
        raise ConfigError(f"reward.terms={c.reward.terms!r}: task.name={t.name} in its own alphabet has accuracy alone")
    components = mixture(c)
    if components:
        labels(c)
        for part, _ in components:
            try:
                _check_fields("task", part.task)
                _check_task(part)
            except ConfigError as error:
                raise ConfigError(f"task.mixture={(t.mixture or '')[:80]!r}: {error}") from error
        return
    if t.name in ("math", "gsm8k", "multiple_choice", "python_function") and t.train_data is None:
        raise ConfigError(f"task.train_data=None: task.name={t.name} needs a file, a folder or a hub id")
    if t.name == "python_function" and (t.function is None or ":" not in t.function):
        raise ConfigError(f"task.function={t.function}: task.name=python_function needs module:function")
    if t.name == "reasoning_gym" and not t.dataset:
        raise ConfigError(
            "task.dataset=None: task.name=reasoning_gym needs names of its datasets, such as leg_counting"
        )
    if t.name == "reasoning_gym":
        options(t.options)
    sizes = t.numbers.split(",")
    if not all(s.strip().isdecimal() and 2 <= int(s) <= 6 for s in sizes):
        raise ConfigError(f"task.numbers={t.numbers!r}: must be numbers from 2 to 6, separated by commas")
