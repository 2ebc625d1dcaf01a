"""The whole configuration: one frozen dataclass per stage, nested in `Config`.

Every field's docstring gives its meaning and unit and is what `--help` shows. Ranges stand in the type. A field whose
default is `None` follows `algorithm.name` (see `algorithms.py`), the machine or another field, as its docstring says.
A task of text and adapters replace some of the defaults here by those in `defaults.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pspo_jax.config.fields import Range
from pspo_jax.config.strategies import (
    AdvantageConfig,
    AlgorithmConfig,
    ForgettingConfig,
    LossConfig,
    ReplayConfig,
    SelectionConfig,
)

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full", "offload"]
TaskName = Literal[
    "arithmetic", "countdown", "math", "gsm8k", "multiple_choice", "reasoning_gym", "python_function", "own"
]
AnswerTransform = Literal["none", "gsm8k", "stringified_list", "boxed"]
ChoicesAnswer = Literal["label", "letter", "text", "index", "index_from_1"]
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The matrices of a transformer block."""


@dataclass(frozen=True)
class RunConfig:
    dir: str = "runs/default"
    """Run folder: config.yaml, metrics.jsonl, summary.json, checkpoints/, completions/, report.html. A folder that
    holds a checkpoint is resumed."""
    steps: Annotated[int, Range(1)] = 150
    """Training steps; each rolls out rollout.prompts x rollout.group_size completions."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of the policy's initial weights, the cold start, the prompt draws and the sampling."""
    fingerprint: bool = False
    """Add CRCs of prompt ids, tokens, parameters and strategy state to every line of metrics.jsonl."""
    print_config: bool = False
    """Print the resolved configuration as YAML and exit."""
    start_over: bool = False
    """Whether to begin at step 0 in a folder that holds a run already, whose files are then moved to set_aside/ inside
    the folder. It is not kept in config.yaml."""
    compilation_cache: str | None = None
    """Folder of XLA's persistent compilation cache; None = ~/.cache/pspo_jax/xla; "off" = no cache."""


@dataclass(frozen=True)
class TaskConfig:
    name: TaskName = "arithmetic"
    """Where prompts come from and what a right answer is. arithmetic and countdown make their own; math, gsm8k,
    multiple_choice and python_function read task.train_data; reasoning_gym takes a dataset of that package. own is
    the task that a program gives to pspo_jax.train, which sets it."""
    train_prompts: Annotated[int, Range(0)] = 512
    """Prompts to train on; 0 = all of the data, or 10,000 of a task that makes its own."""
    heldout_prompts: Annotated[int, Range(1)] = 384
    """Prompts to evaluate on; none of them is a training prompt."""
    seed: Annotated[int, Range(0)] = 0
    """Seed of prompts that are made or mixed. It is not run.seed, so that runs with different seeds share them."""
    train_data: str | None = None
    """File (.jsonl, .json, .parquet, .arrow, .csv), folder saved by datasets, or hub id to train on."""
    heldout_data: str | None = None
    """The same to evaluate on; None = the last rows of train_data, which are then not trained on."""
    subset: str | None = None
    """Configuration of a hub dataset, such as main."""
    train_split: str = "train"
    """Split of a hub dataset to train on."""
    heldout_split: str = "test"
    """Split of a hub dataset to evaluate on."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    prompt_column: str | None = None
    """Column of the question or conversation; None = the first there is of problem, question, prompt, messages,
    conversations. Dots enter an object: extra_info.question."""
    answer_column: str | None = None
    """Column of the gold answer, such as answer or reward_model.ground_truth; None = the first there is of answer,
    solution, target."""
    answer_transform: AnswerTransform | None = None
    """How the gold answer stands in its column: as it is (none), after `####` (gsm8k), the members of a list or of its
    text, any of which is right (stringified_list), or in the last \\boxed{} (boxed). None = the members of a list, and
    the task's own form for all else."""
    choices_column: str = "choices"
    """multiple_choice: column of the list of options."""
    choices_answer: ChoicesAnswer | None = None
    """multiple_choice: how the gold answer names an option: by the label that the data gives it (label), by its letter
    A, B, ... (letter), by its text (text), or by its place, counted from 0 (index) or 1 (index_from_1). None = the one
    way that fits the column."""
    function: str | None = None
    """python_function: module:function that scores a completion; see docs/tasks.md."""
    dataset: str | None = None
    """reasoning_gym: names of its datasets, separated by commas."""
    options: str = "{}"
    """reasoning_gym: JSON object of the datasets' settings."""
    numbers: str = "3,4"
    """countdown: how many numbers a problem may have, separated by commas."""
    max_target: Annotated[int, Range(2)] = 99
    """countdown: largest target."""
    mixture: str | None = None
    """Tasks in place of this one, as a JSON list (in YAML, a list) of objects of these fields, each with a name and a
    weight, its share of the prompts."""
    check_gold: bool = True
    """Leave out rows whose gold answer its own verifier does not accept."""
    allow_change: bool = False
    """Resume on changed data; per-prompt state follows prompts by their content. --allow-data-change is the same. It is
    not kept in config.yaml."""
    cache: str | None = None
    """Folder of tokenised prompts; None = ~/.cache/pspo_jax/data."""


@dataclass(frozen=True)
class PromptConfig:
    template: Literal["chat", "qwen_math", "r1", "none"] = "chat"
    """How a question becomes a prompt: the tokenizer's chat template, Qwen2.5-Math's or DeepSeek-R1-Zero's text, or the
    bare question after the tokenizer's BOS."""
    system: str | None = None
    """System message, or the name of a published one: open_rs, open_r1, qwen_math; None = the row's or the template's
    own. Rows that have one of their own are refused beside it."""
    question: str = "{question}"
    """User message, with {question} where the question goes; or the name of a published one: lighteval, boxed. Of a
    conversation it stands around the last turn, if that is the user's."""
    prefill: str = ""
    """Beginning of the answer, given to the policy, such as "<think>\\n": part of the prompt, and rewards see it."""
    thinking: bool | None = None
    """Passed to the template as enable_thinking (Qwen3); None = not passed."""
    max_tokens: Annotated[int, Range(1)] = 512
    """Longer prompts are left out, counted and listed."""
    date: str | None = None
    """Day that the chat template writes where it asks for today's, as YYYY-MM-DD; None = the day on which the run
    starts, which is kept in its config.yaml."""


@dataclass(frozen=True)
class ModelConfig:
    source: str | None = None
    """Checkpoint to train: a folder in Hugging Face's format or a hub id such as Qwen/Qwen2.5-Math-1.5B. The shape then
    follows from it. None = random weights of the shape below."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None = its main branch."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; None = model.source."""
    layers: Annotated[int, Range(1)] = 2
    """Transformer blocks."""
    width: Annotated[int, Range(1)] = 64
    """Residual stream width D."""
    heads: Annotated[int, Range(1)] = 8
    """Query heads H."""
    kv_heads: Annotated[int, Range(1)] = 8
    """Key/value heads K; a divisor of heads (grouped-query attention)."""
    head_dim: Annotated[int, Range(2)] = 8
    """Width of one head; even, for RoPE."""
    mlp_width: Annotated[int, Range(1)] = 192
    """Hidden width of the SwiGLU block."""
    rope_theta: Annotated[float, Range(above=0.0)] = 100.0
    """Base wavelength of the rotary position embedding."""
    norm_eps: Annotated[float, Range(above=0.0)] = 1e-6
    """Epsilon of RMSNorm."""
    tied: bool = False
    """Share the embedding matrix with the output head."""
    qkv_bias: bool = False
    """Biases on q, k and v (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on the heads of q and k (Qwen3)."""
    param_dtype: Dtype = "float32"
    """Type in which weights are held. Optimizer state is float32 always. An update below about 1/512 of a bfloat16
    weight is lost, as most updates are at a learning rate of 1e-6: choose float32 where all weights train."""
    compute_dtype: Dtype | None = "float32"
    """Type of matrix products and of the KV cache; softmax, norms and log-probs are float32 always. None (the
    default of a task of text) = what suits the machine: bfloat16, but float32 on a CPU, as most CPUs emulate bfloat16.
    The choice is printed at the start and written to config.yaml, and a run that is resumed keeps it."""
    scan_unroll: Annotated[int, Range(1)] = 2
    """Layers unrolled per iteration of the training scan; more compiles longer and can run faster."""
    remat: Remat | None = "none"
    """What the backward pass computes anew instead of keeping it, by block: none; all but the results of projections
    (dots); all but the block's input (full; about a third more work); the same with the inputs in the host's memory
    (offload). None (the default of a task of text) = full; on a CPU the least for which activations fit in a quarter
    of its memory."""

    attention: Literal["auto", "xla", "splash", "cudnn", "triton"] = "auto"
    """What computes attention over whole rows, in updates and prompts. auto = on a TPU or GPU and for rows of 512
    places or more, the first kernel that proves right at the start; else XLA."""

    def shape_fields(self) -> list[str]:
        """Fields that a checkpoint decides."""
        first, last = "layers", "qk_norm"
        names = [f.name for f in dataclasses.fields(self)]
        return names[names.index(first) : names.index(last) + 1]


@dataclass(frozen=True)
class LoraConfig:
    rank: Annotated[int, Range(0)] = 0
    """Rank of low-rank adapters, the only weights trained then; 0 = all weights train. The base stays in
    model.param_dtype, adapters are float32; checkpoints hold the adapters alone."""
    alpha: Annotated[float, Range(above=0.0)] = 64.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[float, Range(0.0, 0.99)] = 0.0
    """Dropout of the adapters' inputs in the gradient, not in rollouts: importance ratios are noisy with it."""
    targets: str = ",".join(PROJECTIONS)
    """Projections with an adapter, separated by commas; q_proj means q."""

    def target_names(self) -> tuple[str, ...]:
        return tuple(t.strip().removesuffix("_proj") for t in self.targets.split(",") if t.strip())


@dataclass(frozen=True)
class SftConfig:
    steps: Annotated[int, Range(0)] = 3000
    """Supervised steps before RL (the cold start); 0 = start from random weights."""
    batch: Annotated[int, Range(1)] = 64
    """Examples a step."""
    learning_rate: Annotated[float, Range(above=0.0)] = 6e-3
    """Peak learning rate of AdamW."""
    warmup: Annotated[int, Range(0)] = 50
    """Steps of linear warm-up."""
    final_fraction: Annotated[float, Range(0.0, 1.0)] = 0.05
    """The cosine schedule ends at this fraction of the peak."""
    b2: Annotated[float, Range(0.0, below=1.0)] = 0.98
    """Adam's second-moment decay."""
    weight_decay: Annotated[float, Range(0.0)] = 0.01
    """Decoupled weight decay of the matrices."""
    clip_norm: Annotated[float, Range(above=0.0)] = 1.0
    """Gradient clipping by global norm."""
    data: str | None = None
    """JSONL file with string fields "prompt" and "completion"; None = the task's own demonstrations."""
    share: bool = True
    """Reuse a finished cold start of equal settings that a run in a sibling folder has left behind."""


@dataclass(frozen=True)
class RolloutConfig:
    prompts: Annotated[int, Range(1)] = 32
    """Prompts a step, B."""
    group_size: Annotated[int, Range(2)] = 8
    """Completions a prompt, G."""
    chunks: Annotated[int, Range(1)] = 1
    """Parts of a batch that are rolled out one after the other; a part is verified while the next one is rolled out. A
    divisor of prompts. The tokens do not depend on it."""
    weights: Literal["gathered", "split"] = "gathered"
    """What a device holds of the weights while it decodes: all (gathered), or its part along mesh.fsdp of the MLPs, the
    embedding and the head (split), which costs two transfers a block and token. Both are split along mesh.tensor."""
    slots: Annotated[int | None, Range(1)] = None
    """Completions that are decoded at a time; when one has ended the next takes its slot. None = all at once. With
    lengths that differ much, a quarter of the completions or fewer wastes less. The tokens do not depend on it."""
    longest_first: bool = False
    """With slots: start with the prompts whose completions have been longest, of which the selector then keeps the mean
    length."""
    max_new_tokens: Annotated[int, Range(1)] = 31
    """Longest completion, T, in tokens with its EOS."""
    stop: str = ""
    """Tokens that end a completion too, separated by commas or as a JSON list, such as "</answer>" where that is one
    token; beside the tokenizer's EOS, the checkpoint's and the token that ends a turn in the template."""
    temperature: Annotated[float, Range(above=0.0)] = 1.0
    """Divides the logits, in the sampler and in the trainer alike."""
    top_p: Annotated[float, Range(above=0.0, high=1.0)] = 1.0
    """Nucleus sampling: the smallest set of tokens with at least this probability; 1 = off."""
    top_k: Annotated[int, Range(0)] = 0
    """Sample among the k most probable tokens; 0 = off."""
    dynamic_sampling_rounds: Annotated[int | None, Range(1, 1000)] = None
    """Dynamic sampling: roll out up to so many rounds a step, until the batch is full of effective groups; what is left
    over is kept for the next step. 1 = a batch is what one round gives; None = 10 for dapo, else 1."""
    oversampling: Annotated[float, Range(above=0.0, high=16.0)] = 1.0
    """Dynamic sampling: prompts of a round, as a multiple of rollout.prompts."""
    prompt_bucket: Annotated[int, Range(1)] = 16
    """Prompts are padded to a multiple of this many tokens, so that lengths inside a bucket share one program."""


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: Annotated[float, Range(above=0.0)] = 8e-4
    """Peak learning rate of AdamW."""
    warmup: Annotated[int, Range(0)] = 5
    """Updates of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine over the run's updates, or constant."""
    final_fraction: Annotated[float, Range(0.0, 1.0)] = 0.05
    """The cosine schedule ends at this fraction of the peak."""
    b1: Annotated[float, Range(0.0, below=1.0)] = 0.9
    """Adam's first-moment decay."""
    b2: Annotated[float, Range(0.0, below=1.0)] = 0.95
    """Adam's second-moment decay."""
    eps: Annotated[float, Range(above=0.0)] = 1e-8
    """Adam's epsilon."""
    weight_decay: Annotated[float, Range(0.0)] = 0.0
    """Decoupled weight decay of the matrices."""
    clip_norm: Annotated[float, Range(above=0.0)] = 1.0
    """Gradient clipping by global norm."""
    max_skipped: Annotated[int, Range(1)] = 5
    """Non-finite updates are skipped; this many in a row stop the run."""


@dataclass(frozen=True)
class MeshConfig:
    data: Annotated[int, Range(-1)] = -1
    """Devices along the batch with replicated weights; -1 = all that fsdp and tensor leave."""
    fsdp: Annotated[int | None, Range(1)] = None
    """Devices along the batch that also shard weights and optimiser state. None = as few as leave half of a device's
    memory free; 1 where that is not known, as on CPUs."""
    tensor: Annotated[int, Range(1)] = 1
    """Devices that share one row: heads, MLP width and vocabulary are split."""
    context: Annotated[int, Range(1)] = 1
    """Devices that share one row of an update by its places, for long sequences; all but attention's keys and values is
    split. In rollouts these devices split the batch, and weights are split along fsdp x context."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes, one a host or one a GPU. On a TPU pod, under SLURM, Open MPI or GKE nothing need be set."""

    auto: bool = True
    """Join the processes of a cluster that JAX knows by its environment."""
    coordinator: str | None = None
    """host:port of process 0; None = found out from the cluster, or there is one process."""
    processes: Annotated[int, Range(1)] = 1
    """Processes of the run; for coordinator."""
    process: Annotated[int, Range(0)] = 0
    """Number of this process, from 0; for coordinator."""
    join_timeout: Annotated[int, Range(1)] = 300
    """Seconds to wait for the other processes at the start."""
    heartbeat_timeout: Annotated[int, Range(5)] = 30
    """Seconds without a sign of life after which a process counts as dead, and the others end."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Flags of the compilers, set before JAX starts; docs/distributed.md has the table."""

    flags: bool = True
    """Set the table's flags for GPUs and TPUs, but those that the environment names."""
    xla_flags: str = ""
    """More of them for XLA_FLAGS, as --name=value, separated by spaces."""
    libtpu_flags: str = ""
    """The same for LIBTPU_INIT_ARGS."""


@dataclass(frozen=True)
class EvalConfig:
    every: Annotated[int, Range(0)] = 20
    """Steps between evaluations on the held-out prompts; 0 = before the first and after the last step only."""
    samples: Annotated[int, Range(1)] = 4
    """Completions a held-out prompt for the sampled accuracy, at rollout.temperature."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: Annotated[int, Range(1)] = 20
    """Steps between checkpoints; the last step and a requested stop are always saved."""
    keep: Annotated[int, Range(1)] = 3
    """Latest checkpoints kept."""
    keep_best: Annotated[int, Range(0)] = 1
    """Checkpoints with the best greedy held-out accuracy kept beside them; one whose accuracy is not finite
    is not ranked."""
    on_error: Literal["stop", "retry"] = "stop"
    """What happens when the run folder cannot be written, as on a full disk: the run ends with one line (stop), or it
    waits and tries again with what it has in memory (retry)."""
    retry_minutes: Annotated[float, Range(above=0.0)] = 60.0
    """on_error=retry: minutes after which the run ends all the same."""


@dataclass(frozen=True)
class LogConfig:
    progress: bool = True
    """Show progress bars on a terminal, plain lines elsewhere."""
    tensorboard: bool = True
    """Write TensorBoard events to the run folder."""
    completions_every: Annotated[int, Range(0)] = 10
    """Steps between dumps of sample completions; 0 = none."""
    completions: Annotated[int, Range(1)] = 4
    """Groups in one dump; the first is also printed."""
    selection_every: Annotated[int, Range(0)] = 10
    """Steps between surveys of all prompts: priorities, visits, pools; 0 = after the last step only."""
    completions_format: Literal["jsonl", "parquet"] = "jsonl"
    """File format of the dumps in the run folder's completions/."""
    report: bool = True
    """Write report.html at the end."""


@dataclass(frozen=True)
class RewardConfig:
    terms: str = "accuracy"
    """Rewards and their weights, such as "format=1, cosine=2": accuracy, format, tag_count, cosine, length, overlong,
    repetition, reasoning_steps, or module:function. The reward is their weighted sum."""
    format: Literal["open_r1", "open_rs"] = "open_r1"
    """format: think and answer tags on lines of their own, or exactly one line </think>."""
    cosine_length: Annotated[int, Range(0)] = 0
    """cosine: completion length, in tokens, at which the range's end is reached; 0 = rollout.max_new_tokens."""
    cosine_right: str = "0.5,1.0"
    """cosine: reward of a right completion at that length, and of an empty one."""
    cosine_wrong: str = "-0.5,0.0"
    """cosine: the same for a wrong one."""
    overlong_cache: Annotated[int, Range(0)] = 0
    """overlong: tokens before rollout.max_new_tokens in which the punishment grows to 1; 0 = a fifth of them."""
    repetition_ngram: Annotated[int, Range(1)] = 3
    """repetition: words of an n-gram."""
    repetition_penalty: Annotated[float, Range(high=0.0)] = -1.0
    """repetition: reward of a completion that only repeats itself."""
    require_end: bool = True
    """A completion that was cut off has accuracy 0; a python_function sees and judges it."""
    variant: Literal["paper", "published_code"] = "paper"
    """published_code: the cosine's length is in characters, ends at 1,000 and is uncapped, as PSPO's published code has
    it."""


@dataclass(frozen=True)
class VerifierConfig:
    workers: Annotated[int, Range(0)] = 0
    """Processes that verify completions of text tasks; 0 = one per core, 2 to 8."""
    deadline: Annotated[float, Range(above=0.0)] = 5.0
    """Seconds of processor time for one completion (for one group, if a function takes a list); then its worker is
    killed and it has no verdict."""
    wall_limit: Annotated[float, Range(0.0)] = 0.0
    """Seconds that a completion may take in all, also while its verifier sleeps or asks a service; time in which other
    processes have the processors does not count. 0 = six times `deadline`."""
    memory_mib: Annotated[int, Range(256)] = 4096
    """Address space of a worker, MiB."""
    network: bool = False
    """Let verifiers open connections."""
    max_no_verdict: Annotated[float, Range(0.0, 1.0)] = 0.25
    """A step with a larger share of completions without a verdict stops the run, with the reason."""


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    forgetting: ForgettingConfig = field(default_factory=ForgettingConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    given: frozenset[str] | None = None
    """Dotted names of the fields that somebody has set; the others follow the task (`defaults.py`). `replace` keeps the
    record. None, as in a config made by hand = the fields that differ from their defaults."""


def round_prompts(config: Config) -> int:
    """Prompts that a resolved config rolls out at a time: a batch, or a round of dynamic sampling."""
    r = config.rollout
    return r.prompts if r.dynamic_sampling_rounds == 1 else round(r.prompts * r.oversampling)
