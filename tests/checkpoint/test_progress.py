"""What a person sees of a phase: the time that is left does not count compilation."""

import io
import re

from rich.console import Console

from pspo_jax.system import progress
from pspo_jax.system.progress import Progress


def test_the_time_left_is_estimated_from_the_second_call_on(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(True).phase("cold start", 100) as advance:
        now[0] = 60.0  # compilation and the first ten steps
        advance(10, "loss 3")
        now[0] = 70.0
        advance(10, "loss 2")
    first, later = capsys.readouterr().out.splitlines()
    assert "eta" not in first and "10/100" in first
    assert re.search(r"20/100 .* eta 80 s", later)


def test_a_bar_counts_every_call():
    shown = Progress(True)
    shown.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with shown.phase("step", 6, done=2) as advance:
        for _ in range(4):
            advance(1, "")
    assert "6/6" in shown.console.file.getvalue()
