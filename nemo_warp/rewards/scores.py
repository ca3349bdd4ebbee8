"""Scores of a batch, and the budget of failures a run may have."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nemo_warp.rewards.errors import RewardFailureRateError
from nemo_warp.rewards.scale import Scale


@dataclass(frozen=True)
class RewardScores:
    """What became of N samples, in the order they were submitted.

    Attributes:
        scores: float64 [N]; NaN where the sample failed, so that it cannot pass for a reward.
        failed: bool [N].
        reasons: why a sample failed; "" where it did not.
        parts: of a mixture, the unweighted scores [N] of each reward by name.
    """

    scores: np.ndarray
    failed: np.ndarray
    reasons: list[str]
    parts: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, values: np.ndarray, reasons: Sequence[str]) -> RewardScores:
        """From a server's answer: values [N], where anything that is not finite has failed."""
        values = np.asarray(values, np.float64)
        failed = ~np.isfinite(values) | np.array([bool(reason) for reason in reasons], bool)
        told = [
            reason or f"the reward server returned {value}" if bad else ""
            for value, reason, bad in zip(values, reasons, failed, strict=True)
        ]
        return cls(np.where(failed, np.nan, values), failed, told)

    @classmethod
    def all_failed(cls, num_samples: int, reason: str) -> RewardScores:
        """A batch that was never scored."""
        return cls.of(np.full(num_samples, np.nan), [reason] * num_samples)

    @classmethod
    def joined(cls, batches: Sequence[RewardScores]) -> RewardScores:
        """Consecutive batches as one."""
        return cls.of(
            np.concatenate([batch.scores for batch in batches] or [np.empty(0)]),
            [reason for batch in batches for reason in batch.reasons],
        )

    @property
    def failure_rate(self) -> float:
        """Share of the samples that failed; 0 for an empty batch."""
        return float(self.failed.mean()) if len(self.failed) else 0.0


def weighted_sum(
    parts: dict[str, RewardScores],
    weights: dict[str, float],
    scales: Mapping[str, Scale] | None = None,
) -> RewardScores:
    """Sum of weight * score over the rewards; a sample fails if any reward of weight != 0 fails.

    Args:
        parts: scores by reward, as they were given.
        weights: factors, by reward.
        scales: what each score becomes before it is weighted.
    """
    # A reward of weight 0 is only watched: 0 * NaN would fail the sample.
    counted = [name for name, weight in weights.items() if weight != 0]
    num_samples = len(next(iter(parts.values())).failed)
    scores = np.zeros(num_samples)
    for name in counted:
        scale = (scales or {}).get(name, Scale())
        scores += weights[name] * scale.of_each(parts[name].scores)
    reasons = [
        "; ".join(f"{name}: {why}" for name in counted if (why := parts[name].reasons[sample]))
        for sample in range(num_samples)
    ]
    total = RewardScores.of(scores, reasons)
    unweighted = {name: part.scores for name, part in parts.items()}
    return RewardScores(total.scores, total.failed, total.reasons, unweighted)


class FailureBudget:
    """Counts failures among the last ``window`` samples and raises when there are too many.

    The limit is ``max_failure_rate * window`` failures, also before the window has filled: a few
    unlucky first samples do not stop a run, a dead server does within its first batches.
    """

    def __init__(self, max_failure_rate: float, window: int):
        if not 0 <= max_failure_rate <= 1:
            raise ValueError(f"max_failure_rate must be in [0, 1], got {max_failure_rate}")
        if window < 1:
            raise ValueError(f"failure_window must be at least 1 sample, got {window}")
        self.max_failure_rate = max_failure_rate
        self._recent: deque[bool] = deque(maxlen=window)

    def record(self, failed: Iterable[bool], reasons: Sequence[str] = ()) -> None:
        """Count one batch.

        Raises:
            RewardFailureRateError: more failures in the window than the limit.
        """
        self._recent.extend(bool(sample) for sample in failed)
        failures, window = sum(self._recent), self._recent.maxlen or 1
        if failures > self.max_failure_rate * window:
            last = next((reason for reason in reversed(reasons) if reason), "unknown")
            raise RewardFailureRateError(
                f"{failures} of the last {len(self._recent)} rewards failed, more than "
                f"{self.max_failure_rate:.0%} of {window} (the last one: {last}); mend the reward "
                "server and run again"
            )
