"""``nemo-warp compare`` with judges that are asked: a language model, and a running reward server.

The language model is a real HTTP server of OpenAI's protocol, whose verdicts this test makes.
"""

import json
import re

import numpy as np
import pytest
from chat_server import ChatServer, chat_server, said
from reward_servers import running

from nemo_warp.cli import main
from nemo_warp.evidence.responses import write_responses
from nemo_warp.rewards.library.pairwise import verdict_of


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _responses(path, lengths):
    """P prompts, G generations: ``lengths`` [P, G] in words."""
    records = [
        {
            "prompt": f"prompt {index}",
            "prompt_index": index,
            "generation": generation,
            "response": "w" * int(length),
            "reward": float(length),
            "tokens": int(length),
        }
        for index, row in enumerate(lengths)
        for generation, length in enumerate(row)
    ]
    write_responses(path, records)
    return str(path)


def _asked(body) -> tuple[int, int, int]:
    """Number of the prompt, lengths of A and B."""
    text = body["messages"][0]["content"]
    number = re.search(r"\[Prompt\]\nprompt (\d+)", text)[1]
    shown = [re.search(rf"\[Response {side}\]\n(w*)", text)[1] for side in "AB"]
    return int(number), len(shown[0]), len(shown[1])


def _longer(body, _):
    """Prefers the longer one; prompt 3 gets no verdict when the longer one is shown first."""
    number, a, b = _asked(body)
    if number == 3 and a > b:
        return said("I cannot say.")
    words = (
        "tie" if a == b else f"{'A' if a > b else 'B'} {'much ' if abs(a - b) > 5 else ''}better"
    )
    return said(f"Verdict: A better? No.\n**Verdict:** {words}")


def _first(body, _):
    return said("Verdict: A better")


LENGTHS = np.array([[5, 9], [4, 4], [20, 3], [8, 8], [1, 2]])
OTHER = np.array([[3, 9], [5, 3], [4, 4], [2, 9], [1, 1]])


def _compare(tmp_path, server: ChatServer, *more: str):
    first = _responses(tmp_path / "a.jsonl.gz", LENGTHS)
    second = _responses(tmp_path / "b.jsonl.gz", OTHER)
    options = {"url": server.url, "cache": str(tmp_path / "cache"), "backoff_s": 0.01}
    words = ["compare", first, second, "--llm-judge", "m", "--llm-options", json.dumps(options)]
    code = main([*words, "--output", str(tmp_path / "out"), *more])
    return code, json.loads((tmp_path / "out/compare.json").read_text())["judges"]


def test_a_language_model_sees_both_orders(tmp_path, capsys):
    with chat_server(_longer) as server:
        code, judges = _compare(tmp_path, server, "--concurrency", "3")
        assert code == 0 and server.most_at_a_time <= 3
        asked = len(server.requests)
        assert 18 <= asked <= 20, "two of the questions are the same in both orders"
        text = capsys.readouterr().out
        # By hand: pairs of generations, each seen twice; prompt 3's first pair (8 against 2) has a
        # verdict in one order only, its second (8 against 9) in the other.
        seen = judges["m"]
        assert list(judges) == ["m"], "only who was asked for"
        assert (seen["wins"], seen["ties"], seen["losses"], seen["failed"]) == (9, 4, 5, 2)
        grades = [[1, 0], [-1, 1], [1.5, -1], [1.5, -1], [0, 1]]
        assert seen["preference_score"]["mean"] == pytest.approx(np.mean(grades))
        rate = [[1, 0.5], [0, 1], [1, 0], [1, 0], [0.5, 1]]
        assert seen["rate"]["mean"] == pytest.approx(np.mean(rate))
        assert seen["swap_agreement"] == 1.0
        assert "9 / 4 / 5 (2 failed)" in text and "the same verdict in both: 100.0%" in text
        assert (
            "2 verdicts are missing (the first: the judge gave no verdict: 'I cannot say.')" in text
        )
        # What was answered is not asked again; a text without a verdict was an answer, too.
        _compare(tmp_path, server)
        assert len(server.requests) == asked


def test_a_judge_that_takes_the_first_one_shown_prefers_nobody(tmp_path, capsys):
    with chat_server(_first) as server:
        code, judges = _compare(tmp_path, server, "--judge", "reward")
    assert code == 0 and set(judges) == {"reward", "m"}
    seen = judges["m"]
    assert (seen["wins"], seen["losses"], seen["rate"]["mean"]) == (10, 10, 0.5)
    assert seen["preference_score"]["mean"] == 0 and seen["swap_agreement"] == 0
    assert "the same verdict in both: 0.0% of pairs" in capsys.readouterr().out


def test_a_reward_server_is_asked_now(tmp_path, capsys):
    pytest.importorskip("pytriton")
    first = _responses(tmp_path / "a.jsonl.gz", LENGTHS)
    second = _responses(tmp_path / "b.jsonl.gz", OTHER)
    with running(tmp_path / "help", "strange_rewards:picky") as server:
        named = server.endpoint_file.with_name("endpoint_help.json")
        server.endpoint_file.rename(named)
        assert main(["compare", first, second, "--judge", str(named)]) == 0
    shown = capsys.readouterr().out
    # It refuses lengths that are multiples of 3: [5, -], [4, 4], [20, -], [8, 8], [1, 2] against
    # [-, -], [5, -], [4, 4], [2, -], [1, 1].
    assert "| judge:help |" in shown and "| reward" not in shown
    assert "6 / 2 / 2 (10 failed)" in shown


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Verdict: A much better", "A much better"),
        ("verdict: [[B]] slightly better.", "B slightly better"),
        ("Verdict: B better\nOn reflection:\n**Verdict: tie**", "tie"),
        ("A is better", ""),
        ("Verdict: C better", ""),
    ],
)
def test_verdicts_are_read_from_the_last_such_line(answer, verdict):
    assert verdict_of(answer) == verdict


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--llm-options", "[1]"], 2, "must be a JSON object"),
        (["--llm-options", "{}"], 2, "--llm-judge m: url is ''"),
        (["--llm-options", '{"url": "http://127.0.0.1:9", "color": 1}'], 2, "color"),
        (["--llm-options", '{"url": "http://x", "template": "{first}"}'], 2, "hold {second}"),
        (["--llm-options", '{"url": "http://127.0.0.1:9", "retries": 0}'], 1, "gave no verdict on"),
        (["--concurrency", "0"], 2, "--concurrency is 0"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_one_sentence(
    tmp_path, capsys, monkeypatch, words: list[str], code: int, message: str
):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    files = [_responses(tmp_path / f"{name}.jsonl.gz", LENGTHS) for name in "ab"]
    assert main(["compare", *files, "--llm-judge", "m", *words]) == code
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error
