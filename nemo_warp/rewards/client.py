"""The trainer's side: send samples to reward servers, and get scores or honest failures back.

Every attempt reads the endpoint file anew and opens its own connection, so a server that was
restarted on another port is found, and one that belongs to another run is never asked.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemo_warp.rewards.endpoint import Endpoint, served_name
from nemo_warp.rewards.errors import RewardError
from nemo_warp.rewards.scores import RewardScores
from nemo_warp.rewards.settings import RewardClientSettings
from nemo_warp.rewards.wire import check_ready, infer

log = logging.getLogger("nemo_warp.rewards")

_MAX_BACKOFF_S = 60.0
_CONNECT_POLL_S = 0.5
_PROGRESS_S = 15.0


class RewardFuture:
    """Scores on their way. Unlike a plain future it never raises for a failed request."""

    def __init__(self, pending: Sequence[Any], join: Callable[[list[Any]], RewardScores]):
        self._pending = pending
        self._join = join

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return all(part.done() for part in self._pending)

    def result(self, timeout: float | None = None) -> RewardScores:
        """Wait for the scores.

        Raises:
            TimeoutError: not there within ``timeout`` seconds; ask again later.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        left = (
            None if deadline is None else max(0.0, deadline - time.monotonic())
            for _ in iter(int, 1)
        )
        return self._join([part.result(next(left)) for part in self._pending])


class RewardClient:
    """Client of one reward server.

    Args:
        endpoint_file: written by the server once it is ready.
        settings: deadlines, retries and batch sizes.
        name: for messages.
        run_id: refuse a server of another run; None accepts the first one found.
        fingerprint: refuse another reward; None accepts the first one found. Either way a server
            that replaces it later must have the same.
    """

    def __init__(
        self,
        endpoint_file: str | Path,
        settings: RewardClientSettings | None = None,
        *,
        name: str = "reward",
        run_id: str | None = None,
        fingerprint: str | None = None,
    ):
        if run_id is not None:
            served_name(run_id, "")
        self.endpoint_file = Path(endpoint_file)
        self.settings = settings or RewardClientSettings()
        self.name = name
        self.run_id = run_id
        self.fingerprint = fingerprint
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(
            self.settings.in_flight, thread_name_prefix=f"reward-{name}"
        )

    def connect(self) -> Endpoint:
        """Wait until the server is ready, and pin its identity.

        Raises:
            RewardError: it is another run's or another reward's server, or it is not ready within
                ``ready_deadline_s``.
        """
        started = told = time.monotonic()
        while True:
            endpoint, problem = self._probe()
            if endpoint is not None:
                break
            waited = time.monotonic() - started
            if waited > self.settings.ready_deadline_s:
                raise RewardError(
                    f"reward {self.name!r} was not ready within "
                    f"{self.settings.ready_deadline_s:g} s: {problem}"
                )
            if time.monotonic() - told > _PROGRESS_S:
                told = time.monotonic()
                log.info("reward %s: waiting for %.0f s: %s", self.name, waited, problem)
            time.sleep(_CONNECT_POLL_S)
        endpoint.check_identity(self.run_id, self.fingerprint)
        self.run_id, self.fingerprint = endpoint.run_id, endpoint.fingerprint
        log.info("reward %s: %s at %s", self.name, endpoint.model_name, endpoint.address)
        return endpoint

    def submit(self, prompts: Sequence[str], responses: Sequence[str]) -> RewardFuture:
        """Send samples to be scored; returns at once."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
        size = self.settings.batch_size
        batches = (
            (list(prompts[start : start + size]), list(responses[start : start + size]))
            for start in range(0, len(prompts), size)
        )
        pending: list[Future] = [self._pool.submit(self._score, *batch) for batch in batches]
        return RewardFuture(pending, RewardScores.joined)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> RewardScores:
        """`submit` and wait."""
        return self.submit(prompts, responses).result()

    def close(self) -> None:
        """Give up what has not been sent; a request under way still ends or times out."""
        self._closing.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _probe(self) -> tuple[Endpoint | None, str]:
        """The endpoint if the server it names is up, whoever's it is; else what is missing."""
        endpoint = Endpoint.read(self.endpoint_file)
        if endpoint is None:
            return None, f"there is no endpoint file {self.endpoint_file} (is its server running?)"
        try:
            check_ready(endpoint)
        except RewardError as error:
            return None, str(error)
        return endpoint, ""

    def _score(self, prompts: list[str], responses: list[str]) -> RewardScores:
        """One batch, with retries; a failure to the end is every sample's failure."""
        reason = "the client was closed"
        for attempt in range(self.settings.retries + 1):
            if attempt and self._closing.wait(self._backoff(attempt)):
                break
            try:
                return self._attempt(prompts, responses)
            except UnicodeError as error:
                return RewardScores.all_failed(len(prompts), f"not a text: {error}")
            except RewardError as error:
                reason = str(error)
            log.warning("reward %s: attempt %d failed: %s", self.name, attempt + 1, reason)
        return RewardScores.all_failed(len(prompts), reason)

    def _attempt(self, prompts: list[str], responses: list[str]) -> RewardScores:
        endpoint = Endpoint.read(self.endpoint_file)
        if endpoint is None:
            raise RewardError(f"its server has stopped: there is no {self.endpoint_file}")
        endpoint.check_identity(self.run_id, self.fingerprint)
        return infer(endpoint, prompts, responses, self.settings.request_timeout_s)

    def _backoff(self, attempt: int) -> float:
        wait = min(_MAX_BACKOFF_S, self.settings.backoff_s * 2 ** (attempt - 1))
        return wait * random.uniform(0.5, 1.5)


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
