"""Callables of strangers: whatever they do, one sample's trouble stays one sample's."""

import asyncio
import math
import sys
import threading
import time

import numpy as np
import pytest

from nemo_warp.rewards.callables import load_callable, score_samples, score_together
from nemo_warp.rewards.mixture import RewardMixture
from nemo_warp.rewards.scoring import Desk, Scoring
from nemo_warp.rewards.serve import text_infer
from nemo_warp.rewards.triton import answer
from nemo_warp.rewards.workers import Workers


class UnspeakableError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def misbehaving(prompt, response):
    """What the response names."""
    if response == "cancelled":
        raise asyncio.CancelledError("the judge did not answer")
    if response == "exits":
        sys.exit("bad grammar")
    if response == "unspeakable":
        raise UnspeakableError
    if response == "surrogate":
        raise ValueError("half of one: \ud83d")
    return float(len(response))


RESPONSES = ["good", "cancelled", "exits", "unspeakable", "surrogate", "fine"]


@pytest.mark.parametrize("together", [False, True])
def test_only_the_sample_that_fails_fails(together):
    prompts = ["p"] * len(RESPONSES)
    if together:
        scores, reasons = score_together(
            lambda p, r: [misbehaving(*sample) for sample in zip(p, r, strict=True)],
            prompts,
            RESPONSES,
        )
    else:
        scores, reasons = score_samples(misbehaving, prompts, RESPONSES)
    assert scores[0] == scores[-1] == 4.0 and all(math.isnan(score) for score in scores[1:-1])
    assert reasons[0] == reasons[-1] == ""
    assert reasons[1] == "CancelledError: the judge did not answer"
    assert reasons[2] == "SystemExit: bad grammar"
    assert reasons[3] == "UnspeakableError (which cannot be shown)"
    sent = answer(np.asarray(scores, np.float32), reasons)["reasons"]
    assert sent[4, 0] == b"ValueError: half of one: \\ud83d"


def test_a_callable_may_run_an_event_loop_of_its_own():
    """PyTriton calls from a thread in which a loop runs already."""

    def asks(prompt, response):
        return asyncio.run(asyncio.sleep(0.001, 0.75))

    infer = text_infer(Desk(Scoring(asks)))

    async def as_pytriton_does():
        return infer(np.array([[b"text"]], dtype=object))

    assert asyncio.run(as_pytriton_does())["rewards"].tolist() == [[0.75]]


def test_workers_call_side_by_side_and_pass_errors_on():
    workers, barrier = Workers(2, "test"), threading.Barrier(2, timeout=10)
    both = [workers.submit(barrier.wait) for _ in range(2)]  # each waits for the other
    assert sorted(future.result(10) for future in both) == [0, 1]
    with pytest.raises(SystemExit):
        workers.submit(sys.exit, 3).result(10)
    assert workers.submit(time.monotonic).result(10) > 0, "the thread goes on"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise SystemExit('no key')", "cannot import broken_reward: SystemExit: no key"),
        ("1/0", "cannot import broken_reward: ZeroDivisionError"),
        ("score = 3", "broken_reward has no 'score' to call"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_sentence(tmp_path, monkeypatch, text, message):
    (tmp_path / "broken_reward.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_reward", raising=False)
    with pytest.raises(ValueError, match=message):
        load_callable("broken_reward:score", {})


def test_a_shared_server_may_be_of_any_run():
    """Somebody else's server is known by its fingerprint; one's own by its run, too."""
    rewards = [
        {"name": "own", "weight": 1.0, "endpoint": "a.json"},
        {"name": "pool", "weight": 1.0, "endpoint": "b.json", "shared": True, "fingerprint": "ab"},
    ]
    own, pool = RewardMixture.from_config(rewards, {}, run_id="me").clients
    assert (own.run_id, pool.run_id, pool.fingerprint) == ("me", None, "ab")
    for client in (own, pool):
        client.close()
