"""What the measured inner products decide: coefficients, and refusing policies that are copies."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from nemo_warp.core.merging import OppositeTaskVectorsError, liti_coefficients, merge_coefficients
from nemo_warp.merge.plan import MergePlan
from nemo_warp.merge.results import MergeResult, exact_sum

SIMILAR_COSINE = 0.99


def unit_coefficients(plan: MergePlan, unit: str, gram: np.ndarray) -> np.ndarray:
    """[K + 1, N] coefficients over the inputs: one row per eta, then the merged task vector.

    Raises:
        OppositeTaskVectorsError: names the unit.
    """
    options, size = plan.options, 1 + len(plan.options.policies)
    try:
        merged = merge_coefficients(options.method, gram[:size, :size], options.weight)
    except OppositeTaskVectorsError as error:
        raise OppositeTaskVectorsError(f"{unit}: {error}") from None
    padded = np.concatenate([merged, np.zeros(len(gram) - size)])
    towards = 0 if options.liti_towards is None else size
    rows = [liti_coefficients(padded, eta, towards) for eta in options.etas]
    task_vector = padded.copy()
    task_vector[towards] -= 1.0
    return np.stack([*rows, task_vector])


def refuse_similar(result: MergeResult) -> None:
    """Raise if two policies are nearly the same over the whole model.

    Raises:
        ValueError: names the two and their cosine.
    """
    policies = result.plan.options.policies
    deltas = exact_sum([unit.gram for unit in result.units.values()])[1:, 1:]
    for i, j in combinations(range(len(policies)), 2):
        norms = np.sqrt(deltas[i, i] * deltas[j, j])
        if norms > 0.0 and deltas[i, j] / norms > SIMILAR_COSINE:
            raise ValueError(
                f"{policies[i]} and {policies[j]} are nearly the same policy (cosine "
                f"{deltas[i, j] / norms:.4f} of their task vectors, above {SIMILAR_COSINE}): were "
                "seeds or prompt orders shared? pass --allow-similar to merge them all the same"
            )
