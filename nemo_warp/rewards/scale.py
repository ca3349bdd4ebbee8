"""A reward's scale: shift, scale and clip of each score, mean and deviation over a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

KEYS = ("shift", "scale", "clip", "standardize")


@dataclass(frozen=True)
class Scale:
    """``clip((score + shift) * scale)``, then standardised over the batch.

    Attributes:
        shift, scale: of each score.
        clip: (low, high), bounds after both.
        standardize: what training does over each batch: ``none``, take the ``mean`` off, or take it
            off and divide by the ``deviation``. Measurements do not: their mean would be 0 always.
    """

    shift: float = 0.0
    scale: float = 1.0
    clip: tuple[float, float] | None = None
    standardize: str = "none"

    @classmethod
    def of(cls, reward: Mapping[str, Any]) -> Scale:
        """Of an entry of ``rewards``; keys left out keep their defaults."""
        given = {key: reward[key] for key in KEYS if reward.get(key) is not None}
        if "clip" in given:
            low, high = given["clip"]
            given["clip"] = (float(low), float(high))
        return cls(**given)

    def of_each(self, scores: np.ndarray) -> np.ndarray:
        """Shifted, scaled and clipped scores, float64 of any shape; NaN stays NaN."""
        # The very array where nothing is to be done: a reward without a scale keeps its bits.
        if self.shift == 0 and self.scale == 1 and self.clip is None:
            return scores
        scaled = (np.asarray(scores, np.float64) + self.shift) * self.scale
        return scaled if self.clip is None else np.clip(scaled, *self.clip)

    def over_batch(self, scores: np.ndarray) -> np.ndarray:
        """As `of_each`, then standardised over the scores [B] that are not NaN.

        The deviation is that of a sample (n - 1); where all scores are equal they become 0.
        """
        scaled = np.asarray(self.of_each(scores), np.float64)
        there = scaled[~np.isnan(scaled)]
        if self.standardize == "none" or not there.size:
            return scaled
        centred = scaled - there.mean()
        if self.standardize == "mean":
            return centred
        deviation = there.std(ddof=1) if there.size > 1 else 0.0
        # Rounding leaves a deviation of 1e-16 where all scores are equal.
        equal = deviation <= 1e-12 * max(1.0, float(np.abs(there).max()))
        return np.where(np.isnan(scaled), np.nan, 0.0) if equal else centred / deviation


def optimised(parts: np.ndarray, scales: list[Scale], weights: list[float]) -> np.ndarray:
    """What training maximises, float64 [B]: the weighted sum of standardised rewards.

    Args:
        parts: scores [B, K] as they were given, NaN where failed; one column a reward, more are
            left out.

    Returns:
        NaN where a reward of weight other than 0 failed.
    """
    total = np.zeros(len(parts))
    for column, scale, weight in zip(parts.T, scales, weights, strict=False):
        if weight != 0:
            total += weight * scale.over_batch(column)
    return total
