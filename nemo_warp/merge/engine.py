"""Two passes over a group: read it and measure its angles, then write all outputs.

A group (a layer) stays in memory between the passes, slab by slab, and each slab that is written
makes room for one of the next group: while one group is written, the next is read. Both passes are
spread over threads of their own, more of them than processors, since most wait for the disk.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from nemo_warp.checkpoints.direct import ALIGNMENT
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.logical import LogicalTensor, Patch
from nemo_warp.checkpoints.parts import Part, coalesce, joined_crc32
from nemo_warp.checkpoints.reading import FileCache, check_records
from nemo_warp.checkpoints.slabs import Slab, slabs_of
from nemo_warp.merge.kernel import Inputs, Kernel, Measured, room_bytes, rounding_noise
from nemo_warp.merge.memory import Memory
from nemo_warp.merge.options import STOCHASTIC
from nemo_warp.merge.output import Output
from nemo_warp.merge.passes import Pass
from nemo_warp.merge.plan import GroupPlan, MergePlan, TensorPlan
from nemo_warp.merge.results import GroupResult, UnitResult, exact_sum

WAITING_THREADS = 4
"""Threads of each pass beside the workers, since most wait for the disk at any time."""

WRITING_THREADS = 24
"""Threads that do nothing but write: a disk is as fast as it has requests to choose from."""

READ_AHEAD = 0.05
"""How much of a group is read before the one before leaves room for it, of one model's share."""

OUTPUT_BYTES = 1 << 22
"""Memory of a thread for merged rows of all outputs, about: the peak does not depend on K."""


@dataclass
class GroupMeasure:
    """What the first pass finds.

    Attributes:
        grams: unit -> [1 + M (+ 1), ...] Gram matrix of (theta_init, deltas).
        crcs: per input, tensor name -> CRC-32 of its true rows in logical order.
        inputs: slab by slab; `Engine.merge` gives their memory back.
    """

    grams: dict[str, np.ndarray]
    crcs: list[dict[str, int]]
    inputs: list[Inputs]


class Engine:
    """Runs groups of a plan.

    Args:
        plan: what to merge.
        outputs: one per eta, in the order of the plan's etas.
        progress: called with a number of bytes read or written, from any thread.
    """

    def __init__(self, plan: MergePlan, outputs: list[Output], progress: Callable[[int], Any]):
        self.plan, self.outputs, self.progress = plan, outputs, progress
        self._files = FileCache()
        threads = plan.options.workers + WAITING_THREADS
        self._readers = ThreadPoolExecutor(threads, "measure")
        self._mergers = ThreadPoolExecutor(threads, "merge")
        self._writers = ThreadPoolExecutor(WRITING_THREADS, "write")
        self._memory = Memory(_memory_limit(plan))
        self._threads = threading.local()

    def close(self) -> None:
        """Stop the threads and close the inputs."""
        self._memory.close()
        for pool in (self._readers, self._mergers, self._writers):
            pool.shutdown(cancel_futures=True)
        self._files.__exit__()

    def measure(self, group: GroupPlan) -> Pass[GroupMeasure]:
        """Start to read and check the group in all inputs.

        The pass raises CheckpointError: damaged bytes, copies that differ, a NaN or an infinity.
        """
        slabs = list(_merged_slabs(group))
        padding = [
            (source, slab)
            for tensor in group.tensors
            for source in tensor.sources
            for slab in slabs_of(tensor.true_rows, source.rows, source.cols)
        ]
        tasks = [(self._measure, *place) for place in slabs]
        tasks += [(self._read_padding, *place) for place in padding]

        def finish(found: list) -> GroupMeasure:
            measured = found[: len(slabs)]
            parts = [part for of_padding in found[len(slabs) :] for part in of_padding]
            parts += [part for slab in measured for read in slab.parts for part in read]
            sources = [source for tensor in group.tensors for source in tensor.sources]
            check_records(self._files, sources, parts)
            return _group_measure(slabs, measured, len(self.plan.inputs))

        return Pass(self._readers, tasks, finish)

    def merge(
        self, group: GroupPlan, measure: GroupMeasure, coefficients: dict[str, np.ndarray]
    ) -> Pass[GroupResult]:
        """Start to write the group to all outputs.

        Args:
            group: measured before.
            measure: what is known about it, for the record.
            coefficients: unit -> [K + 1, N] over the inputs; the last row is the task vector.

        The pass raises ValueError: a merged value is too large for the outputs' dtype.
        """
        slabs = list(_merged_slabs(group))
        padding = [
            (tensor, slab)
            for tensor in group.tensors
            for slab in slabs_of(tensor.true_rows, tensor.target.rows, tensor.target.cols)
        ]
        tasks = [
            (self._merge, tensor, slab, inputs, coefficients[tensor.unit])
            for (tensor, slab), inputs in zip(slabs, measure.inputs, strict=True)
        ]
        tasks += [(self._copy_padding, *place) for place in padding]

        def finish(found: list) -> GroupResult:
            units: dict[str, UnitResult] = {}
            for (tensor, slab), (_, *measured) in zip(slabs, found, strict=False):
                unit, size = tensor.unit, slab.rows * tensor.target.cols
                share = UnitResult(measure.grams[unit], coefficients[unit], *measured, size)
                if unit in units:
                    units[unit].add(share)
                else:
                    units[unit] = share
            written = zip(*(parts for parts, *_ in found), strict=True)
            parts = [coalesce(chain.from_iterable(of_output)) for of_output in written]
            return GroupResult(group.name, units, parts, measure.crcs)

        return Pass(self._mergers, tasks, finish)

    def forget(self, measure: GroupMeasure) -> None:
        """Give back the memory of a group that will not be merged."""
        for inputs in measure.inputs:
            self._memory.give(inputs.buffer)

    def _measure(self, tensor: TensorPlan, slab: Slab) -> Measured:
        buffer = self._memory.take(room_bytes(tensor, slab))
        measured = self._kernel.measure(tensor, slab, buffer)
        if not np.isfinite(measured.grams).all():
            self._refuse_nonfinite(tensor, slab)
        self.progress(slab.rows * sum(source.row_bytes for source in tensor.sources))
        return measured

    def _refuse_nonfinite(self, tensor: TensorPlan, slab: Slab) -> None:
        check_records(self._files, tensor.sources, ())  # or is it damage?
        for checkpoint, source in zip(self.plan.inputs, tensor.sources, strict=True):
            if not torch.isfinite(self._kernel.read(source, slab)[0]).all():
                raise CheckpointError(
                    f"{checkpoint.path}: {tensor.name} holds a NaN or an infinity; "
                    "the policy diverged, choose an earlier checkpoint"
                )
        raise CheckpointError(f"{tensor.name}: its inner products overflow float64")

    def _read_padding(self, source: LogicalTensor, slab: Slab) -> list[Part]:
        self.progress(slab.rows * source.row_bytes)
        return self._kernel.read(source, slab)[1]

    def _merge(
        self, tensor: TensorPlan, slab: Slab, inputs: Inputs, coefficients: np.ndarray
    ) -> tuple[list[list[Part]], np.ndarray, np.ndarray]:
        """Parts of each output, projections and changed elements; gives the memory back."""
        target, count = tensor.target, len(self.outputs)
        written: list[list[Part]] = [[] for _ in self.outputs]
        projections, changed = np.zeros(count), np.zeros(count, np.int64)
        elements = OUTPUT_BYTES // target.dtype.itemsize // count
        for rows in slabs_of(slab.first, slab.last, target.cols, elements):
            noise = self._noise(tensor, rows)
            skip = self._skip(target, rows)
            merged = self._kernel.combine(tensor, rows, inputs, coefficients, noise, skip)
            if not np.isfinite(merged.projections).all():
                raise ValueError(
                    f"{tensor.name}: merged values are too large for {target.dtype}; "
                    "use another --dtype or a smaller --eta"
                )
            projections += merged.projections
            changed += merged.changed
            new = self._write(tensor, rows, merged.values)
            written = [old + parts for old, parts in zip(written, new, strict=True)]
        self._memory.give(inputs.buffer)
        return written, projections, changed

    def _skip(self, target: LogicalTensor, rows: Slab) -> int:
        """Where in a page the rows go in the outputs, if elements do not lie across pages."""
        for patch in target.patches:
            if patch.row <= rows.first and rows.last <= patch.row + patch.rows:
                start = patch.start_of(rows.first, target.dtype.itemsize)
                skip = self.outputs[0].place(patch.record, start) % ALIGNMENT
                return skip if skip % target.dtype.itemsize == 0 else 0
        return 0

    def _noise(self, tensor: TensorPlan, rows: Slab) -> np.ndarray | None:
        """[K, length] random bits of some rows, or None where they are not wanted."""
        options, cols = self.plan.options, tensor.target.cols
        if options.rounding != STOCHASTIC:
            return None
        place = rows.first * cols, rows.rows * cols
        bits = [rounding_noise(options.seed, tensor.name, eta, *place) for eta in options.etas]
        return np.stack(bits)

    def _copy_padding(self, tensor: TensorPlan, slab: Slab) -> tuple[list[list[Part]]]:
        padding = self._kernel.read(tensor.sources[0], slab)[0].to(tensor.target.dtype)
        rows = padding.view(torch.uint8).numpy().reshape(-1)
        return (self._write(tensor, slab, [rows] * len(self.outputs)),)

    def _write(
        self, tensor: TensorPlan, slab: Slab, merged: Iterable[np.ndarray]
    ) -> list[list[Part]]:
        """Write the slab's rows, [bytes] per output; returns the parts of each output."""
        target = tensor.target
        patches = list(chain(target.patches, *target.replicas))

        def write(output: Output, rows: np.ndarray) -> list[Part]:
            width = target.dtype.itemsize
            written = [_write_patch(output, patch, slab, rows, width) for patch in patches]
            self.progress(rows.nbytes)
            return [part for part in written if part is not None]

        return list(self._writers.map(write, self.outputs, merged))

    @property
    def _kernel(self) -> Kernel:
        """This thread's."""
        if not hasattr(self._threads, "kernel"):
            self._threads.kernel = Kernel(self._files)
        return self._threads.kernel


def _merged_slabs(group: GroupPlan) -> Iterable[tuple[TensorPlan, Slab]]:
    for tensor in group.tensors:
        for slab in slabs_of(0, tensor.true_rows, tensor.target.cols):
            yield tensor, slab


def _memory_limit(plan: MergePlan) -> int:
    """Bytes for the largest group in all inputs and the beginning of the next."""
    sizes = [sum(room_bytes(*place) for place in _merged_slabs(group)) for group in plan.groups]
    return int(max(sizes) * (1 + READ_AHEAD / len(plan.inputs)))


def _group_measure(
    slabs: list[tuple[TensorPlan, Slab]], measured: list[Measured], num_inputs: int
) -> GroupMeasure:
    """Put slabs together. Blocks are summed exactly (math.fsum), so their order is no matter."""
    grams: dict[str, list[np.ndarray]] = defaultdict(list)
    pieces: dict[str, list[list[tuple[int, int]]]] = defaultdict(list)
    for (tensor, _), slab in zip(slabs, measured, strict=True):
        grams[tensor.unit].extend(slab.grams)
        pieces[tensor.name].append(slab.pieces)
    crcs: list[dict[str, int]] = [{} for _ in range(num_inputs)]
    for name, found in pieces.items():
        for known, of_input in zip(crcs, zip(*found, strict=True), strict=True):
            known[name] = joined_crc32(of_input)
    summed = {unit: exact_sum(found) for unit, found in grams.items()}
    return GroupMeasure(summed, crcs, [slab.inputs for slab in measured])


def _write_patch(
    output: Output, patch: Patch, slab: Slab, rows: np.ndarray, width: int
) -> Part | None:
    first, last = max(slab.first, patch.row), min(slab.last, patch.row + patch.rows)
    if first >= last:
        return None
    left, line = patch.col * width, patch.cols * width
    window = rows.reshape(slab.rows, -1)[first - slab.first : last - slab.first, left : left + line]
    data = np.ascontiguousarray(window).reshape(-1)
    return output.write(patch.record, patch.start_of(first, width), data)
