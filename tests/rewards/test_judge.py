"""The judge against a local HTTP server: scores, retries, deadlines, failures, bounds, memory and secrets."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.rewards import JUDGE_PROMPT, JudgeConfig
from pspo_jax.config.validation import validate
from pspo_jax.data.synthetic.arithmetic import TOKENIZER
from pspo_jax.data.task import CompletionBatch
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.rewards.task import make_task
from pspo_jax.rewards.text_reward import make_pool
from pspo_jax.runs import verdicts
from pspo_jax.verifiers import judge as module
from pspo_jax.verifiers.judge import Judge, question_of, score_in, words_in
from tests.helpers import tiny_config
from tests.rewards.chat_service import Answer, serving


def settings(service, **fields):
    values = {"url": service.url, "model": "m", "prompt": "{prompt} {completion}", "deadline": 10.0}
    return JudgeConfig(**values | fields)


def replies(service, questions, memory=None, **fields):
    with Judge(settings(service, **fields), memory) as judge:
        return judge.submit(questions).result()


@pytest.fixture
def quick(monkeypatch):
    """Waits between tries that a test can afford."""
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.02)


@given(st.floats(-20, 30, allow_nan=False).map(lambda x: round(x, 2)), st.text(max_size=30))
def test_a_score_is_linear_in_the_scale_and_nothing_outside_it(score, words):
    text = words.replace("core", "") + f"\nScore: 3\nScore: {score:.2f}"
    found = score_in(text, JudgeConfig(scale="-5,5"))
    assert found == (pytest.approx((score + 5) / 10) if -5 <= score <= 5 else None)


@pytest.mark.parametrize("text", ["", "9", "Score: ten", "Score: 11", "Score: -1", "[[7]]"])
def test_words_without_a_score(text):
    assert score_in(text, JudgeConfig()) is None


def test_an_own_pattern_and_scale():
    assert score_in("I say [[4]]", JudgeConfig(pattern=r"\[\[(\d)\]\]", scale="1,5")) == 0.75


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_what_is_filled_in_is_not_filled_again(prompt, answer, completion):
    template = "a{prompt}b{answer}c{completion}d{other}"
    text = question_of(template, prompt + "{answer}", answer + "{completion}", completion + "{prompt}")
    assert text == f"a{prompt}{{answer}}b{answer}{{completion}}c{completion}{{prompt}}d{{other}}"


@given(
    st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_no_body_breaks_the_reader(body):
    found = words_in(json.dumps(body))
    assert found is None or isinstance(found, str)


def test_the_request_and_its_score():
    with serving(lambda asked, n: Answer("fine.\nScore: 7.5")) as service:
        (reply,) = replies(service, ["Q"], temperature=0.5, max_tokens=9)
    assert reply.score == 0.75 and reply.reason is None and reply.metrics == {"judge_tries": [1.0]}
    assert reply.columns == {"judge": ["fine.\nScore: 7.5"]}
    asked = service.asked[-1]
    assert asked.path == "/v1/chat/completions" and "Authorization" not in asked.headers
    message = [{"role": "user", "content": "Q"}]
    assert asked.body == {"model": "m", "messages": message, "temperature": 0.5, "max_tokens": 9}


def test_errors_that_may_pass_are_tried_again(quick):
    statuses = [429, 500, 503, 200]
    with serving(lambda asked, n: Answer("Score: 2", statuses[n])) as service:
        (reply,) = replies(service, ["Q"], retries=3)
    assert reply.score == 0.2 and reply.metrics == {"judge_tries": [4.0]} and len(service.questions()) == 4


def test_tries_end_and_the_last_error_is_the_reason(quick):
    with serving(lambda asked, n: Answer(status=429, body='{"error": "slow\ndown"}')) as service:
        (reply,) = replies(service, ["Q"], retries=2)
    assert reply.score is None and len(service.questions()) == 3
    assert reply.reason == 'HTTP 429: {"error": "slow down"}'


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_errors_that_stay_are_not_tried_again(status):
    with serving(lambda asked, n: Answer(status=status, body="no")) as service:
        (reply,) = replies(service, ["Q"])
    assert reply.score is None and reply.reason == f"HTTP {status}: no" and len(service.questions()) == 1


def test_the_service_says_how_long_to_wait(quick):
    with serving(lambda asked, n: Answer("Score: 1", 200 if n else 429, {"Retry-After": "0.3"})) as service:
        began = time.monotonic()
        (reply,) = replies(service, ["Q"])
        assert time.monotonic() - began >= 0.3 and reply.score == 0.1


def test_a_wait_beyond_the_deadline_is_not_begun():
    with serving(lambda asked, n: Answer(status=429, headers={"Retry-After": "3600"}, body="later")) as service:
        began = time.monotonic()
        (reply,) = replies(service, ["Q"], deadline=5.0)
    assert time.monotonic() - began < 3 and reply.score is None
    assert reply.reason == "deadline: no score in 5 s (judge.deadline) after 1 tries, the last: HTTP 429: later"


def test_a_slow_reply_has_no_score_and_holds_up_no_other():
    def answer(asked, n):
        if "slow" in str(asked.body):
            time.sleep(1.5)
        return Answer("Score: 5")

    with serving(answer) as service:
        found = replies(service, ["a", "slow", "b"], deadline=0.5)
    assert [reply.score for reply in found] == [0.5, None, 0.5]
    assert found[1].reason is not None and found[1].reason.startswith("deadline: no score in 0.5 s")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("<html>", "malformed"),
        ("{}", "malformed"),
        ('{"choices": []}', "malformed"),
        ('{"choices": [{"message": {"content": null}}]}', "malformed"),
        ('{"choices": [{"message": {"content": "I like it"}}]}', "no score"),
        ('{"choices": [{"message": {"content": "Score: 99"}}]}', "no score"),
    ],
)
def test_malformed_replies_are_no_verdict(body, kind):
    with serving(lambda asked, n: Answer(body=body)) as service:
        (reply,) = replies(service, ["Q"])
    assert reply.score is None and reply.reason is not None and reply.reason.startswith(f"{kind}: ")
    assert "\n" not in reply.reason and len(service.questions()) == 1


def test_a_connection_that_breaks_is_tried_again(quick):
    def answer(asked, n):
        if not n:
            raise ConnectionResetError  # the handler's thread ends without a response
        return Answer("Score: 3")

    with serving(answer) as service:
        (reply,) = replies(service, ["Q"])
    assert reply.score == 0.3


def test_requests_at_a_time_are_bounded():
    def answer(asked, n):
        time.sleep(0.05)
        return Answer("Score: 5")

    with serving(answer) as service:
        found = replies(service, [f"Q{i}" for i in range(12)], concurrency=3)
    assert all(reply.score == 0.5 for reply in found) and service.most_at_once == 3


def test_equal_questions_are_asked_once_and_remembered_across_runs(tmp_path):
    memory = tmp_path / "judge.jsonl"
    with serving(lambda asked, n: Answer(f"Score: {n}")) as service:
        first = replies(service, ["a", "b", "a", "a"], memory, concurrency=1)
        assert [reply.score for reply in first] == [0.0, 0.1, 0.0, 0.0] and service.questions() == ["a", "b"]
        with memory.open("ab") as file:
            file.write(b'{"key": "x", "score": 7}\n{"key": "hal')
        again = replies(service, ["b", "a", "c"], memory)
        assert [reply.score for reply in again] == [0.1, 0.0, 0.2] and service.questions() == ["a", "b", "c"]
        other = replies(service, ["a"], memory, model="another")
        assert other[0].score == 0.3  # another judge is asked anew


def test_failures_are_not_remembered(tmp_path):
    with serving(lambda asked, n: Answer("Score: 5", 200 if n else 400)) as service:
        first = replies(service, ["Q"], tmp_path / "judge.jsonl")
        again = replies(service, ["Q"], tmp_path / "judge.jsonl")
    assert first[0].score is None and again[0].score == 0.5


def test_the_key_is_sent_and_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-1")
    memory = tmp_path / "judge.jsonl"

    def answer(asked, n):
        return Answer("Score: 5") if n else Answer(status=403, body=f"bad key {asked.headers['Authorization']}")

    with serving(answer) as service:
        found = replies(service, ["Q", "R"], memory, api_key_variable="JUDGE_KEY", concurrency=1)
    assert service.asked[-1].headers["Authorization"] == "Bearer sk-secret-1"
    assert found[0].reason == "HTTP 403: bad key Bearer ***" and found[1].score == 0.5
    assert "secret" not in memory.read_text() + repr(found)


def test_a_missing_key_is_said_first(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"^judge\.api_key_variable=JUDGE_KEY: [^\n]+$"):
        Judge(JudgeConfig(url="http://127.0.0.1:1", model="m", api_key_variable="JUDGE_KEY"))


def test_a_service_that_is_not_there_is_refused_at_once():
    judge = Judge(JudgeConfig(url="http://127.0.0.1:9/v1", model="m"))
    with pytest.raises(ConfigError, match=r"^judge\.url=http://127\.0\.0\.1:9/v1: unreachable: [^\n]+$"):
        judge.__enter__()


def test_what_waits_at_the_end_has_no_verdict():
    def answer(asked, n):
        time.sleep(0.5)
        return Answer("Score: 5")

    with serving(answer) as service:
        with Judge(settings(service, concurrency=1)) as judge:
            batch = judge.submit(["a", "b"])
        assert {reply.reason for reply in batch.result()} == {"closed"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"judge.url": None}, r"judge\.url=None: "),
        ({"judge.url": "localhost:8000"}, r"judge\.url=localhost:8000: "),
        ({"judge.model": None}, r"judge\.model=None: "),
        ({"judge.prompt": "grade it"}, r"judge\.prompt='grade it': "),
        ({"judge.pattern": "("}, r"judge\.pattern='\(': is no regular expression"),
        ({"judge.pattern": r"\d+"}, r"judge\.pattern='\\\\d\+': has 0 groups"),
        ({"judge.scale": "5,5"}, r"judge\.scale='5,5': "),
        ({"reward.terms": "accuracy"}, r"judge\.url=http://x: "),
    ],
)
def test_settings_are_checked(fields, words):
    values = {"reward.terms": "judge=1", "judge.url": "http://x", "judge.model": "m"} | fields
    values |= {"task.name": "math", "task.train_data": "rows.jsonl", "model.tokenizer": "x"}
    with pytest.raises(ConfigError, match=words):
        validate(tiny_config(**{name.replace(".", "__"): value for name, value in values.items()}))


def test_the_default_prompt_asks_for_what_the_default_pattern_finds():
    assert all(place in JUDGE_PROMPT for place in ("{prompt}", "{answer}", "{completion}"))
    assert score_in(question_of(JUDGE_PROMPT, "p", "a", "c") + "Score: 4", JudgeConfig()) == 0.4


def test_it_is_a_term_of_the_reward(tmp_path):
    """A pool with a judge: scores and failures reach the reward, the counts of failures, and the dumps."""
    rows = [{"problem": f"{i}+{i}=", "answer": f"{2 * i}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    TOKENIZER.to_hf().save_pretrained(tmp_path / "tokenizer")

    def answer(asked, n):
        good = asked.body["messages"][0]["content"].endswith("4")
        return Answer("Score: 4") if good else Answer(status=400, body="no")

    with serving(answer) as service:
        fields = {
            "task.name": "math", "task.train_data": str(tmp_path / "rows.jsonl"), "task.train_prompts": 0,
            "task.heldout_prompts": 4, "task.cache": str(tmp_path / "cache"), "prompt.template": "none",
            "model.tokenizer": str(tmp_path / "tokenizer"), "rollout.prompts": 4, "verifier.workers": 1,
            "reward.terms": "accuracy=1, judge=2", "judge.url": service.url, "judge.model": "m",
            "judge.prompt": "{prompt}{answer}|{completion}",
        }  # fmt: skip
        config = tiny_config(**{name.replace(".", "__"): value for name, value in fields.items()})
        with make_pool(config, tmp_path / "workers.log") as pool:
            task = make_task(config, load_tokenizer(config, None, None), pool)
            ids = np.array([[TOKENIZER.encode("4$"), TOKENIZER.encode("5$")]], np.int32)
            row = np.array([2])
            batch = CompletionBatch(task.train, row, ids, np.full((1, 2), 2), np.ones((1, 2), bool), 1)
            found = task.reward_fn(batch)()
            bare = task.reward_fn(batch._replace(wants_reward=False))()
        question = f"{task.train.texts[2]}{task.train.answers[2]}|"
        assert sorted(service.questions()) == [question + "4", question + "5"]
    assert found.terms["judge"][0, 0] == pytest.approx(0.4) and np.isnan(found.terms["judge"][0, 1])
    assert found.reward[0, 0] == pytest.approx(found.verdicts[0, 0] + 0.8) and np.isnan(found.reward[0, 1])
    assert found.missing["judge"] == {"HTTP 400: no": 1} and found.columns["judge"] == [["Score: 4", None]]
    values = verdicts.metrics(found)
    assert values["rewards/judge/no_verdict"] == 0.5 and values["logged/judge_tries"] == 1.0
    assert "judge" not in bare.terms and (tmp_path / "judge.jsonl").exists()
