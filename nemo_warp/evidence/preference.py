"""Side by side: which of two policies' responses a judge prefers (the paper's Table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from nemo_warp.evidence.intervals import Interval, over_prompts

GRADES = {"much better": 1.5, "better": 1.0, "slightly better": 0.5, "tie": 0.0}
"""What a verdict for the first response counts; for the second, its negative (section 4.5)."""


@dataclass(frozen=True)
class SideBySide:
    """Outcomes over prompts; the interval is of ``rate``.

    Attributes:
        wins, ties, losses: comparisons that the first policy won, tied, lost.
        failed: comparisons without a verdict; in no other number.
        rate: mean over prompts of 1 for a win, 1/2 for a tie, 0 for a loss.
    """

    wins: int
    ties: int
    losses: int
    failed: int
    rate: Interval


def by_scores(first: np.ndarray, second: np.ndarray, tie_within: float = 0.0) -> SideBySide:
    """Every response of the first against every response of the second to the same prompt.

    Args:
        first, second: scores [P, G1] and [P, G2] (or [P]) by one judge; NaN where it failed.
        tie_within: scores at most this far apart tie.

    Raises:
        ValueError: the numbers of prompts differ, or nothing can be compared.
    """
    # Transposed twice: atleast_2d puts a new axis in front, and [P] has to become [P, 1].
    first, second = (np.atleast_2d(np.asarray(x, dtype=np.float64).T).T for x in (first, second))
    if len(first) != len(second):
        raise ValueError(f"{len(first)} prompts on one side, {len(second)} on the other")
    # [P, G1, G2]: within a prompt every response meets every other's, which uses all of them.
    gap = first[:, :, None] - second[:, None, :]
    outcome = np.where(np.abs(gap) <= tie_within, 0.5, (gap > 0).astype(float))
    # NaN compares as False and would count as a loss.
    outcome = np.where(np.isnan(gap), np.nan, outcome).reshape(len(first), -1)
    return _side_by_side(outcome)


def by_verdicts(grades: np.ndarray) -> tuple[SideBySide, Interval]:
    """Verdicts of a judge who saw both texts, with the paper's preference score.

    Args:
        grades: [P, K] in `GRADES`' values, positive for the first policy; K comparisons of each
            prompt (both orders of the texts, say); NaN where the judge gave no verdict.

    Returns:
        The outcomes, and the paper's score: the mean grade over prompts.
    """
    grades = np.atleast_2d(np.asarray(grades, dtype=np.float64).T).T
    outcome = np.where(np.isnan(grades), np.nan, (np.sign(grades) + 1) / 2)
    return _side_by_side(outcome), over_prompts(grades)


def swap_agreement(grades: np.ndarray, swapped: np.ndarray) -> float:
    """Share of prompts whose verdict is the same in both orders of the texts: [P] and [P].

    Both in the first policy's favour when positive. A judge that always takes the first text it is
    shown agrees with itself never.
    """
    both = ~(np.isnan(grades) | np.isnan(swapped))
    if not both.any():
        raise ValueError("no prompt has a verdict in both orders")
    return float((np.sign(grades) == np.sign(swapped))[both].mean())


def length_controlled_rate(outcomes: np.ndarray, length_gaps: np.ndarray) -> float:
    """Win rate of the first policy at equal length, by a logistic fit.

    P(win) = sigmoid(quality + slope * tanh(gap / std(gap))), read at gap 0, as in length-controlled
    AlpacaEval (Dubois et al. 2024, arXiv 2404.04475, without its term for each instruction). A tie
    counts as half a win and half a loss.

    Args:
        outcomes: [N] in {0, 1/2, 1}.
        length_gaps: [N], length of the first response minus that of the second.

    Raises:
        ValueError: fewer than two comparisons.
    """
    outcomes, gaps = np.asarray(outcomes, float), np.asarray(length_gaps, float)
    if len(outcomes) < 2:
        raise ValueError(
            f"{len(outcomes)} comparisons, at least 2 are needed to control for length"
        )
    spread = gaps.std()
    # Bounded, so that a single very long response does not decide the slope.
    feature = np.tanh(gaps / spread) if spread > 0 else np.zeros_like(gaps)

    def loss(weights: np.ndarray) -> float:
        z = weights[0] + weights[1] * feature
        # The small penalty keeps the fit finite where one side wins always.
        return float(
            -(outcomes * special.log_expit(z) + (1 - outcomes) * special.log_expit(-z)).sum()
            + 1e-3 * (weights**2).sum()
        )

    return float(special.expit(optimize.minimize(loss, np.zeros(2), method="BFGS").x[0]))


def grades_of(verdicts: Sequence[str]) -> np.ndarray:
    """Grades of verdicts such as ``A much better``, ``B better``, ``tie``; NaN for other words."""
    grades = []
    for verdict in verdicts:
        # Language models add full stops, capitals and spaces.
        text = " ".join(verdict.lower().replace(".", " ").split())
        side, _, word = text.partition(" ")
        if text == "tie":
            grades.append(0.0)
        elif side in ("a", "b") and word in GRADES and word != "tie":
            grades.append(GRADES[word] if side == "a" else -GRADES[word])
        else:
            grades.append(np.nan)
    return np.array(grades)


def _side_by_side(outcome: np.ndarray) -> SideBySide:
    """From [P, K] of 1, 1/2, 0 and NaN."""
    return SideBySide(
        wins=int((outcome == 1).sum()),
        ties=int((outcome == 0.5).sum()),
        losses=int((outcome == 0).sum()),
        failed=int(np.isnan(outcome).sum()),
        rate=over_prompts(outcome),
    )
