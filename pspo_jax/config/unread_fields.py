"""The conditions under which a run reads each field; a field that is set but not read is refused.

`READ_WHEN` lists every field with its conditions; an empty tuple = always read. A new field must be added to the table,
which a test checks. `_BY_SELECTOR` and `_BY_ESTIMATOR` list the fields that each built-in selector and advantage
estimator reads; a user's own strategy may read every field of its stage.
"""

from __future__ import annotations

from pathlib import Path

from pspo_jax.config.conditions import (
    ALWAYS,
    SURROGATE,
    Condition,
    Conditions,
    any_of,
    by_name,
    field_value,
    shown,
    surrogate,
    task,
    term,
    unless,
    unread,
    when,
)
from pspo_jax.config.defaults import defaults_of, flatten, uses_char_tokenizer
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.json_fields import mixture
from pspo_jax.config.schema import Config, ModelConfig, round_prompts
from pspo_jax.config.strategies import STORING
from pspo_jax.config.text_fields import REMOTE_LOGGERS, parse_loggers

FROM_DATA = ("math", "gsm8k", "multiple_choice", "python_function")
"""Names of the tasks that read task.train_data."""
BELIEFS = ("prioritized_replay", "mopps", "posterior_mixed", "spo")
"""Names of the selectors that keep a belief about each prompt."""
_WEIGHTED = ("correction", "correction_end", "replacement")
"""Fields of the selectors that draw in proportion to weights."""
_BY_SELECTOR: dict[str, tuple[str, ...]] = {
    "uniform": (),
    "pps": (*_WEIGHTED, "floor", "exponent", "exponent_end", "initial", "statistic", "signal"),
    "prioritized_replay": ("estimate", "retest_every", "retest_share", "bins", "predictor"),
    "mopps": ("candidates", "bins", "predictor"),
    "posterior_mixed": ("draw", "candidates", "bins", "predictor"),
    "spo": (*_WEIGHTED, "floor"),
    "greso": ("greso_base", "greso_floor"),
    "difficulty_pools": (*_WEIGHTED, "pool_weights", "easy_from", "hard_to"),
    "curriculum": (*_WEIGHTED, "difficulty_column", "curriculum_start", "curriculum_steps"),
}
_BY_ESTIMATOR: dict[str, tuple[str, ...]] = {
    "group": ("scale",),
    "rloo": ("scale",),
    "opo": ("scale",),
    "maxrl": (),
    "tracked_baseline": ("scale",),
    "ers": ("alpha", "alpha_mode", "stat_mode"),
}


def _completions_at_once(c: Config) -> int:
    """Number of completions that are rolled out together."""
    return round_prompts(c) * c.rollout.group_size // c.rollout.chunks


def _is_local(data: str | None) -> bool:
    """Whether data or a model is a file or folder of this machine."""
    return data is not None and Path(data).expanduser().exists()


def trains_on_older_policies(c: Config) -> bool:
    """Whether a batch of a resolved config may hold tokens from earlier steps."""
    return c.replay.name in STORING or c.rollout.dynamic_sampling_rounds != 1 or c.rollout.carry


def _reads_ratio(c: Config) -> bool:
    """Whether the loss depends on the probability ratio."""
    return c.loss.surrogate not in ("vespo", "reinforce") or _kl_reads_ratio(c)


def _kl_reads_ratio(c: Config) -> bool:
    """Whether the KL term depends on the probability ratio."""
    return c.loss.kl_coef > 0 and c.loss.kl_in == "loss" and c.loss.kl_unbiased


def _reads_deviation(c: Config) -> bool:
    """Whether some strategy divides by a group's or batch's standard deviation."""
    by_estimator = (
        c.advantage.scale != "none" if c.advantage.name in ("group", "rloo", "opo") else c.advantage.name == "ers"
    )
    return (
        by_estimator
        or (c.selection.name == "pps" and c.selection.signal == "raw")
        or c.advantage.name not in _BY_ESTIMATOR
    )


def _reads_eps(c: Config) -> bool:
    """Whether some strategy adds advantage.eps to a divisor."""
    return _reads_deviation(c) or (c.advantage.name == "tracked_baseline" and c.advantage.scale == "batch")


def _selector_has_beliefs(c: Config) -> bool:
    """Whether the selector keeps beliefs about prompts."""
    s = c.selection
    by_name = s.name in BELIEFS or s.name not in _BY_SELECTOR
    return by_name and not (s.name == "prioritized_replay" and s.estimate == "last")


def believes(c: Config) -> bool:
    """Whether a strategy of a resolved config keeps beliefs about prompts, which `forgetting` ages."""
    return _selector_has_beliefs(c) or c.advantage.name == "tracked_baseline" or c.advantage.name not in _BY_ESTIMATOR


def _reads_policy_drift(c: Config) -> bool:
    """Whether some strategy depends on the policy drift."""
    by_estimator = (
        c.advantage.name == "ers" and c.advantage.alpha_mode == "policy_drift" and c.algorithm.variant == "paper"
    )
    return by_estimator or (believes(c) and c.forgetting.mode == "policy_drift")


TEXT = Condition(
    lambda c: not uses_char_tokenizer(c),
    lambda c: f"task.name={c.task.name} uses the character tokenizer and does not read it",
    "choose a text task, such as --task.name gsm8k --task.train_data FILE.jsonl",
)
ONE_TASK = when("task.mixture", None)
MAY_HAVE_IMAGES = Condition(
    lambda c: c.task.mixture is not None or c.task.name in (*FROM_DATA, "segments", "own"),
    lambda c: f"the prompts of task.name={c.task.name} have no images",
    "choose a task with images, such as --task.name segments",
)
COLD_START = unless("sft.steps", 0, "set sft.steps")
RANDOM_WEIGHTS = Condition(
    lambda c: c.model.source is None,
    lambda c: f"the checkpoint model.source={c.model.source} decides it",
    "leave model.source out",
)
ADAPTERS = unless("lora.rank", 0, "set lora.rank")
POPO = when("replay.name", "popo")
STORES = when("replay.name", *STORING)
DYNAMIC_SAMPLING = unless("rollout.dynamic_sampling_rounds", 1, "raise rollout.dynamic_sampling_rounds")
CLIP = surrogate("clip")
KL = unless("loss.kl_coef", 0.0, "set loss.kl_coef")
TEACHER = unless("teacher.source", None, "set teacher.source")
PAPER_VARIANT = when("algorithm.variant", "paper")
HAS_COORDINATOR = unless("distributed.coordinator", None, "set distributed.coordinator")
JOINS_PROCESSES = Condition(
    lambda c: c.distributed.auto or c.distributed.coordinator is not None,
    unread("distributed.auto", "distributed.coordinator"),
    "set distributed.coordinator",
)
DUMPS_COMPLETIONS = unless("log.completions_every", 0, "set log.completions_every")
NAMES_RUNS = Condition(
    lambda c: bool(set(parse_loggers(c.log.to)) & set(REMOTE_LOGGERS)),
    unread("log.to"),
    f"add {any_of(REMOTE_LOGGERS)} to log.to",
)
HAS_BELIEFS = Condition(
    believes,
    unread("selection.name", "advantage.name"),
    "choose a strategy that keeps beliefs, such as selection.name mopps or advantage.name tracked_baseline",
)
SELECTOR_HAS_BELIEFS = Condition(
    _selector_has_beliefs, unread("selection.name", "selection.estimate"), f"set selection.name to {any_of(BELIEFS)}"
)
MEASURES_DRIFT = Condition(
    _reads_policy_drift,
    unread("forgetting.mode", "selection.name", "advantage.name", "advantage.alpha_mode"),
    "set forgetting.mode to policy_drift with a strategy that keeps beliefs, or advantage.alpha_mode to policy_drift "
    "with advantage.name ers",
)
OLDER_GROUPS = Condition(
    lambda c: trains_on_older_policies(c) or c.loss.old_log_probs == "trainer",
    unread("replay.name", "rollout.dynamic_sampling_rounds", "rollout.carry", "loss.old_log_probs"),
    "set replay.name to popo or aper, raise rollout.dynamic_sampling_rounds, set rollout.carry, or set "
    "loss.old_log_probs to trainer",
)
_NO_DEVIATION = unread("advantage.name", "advantage.scale", "selection.name")
_DEVIATION_CHOICE = "choose advantage.name ers, an advantage.scale other than none, or selection.name pps"


def _has_splits(field: str) -> Condition:
    """The condition that `field` names data with splits: a hub dataset or a folder."""

    def holds(c: Config) -> bool:
        data = field_value(c, field)
        return isinstance(data, str) and not Path(data).expanduser().is_file()

    return Condition(
        holds,
        unread(field),
        f"name a hub dataset, or a folder that has it, in {field}",
    )


def _selection(name: str, *more: Condition) -> Conditions:
    """The condition that the selector reads the field `name`, and more conditions."""
    return (by_name("selection.name", _BY_SELECTOR, name), *more)


def _estimator(name: str, *more: Condition) -> Conditions:
    """The condition that the advantage estimator reads the field `name`, and more conditions."""
    return (by_name("advantage.name", _BY_ESTIMATOR, name), *more)


_RUN = ("dir", "steps", "hours", "seed", "profile", "start_over", "fingerprint", "print_config", "compilation_cache")
_DATA = ("train_data", "heldout_data", "prompt_column", "answer_column", "answer_transform", "image_column")
_MODEL = ("param_dtype", "compute_dtype", "scan_unroll", "remat", "attention", "decode_attention")
_SFT = ("batch", "learning_rate", "warmup", "final_fraction", "b2", "weight_decay", "clip_norm", "data", "share")
_ROLLOUT = (
    "prompts",
    "group_size",
    "chunks",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "dynamic_sampling_rounds",
    "carry",
)
_SELECTION = ("name", "cooldown", "max_visits", "max_unjudged", "exploration", "quotas", "success", "success_threshold")
_LOSS = (
    *("name", "surrogate", "aggregation", "top_entropy", "entropy_coef", "mask_truncated"),
    *("kl_coef", "num_iterations", "minibatches", "microbatch_rows", "packing", "old_log_probs", "logits_mib"),
)
_OPTIMIZER = ("learning_rate", "warmup", "schedule", "b1", "b2", "eps", "weight_decay", "clip_norm", "max_skipped")
_LOG = ("progress", "to", "completions_every", "selection_every", "report")
_JUDGE = (
    *("url", "model", "prompt", "pattern", "scale", "api_key_variable"),
    *("temperature", "max_tokens", "concurrency", "deadline", "retries"),
)


def _all(stage: str, names: tuple[str, ...], *conditions: Condition) -> dict[str, Conditions]:
    """Dotted field -> conditions, for fields of one stage with the same conditions."""
    return {f"{stage}.{name}": conditions for name in names}


READ_WHEN: dict[str, Conditions] = {
    **_all("run", _RUN),
    "run.profile_memory": (unless("run.profile", None, "set run.profile"),),
    "algorithm.name": ALWAYS,
    "algorithm.variant": (when("advantage.name", "ers"),),
    "task.name": (ONE_TASK,),
    **_all("task", ("train_prompts", "heldout_prompts", "mixture", "allow_change")),
    "task.seed": (
        Condition(
            lambda c: c.task.mixture is not None or c.task.name not in FROM_DATA,
            unread("task.name"),
            "choose a task that generates its prompts, or set task.mixture",
        ),
    ),
    **_all("task", _DATA, task(*FROM_DATA)),
    "task.subset": (task(*FROM_DATA), _has_splits("task.train_data")),
    "task.train_split": (task(*FROM_DATA), _has_splits("task.train_data")),
    "task.heldout_split": (task(*FROM_DATA), _has_splits("task.heldout_data")),
    "task.revision": (
        task(*FROM_DATA),
        Condition(
            lambda c: any(data and not _is_local(data) for data in (c.task.train_data, c.task.heldout_data)),
            unread("task.train_data"),
            "name a hub dataset",
        ),
    ),
    **_all("task", ("choices_column", "choices_answer"), task("multiple_choice")),
    "task.function": (task("python_function"),),
    **_all("task", ("dataset", "options"), task("reasoning_gym")),
    **_all("task", ("numbers", "max_target"), task("countdown")),
    "task.kinds": (task("text_suite"),),
    "task.image_widths": (task("segments"),),
    "task.strata": (ONE_TASK, unless("task.name", "own", "choose another task")),
    "task.difficulty_column": (
        ONE_TASK,
        task(*FROM_DATA, "reasoning_gym"),
        unless("task.strata", "", "set task.strata"),
    ),
    "task.wrong_labels": (
        ONE_TASK,
        task("arithmetic", "segments", "countdown", "text_suite", "math", "gsm8k", "multiple_choice"),
    ),
    "task.check_gold": (task("math", "gsm8k"),),
    "task.cache": (TEXT,),
    **_all("prompt", ("template", "question", "prefill", "max_tokens", "min_pixels", "max_pixels"), TEXT),
    **_all("prompt", ("system", "thinking", "date"), TEXT, when("prompt.template", "chat")),
    **_all("model", ("source", "tokenizer"), TEXT),
    "model.vision": (
        unless("model.source", None, "set model.source to a checkpoint with a vision tower"),
        when("lora.rank", 0),
    ),
    "model.revision": (
        Condition(
            lambda c: c.model.source is not None and not _is_local(c.model.source),
            unread("model.source"),
            "set model.source to a hub id",
        ),
    ),
    **_all("model", tuple(ModelConfig().shape_fields()), RANDOM_WEIGHTS),
    **_all("model", _MODEL),
    "lora.rank": ALWAYS,
    **_all("lora", ("alpha", "dropout", "targets"), ADAPTERS),
    "sft.steps": ALWAYS,
    **_all("sft", _SFT, COLD_START),
    **_all("rollout", _ROLLOUT),
    "rollout.weights": (unless("mesh.fsdp", 1, "raise mesh.fsdp"),),
    "rollout.slots": (
        Condition(
            lambda c: c.rollout.slots is None or c.rollout.slots < _completions_at_once(c),
            lambda c: f"at most {_completions_at_once(c)} completions are rolled out at a time",
            "choose a smaller number",
        ),
    ),
    **_all("rollout", ("stages", "longest_first"), unless("rollout.slots", None, "set rollout.slots")),
    "rollout.oversampling": (DYNAMIC_SAMPLING,),
    "rollout.budget": (when("rollout.carry", True),),
    "rollout.prompt_bucket": ALWAYS,
    "rollout.stop": (TEXT,),
    "reward.terms": ALWAYS,
    "reward.format": (term("format"),),
    "reward.cosine_length": (term("cosine"), when("reward.variant", "paper")),
    **_all("reward", ("cosine_right", "cosine_wrong", "variant"), term("cosine")),
    "reward.overlong_cache": (term("overlong"),),
    **_all("reward", ("repetition_ngram", "repetition_penalty"), term("repetition")),
    **_all("reward", ("model", "model_rows", "model_tokens"), term("reward_model")),
    "reward.require_end": (
        TEXT,
        Condition(
            lambda c: c.task.mixture is not None or c.task.name != "python_function",
            unread("task.name"),
            "choose another task",
        ),
    ),
    **_all("judge", _JUDGE, term("judge")),
    **_all("verifier", ("workers", "deadline", "wall_limit", "memory_mib", "network", "max_no_verdict"), TEXT),
    **_all("selection", _SELECTION),
    "selection.exponent": _selection("exponent"),
    "selection.exponent_end": _selection("exponent_end", PAPER_VARIANT),
    "selection.correction": _selection("correction"),
    "selection.correction_end": _selection("correction_end", PAPER_VARIANT),
    **{f"selection.{name}": _selection(name) for name in ("replacement", "floor", "initial", "statistic", "signal")},
    **{f"selection.{name}": _selection(name) for name in ("estimate", "retest_share", "draw", "pool_weights")},
    "selection.retest_every": _selection(
        "retest_every", unless("selection.retest_share", 0.0, "raise selection.retest_share")
    ),
    "selection.candidates": _selection(
        "candidates",
        Condition(
            lambda c: c.selection.name != "posterior_mixed" or c.selection.draw == "thompson",
            unread("selection.draw"),
            "set selection.draw to thompson",
        ),
    ),
    **{f"selection.{name}": _selection(name) for name in ("greso_base", "greso_floor", "easy_from", "hard_to")},
    **{f"selection.{name}": _selection(name, SELECTOR_HAS_BELIEFS) for name in ("bins", "predictor")},
    "selection.difficulty_column": (
        Condition(
            lambda c: c.selection.bins in ("difficulty", "auto") or _selection("difficulty_column")[0].holds(c),
            unread("selection.name", "selection.bins"),
            "set selection.name to curriculum, or selection.bins to difficulty",
        ),
    ),
    "selection.curriculum_start": _selection("curriculum_start"),
    "selection.curriculum_steps": _selection(
        "curriculum_steps", unless("selection.curriculum_start", 1.0, "lower selection.curriculum_start")
    ),
    "advantage.name": ALWAYS,
    "advantage.scale": _estimator("scale"),
    "advantage.ddof": (Condition(_reads_deviation, _NO_DEVIATION, _DEVIATION_CHOICE),),
    "advantage.eps": (Condition(_reads_eps, _NO_DEVIATION, _DEVIATION_CHOICE),),
    "advantage.alpha": _estimator(
        "alpha",
        Condition(
            lambda c: c.advantage.alpha_mode == "fixed" or c.algorithm.variant == "published_code",
            unread("advantage.alpha_mode"),
            "set advantage.alpha_mode to fixed",
        ),
    ),
    "advantage.alpha_mode": _estimator("alpha_mode", PAPER_VARIANT),
    "advantage.stat_mode": _estimator("stat_mode", PAPER_VARIANT),
    "forgetting.mode": (HAS_BELIEFS,),
    "forgetting.discount": (HAS_BELIEFS, when("forgetting.mode", "fixed")),
    **_all("forgetting", ("half_life", "low", "high"), MEASURES_DRIFT),
    "forgetting.shrinkage": (SELECTOR_HAS_BELIEFS,),
    **_all("forgetting", ("prior_successes", "prior_failures"), HAS_BELIEFS),
    "forgetting.prior_strength": (unless("selection.bins", "none", "set selection.bins"),),
    "forgetting.shared_steps": (
        Condition(
            lambda c: c.selection.predictor not in (None, "none") or c.forgetting.prior_strength == "estimated",
            unread("selection.predictor", "forgetting.prior_strength"),
            "set selection.predictor to hidden_states, or forgetting.prior_strength to estimated",
        ),
    ),
    "replay.name": ALWAYS,
    **_all("replay", ("capacity", "max_age", "min_age", "memory"), STORES),
    **_all("replay", ("max_uses", "max_share", "order", "ess_floor"), POPO),
    "replay.extra": (when("replay.name", "aper"),),
    "replay.tau": (POPO, when("replay.order", "fresh_priority")),
    "replay.effective": (
        Condition(
            lambda c: c.replay.name in ("filter", "popo") or c.rollout.dynamic_sampling_rounds != 1,
            unread("replay.name", "rollout.dynamic_sampling_rounds"),
            "set replay.name to filter or popo, or raise rollout.dynamic_sampling_rounds",
        ),
    ),
    **_all("loss", _LOSS),
    "loss.off_policy_threshold": (SURROGATE,),
    "loss.ratio": (
        Condition(_reads_ratio, unread("loss.surrogate"), "set loss.surrogate to clip, cispo or sapo"),
        SURROGATE._replace(holds=lambda c: SURROGATE.holds(c) or _kl_reads_ratio(c)),
    ),
    "loss.count_masked": (when("loss.aggregation", "grpo", "dr_grpo", "luspo"),),
    "loss.clip_low": (CLIP, SURROGATE),
    "loss.clip_high": (surrogate("clip", "cispo"), SURROGATE),
    **_all("loss", ("delta", "dual_clip"), CLIP, SURROGATE),
    **_all("loss", ("sapo_positive", "sapo_negative"), surrogate("sapo"), SURROGATE),
    **_all("loss", ("vespo_positive", "vespo_negative"), surrogate("vespo"), SURROGATE),
    "teacher.source": ALWAYS,
    "teacher.revision": (
        TEACHER,
        Condition(
            lambda c: not _is_local(c.teacher.source), unread("teacher.source"), "set teacher.source to a hub id"
        ),
    ),
    **_all("teacher", ("step", "divergence", "weight", "reward_weight", "param_dtype"), TEACHER),
    "teacher.jsd_beta": (TEACHER, when("teacher.divergence", "jsd")),
    **_all("loss", ("kl_in", "kl_estimator"), KL),
    "loss.kl_unbiased": (KL, when("loss.kl_in", "loss")),
    "loss.off_policy": (OLDER_GROUPS,),
    **_all("loss", ("importance", "ess_scaling"), OLDER_GROUPS, when("loss.off_policy", "decoupled")),
    "loss.importance_cap": (
        OLDER_GROUPS,
        when("loss.off_policy", "decoupled"),
        unless("loss.surrogate", "vespo", "choose another loss.surrogate"),
    ),
    "loss.microbatch_tokens": (unless("loss.packing", False, "leave loss.packing out"),),
    "loss.share_prompts": (unless("loss.packing", False, "leave loss.packing out"),),
    **_all("optimizer", _OPTIMIZER),
    "optimizer.final_fraction": (when("optimizer.schedule", "cosine"),),
    **_all("mesh", ("slices", "data", "fsdp", "tensor", "context")),
    **_all("distributed", ("auto", "coordinator")),
    **_all("distributed", ("processes", "process"), HAS_COORDINATOR),
    **_all("distributed", ("join_timeout", "heartbeat_timeout"), JOINS_PROCESSES),
    **_all("runtime", ("flags", "xla_flags", "libtpu_flags")),
    **_all("eval", ("every", "samples")),
    **_all("eval", ("patience", "target"), unless("eval.every", 0, "set eval.every")),
    "eval.other_images": (MAY_HAVE_IMAGES,),
    **_all("checkpoint", ("every", "keep", "keep_best", "on_error")),
    "checkpoint.retry_minutes": (when("checkpoint.on_error", "retry"),),
    **_all("log", _LOG),
    **_all("log", ("completions", "completions_format"), DUMPS_COMPLETIONS),
    **_all("log", ("project", "name"), NAMES_RUNS),
}
"""Field -> conditions, all of which must hold for a run to read the field."""
_OF_THE_MIXTURE = ("task.name", "task.seed", "task.cache")
"""Fields of `task` that the mixture as a whole reads, and its parts do not."""
_OF_ONE_TASK = ("task.strata", "task.difficulty_column", "task.wrong_labels")
"""Fields of `task` that neither a mixture nor its parts read."""


def refuse_unread(config: Config, resolved: Config) -> None:
    """Raise ConfigError for the first field whose value differs from its default and that the run does not read.

    Args:
      resolved: `config` after `presets.resolve`.
    """
    defaults = defaults_of(config)
    parts = [part for part, _ in mixture(config)]
    for name, value in flatten(config).items():
        if value == defaults[name]:
            continue
        read_by_parts = parts and name.startswith("task.") and name not in (*_OF_THE_MIXTURE, *_OF_ONE_TASK)
        missing = [_missing(name, reader) for reader in (parts if read_by_parts else [resolved])]
        if all(missing):
            raise ConfigError(f"{name}={shown(value)}: {missing[0]}")
    for part in parts:
        for field, value in vars(part.task).items():
            name = f"task.{field}"
            is_set = value != getattr(config.task, field) and name not in (*_OF_THE_MIXTURE, "task.mixture")
            if is_set and name in _OF_ONE_TASK:
                raise ConfigError(f"task.mixture: {name}={shown(value)}: a mixture does not read it; drop it")
            if is_set and (why := _missing(name, part)):
                raise ConfigError(f"task.mixture: {name}={shown(value)}: {why}")


def is_read(name: str, config: Config) -> bool:
    """Whether a run of a config reads a field. The config is resolved, except for this field."""
    return all(condition.holds(config) for condition in READ_WHEN[name])


def _missing(name: str, config: Config) -> str | None:
    """The reason why the run does not read a field, and what to do; None if the run reads it."""
    for condition in READ_WHEN[name]:
        if not condition.holds(config):
            return f"{condition.why(config)}; drop it, or {condition.choose}"
    return None
