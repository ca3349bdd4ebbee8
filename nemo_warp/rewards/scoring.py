"""Score samples with a callable: they wait in a queue, a stated number is scored at a time.

A client that asks gets the scores that are known so far, and asks again for the rest. A sample that
no client has asked for within `LEASE_S` is dropped before the callable gets it: its client gave up,
or has ended.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_warp.rewards.callables import (
    Outcome,
    Scorer,
    is_async,
    outcomes_together,
    score_one,
    score_one_async,
)
from nemo_warp.rewards.fields import FieldsTaken
from nemo_warp.rewards.workers import AsyncWorkers, Workers

LEASE_S = 5.0
"""How long a sample stays wanted after it was asked for; clients ask several times a second."""
_TURN_S = 0.25
# PyTriton hands one batch over at a time: what was sent beside new samples should not wait long.
_FIRST_TURN_S = 0.02
_DROPPED: Outcome = (math.nan, "nobody waited for it any more")
_STOPPING: Outcome = (math.nan, "the reward server is stopping")


@dataclass(eq=False, slots=True)
class Sample:
    """A text to score.

    Attributes:
        prompt, response, fields: what the callable gets.
        asked: when it was first asked for (s, monotonic).
        wanted_until: when it is dropped if the callable has not begun it.
        began: when the callable began it.
        outcome: what came of it; None until then.
    """

    prompt: str
    response: str
    fields: Mapping[str, Any]
    asked: float = field(default_factory=time.monotonic)
    wanted_until: float = math.inf
    began: float | None = None
    outcome: Outcome | None = None

    def begin(self) -> bool:
        """Whether to score it now; one that no client asks for any more is dropped here."""
        now = time.monotonic()
        # Asked when it would begin, not when it was handed in: a client that gave up (its time-out,
        # a requeue) leaves nothing that costs GPU time or money.
        if now > self.wanted_until:
            self.outcome = _DROPPED
            return False
        self.began = now
        return True

    @property
    def dropped(self) -> bool:
        """No client asked for it in time; if one asks again, it is scored anew."""
        return self.outcome is _DROPPED


class Scoring:
    """Scores samples with a callable, in the order in which they come.

    Args:
        score: the callable; a coroutine function is called on an event loop of its own.
        concurrency: calls at a time.
        together: texts in one call of a callable that takes lists; 0 for one that takes texts.
    """

    def __init__(self, score: Scorer, concurrency: int = 1, together: int = 0) -> None:
        if concurrency < 1:
            raise ValueError(f"the concurrency must be at least 1, got {concurrency}")
        if together and is_async(score):
            raise ValueError("a callable that takes lists cannot be a coroutine function")
        self.taken = FieldsTaken.by(score)
        self.last_done = time.monotonic()
        self.changed = threading.Condition()  # told when something is finished
        self._score = score
        self._together = together
        self._workers: Workers | AsyncWorkers
        self._work: Callable[[list[Sample]], Any]
        if is_async(score):
            self._workers, self._work = AsyncWorkers(concurrency, "callable"), self._one_async
        else:
            self._workers = Workers(concurrency, "callable")
            self._work = self._list if together else self._one_by_one
        # One worker keeps the order by itself, and is handed over fewer things.
        self._share = together or (1 if concurrency > 1 or is_async(score) else 64)

    def submit(self, samples: Sequence[Sample]) -> None:
        """Line them up; each one's ``outcome`` is set when it is known."""
        for start in range(0, len(samples), self._share):
            self._workers.submit(self._work, list(samples[start : start + self._share]))

    def _one_by_one(self, samples: list[Sample]) -> None:
        for sample in samples:
            if sample.begin():
                texts = sample.prompt, sample.response
                self._settle(sample, score_one(self._score, self.taken, *texts, sample.fields))
        self._tell()

    async def _one_async(self, samples: list[Sample]) -> None:
        for sample in samples:
            if sample.begin():
                texts = sample.prompt, sample.response
                outcome = await score_one_async(self._score, self.taken, *texts, sample.fields)
                self._settle(sample, outcome)
        self._tell()

    def _list(self, samples: list[Sample]) -> None:
        wanted = [sample for sample in samples if sample.begin()]
        texts = [s.prompt for s in wanted], [s.response for s in wanted]
        fields = [s.fields for s in wanted]
        outcomes = outcomes_together(self._score, self.taken, *texts, fields)
        for sample, outcome in zip(wanted, outcomes, strict=True):
            self._settle(sample, outcome)
        self._tell()

    def _settle(self, sample: Sample, outcome: Outcome) -> None:
        self.last_done = time.monotonic()
        sample.outcome = outcome

    def _tell(self) -> None:
        """After a list of samples, not after each: 4096 fast ones a second are many."""
        with self.changed:
            self.changed.notify_all()

    def wait(self, samples: Sequence[Sample], seconds: float) -> bool:
        """Until all have an outcome; whether they have."""
        end = time.monotonic() + seconds
        finished = 0
        with self.changed:
            while True:
                while finished < len(samples) and samples[finished].outcome is not None:
                    finished += 1
                left = end - time.monotonic()
                if finished == len(samples) or left <= 0:
                    return finished == len(samples)
                self.changed.wait(left)


State = tuple[Outcome, float]
"""What is known of a sample: its outcome, or (NaN, "") and the seconds that it has made no way.

These are the seconds that its own call has lasted or, while it is in line, for which the callable
has finished nothing. They are negative where there is an outcome.
"""


class Desk:
    """Where samples are handed in and asked for. Used by one thread at a time."""

    def __init__(self, scoring: Scoring) -> None:
        self.scoring = scoring
        self._stopping = threading.Event()
        self._open: dict[int, Sample] = {}
        self._swept = time.monotonic()

    def stop(self) -> None:
        """Let waiting calls return."""
        self._stopping.set()

    def score(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Wait until all are scored: for clients that ask once."""
        self.scoring.submit(samples)
        while not self.scoring.wait(samples, _TURN_S) and not self._stopping.is_set():
            pass
        for sample in samples:
            # What has not begun by now is dropped by whichever worker comes to it.
            sample.wanted_until = -math.inf
        return [_STOPPING if s.outcome is None else s.outcome for s in samples]

    def ask(self, keys: Sequence[int], samples: Sequence[Sample]) -> list[State]:
        """What is known of the samples by now; new ones (by key) are lined up first."""
        now = time.monotonic()
        self._sweep(now)
        fresh = []
        for key, sample in zip(keys, samples, strict=True):
            known = self._open.get(key)
            # Asked for again after a lost answer: it is the same sample, and is not scored twice.
            if known is None or known.dropped:
                self._open[key] = sample
                fresh.append(sample)
            self._open[key].wanted_until = now + LEASE_S
        self.scoring.submit(fresh)
        asked = [self._open[key] for key in keys]
        # For a moment, since most callables answer at once; the rest is asked for again.
        self.scoring.wait(asked, _FIRST_TURN_S if fresh else _TURN_S)
        states = [self._state(sample) for sample in asked]
        for key, (_, seconds) in zip(keys, states, strict=True):
            if seconds < 0:
                # Settled and told. If the answer is lost on its way, the key is new and it is
                # scored again.
                del self._open[key]
        return states

    def _state(self, sample: Sample) -> State:
        outcome = sample.outcome
        if outcome is not None and outcome is not _DROPPED:
            return outcome, -1.0
        # One that waits in line is not stalled as long as the callable finishes others.
        since = sample.began or max(sample.asked, self.scoring.last_done)
        return (math.nan, ""), time.monotonic() - since

    def _sweep(self, now: float) -> None:
        """Forget samples that no client asks for any more."""
        if now - self._swept > LEASE_S:
            self._swept = now
            self._open = {k: s for k, s in self._open.items() if s.wanted_until > now}
