"""Which configs are refused, each with one line that names the field, the value and the fix."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from typing import Any

from pspo_jax.config.defaults import replace, uses_char_tokenizer
from pspo_jax.config.fields import ConfigError, check_range, convert, kinds
from pspo_jax.config.json_fields import labels, mixture, options
from pspo_jax.config.ownership import check_owners
from pspo_jax.config.presets import check_choices, resolve
from pspo_jax.config.schema import PROJECTIONS, Config, round_prompts
from pspo_jax.config.text_fields import gamma_shape, interval, parse_quotas, parse_terms, parse_weights, stop_texts

MAX_DEADLINE = 86_400


def validate(config: Config) -> None:
    """Raise ConfigError for the first field that is of another type or range, contradicts another, or is not read."""
    for stage, default in vars(Config()).items():
        section = getattr(config, stage)
        if stage == "given":
            continue
        if type(section) is not type(default):
            raise ConfigError(f"{stage}={str(section)[:80]}: must be a {type(default).__name__}")
        _check_fields(stage, section)
    check_choices(config)
    config = replace(config, {})
    _check_relations(config)
    check_owners(config, resolve(config))


def _check_fields(stage: str, section: Any) -> None:
    for name, kind in kinds(section).items():
        path = f"{stage}.{name}"
        check_range(path, kind, convert(path, kind, getattr(section, name)))


def _check_relations(c: Config) -> None:
    _check_policy(c)
    _check_prompt(c)
    _check_task(c)
    parse_terms(c.reward)
    repeats = c.selection.replacement
    if c.task.train_prompts and c.rollout.prompts > c.task.train_prompts and not repeats:
        raise ConfigError(
            f"rollout.prompts={c.rollout.prompts}: prompts are drawn without replacement from "
            f"task.train_prompts={c.task.train_prompts}; lower the first or raise the second"
        )
    _check_strategies(c)
    if c.model.heads % c.model.kv_heads:
        raise ConfigError(f"model.kv_heads={c.model.kv_heads}: must divide model.heads={c.model.heads}")
    if c.model.head_dim % 2:
        raise ConfigError(f"model.head_dim={c.model.head_dim}: must be even for RoPE")
    if c.rollout.prompts % c.rollout.chunks:
        raise ConfigError(f"rollout.chunks={c.rollout.chunks}: must divide rollout.prompts={c.rollout.prompts}")
    _check_rounds(c)
    _check_distributed(c)
    _check_objective(c)
    _check_schedules(c)
    _check_rewards(c)
    if c.rollout.prompts % c.loss.minibatches:
        raise ConfigError(f"loss.minibatches={c.loss.minibatches}: must divide rollout.prompts={c.rollout.prompts}")


def _check_distributed(c: Config) -> None:
    """A process must know its place, and a mesh its size."""
    d = c.distributed
    if c.mesh.data == 0:
        raise ConfigError("mesh.data=0: must be at least 1, or -1 for all devices that fsdp and tensor leave")
    if d.coordinator is None:
        return
    host, _, port = d.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"distributed.coordinator={d.coordinator}: must be host:port, such as 10.0.0.2:9876")
    if d.process >= d.processes:
        raise ConfigError(
            f"distributed.process={d.process}: must be less than distributed.processes={d.processes}; they count from 0"
        )


def _check_rounds(c: Config) -> None:
    """Dynamic sampling's rounds."""
    c = resolve(c)
    r = c.rollout
    if r.dynamic_sampling_rounds == 1:
        return
    prompts = round_prompts(c)
    field = f"rollout.oversampling={r.oversampling:g}: a round has {prompts} prompts"
    if not prompts or prompts % r.chunks:
        raise ConfigError(f"{field}, which rollout.chunks={r.chunks} must divide; choose another")
    if c.task.train_prompts and prompts > c.task.train_prompts and not c.selection.replacement:
        raise ConfigError(f"{field}, more than task.train_prompts={c.task.train_prompts}; lower it")


def _check_objective(c: Config) -> None:
    """Loss and replay settings must go together."""
    c = resolve(c)
    o, r = c.loss, c.replay
    if r.min_age > r.max_age:
        raise ConfigError(f"replay.min_age={r.min_age}: must be at most replay.max_age={r.max_age}")
    if o.delta and o.delta <= 1 + (o.clip_high or 0):
        raise ConfigError(
            f"loss.delta={o.delta:g}: must be greater than 1 + loss.clip_high = {1 + (o.clip_high or 0):g}"
        )
    if o.dual_clip and o.dual_clip <= 1:
        raise ConfigError(f"loss.dual_clip={o.dual_clip:g}: must be greater than 1, or 0 = off")
    for name in ("vespo_positive", "vespo_negative"):
        try:
            if not all(map(math.isfinite, gamma_shape(getattr(o, name)))):
                raise ValueError("they must be finite")
        except ValueError as error:
            raise ConfigError(
                f"objective.{name}={getattr(o, name)!r}: must be k and lambda, such as 2,3 ({error})"
            ) from error
    if o.kl_in == "reward" and o.kl_estimator.endswith("+"):
        raise ConfigError(
            f"loss.kl_estimator={o.kl_estimator}: + is about the gradient, which loss.kl_in=reward has none "
            f"of; set {o.kl_estimator.removesuffix('+')}"
        )
    if o.off_policy == "coupled" and o.old_log_probs == "trainer":
        raise ConfigError(
            "loss.off_policy=coupled: clips around the behaviour policy, whose log-probs are the sampler's; set "
            "loss.old_log_probs=sampler"
        )


def _check_schedules(c: Config) -> None:
    """A warm-up that was asked for must come to its end."""
    defaults = Config()
    updates = c.run.steps * c.loss.num_iterations * c.loss.minibatches
    for stage, own, default, total, words in (
        ("optimizer", c.optimizer, defaults.optimizer, updates, f"the {updates} updates of run.steps={c.run.steps}"),
        ("sft", c.sft, defaults.sft, c.sft.steps, f"sft.steps={c.sft.steps}"),
    ):
        if own.warmup != default.warmup and own.warmup >= total > 0:
            raise ConfigError(f"{stage}.warmup={own.warmup}: must be less than {words}; lower it")


def _check_rewards(c: Config) -> None:
    """Rewards must be numbers, and say something."""
    terms = parse_terms(c.reward)
    if not any(terms.values()):
        raise ConfigError(f"reward.terms={c.reward.terms!r}: every weight is 0, so nothing would be learned; raise one")
    if c.reward.overlong_cache > c.rollout.max_new_tokens:
        raise ConfigError(
            f"reward.overlong_cache={c.reward.overlong_cache}: must be at most "
            f"rollout.max_new_tokens={c.rollout.max_new_tokens}"
        )
    for name in ("cosine_right", "cosine_wrong"):
        if not all(map(math.isfinite, interval(getattr(c.reward, name), f"reward.{name}"))):
            raise ConfigError(f"reward.{name}={getattr(c.reward, name)!r}: must be two finite numbers, such as 0.5,1.0")
    if c.verifier.deadline > MAX_DEADLINE:
        raise ConfigError(f"verifier.deadline={c.verifier.deadline:g}: must be at most {MAX_DEADLINE} seconds, a day")


def _check_strategies(c: Config) -> None:
    """Selector, credit and forgetting must go together."""
    c = resolve(c)
    s, f = c.selection, c.forgetting
    parse_quotas(s.quotas)
    parse_weights(s.pool_weights)
    prompts = round_prompts(c)
    if s.exploration and not round(s.exploration * prompts):
        raise ConfigError(
            f"selection.exploration={s.exploration:g}: is less than half a prompt of the {prompts} that are rolled out "
            f"at a time, so none would be drawn; set 0, or at least {1 / max(prompts, 1):g}"
        )
    if s.success == "verdict" and s.success_threshold is not None and not 0 < s.success_threshold <= 1:
        raise ConfigError(
            f"selection.success_threshold={s.success_threshold:g}: selection.success=verdict is within [0, 1]; choose "
            "one above 0 and up to 1, or selection.success=reward"
        )
    if s.easy_from <= s.hard_to:
        raise ConfigError(f"selection.easy_from={s.easy_from}: must be greater than selection.hard_to={s.hard_to}")
    if f.low > f.high:
        raise ConfigError(f"forgetting.low={f.low}: must be at most forgetting.high={f.high}")
    if c.advantage.name == "tracked_baseline" and c.advantage.scale == "group":
        raise ConfigError(
            "advantage.scale=group: advantage.name=tracked_baseline has no use for a group's deviation, which is 0 "
            "where all are right; choose batch or none"
        )


def _check_policy(c: Config) -> None:
    """Task, checkpoint, tokenizer and adapters must go together."""
    p, own_alphabet = c.model, uses_char_tokenizer(c)
    if own_alphabet and not c.task.train_prompts:
        raise ConfigError(f"task.train_prompts=0: must be at least 1 for task.name={c.task.name}")
    if not own_alphabet and c.task.name != "own" and p.source is None and p.tokenizer is None:
        raise ConfigError(f"model.source=None: task.name={c.task.name} needs a checkpoint, or a model.tokenizer")
    if not own_alphabet and c.sft.steps and c.sft.data is None:
        raise ConfigError(f"sft.steps={c.sft.steps}: task.name={c.task.name} has no demonstrations; set sft.data or 0")
    if c.lora.rank and p.source is None:
        raise ConfigError(f"lora.rank={c.lora.rank}: adapters need a checkpoint under them; set model.source")
    _check_list("lora.targets", c.lora.targets, lambda name: name.removesuffix("_proj"))
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
    if stop_texts(c.rollout.stop) and uses_char_tokenizer(c):
        raise ConfigError(
            f"rollout.stop={c.rollout.stop!r}: task.name={c.task.name} in its own alphabet ends with $ alone; drop it"
        )


def _check_task(c: Config) -> None:
    """Each task has what it needs."""
    t = c.task
    if uses_char_tokenizer(c) and c.reward.terms.strip() != "accuracy":
        raise ConfigError(
            f"reward.terms={c.reward.terms!r}: task.name={t.name} in its own alphabet has accuracy alone; drop it"
        )
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
    options(t.options)
    if t.dataset is not None:
        _check_list("task.dataset", t.dataset)
    for name in ("subset", "revision", "prompt_column", "answer_column", "function"):
        if getattr(t, name) is not None and not getattr(t, name).strip():
            raise ConfigError(f"task.{name}='': must not be empty; leave it out")
    _check_list("task.numbers", t.numbers)
    sizes = t.numbers.split(",")
    if not all(s.strip().isdecimal() and 2 <= int(s) <= 6 for s in sizes):
        raise ConfigError(f"task.numbers={t.numbers!r}: must be numbers from 2 to 6, separated by commas")


def _check_list(field: str, text: str, normal: Callable[[str], str] = str) -> None:
    """Entries with commas between them: none is empty, none stands there twice."""
    entries = [normal(entry.strip()) for entry in text.split(",")]
    if "" in entries:
        raise ConfigError(f"{field}={text!r}: has an empty entry; separate the entries by single commas")
    if twice := [entry for i, entry in enumerate(entries) if entry in entries[:i]]:
        raise ConfigError(f"{field}={text!r}: {twice[0]} stands there twice; drop one")
