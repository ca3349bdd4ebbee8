"""From options to published outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nemo_warp.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_warp.core.merging import OppositeTaskVectorsError, liti_coefficients, merge_coefficients
from nemo_warp.merge.engine import Engine, MergedGroup, exact_sum
from nemo_warp.merge.options import MergeOptions
from nemo_warp.merge.output import Output, combine_parts
from nemo_warp.merge.plan import GroupPlan, MergePlan, make_plan
from nemo_warp.merge.provenance import provenance_bytes


@dataclass
class UnitResult:
    """One angle's worth of weights: measured inner products and what came of them."""

    gram: np.ndarray
    coefficients: np.ndarray
    projections: np.ndarray
    changed: np.ndarray
    num_elements: int


@dataclass
class MergeResult:
    """What a merge did.

    Attributes:
        units: unit name -> result, in canonical order.
    """

    plan: MergePlan
    units: dict[str, UnitResult] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def open_inputs(options: MergeOptions) -> tuple[Checkpoint, ...]:
    """Open all inputs; a checkpoint given twice is opened once."""
    opened = {path: open_checkpoint(path) for path in dict.fromkeys(options.inputs)}
    return tuple(opened[path] for path in options.inputs)


def run(options: MergeOptions, plan: MergePlan) -> MergeResult:
    """Write and publish all outputs of a plan.

    Raises:
        CheckpointError: damaged or non-finite input data; nothing is published.
        OppositeTaskVectorsError: names the layer; nothing is published.
    """
    outputs = [Output(options.outputs[eta], plan.image) for eta in options.etas]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    total = plan.input_bytes + len(outputs) * sum(group.output_bytes for group in plan.groups)
    bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="merge")
    engine = Engine(plan, outputs, bar.update)
    try:
        result = _run_groups(plan, engine, outputs)
    except BaseException:
        engine.close()
        for output in outputs:
            output.discard()
        raise
    finally:
        bar.close()
        torch.set_num_threads(threads)
    engine.close()
    for output in outputs:
        output.publish(options.overwrite)
    return result


def _run_groups(plan: MergePlan, engine: Engine, outputs: list[Output]) -> MergeResult:
    fixed = []
    for output in outputs:
        output.create()
        fixed.append(output.write_fixed())
    result = MergeResult(plan)
    parts = [[] for _ in outputs]
    for index, group in enumerate(plan.groups):
        engine.load(group)
        if index + 1 < len(plan.groups):
            engine.prefetch(plan.groups[index + 1])
        grams = engine.grams(group)
        coefficients = {unit: unit_coefficients(plan, unit, gram) for unit, gram in grams.items()}
        merged = engine.merge(group, coefficients)
        for known, new in zip(parts, merged.parts, strict=True):
            known.extend(new)
        _record(result, group, grams, coefficients, merged)
    for output, crcs, written in zip(outputs, fixed, parts, strict=True):
        output.seal(crcs | combine_parts(written), provenance_bytes(plan))
    return result


def unit_coefficients(plan: MergePlan, unit: str, gram: np.ndarray) -> np.ndarray:
    """[K + 1, N] coefficients over the inputs: one row per eta, then the merged task vector."""
    options, num_policies = plan.options, len(plan.options.policies)
    size = 1 + num_policies
    try:
        merged = merge_coefficients(options.method, gram[:size, :size], options.weight)
    except OppositeTaskVectorsError as error:
        raise OppositeTaskVectorsError(f"{unit}: {error}") from None
    padded = np.concatenate([merged, np.zeros(len(gram) - size)])
    towards = 0 if options.liti_towards is None else size
    rows = [liti_coefficients(padded, eta, towards) for eta in options.etas]
    task_vector = padded.copy()
    task_vector[0] -= 1.0
    return np.stack([*rows, task_vector])


def _record(result: MergeResult, group: GroupPlan, grams, coefficients, merged: MergedGroup):
    for unit, gram in grams.items():
        count = sum(t.true_rows * t.target.cols for t in group.tensors if t.unit == unit)
        result.units[unit] = UnitResult(
            gram, coefficients[unit], merged.projections[unit], merged.changed[unit], count
        )


__all__ = ["exact_sum", "make_plan", "open_inputs", "run"]
