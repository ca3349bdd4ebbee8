"""Comparing fronts: reward at equal KL, hypervolume, the point at a KL budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


def reward_at(kls: Sequence[float], rewards: Sequence[float], kl: float) -> float:
    """Reward at ``kl`` nats, linear between measured points; NaN outside of them."""
    order = np.argsort(kls, kind="stable")
    x, y = np.asarray(kls, float)[order], np.asarray(rewards, float)[order]
    # Never beyond the measured points: what a front does there is not known.
    return float(np.interp(kl, x, y)) if len(x) and x[0] <= kl <= x[-1] else float("nan")


def hypervolume(
    kls: Sequence[float], rewards: Sequence[float], kl_limit: float, reward_floor: float
) -> float:
    """Area that the points dominate: below their best reward so far, above the floor, up to a KL.

    The integral over x in [0, kl_limit] of max(0, best reward among points with KL <= x, minus
    ``reward_floor``): the hypervolume in two dimensions, with (kl_limit, reward_floor) as reference
    point. Unit: reward times nats. Points beyond the limit do not count.
    """
    order = np.argsort(kls, kind="stable")
    area, best, left = 0.0, 0.0, 0.0
    for x, y in zip(np.asarray(kls, float)[order], np.asarray(rewards, float)[order], strict=True):
        x = max(x, 0.0)  # a sampled KL near 0 may come out negative
        if x >= kl_limit:
            break
        area += best * (x - left)
        best, left = max(best, y - reward_floor), x
    return area + best * (kl_limit - left)


@dataclass(frozen=True)
class Found:
    """A point of the front at a KL budget: its place, and its measured KL in nats."""

    kappa: float
    kl: float


def at_budget(
    measure: Callable[[float], float],
    known: Sequence[tuple[float, float]],
    budget: float,
    tolerance: float,
    max_measurements: int = 12,
) -> Found:
    """The largest kappa whose KL does not pass the budget, to a tolerance in nats.

    KL grows with kappa on the fronts that were measured (roughly as its square). Starting from
    points that are known, the bracket around the budget is narrowed by linear interpolation, and by
    halving where that would hardly move; every new place is measured.

    Args:
        measure: KL to SFT in nats at a kappa; on the same prompts and random numbers every time.
        known: (kappa, KL) of points already measured, at least two.
        budget: nats.
        tolerance: a point within ``tolerance`` below the budget is good enough.

    Raises:
        ValueError: the budget lies outside the known points, or is not met to the tolerance.
    """
    points = sorted(known)
    below = [p for p in points if p[1] <= budget]
    above = [p for p in points if p[1] > budget]
    if not below or not above:
        low, high = min(kl for _, kl in points), max(kl for _, kl in points)
        raise ValueError(
            f"a budget of {budget:g} nats is outside of the front, whose KL goes from {low:.3g} to "
            f"{high:.3g}; measure more kappas"
        )
    # The last point under the budget and the first over it behind that one: where KL does not grow
    # with kappa, an earlier crossing would give the smaller policy.
    left = max(below)
    right = min((p for p in above if p[0] > left[0]), default=None)
    if right is None:
        raise ValueError(
            f"KL does not grow with kappa around {budget:g} nats: it is {left[1]:.3g} at kappa "
            f"{left[0]:g} and more at smaller ones; choose a kappa by hand"
        )
    for _ in range(max_measurements):
        if budget - left[1] <= tolerance:
            return Found(*left)
        # Aimed half a tolerance below the budget, so that a small error of the line still lands
        # inside. Rounded, because kappa is printed, put into file names and typed again.
        kappa = round(_between(left, right, budget - tolerance / 2), 6)
        kl = measure(kappa)
        if kl <= budget:
            left = (kappa, kl)
        else:
            right = (kappa, kl)
    raise ValueError(
        f"no kappa within {tolerance:g} nats below {budget:g} in {max_measurements} measurements: "
        f"nearest {left[0]:.4f} with {left[1]:.3g} nats; allow a larger tolerance"
    )


def _between(left: tuple[float, float], right: tuple[float, float], kl: float) -> float:
    """Linear interpolation of kappa, kept away from the ends of the bracket."""
    share = (kl - left[1]) / (right[1] - left[1])
    # Without it regula falsi creeps towards the budget from one side.
    return left[0] + min(max(share, 0.1), 0.9) * (right[0] - left[0])
