"""Every algorithm: twenty steps of the embedded default without a new program."""

import jax
import pytest

from pspo_jax.config.command_line import parse
from pspo_jax.config.presets import PRESETS
from pspo_jax.runs.accounting import RunAccounting
from pspo_jax.runs.run_folder import RunLog
from pspo_jax.training.compile import Programs, lower_programs
from pspo_jax.training.host_step import StepContext, one_step
from pspo_jax.training.setup import place_state, prepare
from tests.helpers import TINY

NAMES = tuple(PRESETS)
USUAL = {"pspo"}
"""The others are slow tests; training/test_replay_step.py counts what is traced with replay."""
SURVEYED = {
    "selection/priority_entropy",
    "selection/effective_prompts",
    "selection/never_seen",
    "selection/visits_mean",
    "selection/eligible",
    "priority",
    "visits",
}
DRAWN = {"selection/new", "selection/reuse", "selection/age", "selection/not_eligible", "selection/distinct"}


@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_twenty_steps_compile_nothing_after_the_second(name, tmp_path):
    small = [f"--{key}={value}" for key, value in TINY.items()]
    words = ["--algorithm.name", name, *small, "--mesh.data=1", "--log.completions_every=0"]
    config = parse(words, "train", "")
    setup, compiled = prepare(config), []
    with jax.set_mesh(setup.mesh):
        lowered = lower_programs(setup)
        # Evaluation is the same for all of them.
        parts = {name: low.compile() for name, low in lowered.items() if name != "eval_sample"}
        programs = Programs(**parts, eval_sample=lowered["eval_sample"])
        state = place_state(setup, setup.model.init(jax.random.key(0)))
        log, totals = RunLog(tmp_path, 0, False), RunAccounting()
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
        )
        try:
            for step in range(1, 21):
                # Nothing crosses between host and device but what is sent on purpose: ids out, rewards in.
                with jax.transfer_guard("disallow" if step > 2 else "allow"):
                    state, values = one_step(StepContext(setup, programs, totals, log), state, step)
                if step == 2:
                    compiled.clear()
        finally:
            jax.monitoring.clear_event_listeners()
        seen = programs.summary(state.selector, state.step)
    assert not compiled
    assert int(state.step) == 20
    assert set(values) >= DRAWN
    assert set(seen) >= SURVEYED - ({"priority"} if setup.config.selection.name == "uniform" else set())
