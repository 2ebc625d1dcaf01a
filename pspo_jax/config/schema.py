"""The whole configuration: one frozen dataclass per stage, nested in `Config`.

Every field's docstring gives its meaning and unit; `--help-all` shows it. The type holds the field's range. A field
whose default is `None` follows `algorithm.name` (`presets.py`), the machine or another field, as its docstring says.
For text tasks and adapters, the defaults in `defaults.py` replace some of those here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pspo_jax.config.fields import Range
from pspo_jax.config.machines import DistributedConfig, MeshConfig, RuntimeConfig
from pspo_jax.config.rewards import JudgeConfig, RewardConfig, VerifierConfig
from pspo_jax.config.run_stages import CheckpointConfig, EvalConfig, LogConfig, RunConfig
from pspo_jax.config.strategies import (
    AdvantageConfig,
    AlgorithmConfig,
    ForgettingConfig,
    LossConfig,
    ReplayConfig,
    SelectionConfig,
)
from pspo_jax.config.teachers import TeacherConfig

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full", "offload"]
TextTaskName = Literal[
    "countdown", "math", "gsm8k", "multiple_choice", "reasoning_gym", "text_suite", "python_function"
]
TaskName = Literal["arithmetic", "segments", TextTaskName, "own"]
AnswerTransform = Literal["none", "gsm8k", "stringified_list", "boxed"]
ChoicesAnswer = Literal["label", "letter", "text", "index", "index_from_1"]
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
LEAST_LOGITS_MIB = 160
"""Memory for a chunk of logits where loss.logits_mib is not set, in MiB; large accelerators take more."""
"""Names of the weight matrices of a transformer block."""


@dataclass(frozen=True)
class TaskConfig:
    """Prompts and gold answers: where they come from and how they are read."""

    name: TaskName = "arithmetic"
    """Name of the task, which supplies prompts and decides which answers are correct. arithmetic, countdown, text_suite
    and segments, which has images, generate their prompts; math, gsm8k, multiple_choice and python_function read
    task.train_data; reasoning_gym takes datasets of the package of that name. own is the task that a program gives to
    pspo_jax.train, which sets this field."""
    train_prompts: Annotated[int, Range(0)] = 512
    """Number of prompts to train on; 0 = all rows of the data, or 10,000 for a task that generates its prompts."""
    heldout_prompts: Annotated[int, Range(1)] = 384
    """Number of prompts to evaluate on; none of them is a training prompt."""
    seed: Annotated[int, Range(0)] = 0
    """Seed of prompts that are generated or mixed; runs with different run.seed thus train on the same prompts."""
    train_data: str | None = None
    """Training data: a file (.jsonl, .json, .parquet, .arrow, .csv), a folder saved by `datasets`, or a hub id."""
    heldout_data: str | None = None
    """Held-out data, in the same forms; None = the last rows of train_data, which are then not trained on."""
    subset: str | None = None
    """Name of a hub dataset's configuration, such as main."""
    train_split: str = "train"
    """Split of a hub dataset to train on."""
    heldout_split: str = "test"
    """Split of a hub dataset to evaluate on."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset; None = its main branch."""
    prompt_column: str | None = None
    """Column of the question or conversation; None = the first column found among problem, question, prompt, messages,
    conversations. A dot enters an object: extra_info.question."""
    answer_column: str | None = None
    """Column of the gold answer, such as reward_model.ground_truth; None = the first of answer, solution, target."""
    answer_transform: AnswerTransform | None = None
    """Form of the gold answer in its column: the answer itself (none), the text after `####` (gsm8k), a list or the
    text of a list, each member of which is correct (stringified_list), or the last \\boxed{} (boxed). None = a list's
    members where the column holds lists, else the task's usual form."""
    image_column: str | None = None
    """Column of a prompt's image, or of the list of its images, for a checkpoint with a vision tower: the bytes, the
    path or the data URL of each. Their places in the text are marked by <image>. None = the first column found of
    images and image; "off" = no images are read."""
    choices_column: str = "choices"
    """multiple_choice: column that holds the list of options."""
    choices_answer: ChoicesAnswer | None = None
    """multiple_choice: how the gold answer names an option: the data's own label (label), the letter A, B, ...
    (letter), the option's text (text), or its position counted from 0 (index) or from 1 (index_from_1). None = the only
    form that fits the whole column."""
    function: str | None = None
    """python_function: module:function that scores a completion; docs/tasks.md describes its arguments."""
    dataset: str | None = None
    """reasoning_gym: names of datasets, separated by commas."""
    options: str = "{}"
    """reasoning_gym: JSON object with the settings of the datasets."""
    numbers: str = "3,4"
    """countdown: permitted counts of numbers in a problem, separated by commas."""
    max_target: Annotated[int, Range(2)] = 99
    """countdown: largest target."""
    kinds: str = "all"
    """text_suite: kinds of questions, separated by commas, such as add,add_carry; all = every kind."""
    image_widths: str = "24"
    """segments: widths of the images in pixels, separated by commas, equally frequent: multiples of 8 from 24 on."""
    strata: str = ""
    """Shares of the training prompts by difficulty, such as "0=0.8, 3+=0.2": 80 % of difficulty 0, 20 % of 3 or more.
    A stratum is a number, a range (1-2) or a least number (3+), and the shares sum to 1. Empty = as the task draws its
    prompts. Held-out prompts do not depend on it, and their accuracy is logged by stratum."""
    difficulty_column: str | None = None
    """Source of the difficulty that task.strata reads: a column of the data, or an entry of reasoning-gym's metadata,
    such as num_terms. None = the first column found of difficulty and level. Other tasks have a difficulty of their
    own."""
    wrong_labels: Annotated[float, Range(0.0, 1.0)] = 0.0
    """Share of the training prompts whose gold answer is replaced by a wrong one, the same in every stratum of
    task.strata. Held-out prompts keep their answers."""
    mixture: str | None = None
    """Several tasks in place of one: a JSON list (in YAML, a list) of objects. Each holds fields of this stage, a name
    among them, and a weight, which is its share of the prompts."""
    check_gold: bool = True
    """Whether to leave out rows whose gold answer the task's own verifier rejects."""
    allow_change: bool = False
    """Whether a run may resume on changed data; per-prompt state then follows each prompt by its content.
    --allow-data-change is the same. config.yaml does not keep this field."""
    cache: str | None = None
    """Folder of tokenised prompts, and of patches and embeddings of images; None = ~/.cache/pspo_jax/data."""


@dataclass(frozen=True)
class PromptConfig:
    """Text around a question (text tasks)."""

    template: Literal["chat", "qwen_math", "r1", "none"] = "chat"
    """Text around a question: the tokenizer's chat template (chat), the published text of Qwen2.5-Math (qwen_math) or
    DeepSeek-R1-Zero (r1), or only the tokenizer's BOS before the question (none)."""
    system: str | None = None
    """System message, or the name of a published one: open_rs, open_r1, qwen_math. None = the system message of the row
    or of the template. Rows with a system message of their own are refused if this field is set."""
    question: str = "{question}"
    """User message, with {question} in place of the question, or the name of a published one: lighteval, boxed, geo3k.
    In a conversation it surrounds the last turn, if that is the user's."""
    prefill: str = ""
    """Beginning of every answer, such as "<think>\\n". It is part of the prompt, and rewards see it."""
    thinking: bool | None = None
    """Value of the template's enable_thinking (Qwen3); None = the template's default."""
    max_tokens: Annotated[int, Range(1)] = 512
    """Largest length of a prompt in tokens. Longer prompts are left out, counted and listed; the tokens of images
    count."""
    date: str | None = None
    """Day that the chat template writes as today's, as YYYY-MM-DD; None = the day of the start, see config.yaml."""
    min_pixels: Annotated[int | None, Range(1)] = None
    """Smallest number of pixels of an image; smaller ones are enlarged. None = the bound of the checkpoint's image
    processor. 28 x 28 pixels become one token of Qwen2.5-VL, and scores are comparable at equal bounds alone."""
    max_pixels: Annotated[int | None, Range(1)] = None
    """Largest number of pixels of an image; larger ones are reduced. None = the bound of the checkpoint's image
    processor."""


@dataclass(frozen=True)
class ModelConfig:
    """The model that trains: its checkpoint or its shape, number types and attention."""

    source: str | None = None
    """Checkpoint to train: a folder in Hugging Face's format, or a hub id such as Qwen/Qwen2.5-Math-1.5B. It decides
    the model's shape. None = random weights, with the shape that this stage's other fields give."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None = its main branch."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; None = model.source."""
    layers: Annotated[int, Range(1)] = 2
    """Number of transformer blocks."""
    width: Annotated[int, Range(1)] = 64
    """Width D of the residual stream."""
    heads: Annotated[int, Range(1)] = 8
    """Number of query heads, H."""
    kv_heads: Annotated[int, Range(1)] = 8
    """Number of key/value heads, K: a divisor of model.heads (grouped-query attention)."""
    head_dim: Annotated[int, Range(2)] = 8
    """Width of one head: an even number, for RoPE."""
    mlp_width: Annotated[int, Range(1)] = 192
    """Hidden width of the SwiGLU block."""
    rope_theta: Annotated[float, Range(above=0.0)] = 100.0
    """Base wavelength of the rotary position embedding."""
    norm_eps: Annotated[float, Range(above=0.0)] = 1e-6
    """Epsilon of RMSNorm."""
    tied: bool = False
    """Whether the output head shares the embedding matrix."""
    qkv_bias: bool = False
    """Whether q, k and v have biases (Qwen2)."""
    qk_norm: bool = False
    """Whether RMSNorm is applied to the heads of q and k (Qwen3)."""
    param_dtype: Dtype = "float32"
    """Type of the stored weights; optimizer state is always float32. A bfloat16 weight loses updates smaller than about
    1/512 of its value, which most are at a learning rate of 1e-6: choose float32 where all weights train."""
    compute_dtype: Dtype | None = "float32"
    """Type of matrix products and of the KV cache; softmax, norms and log-probs are always float32. None (the default
    of a text task) = bfloat16 on an accelerator and float32 on a CPU, since most CPUs emulate bfloat16. The choice is
    printed at the start and recorded in config.yaml, so that a resumed run keeps it."""
    scan_unroll: Annotated[int, Range(1)] = 2
    """Number of layers unrolled in an iteration of the training scan; more compile longer and may run faster."""
    remat: Remat | None = "none"
    """Activations of a block that the backward pass recomputes: none; all but the results of projections (dots); all
    but the block's input (full, about a third more work); or the same with the inputs in host memory (offload). None
    (the default of a text task) = full; on a CPU, the first of these whose activations fit in a quarter of memory."""
    attention: Literal["auto", "xla", "splash", "cudnn", "tokamax_mosaic", "tokamax_triton", "triton"] = "auto"
    """Implementation of attention over whole rows, in updates and prompts. auto = on a TPU or GPU, for rows of 512
    tokens or more, the first kernel that passes a check at the start; else XLA. tokamax_mosaic and tokamax_triton need
    the package tokamax."""
    decode_attention: Literal["auto", "xla", "cudnn"] = "auto"
    """Implementation of attention in decoding. xla reads all columns of the cache; cudnn, on a GPU and in 16 bits,
    only those that hold a token. auto = cudnn where it passes a check at the start; else XLA."""
    vision: Literal["frozen", "trained"] = "frozen"
    """Whether the vision tower of a checkpoint trains with the language model; under adapters it never does."""

    def shape_fields(self) -> list[str]:
        """Names of the fields that a checkpoint decides."""
        first, last = "layers", "qk_norm"
        names = [f.name for f in dataclasses.fields(self)]
        return names[names.index(first) : names.index(last) + 1]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters."""

    rank: Annotated[int, Range(0)] = 0
    """Rank of low-rank adapters, which are then the only weights that train; 0 = all weights train. The base weights
    have the type model.param_dtype, adapters are float32, and checkpoints hold only the adapters."""
    alpha: Annotated[float, Range(above=0.0)] = 64.0
    """Scale of the adapters, before it is divided by rank."""
    dropout: Annotated[float, Range(0.0, 0.99)] = 0.0
    """Dropout rate of the adapters' inputs in updates, not in rollouts; it makes importance ratios noisy."""
    targets: str = ",".join(PROJECTIONS)
    """Projections that have an adapter, separated by commas; q_proj means q."""

    def target_names(self) -> tuple[str, ...]:
        """Names of the projections with an adapter, as in `PROJECTIONS`."""
        return tuple(t.strip().removesuffix("_proj") for t in self.targets.split(",") if t.strip())


@dataclass(frozen=True)
class SftConfig:
    """The cold start: supervised training before RL."""

    steps: Annotated[int, Range(0)] = 3000
    """Number of supervised steps before RL (the cold start); 0 = no cold start."""
    batch: Annotated[int, Range(1)] = 64
    """Number of examples in a supervised step."""
    learning_rate: Annotated[float, Range(above=0.0)] = 6e-3
    """Peak learning rate of AdamW."""
    warmup: Annotated[int, Range(0)] = 50
    """Number of steps of linear warm-up."""
    final_fraction: Annotated[float, Range(0.0, 1.0)] = 0.05
    """Fraction of the peak at which the cosine schedule ends."""
    b2: Annotated[float, Range(0.0, below=1.0)] = 0.98
    """Decay of Adam's second moment."""
    weight_decay: Annotated[float, Range(0.0)] = 0.01
    """Decoupled weight decay of the matrices."""
    clip_norm: Annotated[float, Range(above=0.0)] = 1.0
    """Largest global norm of the gradient; larger gradients are scaled down to it."""
    data: str | None = None
    """JSONL file of prompts, with their images if they have any, and completions; None = the task's demonstrations."""
    share: bool = True
    """Whether to reuse a finished cold start with the same settings from a run in a sibling folder."""


@dataclass(frozen=True)
class RolloutConfig:
    """Completions of a step: how many, how long, and how they are sampled."""

    prompts: Annotated[int, Range(1)] = 32
    """Number of prompts in a step, B."""
    group_size: Annotated[int, Range(2)] = 8
    """Number of completions for each prompt, G."""
    chunks: Annotated[int, Range(1)] = 1
    """Number of parts in which a batch is rolled out, one after the other; each part is verified while the next is
    rolled out. It must divide rollout.prompts. The sampled tokens do not depend on it."""
    weights: Literal["gathered", "split"] = "gathered"
    """Share of the weights that each device holds while it decodes: all of them (gathered), or its part along mesh.fsdp
    of the MLPs, embedding and head (split), at the cost of two transfers for each block and token. Both forms are split
    along mesh.tensor."""
    slots: Annotated[int | None, Range(1)] = None
    """Number of completions of T tokens for whose keys and values there is memory, and that are decoded at a time; when
    one ends, the next takes its slot. None = all. Tokens do not depend on it, nor on rollout.stages."""
    stages: Annotated[int | None, Range(1, 8)] = None
    """Number of stages in which rollout.slots are decoded: J begin with more slots of T / 2^(J-1) tokens, and end with
    fewer of T; None = as many as save more reading of keys and values than they add of weights, or 1."""
    longest_first: bool = False
    """Whether slots begin with the prompts of the longest completions so far; the selector then tracks lengths."""
    max_new_tokens: Annotated[int, Range(1)] = 31
    """Largest length T of a completion in tokens, EOS included."""
    stop: str = ""
    """Additional tokens that end a completion, separated by commas or as a JSON list, such as "</answer>" where that is
    one token. The EOS of the tokenizer and of the checkpoint and the template's end of turn always end it."""
    temperature: Annotated[float, Range(above=0.0)] = 1.0
    """Sampling temperature: the divisor of the logits, in the sampler and in the trainer alike."""
    top_p: Annotated[float, Range(above=0.0, high=1.0)] = 1.0
    """Probability of nucleus sampling, from the smallest set of tokens with at least this probability; 1 = off."""
    top_k: Annotated[int, Range(0)] = 0
    """Number of most probable tokens to sample from; 0 = all."""
    dynamic_sampling_rounds: Annotated[int | None, Range(1, 1000)] = None
    """Dynamic sampling: largest number of rollout rounds in a step. Rounds end when the batch is full of effective
    groups; groups beyond the batch wait for the next step. 1 = no dynamic sampling; None = 10 for dapo, else 1."""
    oversampling: Annotated[float, Range(above=0.0, high=16.0)] = 1.0
    """Dynamic sampling: number of prompts in a round, as a multiple of rollout.prompts."""
    carry: bool = False
    """Whether a completion draws at most rollout.budget tokens in a round, so that a long one goes on in a later round
    or step; the first rollout.prompts whole groups are a step's batch. Tokens of earlier steps have importance weights,
    see loss.off_policy."""
    budget: Annotated[int | None, Range(1)] = None
    """Carry-over: largest number of tokens that a completion draws in a round."""
    prompt_bucket: Annotated[int, Range(1)] = 16
    """Multiple of tokens to which prompts are padded, so that lengths within one bucket share a compiled program."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate during RL."""

    learning_rate: Annotated[float, Range(above=0.0)] = 8e-4
    """Peak learning rate of AdamW."""
    warmup: Annotated[int, Range(0)] = 5
    """Number of updates of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: a cosine over the updates of the run, or a constant."""
    final_fraction: Annotated[float, Range(0.0, 1.0)] = 0.05
    """Fraction of the peak at which the cosine schedule ends."""
    b1: Annotated[float, Range(0.0, below=1.0)] = 0.9
    """Decay of Adam's first moment."""
    b2: Annotated[float, Range(0.0, below=1.0)] = 0.95
    """Decay of Adam's second moment."""
    eps: Annotated[float, Range(above=0.0)] = 1e-8
    """Adam's epsilon."""
    weight_decay: Annotated[float, Range(0.0)] = 0.0
    """Decoupled weight decay of the matrices."""
    clip_norm: Annotated[float, Range(above=0.0)] = 1.0
    """Largest global norm of the gradient; larger gradients are scaled down to it."""
    max_skipped: Annotated[int, Range(1)] = 5
    """Number of consecutive non-finite updates that stop the run; fewer are skipped."""


@dataclass(frozen=True)
class Config:
    """A whole configuration. `None` in a field = it follows the algorithm, the machine or another field."""

    run: RunConfig = field(default_factory=RunConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    forgetting: ForgettingConfig = field(default_factory=ForgettingConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    given: frozenset[str] | None = None
    """Dotted names of the fields that the user set; the others follow the task (`defaults.py`). `replace` keeps the
    record. None, as in a config made by hand = the fields that differ from their defaults."""


def round_prompts(config: Config) -> int:
    """Number of prompts that a resolved config rolls out together: a batch, or a round of dynamic sampling."""
    r = config.rollout
    return r.prompts if r.dynamic_sampling_rounds == 1 else round(r.prompts * r.oversampling)


def extra_completions(config: Config) -> int:
    """Number of places beside the batch that a resolved config has for single stored completions."""
    if config.replay.name != "aper":
        return 0
    return config.replay.extra or max(config.rollout.group_size // 4, 1) * config.rollout.prompts


def logits_mib(config: Config) -> int:
    """Memory for one chunk of float32 logits, in MiB; see LossConfig."""
    return LEAST_LOGITS_MIB if config.loss.logits_mib is None else config.loss.logits_mib


def rollout_capacity(config: Config) -> int:
    """Number of single completions that a resolved config stores at most."""
    r, stored = config.rollout, config.replay
    return stored.capacity or r.prompts * r.group_size * stored.max_age


def update_completions(config: Config) -> int:
    """Number of completions that the updates of a resolved config compute at most: a batch, and those beside it."""
    return config.rollout.prompts * config.rollout.group_size + extra_completions(config)
