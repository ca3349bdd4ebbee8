"""Best of N, its KL, and pass@k: what sampling more gives without training."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import gammaln


def best_of(scores: np.ndarray, n: int, values: np.ndarray | None = None) -> np.ndarray:
    """Expected best of ``n`` responses for each prompt, unbiased from N >= n of them: [P].

    The mean over all subsets of size n of their maximum: sum_i C(i-1, n-1) / C(N, n) * s_(i) over
    the scores in ascending order.

    Args:
        scores: [P, N], no NaN: a best of N cannot be known with a score missing.
        values: [P, N] of another number of each response, whose expectation over the best is wanted
            in place of the score; among equal scores the later response counts as better.

    Raises:
        ValueError: fewer than ``n`` responses, or a score that failed.
    """
    scores = _complete(scores, n)
    # Stable, so that ties are ordered the same way everywhere.
    order = np.argsort(scores, axis=1, kind="stable")
    ordered = np.take_along_axis(scores if values is None else np.asarray(values), order, axis=1)
    rank = np.arange(1, scores.shape[1] + 1)
    # Logarithms: C(10000, 5000) is no float64, the ratio of two such numbers is.
    return ordered @ np.exp(_log_choose(rank - 1, n - 1) - _log_choose(scores.shape[1], n))


def best_of_kl(n: int) -> float:
    """KL of best-of-n to the policy it samples from, in nats: at most log n - (n - 1) / n.

    Equal where no two responses tie (Beirami et al. 2024, arXiv 2401.01879: an upper bound else).
    """
    return math.log(n) - (n - 1) / n


def pass_at(correct: np.ndarray, k: int) -> np.ndarray:
    """Probability that one of ``k`` responses is right, for each prompt: [P].

    1 - C(N - c, k) / C(N, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    Args:
        correct: [P, N] of 0 and 1.

    Raises:
        ValueError: fewer than ``k`` responses, a failed score, or one that is neither 0 nor 1.
    """
    correct = _complete(correct, k)
    if not np.isin(correct, (0, 1)).all():
        raise ValueError("pass@k needs rewards of 0 and 1 only")
    total, right = correct.shape[1], correct.sum(1)
    return 1 - np.exp(_log_choose(total - right, k) - _log_choose(total, k))


def _complete(scores: np.ndarray, n: int) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not 1 <= n <= scores.shape[1]:
        found = scores.shape[1] if scores.ndim == 2 else 1
        raise ValueError(
            f"{found} responses a prompt, but {n} are asked for: evaluate with more generations"
        )
    # A missing score is no low score: with it left out the maximum would be of fewer responses.
    if np.isnan(scores).any():
        raise ValueError("a score is missing: leave out the prompts whose scores failed")
    return scores


def _log_choose(n: np.ndarray | int, k: int) -> np.ndarray:
    """Log C(n, k), minus infinity where k > n."""
    n = np.asarray(n, dtype=np.float64)
    inside = np.maximum(n - k, 0)
    value = gammaln(n + 1) - gammaln(k + 1) - gammaln(inside + 1)
    return np.where(n >= k, value, -np.inf)
