"""The trainer's side: send samples to reward servers; each gets a score, or NaN and a reason.

Every attempt reads the endpoint file anew and opens its own connection, so a server that was
restarted on another port is found, and one that belongs to another run is never asked.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nemo_warp.rewards.endpoint import Endpoint, served_name
from nemo_warp.rewards.errors import RewardError, RewardTimeoutError
from nemo_warp.rewards.scores import RewardScores
from nemo_warp.rewards.wire import Reply, Sample, check_ready, infer, problem_of
from nemo_warp.schema.shared import RewardClientSettings

log = logging.getLogger("nemo_warp.rewards")

# Seconds. A turn is answered within `_TURN_TIMEOUT_S` also by a callable that takes minutes, so
# that a server which does not answer at all is noticed soon. NeMo-Aligner waits 600000 s for one
# request (servers/http_communicator.py l.41) and does not ask again.
_MAX_BACKOFF_S = 60.0
_CONNECT_POLL_S = 0.5
_PROGRESS_S = 15.0
_TURN_TIMEOUT_S = 5.0


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
        # The pending parts share one deadline: each waits for what the parts before it have left.
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
        self.needs: tuple[str, ...] = ()  # known once connected
        # Changed by all threads without a lock: it is a guess at what fits, and any of their values
        # will do.
        self._portion = self.settings.batch_size
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
        self.needs = endpoint.needs
        log.info("reward %s: %s at %s", self.name, endpoint.model_name, endpoint.address)
        return endpoint

    def submit(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        fields: Sequence[Mapping[str, Any]] | None = None,
    ) -> RewardFuture:
        """Send samples to be scored; returns at once.

        Args:
            prompts, responses: N texts each.
            fields: what else is known of each prompt, for rewards that take it by name.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
        given = [{}] * len(prompts) if fields is None else fields
        if len(given) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but fields of {len(given)}")
        samples = [
            # Keys from the system's randomness and not from `random`: that is seeded by training,
            # and two ranks with equal seeds would take each other's scores.
            Sample(prompt, response, more, secrets.randbits(63))
            for prompt, response, more in zip(prompts, responses, given, strict=True)
        ]
        size = self.settings.batch_size
        pending: list[Future] = [
            self._pool.submit(self._score, samples[start : start + size])
            for start in range(0, len(samples), size)
        ]
        return RewardFuture(pending, RewardScores.joined)

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        fields: Sequence[Mapping[str, Any]] | None = None,
    ) -> RewardScores:
        """`submit` and wait."""
        return self.submit(prompts, responses, fields).result()

    def close(self) -> None:
        """Give up what is not scored; a request under way still ends or times out."""
        self._closing.set()
        self._pool.shutdown(wait=False)

    def _probe(self) -> tuple[Endpoint | None, str]:
        """The endpoint if its server is up, of whatever run; else what is missing."""
        endpoint = Endpoint.read(self.endpoint_file)
        if endpoint is None:
            return None, f"there is no endpoint file {self.endpoint_file} (is its server running?)"
        try:
            check_ready(endpoint)
        except RewardError as error:
            return None, str(error)
        return endpoint, ""

    def _score(self, samples: list[Sample]) -> RewardScores:
        """One batch: what was scored is kept, and only the rest asked for again."""
        found = _Found(samples)
        failures = 0
        while left := found.left(self._portion):
            if self._closing.is_set():
                found.give_up("the client was closed")
                continue
            try:
                reply = self._attempt([samples[place] for place in left])
            except RewardError as error:
                failures += 1
                log.warning("reward %s: attempt %d failed: %s", self.name, failures, error)
                self._after_failure(error, len(left))
                if failures > self.settings.retries:
                    found.give_up(str(error))
                else:
                    # An event and not sleep: `close` ends the waiting.
                    self._closing.wait(self._backoff(failures))
                continue
            failures = 0
            found.keep(left, reply, self._patience())
            # Growing slowly, halved at once: one text that takes long must not cost a time-out
            # every time.
            step = -(-self.settings.batch_size // 8)
            self._portion = min(self.settings.batch_size, self._portion + step)
        return found.scores()

    def _patience(self) -> tuple[float, str]:
        """How long a sample may make no way, and what is said of it then."""
        settings = self.settings
        limit = settings.request_timeout_s * (settings.retries + 1)
        told = f"the reward did not answer in {settings.request_timeout_s:g} s"
        return (
            limit,
            f"{told}, nor in {settings.retries} times that again" if settings.retries else told,
        )

    def _after_failure(self, error: RewardError, asked: int) -> None:
        """What did not fit the deadline is asked for in smaller portions."""
        if isinstance(error, RewardTimeoutError):
            self._portion = max(1, asked // 2)

    def _attempt(self, samples: list[Sample]) -> Reply:
        endpoint = Endpoint.read(self.endpoint_file)
        if endpoint is None:
            raise RewardError(f"its server has stopped: there is no {self.endpoint_file}")
        endpoint.check_identity(self.run_id, self.fingerprint)
        timeout = self.settings.request_timeout_s
        # A server that knows keys answers within its turn, however long the callable takes.
        keyed = "keys" in endpoint.inputs
        return infer(endpoint, samples, max(timeout, _TURN_TIMEOUT_S) if keyed else timeout)

    def _backoff(self, attempt: int) -> float:
        wait = min(_MAX_BACKOFF_S, self.settings.backoff_s * 2 ** (attempt - 1))
        # Jitter: all data-parallel ranks lose a server in the same moment, and would come back
        # together.
        return wait * random.uniform(0.5, 1.5)


class _Found:
    """What is known of the samples of a batch so far."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._values = np.full(len(samples), np.nan)
        self._reasons = [problem_of(sample) for sample in samples]
        # A text that cannot be encoded is a failure of its own and never sent.
        self._left = [place for place, reason in enumerate(self._reasons) if not reason]

    def left(self, portion: int) -> list[int]:
        """The next places to ask for."""
        return self._left[:portion]

    def keep(self, places: list[int], reply: Reply, patience: tuple[float, str]) -> None:
        """Take what is finished, and fail what has made no way for too long."""
        limit, told = patience
        for row, place in enumerate(places):
            if reply.stalled[row] < 0:
                self._values[place] = reply.scores.scores[row]
                self._reasons[place] = reply.scores.reasons[row]
            elif reply.stalled[row] > limit:
                self._reasons[place] = told
        waiting = {place for row, place in enumerate(places) if 0 <= reply.stalled[row] <= limit}
        asked = set(places)
        self._left = [place for place in self._left if place not in asked or place in waiting]

    def give_up(self, reason: str) -> None:
        """Fail the rest."""
        for place in self._left:
            self._reasons[place] = reason
        self._left = []

    def scores(self) -> RewardScores:
        """Of the whole batch."""
        return RewardScores.of(self._values, self._reasons)
