"""Means with 95 % intervals: bootstrap over prompts, Student's t over seeds.

Prompts are the unit that is drawn anew: two responses to one prompt are not independent, so they
are averaged first. A comparison of two policies on the same prompts is paired: the differences are
drawn anew, which takes out what makes a prompt easy or hard for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9999
"""Resamples of the bootstrap; an interval's ends move by about 1 % of its width with the seed."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval.

    Attributes:
        mean: the estimate.
        low, high: ends of the 95 % interval; NaN where there is one observation only.
        count: independent observations: prompts, or seeds.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict[str, float | int | None]:
        """Plain values; None where there is no number (one seed has no interval)."""
        numbers = {"mean": self.mean, "low": self.low, "high": self.high}
        plain = {name: None if np.isnan(n) else float(n) for name, n in numbers.items()}
        return {**plain, "count": self.count}

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of zero."""
        return self.low > 0 or self.high < 0


def over_prompts(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean over prompts with its bootstrap interval (BCa; Efron 1987).

    Args:
        values: float [P] or [P, G] (G generations of each prompt); NaN marks a score that failed.
            A prompt's mean is over what it has; a prompt without any score is left out.
        seed: of the resampling, so that the same file gives the same interval.

    Raises:
        ValueError: no prompt has a score.
    """
    means = _prompt_means(np.asarray(values, dtype=np.float64))
    if len(means) == 0:
        raise ValueError("no prompt has a score to average")
    mean = float(means.mean())
    if len(means) == 1:
        return Interval(mean, np.nan, np.nan, 1)
    if np.ptp(means) <= 1e-12 * max(1.0, abs(mean)):  # BCa divides by the spread
        return Interval(mean, mean, mean, len(means))
    found = stats.bootstrap(
        (means,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        # BCa corrects bias and skew: rewards near their upper bound have a skewed mean.
        method="BCa",
        random_state=np.random.default_rng(seed),
        # Resamples are drawn in batches of 2^22 numbers (32 MB); all 9999 at once would take 80 kB
        # for each prompt.
        batch=max(1, 2**22 // len(means)),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), len(means))


def paired_difference(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Interval:
    """Mean of first - second over prompts that both have a score for.

    Args:
        first, second: float [P] or [P, G], row p of both belonging to the same prompt; the numbers
            of generations may differ.

    Raises:
        ValueError: the numbers of prompts differ, or no prompt is scored on both sides.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} prompts on one side, {len(second)} on the other")
    # NaN on one side makes the difference NaN: that prompt is left out of both.
    return over_prompts(_row_means(first) - _row_means(second), seed)


def over_seeds(values: np.ndarray) -> Interval:
    """Mean over runs that differ in their seed, with Student's t interval.

    Few seeds are the rule (3 to 5), where a bootstrap would be far too narrow.
    """
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, np.nan, np.nan, len(values))
    # sem divides by n - 1, as t wants it.
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * stats.sem(values)
    return Interval(mean, float(mean - half), float(mean + half), len(values))


def _row_means(values: np.ndarray) -> np.ndarray:
    """Mean of each prompt's scored generations, NaN where there is none: [P]."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 1:
        return values
    scored = ~np.isnan(values)
    # By hand: np.nanmean warns for a row without any number, and warnings are errors in the tests.
    count = scored.sum(1)
    total = np.where(scored, values, 0.0).sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _prompt_means(values: np.ndarray) -> np.ndarray:
    means = _row_means(values)
    return means[~np.isnan(means)]
