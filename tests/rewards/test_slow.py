"""Slow callables: how many calls at a time, what a deadline leaves, what is dropped."""

import asyncio
import itertools
import json
import math
import threading
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
from reward_servers import Server, running
from test_serving import QUICK, _connected

from nemo_warp import exit_codes
from nemo_warp.rewards import scoring
from nemo_warp.rewards.client import RewardClient
from nemo_warp.rewards.endpoint import Endpoint
from nemo_warp.rewards.scoring import Desk, Sample, Scoring

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

SLOW = "strange_rewards:slow"
TEXTS = ["x" * (number + 1) for number in range(256)]


def _calls(server: Server) -> int:
    file = server.mark.with_suffix(".calls")
    return file.stat().st_size if file.exists() else 0


def _samples(texts):
    return [Sample("", text, {}) for text in texts]


def _all(desk: Desk, texts, deadline_s: float = 30.0):
    """Ask again and again, as a client does."""
    samples, keys = _samples(texts), list(range(len(texts)))
    found, end = {}, time.monotonic() + deadline_s
    while keys:
        assert time.monotonic() < end, f"{len(keys)} are still missing"
        states = desk.ask(keys, [samples[key] for key in keys])
        found |= {k: o for k, (o, seconds) in zip(keys, states, strict=True) if seconds < 0}
        keys = [key for key in keys if key not in found]
    return [found[key] for key in range(len(texts))]


class Counting:
    """Length of the text; knows how many calls there were at a time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.most, self.calls = seconds, 0, 0, 0
        self.lock = threading.Lock()

    def begin(self) -> None:
        with self.lock:
            self.now, self.calls = self.now + 1, self.calls + 1
            self.most = max(self.most, self.now)

    def end(self, response: str) -> float:
        with self.lock:
            self.now -= 1
        return float(len(response))

    def __call__(self, prompt: str, response: str) -> float:
        self.begin()
        time.sleep(self.seconds)
        return self.end(response)


class AsyncCounting(Counting):
    async def __call__(self, prompt: str, response: str) -> float:
        self.begin()
        await asyncio.sleep(self.seconds)
        return self.end(response)


@pytest.mark.parametrize("kind", [Counting, AsyncCounting])
def test_as_many_calls_at_a_time_as_stated(kind):
    score = kind(0.02)
    outcomes = _all(Desk(Scoring(score, concurrency=8)), TEXTS[:64])
    assert [value for value, _ in outcomes] == [float(n) for n in range(1, 65)]
    assert score.most == 8 and score.calls == 64


def test_a_batch_is_no_longer_than_stated():
    lengths = []

    def score(prompts, responses):
        lengths.append(len(responses))
        return [float(len(r)) for r in responses]

    outcomes = Desk(Scoring(score, together=10)).score(_samples(TEXTS[:35]))
    assert [value for value, _ in outcomes] == [float(n) for n in range(1, 36)]
    assert lengths == [10, 10, 10, 5]


def test_what_nobody_asks_for_is_dropped_and_may_be_asked_for_again(monkeypatch):
    monkeypatch.setattr(scoring, "LEASE_S", 0.1)
    score = Counting(0.05)
    desk = Desk(Scoring(score))
    desk.ask(range(100), _samples(TEXTS[:100]))  # and its client dies
    time.sleep(1.0)
    left = score.calls
    assert left < 50, "the rest was dropped"
    # In line behind them, another client is served at once; and the first may come back.
    assert desk.score(_samples(["abc"])) == [(3.0, "")]
    assert score.calls == left + 1
    monkeypatch.setattr(scoring, "LEASE_S", 60.0)
    states = desk.ask([99], _samples(["x" * 100]))
    while states[0][1] >= 0:
        states = desk.ask([99], _samples(["x" * 100]))
    assert states[0][0] == (100.0, "")


def test_a_call_that_hangs_is_told_from_a_line_that_moves():
    def score(prompt: str, response: str) -> float:
        if response == "hang":
            threading.Event().wait()
        time.sleep(0.02)
        return float(len(response))

    desk, hanging = Desk(Scoring(score, concurrency=2)), _samples(["hang"])
    desk.ask([1000], hanging)
    started = time.monotonic()
    assert len(_all(desk, TEXTS[:50])) == 50
    ((outcome, seconds),) = desk.ask([1000], hanging)
    assert math.isnan(outcome[0]) and not outcome[1]
    assert seconds >= time.monotonic() - started - 0.5


def test_stopping_lets_go_of_those_who_wait():
    desk = Desk(Scoring(Counting(0.2)))
    threading.Timer(0.3, desk.stop).start()
    outcomes = desk.score(_samples(TEXTS[:100]))
    scored = [value for value, why in outcomes if not why]
    assert scored == [1.0, 2.0][: len(scored)]
    assert outcomes[-1][1] == "the reward server is stopping" and math.isnan(outcomes[-1][0])


def test_64_texts_of_50_ms_and_256_within_a_deadline_of_5_s(pytriton, tmp_path):
    """The issue's conditions: 3.2 s one after the other; 20.5 s and not one score."""
    with running(tmp_path / "a", SLOW, "--concurrency", "16") as server:
        client = _connected(server, replace(QUICK, batch_size=32, in_flight=4, retries=1))
        started = time.monotonic()
        scores = client.score([""] * 64, TEXTS[:64])
        took = time.monotonic() - started
        assert scores.scores.tolist() == [float(n) for n in range(1, 65)]
        assert took < 3.2, "not one after the other"
    with running(tmp_path / "b", SLOW) as server:
        settings = replace(QUICK, request_timeout_s=5, retries=1, batch_size=32, in_flight=4)
        scores = _connected(server, settings).score([""] * 256, TEXTS)
        assert scores.scores.tolist() == [float(n) for n in range(1, 257)]
        assert _calls(server) == 256, "none was scored twice"

        # A client leaves; then the server is stopped while another one waits.
        client = _connected(server, settings)
        left = client.submit([""] * 256, TEXTS)
        time.sleep(1.0)
        client.close()
        assert left.result(timeout=10).failed.any()
        client = _connected(server, replace(settings, retries=0))
        waiting = client.submit([""] * 256, TEXTS)
        time.sleep(0.5)
        assert server.stop() == exit_codes.DONE
        scores = waiting.result(timeout=30)
        assert scores.failed.any() and np.isnan(scores.scores[scores.failed]).all()
        assert _calls(server) < 256 + 256, "what nobody waited for was dropped"


def test_a_server_without_keys_is_asked_in_portions_that_fit(pytriton, tmp_path):
    with running(tmp_path, SLOW) as server:
        old = asdict(Endpoint.read(server.endpoint_file))
        server.endpoint_file.write_text(
            json.dumps({k: v for k, v in old.items() if k not in ("inputs", "needs", "takes")})
        )
        settings = replace(QUICK, request_timeout_s=1, retries=5, batch_size=64, in_flight=1)
        client = RewardClient(server.endpoint_file, settings)
        scores = client.score([""] * 64, TEXTS[:64])
        assert scores.scores.tolist() == [float(n) for n in range(1, 65)]


def test_keys_of_clients_never_meet(vader):
    """Ranks seed Python alike: equal keys would mix up their samples."""
    import random

    random.seed(7)
    clients = [_connected(vader) for _ in range(2)]
    keys = []
    for client in clients:
        random.seed(7)
        client._score = lambda samples: keys.extend(s.key for s in samples)  # type: ignore[method-assign,assignment]
        client.submit([""] * 4, TEXTS[:4])._pending[0].result(10)
    assert len(keys) == len(set(keys)) == 8
    assert all(0 <= key < 1 << 63 for key in itertools.chain(keys))
