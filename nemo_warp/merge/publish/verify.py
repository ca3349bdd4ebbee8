"""Reread an output and compare it with a merge computed the slow way.

Nothing is shared with the engine but the readers: whole tensors, float64 numpy, angles from whole
vectors. A sample takes the smallest group, the largest, and some in between.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.inspection import read_tensor
from nemo_warp.checkpoints.io.reading import FileCache
from nemo_warp.merge.options import STOCHASTIC
from nemo_warp.merge.plan import GroupPlan, MergePlan, TensorPlan
from nemo_warp.merge.results import UnitResult

SAMPLED_GROUPS = 4
_MAX_UNEQUAL = 1e-3


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
    count = 0
    with FileCache() as files:
        for group in groups:
            for tensor in group.tensors:
                inputs = [read_tensor(files, source) for source in tensor.sources]
                coefficients = units[tensor.unit].coefficients
                for row, eta in zip(coefficients, plan.options.etas, strict=False):
                    found = read_tensor(files, written[eta].tensors[tensor.name])
                    _compare(plan, tensor, inputs, row, found, f"{outputs[eta]}: {tensor.name}")
                count += 1
    return count


def _sample(groups: tuple[GroupPlan, ...]) -> list[GroupPlan]:
    by_size = sorted(groups, key=lambda group: group.input_bytes)
    picks = np.linspace(0, len(by_size) - 1, min(SAMPLED_GROUPS, len(by_size))).astype(int)
    return [by_size[index] for index in sorted(set(picks.tolist()))]


def _compare(
    plan: MergePlan, tensor: TensorPlan, inputs, row: np.ndarray, found, what: str
) -> None:
    true, dtype = tensor.true_rows, tensor.target.dtype
    exact = sum(
        weight * values[:true].to(torch.float64)
        for weight, values in zip(row.tolist(), inputs, strict=True)
    )
    padding = inputs[0][true:].to(dtype)
    if found.dtype != dtype or not torch.equal(found[true:], padding):
        raise CheckpointError(f"{what} has the wrong dtype or padding; delete the output")
    expected = exact.to(dtype)
    different = found[:true] != expected
    limit = 1.0 if plan.options.rounding == STOCHASTIC else _MAX_UNEQUAL
    unequal = int(different.sum())
    if unequal > max(1, limit * exact.numel()) or not _within_one_ulp(found[:true], exact):
        raise CheckpointError(
            f"{what} differs from its recomputation in {unequal} of {exact.numel()} elements; "
            "delete the output and check memory and disk of this machine"
        )


def _within_one_ulp(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether each value is one of the two nearest representable neighbours of the exact one."""
    rounded = exact.to(found.dtype)
    infinity = torch.full_like(rounded, torch.inf)
    low = torch.nextafter(rounded, -infinity)
    high = torch.nextafter(rounded, infinity)
    return bool(((low <= found) & (found <= high)).all())
