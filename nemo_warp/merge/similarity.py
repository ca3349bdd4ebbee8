"""Refusing policies that are copies of each other, as soon as it shows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np

from nemo_warp.merge.plan import GroupPlan, MergePlan
from nemo_warp.merge.results import exact_sum

SIMILAR_COSINE = 0.99
EARLY_GROUPS = 4
"""Layers, spread over the depth, that are merged first: copies are alike in all of them."""


def refuse_similar(plan: MergePlan, grams: Iterable[np.ndarray]) -> None:
    """Raise if two policies are nearly the same over everything that the matrices cover.

    Args:
        plan: of the merge.
        grams: [N, N] Gram matrices of (theta_init, deltas), to be added up.

    Raises:
        ValueError: names the two and their cosine.
    """
    if plan.options.allow_similar:
        return
    whole = exact_sum(list(grams))
    for i, j in combinations(range(len(plan.options.policies)), 2):
        cosine = _cosine(whole, i, j)
        if cosine is not None and cosine > SIMILAR_COSINE:
            raise _alike(plan, i, j, cosine)


class EarlyLook:
    """Looks at a few layers before the others are read.

    Args:
        plan: of the merge.
        groups: this process's share.

    Attributes:
        groups: the same, those first that are looked at.
    """

    def __init__(self, plan: MergePlan, groups: list[GroupPlan]):
        self._plan = plan
        self._seen: list[np.ndarray] = []
        self.groups = groups
        size = max((group.input_bytes for group in groups), default=0)
        large = [group for group in groups if 4 * group.input_bytes > size]  # norms say little
        self._wanted = EARLY_GROUPS if len(large) > 2 * EARLY_GROUPS else 0
        if self._wanted:
            places = np.linspace(0, len(large) - 1, self._wanted).astype(int)
            first = [large[place] for place in places]
            self.groups = first + [group for group in groups if group not in first]

    def at(self, grams: Iterable[np.ndarray]) -> None:
        """Take in the next of `groups`.

        Args:
            grams: of the group's units.

        Raises:
            ValueError: two policies are nearly the same in every layer looked at.
        """
        if len(self._seen) >= self._wanted or self._plan.options.allow_similar:
            return
        self._seen.append(exact_sum(list(grams)))
        if len(self._seen) < self._wanted:
            return
        for i, j in combinations(range(len(self._plan.options.policies)), 2):
            cosines = [c for gram in self._seen if (c := _cosine(gram, i, j)) is not None]
            if len(cosines) == len(self._seen) and min(cosines) > SIMILAR_COSINE:
                raise _alike(self._plan, i, j, min(cosines), f" in {len(cosines)} layers")


def _cosine(gram: np.ndarray, i: int, j: int) -> float | None:
    """Of the task vectors of two policies; None if one is zero."""
    deltas = gram[1:, 1:]
    norms = np.sqrt(deltas[i, i] * deltas[j, j])
    return deltas[i, j] / norms if norms > 0.0 else None


def _alike(plan: MergePlan, i: int, j: int, cosine: float, where: str = "") -> ValueError:
    policies = plan.options.policies
    return ValueError(
        f"{policies[i]} and {policies[j]} are nearly the same policy (cosine {cosine:.4f} of their "
        f"task vectors{where}, above {SIMILAR_COSINE}): were seeds or prompt orders shared? pass "
        "--allow-similar to merge them all the same"
    )
