"""Two passes over a group: read it and measure its angles, then write all outputs.

A group (a layer) stays in memory between the passes, slab by slab, and each slab that is merged
makes room for one of the next group: while one group is merged and written, the next is read. A
group that is too large for that is read again to be merged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.io.parts import Part, coalesce, joined_crc32
from nemo_warp.checkpoints.io.reading import FileCache, check_records
from nemo_warp.checkpoints.io.slabs import Slab, slabs_of
from nemo_warp.checkpoints.logical import LogicalTensor
from nemo_warp.merge.compute.budget import group_bytes, merged_slabs, too_large
from nemo_warp.merge.compute.kernel import (
    Inputs,
    Kernel,
    Measured,
    converted,
    numbers,
    room_bytes,
    rounding_noise,
)
from nemo_warp.merge.compute.memory import Memory
from nemo_warp.merge.compute.passes import Pass
from nemo_warp.merge.compute.writer import Piece, Writer
from nemo_warp.merge.options import STOCHASTIC
from nemo_warp.merge.plan import GroupPlan, MergePlan, TensorPlan
from nemo_warp.merge.publish.output import Output
from nemo_warp.merge.results import GroupResult, UnitResult, exact_sum

WAITING_THREADS = 4
"""Threads that read beside the workers, since most wait for the disk at any time."""


@dataclass
class GroupMeasure:
    """What the first pass finds.

    Attributes:
        grams: unit -> [1 + M (+ 1), ...] Gram matrix of (theta_init, deltas).
        crcs: per input, tensor name -> CRC-32 of its true rows in logical order.
        inputs: slab by slab; `Engine.merge` gives their memory back. None: they are read again.
    """

    grams: dict[str, np.ndarray]
    crcs: list[dict[str, int]]
    inputs: list[Inputs | None]


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
        self._kernel = Kernel(self._files)
        workers = plan.options.workers
        self._readers = ThreadPoolExecutor(workers + WAITING_THREADS, "measure")
        self._mergers = ThreadPoolExecutor(workers, "merge")
        self._writer = Writer(outputs, workers, progress)
        self._twice = too_large(plan)
        passing = _some_slabs(plan, workers + WAITING_THREADS) if self._twice else 0
        # Enough for the largest group that is kept: with less the first pass could never end.
        self._memory = Memory(max(_largest_kept(plan, self._twice), passing))
        self._again = Memory(_some_slabs(plan, workers))  # apart: the next groups wait in the other

    def close(self) -> None:
        """Stop the threads and close the inputs."""
        self._memory.close()
        self._again.close()
        self._writer.close()
        for pool in (self._readers, self._mergers):
            pool.shutdown(cancel_futures=True)
        self._files.__exit__()

    def measure(self, group: GroupPlan) -> Pass[GroupMeasure]:
        """Start to read and check the group in all inputs.

        The pass raises CheckpointError: damaged bytes, copies that differ, a NaN or an infinity.
        """
        slabs = list(merged_slabs(group))
        padding = [
            # Rows behind the true vocabulary are read for their checksums only: they are in no
            # angle, since their number depends on the writer's TP.
            (source, slab)
            for tensor in group.tensors
            for source in tensor.sources
            for slab in slabs_of(tensor.true_rows, source.rows, source.cols)
        ]
        keep = group.name not in self._twice
        tasks: list[tuple] = []
        # Tickets are drawn here, in order, and not in the threads: the next group's slabs must
        # never take the memory that the last slabs of this one wait for.
        tasks += [(self._measure, self._memory.ticket(), keep, *place) for place in slabs]
        tasks += [(self._read_padding, *place) for place in padding]

        def finish(found: list) -> GroupMeasure:
            measured = found[: len(slabs)]
            parts = [part for of_padding in found[len(slabs) :] for part in of_padding]
            parts += [part for slab in measured for read in slab.parts for part in read]
            sources = [source for tensor in group.tensors for source in tensor.sources]
            # When all slabs were read: a record's CRC-32 is over all of its bytes.
            check_records(self._files, sources, parts)
            return _group_measure(slabs, measured, len(self.plan.inputs))

        return Pass(self._readers, tasks, finish)

    def merge(
        self, group: GroupPlan, measure: GroupMeasure, coefficients: dict[str, np.ndarray]
    ) -> Pass[GroupResult]:
        """Start to merge the group and to write it to all outputs.

        The pass waits until all is merged; its result, until all is written.

        Args:
            group: measured before.
            measure: what is known about it, for the record.
            coefficients: unit -> [K + 1, N] over the inputs; the last row is the task vector.

        The pass raises ValueError: a merged value is too large for the outputs' dtype.
        """
        slabs = list(merged_slabs(group))
        padding = [
            (tensor, slab)
            for tensor in group.tensors
            for slab in slabs_of(tensor.true_rows, tensor.target.rows, tensor.target.cols)
        ]
        tasks: list[tuple] = [
            (self._merge, tensor, slab, inputs, coefficients[tensor.unit])
            for (tensor, slab), inputs in zip(slabs, measure.inputs, strict=True)
        ]
        tasks += [(self._copy_padding, *place) for place in padding]

        def finish(found: list) -> GroupResult:
            # Bytes may have changed between the two reads; then the merge would not be of what was
            # measured.
            again = [part for result in found[: len(slabs)] for part in result[3]]
            if again:
                sources = [source for tensor in group.tensors for source in tensor.sources]
                check_records(self._files, sources, again)
            units: dict[str, UnitResult] = {}
            for (tensor, slab), (_, moved, changed, _) in zip(slabs, found, strict=False):
                unit, size = tensor.unit, slab.rows * tensor.target.cols
                share = UnitResult(measure.grams[unit], coefficients[unit], moved, changed, size)
                if unit in units:
                    units[unit].add(share)
                else:
                    units[unit] = share
            pieces = chain.from_iterable(started for started, *_ in found)
            parts = [
                coalesce(part for piece in of_output for part in piece.result())
                for of_output in zip(*pieces, strict=True)
            ]
            return GroupResult(group.name, units, parts, measure.crcs)

        return Pass(self._mergers, tasks, finish)

    def forget(self, measure: GroupMeasure) -> None:
        """Give back the memory of a group that will not be merged."""
        for inputs in measure.inputs:
            if inputs is not None:
                self._memory.give(inputs.buffer)

    def _measure(self, ticket: int, keep: bool, tensor: TensorPlan, slab: Slab) -> Measured:
        buffer = self._memory.take(room_bytes(tensor, slab), ticket)
        measured = self._kernel.measure(tensor, slab, buffer)
        # One NaN or infinity makes its row of the Gram matrix non-finite: looking at N x N numbers
        # finds it, and no pass over the weights is needed.
        if not np.isfinite(measured.grams).all():
            self._refuse_nonfinite(tensor, slab)
        self.progress(slab.rows * sum(source.row_bytes for source in tensor.sources))
        if not keep:
            self._memory.give(buffer)
            measured.inputs = None
        return measured

    def _refuse_nonfinite(self, tensor: TensorPlan, slab: Slab) -> None:
        # A flipped bit can look like a NaN: then the error has to name the damage.
        check_records(self._files, tensor.sources, ())
        for checkpoint, source in zip(self.plan.inputs, tensor.sources, strict=True):
            if not np.isfinite(numbers(self._kernel.read(source, slab)[0], source.dtype)).all():
                raise CheckpointError(
                    f"{checkpoint.path}: {tensor.name} holds a NaN or an infinity; "
                    "the policy diverged, choose an earlier checkpoint"
                )
        raise CheckpointError(f"{tensor.name}: its inner products overflow float64")

    def _read_padding(self, source: LogicalTensor, slab: Slab) -> list[Part]:
        self.progress(slab.rows * source.row_bytes)
        return self._kernel.read(source, slab)[1]

    def _merge(
        self, tensor: TensorPlan, slab: Slab, inputs: Inputs | None, coefficients: np.ndarray
    ) -> tuple[list[list[Future]], np.ndarray, np.ndarray, list[Part]]:
        """What `Writer.write` started, piece by piece; projections, changed elements, parts read.

        The slab is read, if it was not kept.
        """
        if inputs is not None:
            return *self._merge_slab(tensor, slab, inputs, coefficients, self._memory), []
        buffer = self._again.take(room_bytes(tensor, slab))
        measured = self._kernel.measure(tensor, slab, buffer)
        parts = [part for read in measured.parts for part in read]
        assert measured.inputs is not None
        merged = self._merge_slab(tensor, slab, measured.inputs, coefficients, self._again)
        return *merged, parts

    def _merge_slab(
        self,
        tensor: TensorPlan,
        slab: Slab,
        inputs: Inputs,
        coefficients: np.ndarray,
        memory: Memory,
    ) -> tuple[list[list[Future]], np.ndarray, np.ndarray]:
        count = len(self.outputs)
        projections, changed = np.zeros(count), np.zeros(count, np.int64)
        started = []
        for piece in self._writer.pieces(tensor.target, slab):
            noise, room = self._noise(tensor.name, piece), self._writer.room(tensor.target, piece)
            merged = self._kernel.combine(tensor, piece, inputs, coefficients, noise, room)
            # An overflow of the output's dtype (float16 ends at 65504) makes the projection
            # infinite.
            if not np.isfinite(merged.projections).all():
                raise ValueError(
                    f"{tensor.name}: merged values are too large for {tensor.target.dtype}; "
                    "use another --dtype or a smaller --eta"
                )
            projections += merged.projections
            changed += merged.changed
            started.append(self._writer.write(tensor.target, piece, merged.values, room))
        # Before the writes have ended: the merged values are in the writer's own memory.
        memory.give(inputs.buffer)
        return started, projections, changed

    def _noise(self, name: str, piece: Piece) -> np.ndarray | None:
        """[K, length] random bits of a piece, or None where they are not wanted."""
        options, place = self.plan.options, (piece.start, piece.length)
        if options.rounding != STOCHASTIC:
            return None
        return np.stack([rounding_noise(options.seed, name, eta, *place) for eta in options.etas])

    def _copy_padding(self, tensor: TensorPlan, slab: Slab) -> tuple[list[list[Future]]]:
        target, started = tensor.target, []
        # The init's padding, so that the output equals it where nothing was trained.
        padding, width = self._kernel.read(tensor.sources[0], slab)[0], target.dtype.itemsize
        stored = converted(padding, tensor.sources[0].dtype, target.dtype).reshape(-1)
        for piece in self._writer.pieces(target, slab):
            room = self._writer.room(target, piece)
            values = piece.within(room, len(self.outputs), width)
            first = (piece.start - slab.first * target.cols) * width
            values[:] = stored[first : first + piece.length * width]
            started.append(self._writer.write(target, piece, values, room))
        return (started,)


def _largest_kept(plan: MergePlan, twice: dict[str, int]) -> int:
    """Bytes for the largest group in all inputs that is kept."""
    kept = (group_bytes(group) for group in plan.groups if group.name not in twice)
    return max(kept, default=0)


def _some_slabs(plan: MergePlan, count: int) -> int:
    """Bytes for ``count`` slabs of all inputs."""
    places = (place for group in plan.groups for place in merged_slabs(group))
    return count * max(room_bytes(*place) for place in places)


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
