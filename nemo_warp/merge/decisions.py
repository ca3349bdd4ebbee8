"""What the measured inner products decide: the coefficients of everything that is written."""

from __future__ import annotations

import numpy as np

from nemo_warp.core.merging import OppositeTaskVectorsError, liti_coefficients, merge_coefficients
from nemo_warp.merge.plan import MergePlan


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
    # The LITI anchor is an input of its own, in no angle: its coefficient begins at 0.
    padded = np.concatenate([merged, np.zeros(len(gram) - size)])
    towards = 0 if options.liti_towards is None else size
    etas = unit_etas(plan, unit)
    rows = [liti_coefficients(padded, eta, towards) for eta in etas]
    task_vector = padded.copy()
    # theta_merged - theta_anchor: what eta scales, and what realised etas are measured along.
    task_vector[towards] -= 1.0
    return np.stack([*rows, task_vector])


def unit_etas(plan: MergePlan, unit: str) -> list[float]:
    """The etas of a unit: those of the outputs, times the unit's own factor if there is one."""
    factor = plan.eta_factors.get(unit, 1.0)
    return [eta * factor for eta in plan.options.etas]
