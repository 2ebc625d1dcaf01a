"""Checks of a configuration. Each refuses with one line that names the field, its value and the fix."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable

from pspo_jax.config.defaults import replace, uses_char_tokenizer
from pspo_jax.config.fields import ConfigError, check_range, convert, field_types
from pspo_jax.config.json_fields import labels, mixture, options
from pspo_jax.config.presets import check_choices, resolve
from pspo_jax.config.schema import PROJECTIONS, Config, extra_completions, rollout_capacity, round_prompts
from pspo_jax.config.text_fields import (
    gamma_shape,
    interval,
    least_reward,
    parse_loggers,
    parse_profile,
    parse_quotas,
    parse_strata,
    parse_terms,
    parse_weights,
    parse_widths,
    stop_texts,
)
from pspo_jax.config.unread_fields import refuse_unread

MAX_DEADLINE = 86_400
"""Largest verifier.deadline, in seconds: a day."""
MAX_CAPACITY = 2**24
"""Largest number of completions that a buffer stores."""


def validate(config: Config) -> None:
    """Raise ConfigError for the first field with a wrong type or range, a contradiction, or no reader."""
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
    refuse_unread(config, resolve(config))


def _check_fields(stage: str, section: object) -> None:
    """Each field of a stage has the type and range that its annotation states."""
    for name, field_type in field_types(section).items():
        path = f"{stage}.{name}"
        check_range(path, field_type, convert(path, field_type, getattr(section, name)))


def _check_relations(c: Config) -> None:
    _check_run(c)
    _check_model(c)
    _check_prompt(c)
    _check_task(c)
    parse_terms(c.reward)
    if c.task.train_prompts and c.rollout.prompts > c.task.train_prompts and not c.selection.replacement:
        raise ConfigError(
            f"rollout.prompts={c.rollout.prompts}: must be at most task.train_prompts={c.task.train_prompts}, as "
            "prompts are drawn without replacement; lower the first or raise the second"
        )
    _check_strategies(c)
    if c.model.heads % c.model.kv_heads:
        raise ConfigError(f"model.kv_heads={c.model.kv_heads}: must divide model.heads={c.model.heads}")
    if c.model.head_dim % 2:
        raise ConfigError(f"model.head_dim={c.model.head_dim}: must be even for RoPE; choose an even number")
    if c.rollout.prompts % c.rollout.chunks:
        raise ConfigError(f"rollout.chunks={c.rollout.chunks}: must divide rollout.prompts={c.rollout.prompts}")
    _check_rounds(c)
    _check_carry(c)
    _check_distributed(c)
    _check_loss(c)
    _check_schedules(c)
    _check_rewards(c)
    _check_judge(c)
    _check_teacher(c)
    if c.rollout.prompts % c.loss.minibatches:
        raise ConfigError(f"loss.minibatches={c.loss.minibatches}: must divide rollout.prompts={c.rollout.prompts}")


def _check_run(c: Config) -> None:
    """The loggers are known, their names are not empty, and the steps of a profile are steps of the run."""
    parse_loggers(c.log.to)
    for name in ("project", "name"):
        if getattr(c.log, name) is not None and not getattr(c.log, name).strip():
            raise ConfigError(f"log.{name}='': must not be empty; leave it out")
    if c.run.profile is not None and (last := parse_profile(c.run.profile)[1]) > c.run.steps:
        raise ConfigError(
            f"run.profile={c.run.profile}: step {last} is after the last one, run.steps={c.run.steps}; choose earlier "
            "steps"
        )


def _check_distributed(c: Config) -> None:
    """A process has a number below the number of processes, and the mesh has a size."""
    d = c.distributed
    if c.mesh.data == 0:
        raise ConfigError("mesh.data=0: must be at least 1, or -1 for all devices that the other axes leave")
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
    """The prompts of a round of dynamic sampling can be drawn and split."""
    c = resolve(c)
    r = c.rollout
    if r.dynamic_sampling_rounds == 1:
        return
    prompts = round_prompts(c)
    reason = f"rollout.oversampling={r.oversampling:g}: a round has {prompts} prompts"
    if not prompts or prompts % r.chunks:
        raise ConfigError(f"{reason}, which rollout.chunks={r.chunks} must divide; choose another")
    if c.task.train_prompts and prompts > c.task.train_prompts and not c.selection.replacement:
        raise ConfigError(f"{reason}, more than task.train_prompts={c.task.train_prompts}; lower it")


def _check_carry(c: Config) -> None:
    """Carry-over has a budget, and nothing that reads groups in another way."""
    c = resolve(c)
    r = c.rollout
    if c.loss.old_log_probs == "interpolated":
        _check_interpolated(c)
    if not r.carry:
        return
    if r.budget is None:
        raise ConfigError(
            f"rollout.budget=None: rollout.carry=true needs it; set it, such as {max(r.max_new_tokens // 2, 1)}, half "
            "of rollout.max_new_tokens"
        )
    for field, used, choose in (
        (
            f"rollout.dynamic_sampling_rounds={r.dynamic_sampling_rounds}",
            r.dynamic_sampling_rounds != 1,
            "set it to 1, or choose another algorithm.name",
        ),
        (f"replay.name={c.replay.name}", c.replay.name != "none", "set it to none, or choose another algorithm.name"),
        (f"rollout.slots={r.slots}", r.slots is not None, "leave it out: a round decodes all of its completions"),
        (f"rollout.chunks={r.chunks}", r.chunks != 1, "leave it out: whole groups are verified after the last round"),
        ("task.name=segments", c.task.name == "segments", "choose a task without images"),
    ):
        if used:
            raise ConfigError(f"{field}: cannot be used with rollout.carry=true; {choose}, or drop rollout.carry")


def _check_interpolated(c: Config) -> None:
    """Tokens of known age are there to interpolate, and nothing needs their log-probs before the update."""
    if not c.rollout.carry:
        raise ConfigError(
            "loss.old_log_probs=interpolated: is for tokens that rollout.carry draws over several steps; set "
            "rollout.carry, or sampler"
        )
    for field, value, kept in (
        ("off_policy", c.loss.off_policy, "decoupled"),
        ("ess_scaling", c.loss.ess_scaling, "none"),
    ):
        if value not in (None, kept):
            raise ConfigError(
                f"loss.{field}={value}: cannot be used with loss.old_log_probs=interpolated; set {kept}, or "
                "loss.old_log_probs=sampler"
            )


def _check_loss(c: Config) -> None:
    """Loss and replay settings fit each other."""
    c = resolve(c)
    loss, stored = c.loss, c.replay
    if stored.min_age > stored.max_age:
        raise ConfigError(f"replay.min_age={stored.min_age}: must be at most replay.max_age={stored.max_age}")
    if stored.name == "aper":
        _check_extra(c)
    if loss.delta and loss.delta <= 1 + (loss.clip_high or 0):
        raise ConfigError(
            f"loss.delta={loss.delta:g}: must be greater than 1 + loss.clip_high = {1 + (loss.clip_high or 0):g}"
        )
    if loss.dual_clip and loss.dual_clip <= 1:
        raise ConfigError(f"loss.dual_clip={loss.dual_clip:g}: must be greater than 1, or 0 = off")
    for name in ("vespo_positive", "vespo_negative"):
        try:
            if not all(map(math.isfinite, gamma_shape(getattr(loss, name)))):
                raise ValueError("they must be finite")
        except ValueError as error:
            raise ConfigError(
                f"loss.{name}={getattr(loss, name)!r}: must be k and lambda, such as 2,3 ({error})"
            ) from error
    if loss.kl_in == "reward" and loss.kl_estimator.endswith("+"):
        raise ConfigError(
            f"loss.kl_estimator={loss.kl_estimator}: + changes only the gradient, and loss.kl_in=reward has none; set "
            f"{loss.kl_estimator.removesuffix('+')}"
        )
    if loss.off_policy == "coupled" and loss.old_log_probs == "trainer":
        raise ConfigError(
            "loss.off_policy=coupled: needs the sampler's log-probs, as it clips around the behaviour policy; set "
            "loss.old_log_probs=sampler"
        )


def _check_extra(c: Config) -> None:
    """The completions that join a batch are stored at all, and minibatches divide them."""
    extra, capacity = extra_completions(c), rollout_capacity(c)
    if capacity > MAX_CAPACITY:
        raise ConfigError(
            f"replay.max_age={c.replay.max_age}: would store {capacity} completions, and at most {MAX_CAPACITY} can "
            "be; lower it, or set replay.capacity"
        )
    if extra > capacity:
        raise ConfigError(
            f"replay.extra={extra}: is more than the {capacity} completions that are stored; lower it, or raise "
            "replay.capacity"
        )
    if extra % c.loss.minibatches:
        raise ConfigError(
            f"replay.extra={extra}: must be a multiple of loss.minibatches={c.loss.minibatches}; choose another"
        )


def _check_schedules(c: Config) -> None:
    """A warm-up that the user set ends before the run does."""
    defaults = Config()
    updates = c.run.steps * c.loss.num_iterations * c.loss.minibatches
    for stage, settings, default, total, words in (
        ("optimizer", c.optimizer, defaults.optimizer, updates, f"the {updates} updates of run.steps={c.run.steps}"),
        ("sft", c.sft, defaults.sft, c.sft.steps, f"sft.steps={c.sft.steps}"),
    ):
        if settings.warmup != default.warmup and settings.warmup >= total > 0:
            raise ConfigError(f"{stage}.warmup={settings.warmup}: must be less than {words}; lower it")


def _check_rewards(c: Config) -> None:
    """Reward terms have finite numbers, and at least one weight is not 0."""
    terms = parse_terms(c.reward)
    if not any(terms.values()):
        raise ConfigError(f"reward.terms={c.reward.terms!r}: every weight is 0, so nothing is learned; raise one")
    if "reward_model" in terms and not c.reward.model:
        raise ConfigError("reward.model=None: the term reward_model (reward.terms) needs a checkpoint; name one")
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


def _check_judge(c: Config) -> None:
    """A judge among the terms has a service, a prompt that holds the completion, and a way to read its score."""
    j = c.judge
    if "judge" not in parse_terms(c.reward):
        return
    for name, example in (("url", "http://localhost:8000/v1"), ("model", "Qwen/Qwen2.5-7B-Instruct")):
        if not getattr(j, name):
            raise ConfigError(f"judge.{name}=None: the term judge (reward.terms) needs it; set it, such as {example}")
    if not (j.url or "").startswith(("http://", "https://")):
        raise ConfigError(f"judge.url={j.url}: must begin with http:// or https://, as http://localhost:8000/v1 does")
    if "{completion}" not in j.prompt:
        raise ConfigError(f"judge.prompt={j.prompt[:60]!r}: must hold {{completion}}, which stands for what is graded")
    try:
        groups = re.compile(j.pattern).groups
    except re.error as error:
        raise ConfigError(f"judge.pattern={j.pattern!r}: is no regular expression ({error}); mend it") from error
    if groups != 1:
        raise ConfigError(f"judge.pattern={j.pattern!r}: has {groups} groups; write one, around the score")
    low, high = interval(j.scale, "judge.scale")
    if not low < high or not math.isfinite(high - low):
        raise ConfigError(f"judge.scale={j.scale!r}: the first score must be less than the second, such as 0,10")


def _check_teacher(c: Config) -> None:
    """The loss gives each token an advantage of its own, and no group that a teacher teaches from leaves the batch."""
    c = resolve(c)
    t = c.teacher
    if t.source is None:
        return
    if t.step not in ("latest", "best", "cold_start") and not t.step.isdecimal():
        raise ConfigError(f"teacher.step={t.step!r}: must be a step's number, latest, best or cold_start")
    if t.divergence == "sampled":
        where = f"cannot be used with teacher.source={t.source}, which gives each token an advantage of its own"
        other = "or another teacher.divergence"
        if c.loss.surrogate == "vespo":
            raise ConfigError(f"loss.surrogate=vespo: {where}; choose clip, cispo, sapo or reinforce, {other}")
        if c.loss.ratio == "sequence":
            raise ConfigError(f"loss.ratio=sequence: {where}; choose token or sequence_token, {other}")
    if t.reward_weight:
        return
    for field, drops in (
        (f"replay.name={c.replay.name}", c.replay.name in ("filter", "popo")),
        (
            f"rollout.dynamic_sampling_rounds={c.rollout.dynamic_sampling_rounds}",
            c.rollout.dynamic_sampling_rounds != 1,
        ),
    ):
        if drops:
            raise ConfigError(
                f"{field}: leaves out groups by their rewards, and with teacher.reward_weight=0 the teacher alone "
                "teaches, from all of them; choose algorithm.name=grpo, or raise teacher.reward_weight"
            )


def _check_strategies(c: Config) -> None:
    """Selector, advantage estimator and forgetting fit each other."""
    c = resolve(c)
    s, f = c.selection, c.forgetting
    parse_quotas(s.quotas)
    parse_weights(s.pool_weights)
    prompts = round_prompts(c)
    if s.exploration and not round(s.exploration * prompts):
        raise ConfigError(
            f"selection.exploration={s.exploration:g}: is less than half a prompt of the {prompts} that are rolled out "
            f"at a time, so no prompt would be drawn uniformly; set 0, or at least {1 / max(prompts, 1):g}"
        )
    if s.success == "verdict" and s.success_threshold is not None and not 0 < s.success_threshold <= 1:
        raise ConfigError(
            f"selection.success_threshold={s.success_threshold:g}: must be above 0 and at most 1 with "
            "selection.success=verdict; choose another, or selection.success=reward"
        )
    if s.easy_from <= s.hard_to:
        raise ConfigError(f"selection.easy_from={s.easy_from}: must be greater than selection.hard_to={s.hard_to}")
    if s.bins not in (None, "none") and s.predictor not in (None, "none"):
        raise ConfigError(
            f"selection.predictor={s.predictor}: cannot be used with selection.bins={s.bins}, as both decide the prior "
            "of a prompt's belief; set one of them to none"
        )
    if f.low > f.high:
        raise ConfigError(f"forgetting.low={f.low}: must be at most forgetting.high={f.high}")
    if c.advantage.name == "tracked_baseline" and c.advantage.scale == "group":
        raise ConfigError(
            "advantage.scale=group: cannot be used with advantage.name=tracked_baseline, as a group's deviation is 0 "
            "where all completions are correct; choose batch or none"
        )
    if c.advantage.name == "maxrl":
        _check_maxrl(c)


def _check_maxrl(c: Config) -> None:
    """No reward that the config describes is below 0; rewards of a user's own are checked as they come."""
    if c.loss.kl_coef > 0 and c.loss.kl_in == "reward":
        raise ConfigError(
            "advantage.name=maxrl: divides by a group's mean reward, which loss.kl_in=reward may lower below 0; set "
            "loss.kl_in=loss"
        )
    least = least_reward(c.reward)
    if least is not None and least < 0:
        raise ConfigError(
            f"advantage.name=maxrl: divides by a group's mean reward, and reward.terms={c.reward.terms!r} may give "
            f"{least:g}; drop the terms that are below 0, or choose advantage.name=group"
        )


def _check_model(c: Config) -> None:
    """Task, checkpoint, tokenizer and adapters fit each other."""
    model, own_characters = c.model, uses_char_tokenizer(c)
    if own_characters and not c.task.train_prompts:
        raise ConfigError(f"task.train_prompts=0: must be at least 1 for task.name={c.task.name}")
    if not own_characters and c.task.name != "own" and model.source is None and model.tokenizer is None:
        raise ConfigError(f"model.source=None: task.name={c.task.name} needs a checkpoint; set it, or model.tokenizer")
    if not own_characters and c.sft.steps and c.sft.data is None:
        raise ConfigError(f"sft.steps={c.sft.steps}: task.name={c.task.name} has no demonstrations; set sft.data or 0")
    if c.task.name == "segments" and c.sft.data is not None:
        raise ConfigError(f"sft.data={c.sft.data}: task.name=segments draws its own demonstrations; drop it")
    if c.lora.rank and model.source is None:
        raise ConfigError(f"lora.rank={c.lora.rank}: adapters need a checkpoint; set model.source")
    _check_list("lora.targets", c.lora.targets, lambda name: name.removesuffix("_proj"))
    unknown = [t for t in c.lora.target_names() if t not in PROJECTIONS]
    if unknown or not c.lora.target_names():
        reason = f"{', '.join(unknown)} is not a projection" if unknown else "names no projection"
        raise ConfigError(f"lora.targets={c.lora.targets!r}: {reason}; choose among {', '.join(PROJECTIONS)}")


def _check_prompt(c: Config) -> None:
    """Date and stop tokens can be parsed, and the task reads them; some image meets the bounds on pixels."""
    if c.prompt.date is not None:
        try:
            datetime.date.fromisoformat(c.prompt.date)
        except ValueError as error:
            raise ConfigError(f"prompt.date={c.prompt.date!r}: must be a day, such as 2026-01-31") from error
    smallest, largest = c.prompt.min_pixels, c.prompt.max_pixels
    if smallest is not None and largest is not None and smallest > largest:
        raise ConfigError(f"prompt.min_pixels={smallest}: must be at most prompt.max_pixels={largest}; lower it")
    if stop_texts(c.rollout.stop) and uses_char_tokenizer(c):
        raise ConfigError(
            f"rollout.stop={c.rollout.stop!r}: task.name={c.task.name} with characters always ends with $; drop it"
        )


def _check_task(c: Config) -> None:
    """Each task has the fields that it needs."""
    t = c.task
    if uses_char_tokenizer(c) and c.reward.terms.strip() != "accuracy":
        raise ConfigError(
            f"reward.terms={c.reward.terms!r}: task.name={t.name} with characters knows accuracy only; drop it"
        )
    parts = mixture(c)
    if parts:
        labels(c)
        for part, _ in parts:
            try:
                _check_fields("task", part.task)
                _check_task(part)
            except ConfigError as error:
                raise ConfigError(f"task.mixture={(t.mixture or '')[:80]!r}: {error}") from error
        return
    if t.name in ("math", "gsm8k", "multiple_choice", "python_function") and t.train_data is None:
        raise ConfigError(f"task.train_data=None: task.name={t.name} needs data; name a file, a folder or a hub id")
    if t.name == "python_function" and (t.function is None or ":" not in t.function):
        raise ConfigError(f"task.function={t.function}: task.name=python_function needs one, as module:function")
    if t.name == "reasoning_gym" and not t.dataset:
        raise ConfigError(
            "task.dataset=None: task.name=reasoning_gym needs datasets; name them, such as leg_counting,chain_sum"
        )
    options(t.options)
    parse_strata(t.strata)
    if t.dataset is not None:
        _check_list("task.dataset", t.dataset)
    columns = ("prompt_column", "answer_column", "image_column", "difficulty_column")
    for name in ("subset", "revision", *columns, "function"):
        if getattr(t, name) is not None and not getattr(t, name).strip():
            raise ConfigError(f"task.{name}='': must not be empty; leave it out")
    parse_widths(t.image_widths)
    _check_list("task.kinds", t.kinds)
    _check_list("task.numbers", t.numbers)
    sizes = t.numbers.split(",")
    if not all(s.strip().isdecimal() and 2 <= int(s) <= 6 for s in sizes):
        raise ConfigError(f"task.numbers={t.numbers!r}: must be numbers from 2 to 6, separated by commas")


def _check_list(field: str, text: str, normal: Callable[[str], str] = str) -> None:
    """The entries between commas are neither empty nor repeated."""
    entries = [normal(entry.strip()) for entry in text.split(",")]
    if "" in entries:
        raise ConfigError(f"{field}={text!r}: has an empty entry; separate the entries by single commas")
    if twice := [entry for i, entry in enumerate(entries) if entry in entries[:i]]:
        raise ConfigError(f"{field}={text!r}: {twice[0]} appears twice; drop one")
