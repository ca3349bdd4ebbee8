"""Rewards that people bring: mathematics, programs, a language model's rating."""

import json
import math
import sys
import threading
import time

import pytest
from chat_server import chat_server, said
from reward_servers import running

from nemo_warp.rewards.callables import fingerprint, load_callable, score_samples
from nemo_warp.rewards.client import RewardClient
from nemo_warp.rewards.library.programs import PassesTests, program_of
from nemo_warp.rewards.scoring import Desk, Sample, Scoring
from nemo_warp.schema.shared import RewardClientSettings

LIBRARY = "nemo_warp.rewards.library"
GOOD = "Sure:\n```python\ndef f(x):\n    return 2 * x\n```\nThat is all."


def load(name, **options):
    return load_callable(f"{LIBRARY}.{name}", options)


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("42", "The answer is 42.", True),
        ("42", "The answer is 43.", False),
        ("42", "I do not know", False),
        ("#### 72", "48/2 = 24, and 48+24 = 72 clips. \\boxed{72}", True),
        ("\\frac{1}{2}", "\\boxed{\\frac{2}{4}}", True),
        ("\\frac{1}{2}", "It is $0.5$", True),
        ("x^2+1", "$1+x^2$", True),
        ("1/3", "0.333", False),
        ("A", "\\boxed{A}", True),
    ],
)
def test_answers_in_mathematics_are_compared_by_value(answer, response, right):
    pytest.importorskip("math_verify")
    from nemo_warp.rewards.library.mathematics import equal

    assert equal(answer, response) is right


def test_mathematics_is_checked_in_a_process_that_can_be_killed():
    """As served: in threads, where math-verify's own time limits do not work."""
    pytest.importorskip("math_verify")
    score = load("mathematics:Answer", seconds=5, right=2.0)
    bomb = "\\boxed{9^{9^{9^{9^{9}}}}}"
    fields = [{"answer": 7}, {"answer": "9^{9^{9^{9}}}"}, {"answer": ""}, {}, {"answer": "8"}]
    samples = [
        Sample("p", text, more)
        for text, more in zip(["\\boxed{7}", bomb, "1", "1", "\\boxed{7}"], fields, strict=True)
    ]
    outcomes = Desk(Scoring(score)).score(samples)
    assert [value for value, _ in outcomes[::4]] == [2.0, 0.0]
    assert all(math.isnan(value) for value, _ in outcomes[1:4])
    assert outcomes[1][1] == "TimeoutError: no result within 5 s"
    assert "the answer '' cannot be read" in outcomes[2][1]
    assert "no field 'answer'" in outcomes[3][1]
    assert fingerprint(f"{LIBRARY}.mathematics:Answer", {"right": 2.0}) != fingerprint(
        f"{LIBRARY}.mathematics:Answer", {}
    )


@pytest.mark.parametrize(
    ("response", "tests", "passes"),
    [
        (GOOD, ["assert f(2) == 4", "assert f(0) == 0"], True),
        (GOOD, ["assert f(2) == 4", "assert f(1) == 1"], False),
        (GOOD, "assert f(3) == 6", True),
        ("print(int(input()) * 2)", [{"input": "21\n", "output": "42"}], True),
        ("print(43)", [{"input": "21\n", "output": "42"}], False),
        ("import sys; sys.stderr.write('a warning')", ["x = 1"], True),
        ("import sys; sys.exit(0)", ["assert False"], False),
        ("import os; os._exit(0)", ["assert False"], False),
        ("def (", ["x = 1"], False),
        ("while True: pass", ["x = 1"], False),
        ("x = bytearray(1 << 30)", ["x = 1"], False),
        ("open('x', 'wb').write(bytes(1 << 22))", ["x = 1"], False),
        ("print('0' * (1 << 22))", ["x = 1"], False),
        ("import os; assert 'SECRET' not in os.environ", ["x = 1"], True),
    ],
)
def test_programs_pass_their_tests_within_limits(monkeypatch, response, tests, passes):
    monkeypatch.setenv("SECRET", "x")
    # 5 s are for a busy machine; only the endless loop takes them.
    score = PassesTests(seconds=5, memory_mib=512, files_mib=1)
    assert score("p", response, tests=tests) == float(passes)


def test_a_program_leaves_nothing_behind(tmp_path):
    late = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    child = f"import subprocess\nsubprocess.Popen([{sys.executable!r}, '-c', {late!r}])"
    score = PassesTests(share=True, seconds=30)
    assert score("p", f"```python\n{child}\n```", tests=["x = 1", "assert False"]) == 0.5
    time.sleep(4)
    assert not (tmp_path / "late").exists(), "its children are killed"


def test_what_cannot_be_run_is_no_score():
    scores, reasons = score_samples(
        PassesTests(),
        ["p"] * 4,
        [GOOD] * 4,
        [{"tests": [], "x": 1}, {"tests": ["1"], "language": "cpp"}, {"tests": [3]}, {}],
    )
    assert all(map(math.isnan, scores))
    assert "tests must be texts of Python" in reasons[0] and reasons[0] == reasons[2]
    assert "'cpp' cannot be run" in reasons[1] and "no field 'tests'" in reasons[3]
    with pytest.raises(ValueError, match="there is no program 'no-such-jail'"):
        load("programs:PassesTests", prefix=["no-such-jail"])
    for options in ({"prefix": ["false"]}, {"memory_mib": 1}):
        with pytest.raises(ValueError, match="a program that must pass its test does not"):
            load("programs:PassesTests", **options)


def test_the_program_is_the_last_block():
    assert program_of("```\na\n```\ntext\n```py\nb\n```") == "b\n"
    assert program_of("```python\nunfinished") == "unfinished"


def _rating(body, number):
    """The length of the response, as a judge would say it."""
    text = body["messages"][-1]["content"]
    response = text.rpartition("[Response]\n")[2].strip()
    if response == "silent":
        return said("I would rather not say.")
    if response == "eleven":
        return said("Rating: 11")
    if response == "forbidden":
        return 400, {}, {"error": {"message": "too long"}}
    if response == "garbage":
        return 200, {}, b"<html>"
    return said(f"It could be Rating: 1.\nRating: {len(response)}")


def _judged(score, responses, **more):
    desk = Desk(Scoring(score, concurrency=16))
    return desk.score([Sample("p {response}", response, more) for response in responses])


def test_a_language_models_rating_is_a_score_and_nothing_else_is(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    responses = ["abc", "silent", "eleven", "forbidden", "garbage", "abcde"]
    with chat_server(_rating) as server:
        score = load("judge:Rating", model="m", url=server.url, cache=str(tmp_path))
        outcomes = _judged(score, responses)
        assert [value for value, why in outcomes if not why] == [3.0, 5.0]
        reasons = [why for _, why in outcomes if why]
        assert "gave no rating: 'I would rather not say.'" in reasons[0]
        assert "rating 11 is not from 1 to 10" in reasons[1]
        assert "answered 400" in reasons[2] and "too long" in reasons[2]
        assert "no choices[0].message.content" in reasons[3]
        assert len(server.requests) == 6, "a refusal is not asked again"
        assert set(server.keys) == {"Bearer secret-key"}
        body = server.requests[0]
        assert (body["model"], body["temperature"]) == ("m", 0.0)
        assert "[Prompt]\np {response}\n" in body["messages"][0]["content"], "filled in once"
        # Another server process with the same directory asks only what has no answer yet.
        again = load("judge:Rating", model="m", url=server.url, cache=str(tmp_path))
        assert [value for value, why in _judged(again, responses) if not why] == [3.0, 5.0]
        assert len(server.requests) == 8 and again.client.from_cache == 4
        other = load("judge:Rating", model="n", url=server.url, cache=str(tmp_path))
        assert _judged(other, ["abc"]) == [(3.0, "")] and len(server.requests) == 9
    assert not any("secret-key" in file.read_text() for file in tmp_path.rglob("*.json"))


def test_a_judge_is_asked_side_by_side_and_again_when_it_says_later(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    barrier, seen, lock = threading.Barrier(8), {}, threading.Lock()

    def answer(body, number):
        text = body["messages"][-1]["content"]
        with lock:
            seen[text] = seen.get(text, 0) + 1
        if seen[text] == 1:
            barrier.wait(60)  # none of the eight is answered before all are here
            if number % 2:
                return 429, {"Retry-After": "0"}, {}
            return 503, {}, b"busy"
        return said("Rating: 7")

    with chat_server(answer) as server:
        score = load("judge:Rating", model="m", url=server.url, backoff_s=0.01)
        outcomes = _judged(score, [f"response {number}" for number in range(8)])
        assert outcomes == [(7.0, "")] * 8
        assert server.most_at_a_time == 8 and len(server.requests) == 16
    gone = load("judge:Rating", model="m", url=server.url, backoff_s=0.01, retries=1)
    ((value, why),) = _judged(gone, ["x"])
    assert math.isnan(value) and "could not be asked" in why and "(2 attempts)" in why


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model"),
        ({"model": "m"}, "set OPENAI_BASE_URL"),
        ({"model": "m", "url": "ftp://x"}, "expected http"),
        ({"model": "m", "url": "http://x", "template": "{prompt}"}, "does not hold {response}"),
        ({"model": "m", "url": "http://x", "pattern": "("}, "no regular expression"),
        ({"model": "m", "url": "http://x", "low": 3, "high": 1}, "expected low < high"),
        ({"model": "m", "url": "http://x", "colour": 1}, "colour"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(monkeypatch, options, message):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match=message):
        load("judge:Rating", **options)


def test_where_a_judge_is_does_not_decide_what_it_says(monkeypatch):
    options = {"model": "m", "url": "http://a/v1", "cache": "/tmp/a"}
    elsewhere = {"model": "m", "url": "http://b/v1", "timeout_s": 5}
    name = f"{LIBRARY}.judge:Rating"
    assert fingerprint(name, options) == fingerprint(name, elsewhere)
    assert fingerprint(name, options) != fingerprint(name, {**options, "model": "n"})


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_judge_is_served_many_questions_at_a_time(pytriton, tmp_path, monkeypatch):
    """PyTriton, an event loop, fields in the template, and the client's patience together."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def answer(body, number):
        time.sleep(0.3)
        asked, _, told = body["messages"][-1]["content"].partition("|")
        return said(f"Rating: {len(asked) + int(told)}")

    with chat_server(answer) as server:
        options = {"model": "m", "url": server.url, "template": "{response}|{level}"}
        words = ["--options", json.dumps(options), "--concurrency", "16"]
        with running(tmp_path, f"{LIBRARY}.judge:Rating", *words) as served:
            client = RewardClient(served.endpoint_file, RewardClientSettings(request_timeout_s=10))
            client.connect()
            responses, fields = ["abc", "abcd"] * 16, [{"level": n % 4} for n in range(32)]
            scores = client.score(["p"] * 32, responses, fields)
            client.close()
        expected = [len(r) + f["level"] for r, f in zip(responses, fields, strict=True)]
        assert scores.scores.tolist() == expected
        assert 2 <= server.most_at_a_time <= 16
