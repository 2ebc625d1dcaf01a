"""The pool of verifiers with real processes: requests that hang, die or misbehave, and the processes they leave."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.rewards import VerifierConfig
from pspo_jax.verifiers.workers.pool import Pool, Request
from tests.conftest import REPO

pytestmark = [
    pytest.mark.xdist_group("pool"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and memory is limited on Linux alone"),
]

HOSTILE = (
    "$9^{9^{9^{9}}}$",
    "$(x+1)^{100000}$",
    "$123456789^{987654321}$",
    "(" * 60 + "x" + ")" * 60,
    "9" * 1_000_000,
    "\\boxed{10000000!}",
    "\\boxed{\\binom{1000000}{500000}}",
    "\\boxed{" + "{" * 900 + "}" * 900 + "}",
)
HANGING = "$9^{9^{9^{9}}}$"

FUNCTIONS = """
import os, socket, sys, time

def sees(prompt, completion, token_ids, answer, step, level, topic):
    return float((prompt, completion, token_ids, answer, step, level, topic)
                 == ("1+1?", "It is 2", [5, 6], "2", 7, 3, "sums"))

def sees_all(**given):
    return float(set(given) == {"prompt", "completion", "token_ids", "answer", "step", "level", "topic"})

def few(completion, absent=4):
    return float(absent)

def lists(prompts, completions, **kwargs):
    same = (prompts, kwargs["answer"], kwargs["topic"], kwargs["step"]) == (
        ["1+1?"] * 3, ["2"] * 3, ["sums"] * 3, 7)
    return [len(c) + len(ids) / 10 if same else -1.0 for c, ids in zip(completions, kwargs["completion_ids"])]

def tupled(completions):
    return (1, None, 0.5)

def deep(completion):
    raise KeyError("no such thing")

def raises(completion):
    return deep(completion)

def short(completions, **kwargs):
    return [1.0]

def no_list(completions):
    return 1.0

def nan(completion):
    return float("nan")

def text(completion):
    return "1.0"

def nothing(completion):
    return None

def sleeps(completion):
    time.sleep(1e6)

def spins(completion):
    while True:
        pass

def hungry(completion):
    return float(len(bytearray(10 * 2**30)))

def connects(completion):
    socket.create_connection(("127.0.0.1", 9), timeout=1)
    return 1.0

def exits(completion):
    with open(completion, "a") as file:
        file.write("x")
    os._exit(1)

def quits(completion):
    sys.exit(1)

def number(completion):
    return float(completion)

def late_number(completion):
    time.sleep(0.02)
    return float(completion)

def counts(completion):
    with open(completion, "a") as file:
        file.write("x")
    return os.path.getsize(completion)

def jax(completion):
    return float(any(m == "jax" or m.startswith(("jax.", "jaxlib")) for m in sys.modules))

def devices(completion):
    return float(os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["TPU_VISIBLE_CHIPS"] == ""
                 and os.environ["JAX_PLATFORMS"] == "cpu")
"""
MODULE = "user_rewards_of_test_pool"
NAMES = [line[4 : line.index("(")] for line in FUNCTIONS.splitlines() if line.startswith("def ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with users' modules, good and bad."""
    path = tmp_path_factory.mktemp("user")
    (path / f"{MODULE}.py").write_text(FUNCTIONS)
    (path / "user_raises_of_test_pool.py").write_text("1 / 0\n")
    (path / "user_quits_of_test_pool.py").write_text("import sys\nsys.exit(3)\n")
    (path / "user_dies_of_test_pool.py").write_text("import os\nos._exit(3)\n")
    return path


@contextlib.contextmanager
def entered(path, functions, **settings):
    """A pool that was entered with `path` as the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("PYTHONPATH", str(REPO))
        with Pool(VerifierConfig(**settings), functions) as pool:
            yield pool


@pytest.fixture(scope="module")
def pool(folder):
    # The limits differ, so that a completion that spins meets the one of processor time first on any machine.
    with entered(
        folder, [f"{MODULE}:{name}" for name in NAMES], workers=2, deadline=3.0, wall_limit=4.0, memory_mib=2048
    ) as pool:
        yield pool


def asked(name, *completions, key=None):
    """A request for a user function."""
    completions = completions or ("It is 2",)
    arguments = {
        "function": f"{MODULE}:{name}",
        "prompt": "1+1?",
        "completions": list(completions),
        "token_ids": [[5, 6][: i + 2] for i in range(len(completions))],
        "answer": "2",
        "step": 7,
        "columns": {"level": 3, "topic": "sums"},
    }
    return Request("function", arguments, key)


def ask(pool, name, *completions):
    return pool.submit([asked(name, *completions)]).result()[0]


def maths(gold, answer, key=None):
    return Request("math", {"gold": gold, "answer": answer}, key)


def sums(seed, n):
    """`n` requests with their verdicts."""
    rng = random.Random(seed)
    right = [rng.random() < 0.5 for _ in range(n)]
    requests = [
        maths(f"\\frac{{{3 * i + 1}}}{{3}}", f"\\boxed{{\\frac{{{6 * i + (2 if r else 3)}}}{{6}}}}")
        for i, r in enumerate(right)
    ]
    return requests, [float(r) for r in right]


def until(condition, seconds=10.0):
    """Wait for a condition; whether it came."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def exists(pid):
    return Path(f"/proc/{pid}").exists()


def niceness(pid):
    """Priority of a process; None if it is gone."""
    try:
        return os.getpriority(os.PRIO_PROCESS, pid)
    except ProcessLookupError:
        return None


def zombies(parent):
    """Children of a process that ended and were not waited for."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    states = []
    for child in children:
        with contextlib.suppress(FileNotFoundError):
            states.append(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0])
    return states.count("Z")


def test_hanging_answers_hold_up_nobody():
    """8 of 64 answers hang: the others are right, nothing is left behind."""
    deadline = 1.0
    easy, verdicts = sums(0, 56)
    requests = list(easy)
    for i, answer in enumerate(HOSTILE):
        requests.insert(7 * i, maths("42", answer))
    hostile = {7 * i for i in range(len(HOSTILE))}
    with Pool(VerifierConfig(workers=4, deadline=deadline)) as pool:
        assert pool.submit([maths("1", "\\boxed{1}")] * 4).result()[0].score == 1.0
        before = set(pool.pids())
        replies: list = []
        waiter = threading.Thread(target=lambda: replies.extend(pool.submit(requests).result()))
        waiter.start()
        seen = set(before)
        while waiter.is_alive():
            time.sleep(0.01)
            seen |= set(pool.pids())
        assert [r.score for i, r in enumerate(replies) if i not in hostile] == verdicts
        hung = [replies[i] for i in sorted(hostile)]
        assert all(r.score is None or r.score == 0.0 for r in hung)
        assert all(r.reason.startswith("deadline") for r in hung if r.score is None)
        assert sum(r.score is None for r in hung) >= 5
        assert pool.replaced >= 5 and before != set(pool.pids())
        assert until(lambda: len(pool.pids()) == 4)
        assert not any(exists(pid) for pid in seen - set(pool.pids()))
        assert not zombies(pool._fork_server.pid)
        requests, verdicts = sums(1, 20)
        assert [r.score for r in pool.submit(requests).result()] == verdicts


@pytest.mark.parametrize("all_at_once", [False, True])
def test_killed_workers_lose_nothing(pool, all_at_once):
    before = pool.replaced
    batch = pool.submit([asked("late_number", str(i)) for i in range(100)])
    time.sleep(0.3)
    assert not batch._done.is_set()
    for pid in pool.pids()[: None if all_at_once else 1]:
        os.kill(pid, signal.SIGKILL)
    assert [r.score for r in batch.result()] == [[float(i)] for i in range(100)]
    assert pool.replaced > before
    assert not zombies(pool._fork_server.pid)


def test_a_function_sees_the_completion_and_its_row(pool):
    assert [ask(pool, name).score for name in ("sees", "sees_all", "few")] == [[1.0], [1.0], [4.0]]
    assert ask(pool, "number", "1", "2.5").score == [1.0, 2.5]


def test_a_function_of_lists_is_called_once_for_a_group(pool):
    assert ask(pool, "lists", "a", "bb", "ccc").score == pytest.approx([1.2, 2.2, 3.2])
    assert ask(pool, "tupled", "a", "b", "c").score == [1.0, None, 0.5]
    grouped = {f"{MODULE}:{name}" for name in ("lists", "tupled", "short", "no_list")}
    assert pool.group_functions == grouped


def test_an_exception_is_no_verdict_and_kept_whole(pool):
    reply = ask(pool, "raises")
    assert reply.score is None and reply.reason == "KeyError: 'no such thing'"
    assert all(part in reply.error for part in ("Traceback", "in raises", "in deep", f"{MODULE}.py"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("short", "ValueError: user_rewards_of_test_pool:short returned 1 rewards for 2 completions"),
        ("no_list", "TypeError: user_rewards_of_test_pool:no_list must return a list of 2 numbers, got float"),
        (
            "nan",
            "ValueError: user_rewards_of_test_pool:nan returned nan, allowed is up to 1e6; return None where there is "
            "no verdict",
        ),
        ("text", "TypeError: user_rewards_of_test_pool:text must return one number or None for a completion"),
    ],
)
def test_a_wrong_result_is_explained_in_a_line(pool, name, reason):
    reply = ask(pool, name, "a", "b")
    assert reply.score is None
    assert reply.reason.startswith(reason) and "\n" not in reply.reason


def test_none_is_no_verdict(pool):
    assert ask(pool, "nothing", "a", "b").score == [None, None]


def test_misbehaviour_costs_only_its_own_verdict(pool, tmp_path):
    """Sleeping, spinning, ten gigabytes, a connection, the end of the process: none touches its neighbours."""
    tries = tmp_path / "tries"
    bad = [
        asked("sleeps"),
        asked("spins"),
        asked("hungry"),
        asked("connects"),
        asked("exits", str(tries)),
        asked("quits"),
    ]
    good = [asked("number", str(i)) for i in range(30)]
    mixed = [request for pair in zip(bad, good, strict=False) for request in pair] + good[len(bad) :]
    before = pool.replaced
    replies = pool.submit(mixed).result()
    assert [r.score for r in replies if r.score is not None] == [[float(i)] for i in range(30)]
    slept, spun, hungry, connected, ended, quit_ = replies[0:12:2]
    assert spun.reason == "deadline of 3 s"
    assert slept.reason == "deadline: no answer after 4 s (verifier.wall_limit)"
    assert hungry.reason == "out of memory (verifier.memory_mib=2048)"
    assert connected.reason.startswith("PermissionError: socket.") and "verifier.network" in connected.reason
    assert ended.reason.startswith("died") and tries.read_text() == "xx"  # tried twice
    assert quit_.reason == "SystemExit: 1"
    assert all(r.score is None for r in (slept, spun, hungry, connected, ended, quit_))
    assert pool.replaced >= before + 5
    assert until(lambda: len(pool.pids()) == 2) and not zombies(pool._fork_server.pid)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("no_such_module_anywhere:f", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        (f"{MODULE}:absent", "has no attribute 'absent'"),
        (f"{MODULE}:time.timezone", "is no function"),
        ("builtins:max", "no signature found"),
        ("user_raises_of_test_pool:f", "ZeroDivisionError"),
        ("user_quits_of_test_pool:f", "SystemExit: 3"),
        ("user_dies_of_test_pool:f", "verifiers end before they are ready"),
    ],
)
def test_a_function_that_cannot_be_imported(folder, function, why):
    """One line, no processes left, and no endless attempts."""
    with pytest.raises(ConfigError) as error, entered(folder, [function], workers=2, deadline=3.0):
        pass
    text = str(error.value)
    assert text.startswith("task.function, reward.terms: ") and function in text and why in text and "\n" not in text


def test_failure_that_is_known_before_the_first_request(folder, monkeypatch):
    """All workers may have failed by the time that entering asks whether they work."""
    submit = Pool.submit

    def late(self, requests):
        time.sleep(0.5)
        return submit(self, requests)

    monkeypatch.setattr(Pool, "submit", late)
    with pytest.raises(ConfigError), entered(folder, ["no_such_module_anywhere:f"], workers=2):
        pass


def test_workers_are_without_jax_and_accelerators(pool):
    assert [ask(pool, name).score for name in ("jax", "devices")] == [[0.0], [1.0]]


def test_equal_keys_are_asked_once(pool, tmp_path):
    """The function counts its calls in a file."""
    count, other = str(tmp_path / "count"), str(tmp_path / "other")
    together = pool.submit([asked("counts", count, key="a")] * 5 + [asked("counts", other, key="b")])
    assert [r.score for r in together.result()] == [[1.0]] * 6
    assert [r.score for r in pool.submit([asked("counts", count, key="a")] * 3).result()] == [[1.0]] * 3
    pool.submit([asked("counts", count)] * 2).result()  # without a key
    assert Path(count).read_text() == "xxx"


def test_no_verdict_is_not_remembered(pool, tmp_path):
    path = str(tmp_path / "tries")
    for _ in range(2):
        assert pool.submit([asked("exits", path, key="dies")] * 2).result()[1].score is None
    assert Path(path).read_text() == "xxxx"


@pytest.mark.parametrize("seed", range(5))
def test_replies_are_in_the_order_of_the_requests(pool, seed):
    rng = random.Random(seed)
    numbers = [rng.randrange(20) for _ in range(rng.randrange(60))]
    requests = [
        asked(rng.choice(("number", "number", "late_number")), str(n), key=rng.choice((None, ("n", n))))
        for n in numbers
    ]
    assert [r.score for r in pool.submit(requests).result()] == [[float(n)] for n in numbers]


def test_an_empty_batch_is_done(pool):
    assert pool.submit([]).result() == []


def test_threads_share_a_pool(pool):
    found = {}

    def work(seed):
        requests, verdicts = sums(seed, 25)
        for _ in range(3):
            found.setdefault(seed, []).append([r.score for r in pool.submit(requests).result()] == verdicts)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: [True] * 3 for seed in range(6)}


def test_leaving_ends_everything():
    """Also while requests hang; those and all later ones have no verdict."""
    with Pool(VerifierConfig(workers=2, deadline=300.0)) as pool:
        batch = pool.submit([maths("42", HANGING)] * 5)
        assert until(lambda: len(pool.pids()) > 2)
        pids = [*pool.pids(), pool._fork_server.pid]
        start = time.monotonic()
    assert time.monotonic() - start < 2
    assert [(r.score, r.reason) for r in batch.result()] == [(None, "closed")] * 5
    assert not any(exists(pid) for pid in pids)
    assert pool.submit([maths("1", "\\boxed{1}")]).result()[0].reason == "closed"
    pool.close()


def test_death_of_the_process_that_forks():
    """Nothing waits for ever if the fork server is killed."""
    with Pool(VerifierConfig(workers=2, deadline=1.0)) as pool:
        assert pool.submit([maths("1", "\\boxed{1}")]).result()[0].score == 1.0
        pids = pool.pids()
        pool._fork_server.kill()
        assert [r.score for r in pool.submit([maths("42", HANGING), maths("1", "\\boxed{2}")]).result()] == [None, 0.0]
        assert "ended" in pool.submit([maths("1", "\\boxed{1}")]).result()[0].reason
        assert until(lambda: not any(exists(pid) for pid in pids))


def test_workers_do_not_outlive_a_killed_main_process():
    script = (
        "import time\nfrom pspo_jax.config.rewards import VerifierConfig\n"
        "from pspo_jax.verifiers.workers.pool import Pool, Request\n"
        "with Pool(VerifierConfig(workers=2, deadline=300.0)) as pool:\n"
        f"    pool.submit([Request('math', {{'gold': '42', 'answer': {HANGING!r}}})] * 2)\n"
        "    print(pool._fork_server.pid, *pool.pids(), flush=True)\n    time.sleep(300)\n"
    )
    main = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=REPO, stderr=subprocess.PIPE
    )
    pids = main.stdout.readline().split()
    assert len(pids) == 3
    main.kill()
    assert main.communicate()[1] == ""
    assert until(lambda: not any(exists(pid) for pid in pids))


def test_a_slow_worker_is_not_starved_afterwards(pool):
    """Slow requests lower their worker's priority; what comes after them runs with the usual one."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    assert ask(pool, "late_number", *map(str, range(30))).score == [float(i) for i in range(30)]
    assert until(lambda: [niceness(pid) for pid in pool.pids()] == [usual] * 2)
