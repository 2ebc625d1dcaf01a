"""Verdicts depend neither on the load of the machine nor on what an earlier function did to its worker."""

import os
import signal
import subprocess
import sys

import pytest

from pspo_jax.config.rewards import VerifierConfig
from pspo_jax.verifiers.workers.clock import time_spent, usage
from pspo_jax.verifiers.workers.pool import Pool
from tests.rewards.test_pool import asked, entered, maths, until

pytestmark = [
    pytest.mark.xdist_group("pool"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
MODULE = "odd_rewards_of_test_pool"
ODD = """
import os, signal, sys, threading, time

def good(completion):
    print(completion)
    return float(completion)

def forks(completion):
    os.fork()
    return 2.0

def interrupts(completion):
    raise KeyboardInterrupt

def stops(completion):
    raise StopIteration

def recurses(completion):
    return recurses(completion)

def remembers(completion):
    raise MemoryError

def surrogates(completion):
    raise ValueError("half \\ud83d of a pair, \\x00" + "x" * 1_000_000)

def unspeakable(completion):
    class Odd(Exception):
        def __str__(self):
            raise RuntimeError
    raise Odd

def prints(completion):
    print("\\ud83d" + "x" * 5_000_000)
    return 1.0

def closes(completion):
    sys.stdout.close()
    os.close(2)
    return 1.0

def moves(completion):
    os.chdir("/")
    return 1.0

def leaves_a_thread(completion):
    threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()
    return 1.0

def alarms(completion):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    return 1.0

def freezes(completion):
    os.kill(os.getpid(), signal.SIGSTOP)
    return 1.0

def garbles(completion):
    for fd in range(3, 20):
        try:
            os.write(fd, b"\\0\\0\\0\\5{junk")
        except OSError:
            pass
    return 1.0

def sleeps(completion):
    time.sleep(0.5)
    return 1.0

def here(completion):
    return float(os.path.exists("odd_rewards_of_test_pool.py"))
"""
NAMES = [line[4 : line.index("(")] for line in ODD.splitlines() if line.startswith("def ")]


def odd(name, completion="1"):
    request = asked(name, completion)
    return request._replace(arguments={**request.arguments, "function": f"{MODULE}:{name}"})


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    path = tmp_path_factory.mktemp("odd")
    (path / f"{MODULE}.py").write_text(ODD)
    with entered(path, [f"{MODULE}:{name}" for name in NAMES], workers=1, deadline=2.0) as pool:
        yield pool


def test_easy_answers_on_a_busy_machine_have_their_verdicts():
    requests = []
    for i in range(15):
        requests += [
            maths(f"{i}", f"\\boxed{{{i}}}"),
            maths(f"x^2+{i}x+1", f"\\boxed{{1+{i}x+x^2}}"),
            maths(f"[{i},{i + 1})", f"\\boxed{{[{i},{i + 1})}}"),
            maths(f"\\frac{{{i}\\pi}}{{3}}", f"\\boxed{{\\frac{{{2 * i}\\pi}}{{6}}}}"),
        ]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(12)]
    try:
        with Pool(VerifierConfig(workers=2, deadline=5.0)) as pool:
            assert [reply.score for reply in pool.submit(requests).result()] == [1.0] * 60
            assert pool.replaced == 0
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_time_without_a_processor_is_not_counted():
    pid = os.getpid()
    begun = usage(pid)
    assert begun is not None and begun.state == "R" and begun.cpu > 0
    assert time_spent(pid, begun._replace(starved=begun.starved - 7), 10.0).waited <= 3
    assert time_spent(pid, None, 10.0) == (0.0, 10.0, "?")
    assert usage(2**22 + 1) is None


def test_who_sleeps_longer_than_the_deadline_has_a_verdict(tmp_path):
    """The deadline is of processor time; verifier.wall_limit is for the rest."""
    (tmp_path / f"{MODULE}.py").write_text(ODD)
    with entered(tmp_path, [f"{MODULE}:sleeps"], workers=1, deadline=0.2, wall_limit=60.0) as pool:
        assert pool.submit([odd("sleeps")]).result()[0].score == [1.0]


def test_stopped_workers_lose_nothing(pool):
    for pid in pool.pids():
        os.kill(pid, signal.SIGSTOP)
    assert [r.score for r in pool.submit([odd("good", str(i)) for i in range(5)]).result()] == [[i] for i in range(5)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("forks", None),
        ("interrupts", "KeyboardInterrupt"),
        ("stops", "StopIteration"),
        ("recurses", "RecursionError: maximum recursion depth exceeded"),
        ("remembers", "out of memory"),
        ("surrogates", "ValueError: half \\ud83d of a pair, \\x00xxx"),
        ("unspeakable", ""),
        ("prints", None),
        ("closes", None),
        ("moves", None),
        ("leaves_a_thread", None),
        ("alarms", None),
        ("freezes", "died"),
        ("garbles", "died"),
    ],
)
def test_an_odd_function_costs_at_most_its_own_verdict(pool, name, reason):
    """One worker serves all of them, so whatever it is left with falls upon the requests that follow."""
    first, *others = pool.submit([odd(name), *(odd("good", str(i)) for i in range(8)), odd("here")]).result()
    assert [reply.score for reply in others] == [[float(i)] for i in range(8)] + [[1.0]]
    if reason is None:
        assert first.score is not None and first.reason is None
    else:
        assert first.score is None and first.reason.startswith(reason) and len(first.reason) <= 310
        assert first.reason.isascii() and (first.error or "").isascii() and len(first.error or "") < 5000
    assert until(lambda: len(pool.pids()) == 1)
