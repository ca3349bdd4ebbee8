"""Reread an output and compare it with a merge computed the slow way.

Nothing is shared with the engine but the readers and the coefficients: slabs in float64, rounded by
torch. A sample takes the smallest group, the largest, and some in between.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.io.direct import pages
from nemo_warp.checkpoints.io.parts import Part
from nemo_warp.checkpoints.io.reading import (
    FileCache,
    check_records,
    check_replicas,
    read_slab,
    slab_room,
)
from nemo_warp.checkpoints.io.slabs import Slab, slabs_of
from nemo_warp.checkpoints.logical import LogicalTensor
from nemo_warp.merge.options import STOCHASTIC
from nemo_warp.merge.plan import GroupPlan, MergePlan, TensorPlan
from nemo_warp.merge.results import UnitResult

SAMPLED_GROUPS = 4
# Share of elements that may differ in the last place: the engine fuses multiplications and
# additions, which moves a value across a rounding boundary now and then.
_MAX_UNEQUAL = 1e-3
_REMEDY = "check memory and disk of this machine and merge again; nothing was published"


def verify_outputs(
    plan: MergePlan, units: dict[str, UnitResult], outputs: dict[float, Path], how: str
) -> int:
    """Check outputs against a recomputation.

    Args:
        plan: of the merge.
        units: results of the merge, for their coefficients.
        outputs: eta -> where the output is, final or not.
        how: ``sample`` or ``full``.

    Returns:
        Number of tensors compared per output.

    Raises:
        CheckpointError: an output cannot be read back or differs; names the tensor.
    """
    groups = plan.groups if how == "full" else _sample(plan.groups)
    written = {eta: open_checkpoint(path) for eta, path in outputs.items()}
    tensors = [tensor for group in groups for tensor in group.tensors]
    with FileCache() as files:
        for tensor in tensors:
            targets = [written[eta].tensors[tensor.name] for eta in plan.options.etas]
            rows = units[tensor.unit].coefficients[:-1]
            found = _Comparison(files, plan, tensor, rows, targets).unequal()
            for eta, count in zip(plan.options.etas, found, strict=True):
                # Stochastic rounding gives one of the two neighbours by design: any element may
                # differ.
                limit = 1.0 if plan.options.rounding == STOCHASTIC else _MAX_UNEQUAL
                if count > max(1, limit * tensor.target.numel):
                    raise CheckpointError(
                        f"{outputs[eta]}: {tensor.name} differs from its recomputation in {count} "
                        f"of {tensor.target.numel} elements; {_REMEDY}"
                    )
    return len(tensors)


def _sample(groups: tuple[GroupPlan, ...]) -> list[GroupPlan]:
    by_size = sorted(groups, key=lambda group: group.input_bytes)
    picks = np.linspace(0, len(by_size) - 1, min(SAMPLED_GROUPS, len(by_size))).astype(int)
    return [by_size[index] for index in sorted(set(picks.tolist()))]


class _Comparison:
    """One tensor in all outputs against the inputs, slab by slab.

    Args:
        files: to read from.
        plan: of the merge.
        tensor: what is compared.
        coefficients: [K, N] over the inputs.
        targets: the tensor in each output.
    """

    def __init__(
        self,
        files: FileCache,
        plan: MergePlan,
        tensor: TensorPlan,
        coefficients: np.ndarray,
        targets: list[LogicalTensor],
    ) -> None:
        self._files, self._plan, self._tensor = files, plan, tensor
        self._coefficients, self._targets = coefficients, targets
        self._parts: list[Part] = []

    def unequal(self) -> list[int]:
        """Per output, how many elements differ from the recomputation by the last place.

        Raises:
            CheckpointError: one differs by more, or in its padding or dtype.
        """
        tensor = self._tensor
        counts = [0] * len(self._targets)
        for slab in slabs_of(0, tensor.true_rows, tensor.target.cols):
            inputs = [self._read(source, slab).to(torch.float64) for source in tensor.sources]
            for k, target in enumerate(self._targets):
                weights = self._coefficients[k].tolist()
                exact = sum(w * values for w, values in zip(weights, inputs, strict=True))
                found = self._read(target, slab)
                if target.dtype != tensor.target.dtype or not _within_one_ulp(found, exact):
                    raise CheckpointError(
                        f"{tensor.name} differs from its recomputation; {_REMEDY}"
                    )
                counts[k] += int((found != exact.to(found.dtype)).sum())
        for slab in slabs_of(tensor.true_rows, tensor.target.rows, tensor.target.cols):
            padding = self._read(tensor.sources[0], slab).to(tensor.target.dtype.of_torch())
            for target in self._targets:  # as bits: padding may hold NaNs
                if not torch.equal(_bits(self._read(target, slab)), _bits(padding)):
                    raise CheckpointError(f"{tensor.name} has another padding; {_REMEDY}")
        check_records(self._files, [*tensor.sources, *self._targets], self._parts)
        return counts

    def _read(self, tensor: LogicalTensor, slab: Slab) -> torch.Tensor:
        room = pages(slab_room(tensor, slab))
        rows, parts = read_slab(self._files, tensor, slab, room)
        check_replicas(self._files, tensor, slab, rows)
        self._parts += parts
        return torch.from_numpy(rows).view(tensor.dtype.of_torch())


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


def _within_one_ulp(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether each value is one of the two nearest representable neighbours of the exact one."""
    rounded = exact.to(found.dtype)
    infinity = torch.full_like(rounded, torch.inf)
    low = torch.nextafter(rounded, -infinity)
    high = torch.nextafter(rounded, infinity)
    return bool(((low <= found) & (found <= high)).all())
