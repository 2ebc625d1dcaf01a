"""The report: what goes into the page, and, in a real browser, what comes out of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pspo_jax.config.command_line import to_yaml
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config
from pspo_jax.report import main
from pspo_jax.reporting import page as report_page
from pspo_jax.reporting.page import write_report

HOSTILE = '</script><script>document.body.dataset.pwned=1</script><img src=x onerror="fail(1)"> \u2028 \ud800 &amp;'


def make_run(folder: Path, algorithm: str, seed: int, steps: int = 60, finished: bool = True) -> Path:
    """A run folder with files as training writes them."""
    folder.mkdir(parents=True)
    changes = {"run.dir": str(folder), "run.seed": seed, "run.steps": steps, "algorithm.name": algorithm}
    (folder / "config.yaml").write_text(to_yaml(resolve(replace(Config(), changes))))
    rng = np.random.default_rng(seed)
    lines = [_metrics(rng, step, steps) for step in range(steps + 1)]
    _write_lines(folder / "metrics.jsonl", lines)
    if algorithm == "pspo":
        _write_lines(folder / "strategy.jsonl", [_priorities(rng, step) for step in range(10, steps + 1, 10)])
    (folder / "completions").mkdir()
    for step in range(10, steps + 1, 10):
        _write_lines(folder / "completions" / f"step_{step:06d}.jsonl", _completions(rng, step))
    if finished:
        (folder / "summary.json").write_text(json.dumps(_summary(lines[-1])))
    return folder


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _metrics(rng: np.random.Generator, step: int, steps: int) -> dict[str, Any]:
    skill = 0.42 + 0.4 * (1 - np.exp(-3 * step / steps)) + rng.normal(0, 0.01)
    line: dict[str, Any] = {"step": step, "rollouts/total": 256 * step, "num_tokens": 5100 * step}
    if step % 20 == 0 or step == steps:
        line |= {"eval/greedy": skill, "eval/sampled": skill - 0.05}
    if step == 0:
        return line
    return line | {
        "reward": skill + rng.normal(0, 0.03),
        "reward_std": 0.3,
        "groups/effective": float(rng.integers(8, 24)),
        "loss": rng.normal(0, 0.02),
        "kl": None,
        "entropy": 0.3 * np.exp(-step / steps) + rng.normal(0, 0.01),
        "grad_norm": rng.lognormal(-1, 0.4),
        "clip_ratio/region_mean": 0.0,
        "learning_rate": 8e-4 * (1 - step / steps),
        "completions/mean_length": 20 + rng.normal(0, 0.5),
        "tokens_per_second": 41000 + rng.normal(0, 900),
        "step_time": 0.12,
        **{f"time/{phase}": rng.uniform(0.01, 0.06) for phase in ("select", "rollout", "verify", "update")},
        "crc/params": int(rng.integers(0, 2**32)),
    }


def _priorities(rng: np.random.Generator, step: int) -> dict[str, Any]:
    idle = min(step * 6, 380)
    values = np.concatenate([np.full(idle, 1e-6), rng.gamma(3, 0.3, 512 - idle)])
    counts, edges = np.histogram(values, bins=20)
    return {"step": step, "priority": {"edges": edges.tolist(), "counts": counts.tolist()}}


def _completions(rng: np.random.Generator, step: int) -> list[dict[str, Any]]:
    lines = []
    for prompt_id, prompt, work, answer in [
        (3, "27-4+8-3=", "-4=23+8=31-3=", "28"),
        (71, "58+7-2+1=", "+7=65-2=63+1=", "64"),
        (402, "91-5-4+8+1=", "-5=86-4=82+8=90+1=", "91"),
    ]:
        right = rng.uniform(size=8) < 0.6
        right[:2] = True, False
        advantages = (right - right.mean()) / right.std(ddof=1)
        for is_right, advantage in zip(right, advantages, strict=True):
            text = f"{work}{answer if is_right else int(answer) - 10}$"
            facts = {
                "verdict": float(is_right),
                "reward": float(is_right) / 2 + 0.75,
                "advantage": advantage,
                "length": len(text),
                "ended": bool(is_right),
            }
            head = {"step": step, "prompt_id": prompt_id, "prompt": prompt, "answer": answer}
            lines.append(head | {"completion": text} | facts)
    return lines


def _summary(line: dict[str, Any]) -> dict[str, Any]:
    phases = ("setup", "compile", "sft", "select", "rollout", "verify", "update", "eval", "total")
    return {
        "eval": {"greedy": line["eval/greedy"], "sampled": line["eval/sampled"]},
        "steps": line["step"],
        "rollouts": line["rollouts/total"],
        "tokens": line["num_tokens"],
        "seconds": {phase: 2.5 * (i + 1) for i, phase in enumerate(phases)},
    }


def payload(page: Path) -> dict[str, Any]:
    """The data as the page's script gets them."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.S)
    assert found
    return json.loads(found.group(1))


def test_payload_holds_what_the_files_hold(tmp_path: Path) -> None:
    run = make_run(tmp_path / "pspo-s1", "pspo", seed=1)
    data = payload(write_report([run], tmp_path / "deep" / "out.html"))["runs"][0]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert data["name"] == "pspo-s1" and data["summary"]["finished"] and data["notes"] == []
    reward = data["metrics"]["reward"]
    assert [data["rows"]["tokens"][i] for i in reward["at"]] == [line["num_tokens"] for line in lines[1:]]
    np.testing.assert_allclose(reward["values"], [line["reward"] for line in lines[1:]], rtol=1e-5)
    assert [data["rows"]["step"][i] for i in data["metrics"]["eval/greedy"]["at"]] == [0, 20, 40, 60]
    assert "kl" not in data["metrics"] and "crc/params" not in data["metrics"]
    assert [len(group["rows"]) for group in data["completions"][0]["groups"]] == [8, 8, 8]
    assert [p["step"] for p in data["priorities"]] == list(range(10, 61, 10))
    assert data["config"] == yaml.safe_load((run / "config.yaml").read_text())


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / sweep / "seed0", "grpo", seed=0, steps=3) for sweep in ("a", "b")]
    data = payload(write_report([*runs, runs[0]], tmp_path / "out.html"))
    assert [run["name"] for run in data["runs"]] == ["a/seed0", "b/seed0"]


def test_unfinished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", "grpo", seed=0, steps=25, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "reward": 0.')
    (run / "config.yaml").unlink()
    shutil.rmtree(run / "completions")
    data = payload(write_report([run], run / "report.html"))["runs"][0]
    summary = data["summary"]
    assert not summary["finished"] and summary["steps"] == 25 and summary["rollouts"] == 25 * 256
    assert summary["eval"]["greedy"] == pytest.approx(data["metrics"]["eval/greedy"]["values"][-1], rel=1e-5)
    assert summary["seconds"]["rollout"] == pytest.approx(sum(data["metrics"]["time/rollout"]["values"]), rel=1e-5)
    assert data["completions"] == data["priorities"] == [] and data["config"] == {}
    notes = " ".join(data["notes"])
    assert all(
        name in notes for name in ("metrics.jsonl: 1 unreadable line ", "summary.json", "config.yaml is missing")
    )


def test_a_summary_from_before_a_resume_is_out_of_date(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", "grpo", seed=0, steps=20)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "reward": 0.5}\n')
    summary = payload(write_report([run], run / "report.html"))["runs"][0]["summary"]
    assert not summary["finished"] and summary["steps"] == 21


def test_a_repeated_step_counts_once_and_non_finite_values_are_gaps(tmp_path: Path) -> None:
    run = tmp_path / "r"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        '{"step": 0, "reward": 1}\n{"step": 1, "reward": 2}\n{"step": 2, "reward": NaN}\n{"step": 1, "reward": 3}\n'
    )
    data = payload(write_report([run], run / "report.html"))["runs"][0]
    assert data["metrics"] == {"reward": {"at": [0, 1], "values": [1, 3]}}


def test_thin_keeps_ends_and_spikes() -> None:
    values = np.random.default_rng(0).normal(size=50_001)
    values[31_234], values[7] = 99, -99
    kept = report_page.thin(values.tolist(), report_page.MAX_POINTS)
    assert len(kept) <= report_page.MAX_POINTS and kept == sorted(set(kept))
    assert {0, 7, 31_234, 50_000} <= set(kept)
    assert np.diff(kept).max() < 2 * 2 * 50_001 / report_page.MAX_POINTS + 2
    assert report_page.thin([3.0, 1.0], report_page.MAX_POINTS) == [0, 1]


def test_long_runs_stay_small(tmp_path: Path) -> None:
    run = tmp_path / "r"
    (run / "completions").mkdir(parents=True)
    _write_lines(run / "metrics.jsonl", [{"step": i, "reward": i % 7 / 7, "num_tokens": i} for i in range(20_000)])
    for step in range(200):
        line = {
            "step": step,
            "prompt_id": 0,
            "prompt": "p",
            "answer": "a",
            "completion": "first" + "x" * 50_000 + "last",
        }
        _write_lines(run / "completions" / f"step_{step:06d}.jsonl", [line])
    page = write_report([run], run / "report.html")
    data = payload(page)["runs"][0]
    assert page.stat().st_size < 1_500_000
    assert len(data["metrics"]["reward"]["values"]) <= report_page.MAX_POINTS
    assert [data["completions"][i]["step"] for i in (0, -1)] == [0, 199] and len(
        data["completions"]
    ) == report_page.MAX_DUMPS
    text = data["completions"][0]["groups"][0]["rows"][0]["completion"]
    assert text.startswith("first") and text.endswith("last") and "42009 characters left out" in text
    assert any("60 of 200 completion dumps" in line for line in data["notes"])


@pytest.mark.parametrize(("exists", "complaint"), [(False, "no such folder"), (True, "holds no metrics.jsonl")])
def test_bad_folder_is_one_line_and_exit_code_2(tmp_path: Path, exists: bool, complaint: str) -> None:
    run = tmp_path / "r"
    if exists:
        run.mkdir()
    done = subprocess.run([sys.executable, "-m", "pspo_jax.report", run], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and f"{run}: {complaint}; name" in done.stderr


def test_bad_flags_and_outputs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", "grpo", seed=0, steps=2)
    with pytest.raises(ConfigError, match="RUN; see --help"):
        main([])
    with pytest.raises(ConfigError, match=r"--out .*metrics.jsonl/x.html: "):
        main([str(run), "--out", str(run / "metrics.jsonl" / "x.html")])
    assert main([str(run)]) == 0 and (run / "report.html").is_file()


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", "pspo", seed=0, steps=10)
    line = {
        "step": 10,
        "prompt_id": 0,
        "prompt": HOSTILE,
        "answer": HOSTILE,
        "completion": HOSTILE,
        "reward": 1.0,
    }
    _write_lines(run / "completions" / "step_000010.jsonl", [line])
    page = write_report([run], run / "report.html")
    text = page.read_text()
    assert "__PSPO" not in text
    assert len(re.findall("</script", text)) == len(re.findall("<script", text)) == 2
    addresses = re.sub(r"http://www\.w3\.org/2000/svg", "", text)
    assert not re.search(r"https?://|@import|url\(", addresses)
    assert payload(page)["runs"][0]["completions"][-1]["groups"][0]["rows"][0]["completion"] == HOSTILE.replace(
        "\ud800", "\ufffd"
    )


def test_a_dump_tells_the_verdict_apart_from_the_reward(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", "grpo", seed=0, steps=10)
    head = {"step": 10, "prompt_id": 0, "prompt": "p", "answer": "a", "completion": "c", "advantage": 0.0}
    lines = [
        head | {"verdict": 0.0, "reward": 1.5},
        head | {"verdict": None, "reward": None},
        head | {"rewards/accuracy": 1.0, "reward": 0.2},
        head | {"reward": 1.0},
    ]
    _write_lines(run / "completions" / "step_000010.jsonl", lines)
    rows = payload(write_report([run], run / "report.html"))["runs"][0]["completions"][-1]["groups"][0]["rows"]
    assert [(row["verdict"], row["reward"]) for row in rows] == [(0.0, 1.5), (None, None), (1.0, 0.2), (None, 1.0)]


def test_a_prompts_images_are_shown_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", "grpo", seed=0, steps=10)
    head = {"step": 10, "prompt_id": 0, "prompt": "[image 3x3]1+2=", "answer": "3", "completion": "1+2=3$"}
    picture = "data:image/png;base64,iVBORw0KGgo="
    bad = ["javascript:alert(1)", "data:image/png;base64," + "A" * 400_000, 3]
    _write_lines(run / "completions" / "step_000010.jsonl", [head | {"images": [picture, *bad]}, head | {"images": []}])
    page = write_report([run], run / "report.html")
    (group,) = payload(page)["runs"][0]["completions"][-1]["groups"]
    assert group["images"] == [picture] and len(group["rows"]) == 2 and page.read_text().count(picture) == 1


NODE = shutil.which("node")
PROBE = """
const show = (tag, attributes, ...children) => ({tag, ...attributes, children: children.flat()});
const text = node => node == null ? "" : typeof node === "object" ? node.children.map(text).join("") : String(node);
const el = show, rows = JSON.parse(process.argv[1]), most = Math.max(...rows.map(row => Math.abs(row.advantage)));
const views = rows.map(row => answerView(row, most));
const bar = view => view.children[2].children.find(child => child.class === "tilt").children[0]?.["data-width"] ?? null;
console.log(JSON.stringify({tally: tally(rows), marks: views.map(v => v.children[0].children[0]),
  kinds: views.map(v => v.class), bars: views.map(bar), facts: views.map(v => text(v.children[2]))}));
"""


@pytest.mark.skipif(NODE is None, reason="no node on PATH to run the page's script in")
def test_marks_are_verdicts_and_bars_share_one_scale() -> None:
    script = (Path(report_page.__file__).parent / "report_script.html").read_text()
    constants = ("verdictOf", "MARKS", "isRight", "signed")
    functions = ("tally", "answerView", "advantageBar", "number")
    parts = [re.search(rf"^const {name} = .*$", script, re.M) for name in constants]
    parts += [re.search(rf"^function {name}\(.*?^}}$", script, re.M | re.S) for name in functions]
    rows = [
        {"verdict": 0.0, "reward": 1.0, "advantage": 0.0, "length": 3, "ended": True, "completion": "short and wrong"},
        {"verdict": 1.0, "reward": 0.3, "advantage": 0.004, "length": 3, "ended": True, "completion": "right"},
        {"verdict": None, "reward": None, "advantage": 0.5, "length": 3, "ended": True, "completion": "?"},
        {"verdict": 0.1, "reward": 0.1, "advantage": -2.0, "length": 3, "ended": False, "completion": "partly"},
    ]
    code = "\n".join(part[0] for part in parts if part) + PROBE
    done = subprocess.run([str(NODE), "-e", code, json.dumps(rows)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tally"] == "1 of 3 right, 1 without a verdict"
    assert found["marks"] == ["✗", "✓", "?", "✗"]
    assert found["kinds"] == ["answer wrong", "answer right", "answer none", "answer wrong"]
    assert found["bars"] == [None, None, "12.5", "50.0"], "what is written as 0.00 has no bar"
    assert "reward none" in found["facts"][2] and "adv. 0.00" in found["facts"][1]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no chromium, chromium-browser, google-chrome or chrome on PATH to open the report in",
)


def dom(page: Path, tmp_path: Path, script: str = "") -> str:
    """The page as a browser has drawn it, after `script`, without the script elements (data and code)."""
    if script:
        page.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"),
        *(
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            page.as_uri(),
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    drawn = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.S)
    assert "data-failed=" not in drawn, re.findall('id="error".*?</div>', drawn)
    return drawn


@browser
def test_browser_draws_every_part(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, name, seed=1) for name in ("pspo", "grpo")]
    drawn = dom(write_report(runs, tmp_path / "out.html"), tmp_path)
    for metric in (
        "eval/greedy",
        "eval/sampled",
        "reward",
        "groups/effective",
        "entropy",
        "grad_norm",
        "time/update",
    ):
        for run in ("pspo", "grpo"):
            path = re.search(rf'<path [^>]*d="(M[^"]*)" data-run="{run}" data-metric="{metric}"', drawn)
            assert path and path.group(1).count("L") == (3 if "eval" in metric else 59) and "NaN" not in path.group(1)
    assert "No reference policy was held: loss.kl_coef is 0." in drawn, "kl is null throughout"
    assert drawn.count("Zero at every step: there is one update a step") == 1, "nothing was clipped"
    assert drawn.count('class="column"') == 20 and "grpo: no priorities logged" in drawn
    assert '<div class="said">-4=23+8=31-3=28$' in drawn and "<code>64</code>" in drawn and "cut off" in drawn
    assert set(re.findall(r'class="differs" data-field="([^"]*)"', drawn)) >= {
        "algorithm.name",
        "selection.name",
    }
    assert 'data-field="model.width"' not in drawn, "only differences are listed at first"
    assert ">22.5<" in drawn, "total seconds of the summary"


@browser
def test_browser_controls(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, name, seed=1) for name in ("pspo", "grpo")]
    drawn = dom(
        write_report(runs, tmp_path / "out.html"),
        tmp_path,
        """
        document.querySelectorAll(".chip")[1].click();
        document.querySelector('#axis [data-value=tokens]').click();
        document.querySelector('#filter [data-value=wrong]').click();
        document.querySelector("#only").click();
        const set = (id, value, type) => { $(id).value = value; $(id).dispatchEvent(new Event(type)); };
        set("smooth", 0, "input");
        set("metric", "learning_rate", "change");
        set("completion-step", 0, "input");
        set("priority-step", 0, "input");
        """,
    )
    assert 'data-run="pspo"' in drawn and 'data-run="grpo"' not in drawn
    assert 'aria-label="Entropy against tokens"' in drawn and ">300k</text>" in drawn
    assert 'class="answer wrong"' in drawn and 'class="answer right"' not in drawn
    assert 'data-field="model.width"' in drawn
    assert 'class="line raw"' not in drawn, "without smoothing there is one line a curve"
    assert 'data-chart="learning_rate"' in drawn and 'data-chart="loss"' not in drawn
    assert drawn.count("step 10, square-root scale<") == 1, "the histogram of the first logged step"


@browser
def test_browser_reads_hostile_text_as_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>r&amp;", "grpo", seed=0, steps=10)
    line = {
        "step": 10,
        "prompt_id": 0,
        "prompt": "1+1=",
        "answer": "2",
        "completion": HOSTILE,
        "verdict": None,
        "reward": None,
    }
    _write_lines(run / "completions" / "step_000010.jsonl", [line])
    drawn = dom(write_report([run], tmp_path / "out.html"), tmp_path)
    assert "data-pwned" not in drawn and "<img" not in drawn and "<b>r" not in drawn
    assert "&lt;/script&gt;&lt;script&gt;document.body.dataset.pwned=1&lt;/script&gt;&lt;img src=x" in drawn
    assert "<b>r&amp;" in unescape(drawn)


@browser
@pytest.mark.parametrize("lines", ["", '{"step": 0, "rollouts/total": 0, "num_tokens": 0, "eval/greedy": 0.4}\n'])
def test_browser_draws_notes_for_what_is_missing(tmp_path: Path, lines: str) -> None:
    run = tmp_path / "young"
    run.mkdir()
    (run / "metrics.jsonl").write_text(lines + '{"step": 1, "rew')
    drawn = dom(write_report([run], tmp_path / "out.html"), tmp_path)
    assert "not finished" in drawn and "1 unreadable line left out" in drawn and "NaN" not in drawn
    for words in (
        "Not logged by these runs.",
        "No priorities are logged.",
        "No completions are stored.",
        "No readable config",
    ):
        assert words in drawn
    assert ('data-metric="eval/greedy"' in drawn) == bool(lines)
    assert ("No metrics are logged yet." in drawn) == (not lines)
