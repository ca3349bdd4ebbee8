"""What merging a group leaves behind, in a form that travels between processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nemo_warp.checkpoints.io.parts import Part
from nemo_warp.merge.plan import MergePlan


@dataclass
class UnitResult:
    """One angle's worth of weights.

    Attributes:
        gram: [N, N] Gram matrix of (theta_init, delta_1 .. delta_M, delta_anchor if any).
        coefficients: [K + 1, N] over the inputs: one row per eta, then the merged task vector
            theta_slerp - theta_anchor.
        projections: [K] inner products of the rounded outputs with that task vector.
        changed: [K] elements that differ from theta_init.
        num_elements: elements merged, padding left out.
    """

    gram: np.ndarray
    coefficients: np.ndarray
    projections: np.ndarray
    changed: np.ndarray
    num_elements: int

    def add(self, other: UnitResult) -> None:
        """Add another group's share of the same unit (granularity ``model``)."""
        self.projections = self.projections + other.projections
        self.changed = self.changed + other.changed
        self.num_elements += other.num_elements

    def task_vector_square(self) -> float:
        """Squared norm of the merged task vector."""
        vector = self._task_vector()
        return float(vector @ self.gram @ vector)

    def realised_etas(self, towards: int) -> list[float | None]:
        """Projection of (rounded output - anchor) on the exact task vector, over its square.

        Equals eta when rounding does no harm. None where the task vector is zero.

        Args:
            towards: index of the LITI anchor among the inputs; 0 is theta_init.
        """
        vector, square = self._task_vector(), self.task_vector_square()
        anchor = _in_deltas(np.eye(len(vector))[towards])
        if square <= 0.0:
            return [None] * len(self.projections)
        # All by the Gram matrix: inner products of combinations need no second pass over the
        # weights.
        offset = anchor @ self.gram @ vector
        return [float((projection - offset) / square) for projection in self.projections]

    def _task_vector(self) -> np.ndarray:
        """The merged task vector's coefficients over (theta_init, deltas)."""
        vector = _in_deltas(self.coefficients[-1])
        vector[0] = 0.0  # the coefficients over the inputs sum to zero, up to rounding
        return vector


@dataclass
class GroupResult:
    """What is known about a group once it is on disk.

    Attributes:
        units: unit -> result; its Gram covers the whole unit.
        parts: per output, the bytes written and their CRC-32s.
        crcs: per input, tensor name -> CRC-32 of its true rows in logical order.
    """

    name: str
    units: dict[str, UnitResult] = field(default_factory=dict)
    parts: list[list[Part]] = field(default_factory=list)
    crcs: list[dict[str, int]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values; float64 survives JSON exactly."""
        units = {
            name: [
                *(unit.gram.tolist(), unit.coefficients.tolist(), unit.projections.tolist()),
                *([int(count) for count in unit.changed], unit.num_elements),
            ]
            for name, unit in self.units.items()
        }
        return {"group": self.name, "units": units, "parts": self.parts, "crcs": self.crcs}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> GroupResult:
        """The inverse of `to_json`."""
        units = {
            name: UnitResult(
                np.array(gram), np.array(rows), np.array(moved), np.array(changed), size
            )
            for name, (gram, rows, moved, changed, size) in raw["units"].items()
        }
        parts = [[Part(*values) for values in written] for written in raw["parts"]]
        return cls(raw["group"], units, parts, raw["crcs"])


@dataclass
class MergeResult:
    """What a merge did and measured.

    Attributes:
        groups: in canonical order.
        timing: see `nemo_warp.merge.report.meter.Meter.read`.
    """

    plan: MergePlan
    groups: list[GroupResult]
    timing: dict[str, Any] = field(default_factory=dict)

    @property
    def units(self) -> dict[str, UnitResult]:
        """Unit name -> result, in canonical order; a unit spread over groups is added up."""
        units: dict[str, UnitResult] = {}
        for group in self.groups:
            for name, unit in group.units.items():
                if name in units:
                    units[name].add(unit)
                else:
                    units[name] = UnitResult(**vars(unit))
        return units


def exact_sum(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Element-wise sum of equally shaped float64 matrices, rounded once: independent of order."""
    columns = np.stack(matrices).reshape(len(matrices), -1).T
    return np.array([math.fsum(column) for column in columns]).reshape(matrices[0].shape)


def _in_deltas(over_inputs: np.ndarray) -> np.ndarray:
    """Coefficients over (theta_init, deltas) of a combination of (theta_init, thetas)."""
    # sum_n a_n theta_n = (sum_n a_n) theta_init + sum_m a_m delta_m.
    return np.concatenate([[over_inputs.sum()], over_inputs[1:]])
