"""The embedded task: right by construction, disjoint, stratified; the demonstrator errs as described."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import TaskConfig
from pspo_jax.data.synthetic.arithmetic import (
    EOS,
    STRATA,
    TOKENIZER,
    arithmetic,
    generate,
    grade,
    hard_steps,
    noisy_totals,
    totals,
    write_prompts,
    write_responses,
)
from pspo_jax.data.task import CompletionBatch


@pytest.fixture(scope="module")
def task():
    return arithmetic(TaskConfig(), 16)


def text(tokens, lengths, i):
    return TOKENIZER.decode(tokens[i, : lengths[i]].tolist())


def test_prompts_are_right_and_in_range(task):
    for prompts in (task.train, task.heldout):
        for i, answer in enumerate(prompts.answers):
            prompt = text(prompts.tokens, prompts.lengths, i)
            assert re.fullmatch(r"\d\d([+-][1-9]){3,6}=", prompt)
            running = int(prompt[:2])
            for op in re.findall(r"[+-]\d", prompt):
                running += int(op)
                assert 10 <= running <= 99
            assert running == eval(prompt[:-1]) == int(answer)


def test_sets_are_disjoint_stratified_and_reproducible(task):
    train = {bytes(row) for row in task.train.tokens}
    heldout = {bytes(row) for row in task.heldout.tokens}
    assert len(train) == 512 and len(heldout) == 384 and not train & heldout
    for prompts in (task.train, task.heldout):
        hard = []
        for i in range(len(prompts.answers)):
            prompt = text(prompts.tokens, prompts.lengths, i)
            running, n = int(prompt[:2]), 0
            for op in re.findall(r"[+-]\d", prompt):
                n += not 0 <= running % 10 + int(op) <= 9
                running += int(op)
            hard.append(min(n, 3))
        shares = np.bincount(hard, minlength=4) / len(hard)
        np.testing.assert_allclose(shares, STRATA, atol=0.01)
    again = arithmetic(TaskConfig(), 16)
    assert again.train.fingerprint() == task.train.fingerprint() != task.heldout.fingerprint()
    assert arithmetic(TaskConfig(seed=1), 16).train.fingerprint() != task.train.fingerprint()


def test_demonstrator_is_right_on_easy_steps_and_wrong_on_hard_ones():
    rng = np.random.default_rng(0)
    problems = generate(rng, 20_000)
    made = noisy_totals(problems, rng)
    assert made.min() >= 10 and made.max() <= 99
    last = np.arange(20_000), problems.length - 1
    right = made[last] == totals(problems)[last]
    hard = hard_steps(problems)
    assert right[hard == 0].mean() > 0.98
    assert 0.2 < right[hard == 1].mean() < 0.4
    assert right[hard >= 3].mean() < 0.1


def test_demonstrations_are_chains_without_heldout_prompts(task):
    heldout = {bytes(row) for row in task.heldout.tokens}
    n = 0
    for block in task.demonstrations(0, 5000):
        n += len(block.prompts)
        assert not heldout & {bytes(row) for row in block.prompts}
        for i in range(0, len(block.prompts), 500):
            prompt = text(block.prompts, block.prompt_lengths, i)
            response = text(block.completions, block.completion_lengths, i)
            assert re.fullmatch(r"([+-][1-9]=\d\d){3,6}\$", response)
            assert re.findall(r"[+-]\d", prompt) == re.findall(r"([+-]\d)=", response)
    assert n == 5000


def verdict(prompts, tokens, lengths):
    """Of one completion a prompt."""
    ended = np.ones((len(tokens), 1), bool)
    scores = grade(CompletionBatch(prompts, np.arange(len(tokens)), tokens[:, None], lengths[:, None], ended, 0))()
    assert scores.reward is scores.verdicts and not scores.reasons
    return scores.reward


@given(st.integers(0, 10**6))
def test_right_chains_are_rewarded_and_others_not(seed):
    rng = np.random.default_rng(seed)
    problems = generate(rng, 4)
    tokens, lengths = write_prompts(problems, 16)
    right, n = write_responses(problems, totals(problems))
    answers = tuple(str(t) for t in totals(problems)[np.arange(4), problems.length - 1])
    prompts = type(arithmetic(TaskConfig(train_prompts=4, heldout_prompts=4), 16).train)(tokens, lengths, answers)
    assert verdict(prompts, right, n).tolist() == [[1.0]] * 4
    # Without its EOS, a right chain is not an answer.
    assert verdict(prompts, right, n - 1).sum() == 0
    wrong, _ = write_responses(problems, totals(problems) % 90 + 10)
    assert verdict(prompts, wrong, n).sum() == 0


@pytest.mark.parametrize("response", ["$", "31$", "+4=$", "+4=331$", "=31=$", "+4=31", ""])
def test_malformed_answers_earn_nothing(task, response):
    prompts = task.train._replace(answers=("31", *task.train.answers[1:]))
    ids = np.zeros((1, 31), np.int32)
    tokens = TOKENIZER.encode(response)
    ids[0, : len(tokens)] = tokens
    assert verdict(prompts, ids, np.array([len(tokens)])).item() == 0


def test_tokenizer():
    assert TOKENIZER.decode(TOKENIZER.encode("27-4+8=$_")) == "27-4+8=$_"
    assert TOKENIZER.encode("$") == [EOS]
    with pytest.raises(ConfigError, match="'x'"):
        TOKENIZER.encode("2x")
