"""One run as several real processes: the same results, one failure for all, a stop at one step, another topology."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import REPO
from tests.distributed.processes import finish_all, free_port, launch, output
from tests.helpers import relative
from tests.runs.processes import finish, lines_of, metrics, params, start, wait_for_step

STEPS = 12
MESHES = {
    "data": {"mesh__data": 8},
    "mixed": {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2},
    "small": {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2},
    "slices": {"mesh__slices": 2, "mesh__data": 4, "mesh__fsdp": 2},
    "wide slices": {"mesh__slices": 2, "mesh__data": 2, "mesh__fsdp": 4},
    "slices by tensor": {"mesh__slices": 2, "mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2},
    "slices by context": {"mesh__slices": 2, "mesh__data": 2, "mesh__context": 2, "mesh__tensor": 2},
    "stages": {"mesh__data": 4, "mesh__fsdp": 1, "rollout__slots": 32, "rollout__stages": 3},
}
DEVICES = dict.fromkeys(MESHES, 8) | {"small": 4, "stages": 4}
EQUAL = (
    "crc/prompt_ids",
    "crc/tokens",
    "reward",
    "rewards/accuracy/mean",
    "rollouts/total",
    "num_tokens",
    "replay/share",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of run folders: siblings share their cold start."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(child_env, runs):
    """Runs on one process with one device, by algorithm."""
    done = {}

    def get(algorithm):
        if algorithm not in done:
            done[algorithm] = runs / f"alone-{algorithm}"
            finish(start(child_env, done[algorithm], run__steps=STEPS, algorithm__name=algorithm))
        return done[algorithm]

    return get


@pytest.fixture(scope="module")
def together(child_env, runs):
    """Finished runs of several processes, by algorithm, number of processes and mesh."""
    done = {}

    def get(algorithm="popo", processes=2, mesh="small"):
        key = algorithm, processes, mesh
        if key not in done:
            done[key] = runs / f"{algorithm}-{processes}-{mesh}"
            fields = {"run__steps": STEPS, "algorithm__name": algorithm, **MESHES[mesh]}
            finish_all(done[key], launch(child_env, done[key], processes, DEVICES[mesh] // processes, **fields))
        return done[key]

    return get


FIELDS = {"run__steps": STEPS, "algorithm__name": "popo", **MESHES["small"]}
"""Those of `together()`, which faults are to leave as it is."""


@pytest.mark.parametrize(
    ("algorithm", "processes", "mesh"),
    [
        ("popo", 2, "small"),
        pytest.param("popo", 2, "stages", marks=pytest.mark.slow),
        pytest.param("popo", 2, "mixed", marks=pytest.mark.slow),
        pytest.param("popo", 2, "slices", marks=pytest.mark.slow),
        pytest.param("pspo", 2, "wide slices", marks=pytest.mark.slow),
        pytest.param("dapo", 4, "slices", marks=pytest.mark.slow),
        pytest.param("popo", 2, "slices by tensor", marks=pytest.mark.slow),
        pytest.param("popo", 2, "slices by context", marks=pytest.mark.slow),
        pytest.param("pspo", 2, "data", marks=pytest.mark.slow),
        pytest.param("pspo", 2, "mixed", marks=pytest.mark.slow),
        pytest.param("popo", 2, "data", marks=pytest.mark.slow),
        pytest.param("pspo", 4, "data", marks=pytest.mark.slow),
        pytest.param("popo", 4, "mixed", marks=pytest.mark.slow),
        pytest.param("dapo", 2, "mixed", marks=pytest.mark.slow),
    ],
)
def test_processes_do_what_one_does(alone, together, algorithm, processes, mesh):
    one, folder = alone(algorithm), together(algorithm, processes, mesh)
    for a, b in zip(metrics(one), metrics(folder), strict=True):
        for key in EQUAL:
            assert a.get(key) == b.get(key), (a["step"], key)
    assert relative(params(folder)["params"], params(one)["params"]) < 1e-5
    # One process writes.
    assert "held-out greedy" in output(folder, 0) and "held-out" not in output(folder, 1)
    assert len(list((folder / "completions").iterdir())) == len(list((one / "completions").iterdir()))


BREAKS = """
import sys
if "--distributed.process" in sys.argv and sys.argv[sys.argv.index("--distributed.process") + 1] == "1":
    from pspo_jax.runs import verdicts
    plain = verdicts.check
    def check(scores, done, *rest):
        if done == 3:
            raise OSError("the disk of host 1 is gone")
        plain(scores, done, *rest)
    verdicts.check = check
"""


@pytest.mark.slow
def test_one_that_raises_one_that_is_killed_and_a_stop_lose_nothing(child_env, runs, together, tmp_path):
    """Three faults in a row, each followed by the same command; the run equals one that met none, to the bit."""
    folder = runs / "faults"

    def begin(env=child_env):
        return launch(env, folder, 2, DEVICES["small"] // 2, **FIELDS | {"checkpoint__every": 2})

    # Process 1 cannot read what the others can: all end within a minute, each with its traceback.
    (tmp_path / "sitecustomize.py").write_text(BREAKS)
    processes = begin(child_env | {"PYTHONPATH": f"{tmp_path}:{REPO}"})
    assert wait_for_step(processes[0], folder, at_least=2)
    assert all(process.wait(timeout=60) != 0 for process in processes)
    for number in (0, 1):
        assert "the disk of host 1 is gone" in output(folder, number), output(folder, number)

    logged = lines_of(folder)
    processes = begin()
    assert wait_for_step(processes[0], folder, at_least=max(logged, 5))
    processes[1].send_signal(signal.SIGKILL)
    assert processes[0].wait(timeout=60) != 0
    assert output(folder, 0).strip()
    processes[1].wait()

    logged = lines_of(folder)
    processes = begin()
    assert wait_for_step(processes[0], folder, at_least=max(logged, 8))
    processes[1].terminate()
    time.sleep(0.2)
    processes[0].terminate()
    finish_all(folder, processes)
    assert "resuming at step" in output(folder, 0)
    if "stopped after step" in output(folder, 0):
        finish_all(folder, begin())
    assert metrics(folder) == metrics(together())


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_a_stop_at_any_moment_is_at_one_step_and_resumes_to_the_bit(child_env, runs, together, trial):
    """SIGTERM to all at a random moment; the resumed run equals one that was not stopped, on the same topology."""
    fields = FIELDS | {"checkpoint__every": 1000}
    folder = runs / f"stopped-{trial}"
    processes = launch(child_env, folder, 2, DEVICES["small"] // 2, **fields)
    rng = np.random.default_rng(trial)
    assert wait_for_step(processes[0], folder, at_least=int(rng.integers(1, STEPS - 4)))
    time.sleep(rng.random() * 0.2)
    order = rng.permutation(2)
    processes[order[0]].terminate()
    time.sleep(rng.random() * 0.3)
    processes[order[1]].terminate()
    finish_all(folder, processes)
    if "stopped after step" in output(folder, 0):
        finish_all(folder, launch(child_env, folder, 2, DEVICES["small"] // 2, **fields))
    assert metrics(folder) == metrics(together())


WAITS = """
import sys, time, jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from pspo_jax.distributed import processes
processes.wait_for_all("here")
if sys.argv[2] == "1":
    time.sleep(4)
else:
    try:
        processes.wait_for_all("there", 1)
    except TimeoutError as error:
        print(error)
"""


def test_a_barrier_ends_when_a_process_does_not_come(child_env):
    address = f"127.0.0.1:{free_port()}"
    env = child_env | {"PYTHONPATH": str(REPO)}
    late, waits = (
        subprocess.Popen([sys.executable, "-c", WAITS, address, number], env=env, stdout=subprocess.PIPE, text=True)
        for number in ("1", "0")
    )
    assert "process 0 waited 1 s for the others at 'there'" in waits.communicate(timeout=60)[0]
    late.communicate(timeout=60)


@pytest.mark.slow
def test_a_run_goes_on_on_other_topologies(child_env, runs):
    """Saved on 2 x 4, resumed on 1 x 8, 1 x 1 and 4 x 2: as the run that stayed on one device."""
    fields = {"algorithm__name": "popo", "checkpoint__every": 4, "optimizer__schedule": "constant"}
    one, folder = runs / "elastic-one", runs / "elastic"
    finish(start(child_env, one, run__steps=16, **fields))
    finish_all(folder, launch(child_env, folder, 2, 4, run__steps=16, **fields, **MESHES["mixed"]))
    _cut(folder, 4)
    for steps, go in (
        (8, lambda **f: finish(start(child_env, folder, devices=8, **f, **MESHES["data"]))),
        (12, lambda **f: finish(start(child_env, folder, **f))),
        (16, lambda **f: finish_all(folder, launch(child_env, folder, 4, 2, **f, **MESHES["mixed"]))),
    ):
        go(run__steps=16, **fields)
        if steps < 16:
            _cut(folder, steps)
    for a, b in zip(metrics(one), metrics(folder), strict=True):
        for name, value in a.items():
            if name not in ("crc/params", "crc/advantage", "crc/selector", "crc/replay"):
                assert b[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (a["step"], name)
    assert relative(params(folder)["params"], params(one)["params"]) < 1e-5


def _cut(folder, step):
    """As if the run had been killed after its checkpoint of this step."""
    import shutil

    for path in (folder / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    (folder / "summary.json").unlink(missing_ok=True)
