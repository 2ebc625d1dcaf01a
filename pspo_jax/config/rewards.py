"""Configuration of rewards: their terms, the judge that a service answers for, and the processes that verify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pspo_jax.config.fields import Range

JUDGE_PROMPT = """\
Grade the answer to a question.

Question:
{prompt}

Reference answer:
{answer}

Answer to be graded:
{completion}

Compare the answer with the reference. Write a short reason, and end with a line "Score: N", where N is a number from \
0 (wrong) to 10 (right).
"""


@dataclass(frozen=True)
class RewardConfig:
    """Reward terms. Only the term that a field's text names first reads that field."""

    terms: str = "accuracy"
    """Reward terms and their weights, such as "format=1, cosine=2"; the reward is the weighted sum. Terms: accuracy,
    geo3k, format, tag_count, cosine, length, overlong, repetition, reasoning_steps, judge, reward_model, or
    module:function."""
    format: Literal["open_r1", "open_rs", "geo3k"] = "open_r1"
    """format: layout that earns the reward: think and answer tags on lines of their own (open_r1), exactly one line
    </think> (open_rs), or a think block and a \\boxed{} behind it (geo3k)."""
    cosine_length: Annotated[int, Range(0)] = 0
    """cosine: length in tokens at the end of the reward's range; 0 = rollout.max_new_tokens."""
    cosine_right: str = "0.5,1.0"
    """cosine: rewards of a correct completion of that length, and of an empty one."""
    cosine_wrong: str = "-0.5,0.0"
    """cosine: rewards of a wrong completion of that length, and of an empty one."""
    overlong_cache: Annotated[int, Range(0)] = 0
    """overlong: number of tokens before rollout.max_new_tokens over which the penalty grows to 1; 0 = a fifth of
    rollout.max_new_tokens."""
    repetition_ngram: Annotated[int, Range(1)] = 3
    """repetition: number of words in an n-gram."""
    repetition_penalty: Annotated[float, Range(high=0.0)] = -1.0
    """repetition: reward of a completion that only repeats itself."""
    require_end: bool = True
    """Whether a completion that the length limit cut off has accuracy 0. A python_function always scores such
    completions itself."""
    model: str | None = None
    """reward_model: sequence-classification checkpoint with one label, whose score of prompt and completion is the
    reward: a folder in Hugging Face's format or a hub id."""
    model_rows: Annotated[int, Range(1)] = 8
    """reward_model: number of completions that it scores at a time, rounded up to a multiple of the devices."""
    model_tokens: Annotated[int, Range(1)] = 4096
    """reward_model: largest length in tokens of a prompt with its completion; longer ones have no verdict."""
    variant: Literal["paper", "published_code"] = "paper"
    """cosine: lengths in tokens, capped (paper), or as in PSPO's published code, in characters with the range's end at
    1,000 and no cap (published_code)."""


@dataclass(frozen=True)
class VerifierConfig:
    """Processes that grade completions, and their limits."""

    workers: Annotated[int, Range(0)] = 0
    """Number of processes that verify the completions of text tasks; 0 = one for each core, from 2 to 8."""
    deadline: Annotated[float, Range(above=0.0)] = 5.0
    """Seconds of processor time for one completion, or for one group if a function takes a list. Its worker is then
    killed, and the completion has no verdict."""
    wall_limit: Annotated[float, Range(0.0)] = 0.0
    """Seconds of wall-clock time for one completion, including time in which its verifier sleeps or waits for a
    service, but not time in which other processes hold the processors. 0 = six times verifier.deadline."""
    memory_mib: Annotated[int, Range(256)] = 4096
    """Address space of a worker, in MiB."""
    network: bool = False
    """Whether verifiers may open network connections."""
    max_no_verdict: Annotated[float, Range(0.0, 1.0)] = 0.25
    """Largest share of a step's completions that may lack a verdict; a larger share stops the run with the reason."""


@dataclass(frozen=True)
class JudgeConfig:
    """The reward term judge: a language model behind an OpenAI-compatible service, which scores each completion."""

    url: str | None = None
    """Base URL of the service, such as http://localhost:8000/v1; requests go to URL/chat/completions."""
    model: str | None = None
    """Name of the judge's model at the service."""
    prompt: str = JUDGE_PROMPT
    """Message that asks for the score, in which {prompt}, {answer} and {completion} stand for the question, the gold
    answer and the completion."""
    pattern: str = r"[Ss]core:\s*(-?\d+(?:\.\d+)?)"
    """Regular expression whose only group is the score; its last match in the reply counts."""
    scale: str = "0,10"
    """Scores that become the rewards 0 and 1. Those between become rewards between, and one outside is no verdict."""
    api_key_variable: str | None = None
    """Name of the environment variable that holds the service's key, such as OPENAI_API_KEY; the key itself is written
    nowhere. None = the service needs no key."""
    temperature: Annotated[float, Range(0.0)] = 0.0
    """Sampling temperature of the judge."""
    max_tokens: Annotated[int, Range(0)] = 512
    """Largest length of a reply in tokens; 0 = as the service decides."""
    concurrency: Annotated[int, Range(1, 4096)] = 16
    """Largest number of requests that are under way at a time, for each process of the run."""
    deadline: Annotated[float, Range(above=0.0, high=86_400.0)] = 60.0
    """Seconds of wall-clock time for the score of one completion, with all tries and waits, from its first request on.
    After it the completion has no verdict."""
    retries: Annotated[int, Range(0, 100)] = 4
    """Number of further tries after a status of 408, 409, 425, 429 or 5xx, or a broken connection. The waits before
    them double from half a second on, or are as long as the service asks for."""
