"""Completions without a verdict are counted term by term, said once, and stop a run where they are too many."""

from collections import Counter

import numpy as np
import pytest

from pspo_jax.data.task import RewardResult
from pspo_jax.rewards.terms import weighted_sum
from pspo_jax.runs import verdicts
from pspo_jax.runs.run_folder import RunLog
from tests.helpers import tiny_config

NAN = np.nan
NONE = "the function returned None"


def scores(accuracy, slow=None, failed=None, missing=None):
    """Of one group of four, with accuracy and a user's function."""
    right, slow = np.float32([accuracy]), np.float32([slow or [0, 0, 0, 0]])
    bad = {"accuracy": np.isnan(right), "m:slow": np.array([failed or [False] * 4])}
    terms = {"accuracy": right, "m:slow": slow}
    reward = weighted_sum(terms, {"accuracy": 1.0, "m:slow": 1.0}, right, bad)
    return RewardResult(reward, terms, right, [[None] * 4], Counter(), (), bad, {"m:slow": Counter(missing or {})})


def test_nobody_gains_by_hanging():
    """A penalty of -1 that hangs on two of four: these have no reward, where they would have had the largest."""
    found = scores([0, 0, 0, 0], [-1, NAN, -1, NAN], [False, True, False, True])
    np.testing.assert_array_equal(found.reward, [[-1, NAN, -1, NAN]])


def test_no_opinion_is_left_out_of_the_sum():
    np.testing.assert_array_equal(scores([1, 0, 1, 0], [NAN, NAN, 1, 1]).reward, [[1, 0, 2, 1]])


def test_a_term_of_weight_0_spoils_nothing():
    right, bad = np.float32([[1, 0]]), {"m:f": np.array([[True, False]])}
    terms = {"accuracy": right, "m:f": np.float32([[NAN, 1]])}
    np.testing.assert_array_equal(weighted_sum(terms, {"accuracy": 1.0, "m:f": 0.0}, right, bad), [[1, 0]])


def test_metrics_count_each_term():
    found = verdicts.metrics(scores([1, 0, NAN, 0], [NAN, NAN, 1, 3], [True, False, False, False]))
    assert found["rewards/no_verdict"] == 0.5  # of the rewards, whatever the cause
    assert (found["rewards/accuracy/no_verdict"], found["rewards/m:slow/no_verdict"]) == (0.25, 0.25)
    assert (found["rewards/m:slow/mean"], found["rewards/m:slow/std"]) == (2, 1)
    logged = scores([1, 0, 0, 0])._replace(logged={"length": [1.0, 2.0]})
    assert verdicts.metrics(logged)["logged/length"] == 1.5


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (scores([NAN, NAN, 0, 0]), ["50% of the completions have no verdict ("]),
        (
            scores([1, 0, 0, 0], [NAN, NAN, 0, 0], [True, True, False, False], {"deadline of 1 s": 2}),
            ["50% of the completions have no verdict of m:slow (reward.terms) (2 x deadline of 1 s)"],
        ),
        (scores([1, 0, 0, 0], [NAN] * 4, missing={NONE: 4}), ["m:slow (reward.terms) has no value", f"4 x {NONE}"]),
    ],
)
def test_a_term_that_fails_too_often_stops_the_run(found, words):
    with pytest.raises(verdicts.NoVerdictError) as error:
        verdicts.check(found, 3, tiny_config(), {})
    text = str(error.value)
    assert text.startswith("stopped in step 3: ") and "verifier.max_no_verdict" in text and "\n" not in text
    assert all(word in text for word in words), text
    verdicts.check(found, 3, tiny_config(verifier__max_no_verdict=1.0), {})


def test_a_term_that_had_a_value_once_may_have_none_in_a_step():
    counts: dict[str, int] = {}
    verdicts.check(scores([1, 0, 0, 0], [1, NAN, NAN, NAN]), 1, tiny_config(), counts)
    verdicts.check(scores([1, 0, 0, 0], [NAN] * 4), 2, tiny_config(), counts)
    assert counts == {"values/accuracy": 8, "values/m:slow": 1}


def test_each_kind_of_failure_is_said_once(tmp_path, capsys):
    log = RunLog(tmp_path, 0, tensorboard=False)
    missing = {"m:f": Counter({"KeyError: 'a'": 2, "KeyError: 'b'": 3, NONE: 1}), "m:g": Counter({NONE: 1})}
    for step in (1, 2):
        log.no_verdicts(step, missing)
    assert capsys.readouterr().err.splitlines() == [
        "step 1: m:f has no value for 5 completions: KeyError: 'b'",
        f"step 1: m:f has no value for 1 completions: {NONE}",
        f"step 1: m:g has no value for 1 completions: {NONE}",
    ]


def test_errors_of_any_text_are_kept(tmp_path):
    log = RunLog(tmp_path, 0, tensorboard=False)
    log.errors(1, ["ValueError: half \ud83d of a pair \x00"])
    assert "half \\ud83d of a pair" in (tmp_path / "reward_errors.log").read_text(encoding="utf-8")
