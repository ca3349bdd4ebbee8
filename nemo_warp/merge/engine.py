"""One pass over the data: read a group of all inputs, measure its angles, write all outputs.

A group (a layer) of every input is in memory once, in buffers that the next group reuses. Reading,
Gram, and merging are each spread over threads; the kernel reads the next group and writes the
last one meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch

from nemo_warp.checkpoints.checksum import digest
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.logical import LogicalTensor, Patch
from nemo_warp.checkpoints.reading import FileCache, check_replica, read_patches, records_of
from nemo_warp.merge.blocks import Slab, blocks_of, slabs_of
from nemo_warp.merge.kernel import (
    STOCHASTIC,
    Block,
    Scratch,
    block_rng,
    count_changed,
    round_stochastically,
)
from nemo_warp.merge.output import Output, Part, coalesce
from nemo_warp.merge.plan import GroupPlan, MergePlan, TensorPlan
from nemo_warp.merge.results import GroupResult, UnitResult, exact_sum

_ALIGNMENT = 64


class Engine:
    """Runs groups of a plan.

    Args:
        plan: what to merge.
        outputs: one per eta, in the order of the plan's etas.
        progress: called with a number of bytes read or written, from any thread.
    """

    def __init__(self, plan: MergePlan, outputs: list[Output], progress: Callable[[int], Any]):
        self.plan, self.outputs, self.progress = plan, outputs, progress
        self.files = FileCache()
        self._pool = ThreadPoolExecutor(
            plan.options.workers, "merge", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._scratch = threading.local()
        size = max(sum(map(_slot_bytes, group.tensors)) for group in plan.groups)
        self._arena = torch.empty(len(plan.inputs), size, dtype=torch.uint8)
        self._loaded: dict[str, Loaded] = {}

    def close(self) -> None:
        """Stop the threads and close the inputs."""
        self._pool.shutdown(cancel_futures=True)
        self.files.__exit__()

    def load(self, group: GroupPlan) -> None:
        """Read the group from all inputs, in logical order.

        Raises:
            CheckpointError: damaged bytes, or copies that differ.
        """
        cursor, tasks = 0, []
        self._loaded = {}
        for tensor in group.tensors:
            slot = self._arena[:, cursor : cursor + _slot_bytes(tensor)]
            cursor += slot.shape[1]
            loaded = self._loaded[tensor.name] = Loaded(tensor, slot)
            for source, values in zip(tensor.sources, loaded.models, strict=True):
                target = _bytes_of(values, source)
                for record, patches in records_of(source).items():
                    size = sum(p.rows * p.cols for p in patches) * source.dtype.itemsize
                    tasks.append((self._read, source, record, patches, target, size))
        self._run(sorted(tasks, key=lambda task: -task[-1]))
        self._run(self._replica_checks(group))

    def _replica_checks(self, group: GroupPlan) -> Iterator[tuple]:
        for tensor in group.tensors:
            models = self._loaded[tensor.name].models
            for source, values in zip(tensor.sources, models, strict=True):
                for patches in source.replicas:
                    yield check_replica, self.files, source, patches, _bytes_of(values, source)

    def prefetch(self, group: GroupPlan) -> None:
        """Have the kernel read the group while something else is computed."""
        for tensor in group.tensors:
            for source in tensor.sources:
                self.files.prefetch({patch.record for patch in source.patches})

    def grams(self, group: GroupPlan) -> dict[str, np.ndarray]:
        """Unit -> [1 + M (+ 1), ...] Gram matrix of (theta_init, deltas) of the loaded group.

        Block results are summed exactly (math.fsum), so neither their number nor order matters.

        Raises:
            CheckpointError: an input holds a NaN or an infinity.
        """
        tasks, owners = [], []
        for tensor in group.tensors:
            for slab in slabs_of(tensor.true_rows, tensor.target.cols):
                tasks.append((self._gram_slab, tensor, slab))
                owners.append(tensor)
        blocks: dict[str, list[np.ndarray]] = {}
        for tensor, found in zip(owners, self._run(tasks), strict=True):
            blocks.setdefault(tensor.unit, []).extend(found)
        return {unit: exact_sum(found) for unit, found in blocks.items()}

    def digests(self, group: GroupPlan) -> list[dict[str, str]]:
        """Per input, tensor name -> digest of the loaded tensor's true rows in logical order."""
        indices = range(len(self.plan.inputs))
        tasks = [(self._digest, tensor, index) for tensor in group.tensors for index in indices]
        found = iter(self._run(tasks))
        result: list[dict[str, str]] = [{} for _ in indices]
        for tensor in group.tensors:
            for index in indices:
                result[index][tensor.name] = next(found)
        return result

    def merge(
        self, group: GroupPlan, grams: dict[str, np.ndarray], coefficients: dict[str, np.ndarray]
    ) -> GroupResult:
        """Write the loaded group to all outputs.

        Args:
            group: the group last loaded.
            grams: unit -> Gram matrix, for the record.
            coefficients: unit -> [K + 1, N] over the inputs; the last row is the task vector.
        """
        tasks = [
            (self._merge_slab, tensor, slab, torch.from_numpy(coefficients[tensor.unit]))
            for tensor in group.tensors
            for slab in slabs_of(tensor.true_rows, tensor.target.cols)
        ]
        padding = [
            (self._copy_padding, tensor, Slab(tensor.true_rows, tensor.target.rows))
            for tensor in group.tensors
            if tensor.true_rows < tensor.target.rows
        ]
        units: dict[str, UnitResult] = {}
        parts: list[list[Part]] = [[] for _ in self.outputs]
        for task, (written, *measured) in zip(tasks, self._run(tasks), strict=True):
            tensor, slab = task[1:3]
            size = (slab.last - slab.first) * tensor.target.cols
            share = UnitResult(grams[tensor.unit], coefficients[tensor.unit], *measured, size)
            if tensor.unit in units:
                units[tensor.unit].add(share)
            else:
                units[tensor.unit] = share
            _extend(parts, written)
        for written in self._run(padding):
            _extend(parts, written)
        return GroupResult(group.name, units, [coalesce(known) for known in parts])

    def _read(self, source: LogicalTensor, record, patches, target, size) -> None:
        read_patches(self.files, source, record, patches, target)
        self.progress(size)

    def _digest(self, tensor: TensorPlan, index: int) -> str:
        true = self._loaded[tensor.name].models[index][: tensor.true_rows * tensor.target.cols]
        return digest(memoryview(true.view(torch.uint8).numpy()))

    def _gram_slab(self, tensor: TensorPlan, slab: Slab) -> list[np.ndarray]:
        loaded, scratch, cols = (
            self._loaded[tensor.name],
            self._thread_scratch(),
            tensor.target.cols,
        )
        first = slab.first * cols
        blocks = [
            loaded.block(first + start, first + stop) for start, stop in blocks_of(slab, cols)
        ]
        found = [scratch.gram(block) for block in blocks]
        if not np.isfinite(found).all():
            self._refuse_nonfinite(tensor, loaded.block(first, slab.last * cols))
        return found

    def _refuse_nonfinite(self, tensor: TensorPlan, views: Block) -> None:
        for checkpoint, view in zip(self.plan.inputs, views, strict=True):
            if not torch.isfinite(view).all():
                raise CheckpointError(
                    f"{checkpoint.path}: {tensor.name} holds a NaN or an infinity; "
                    "the policy diverged, choose an earlier checkpoint"
                )
        raise CheckpointError(f"{tensor.name}: its inner products overflow float64")

    def _merge_slab(self, tensor: TensorPlan, slab: Slab, coefficients: torch.Tensor):
        loaded, scratch, cols = (
            self._loaded[tensor.name],
            self._thread_scratch(),
            tensor.target.cols,
        )
        first, last = slab.first * cols, slab.last * cols
        shape = (len(self.outputs), last - first)
        rounded, projections = torch.empty(shape, dtype=tensor.target.dtype), np.zeros(shape[0])
        for start, stop in blocks_of(slab, cols):
            values = scratch.merge(loaded.block(first + start, first + stop), coefficients)
            self._round(tensor, first + start, values, rounded[:, start:stop])
            projections += scratch.project(rounded[:, start:stop])
        if not np.isfinite(projections).all():
            raise ValueError(
                f"{tensor.name}: merged values are too large for {tensor.target.dtype}; "
                "use another --dtype or a smaller --eta"
            )
        changed = np.array(count_changed(loaded.models[0][first:last], rounded))
        return self._write(tensor, slab, rounded), projections, changed

    def _round(self, tensor: TensorPlan, start: int, values: torch.Tensor, target: torch.Tensor):
        """Round float64 [K, length] into the outputs' dtype."""
        options = self.plan.options
        if options.rounding != STOCHASTIC:
            target.copy_(values)
            return
        for eta, row, rounded in zip(options.etas, values, target, strict=True):
            rng = block_rng(options.seed, tensor.name, eta, start)
            round_stochastically(rounded, row, rng)

    def _copy_padding(self, tensor: TensorPlan, slab: Slab) -> list[list[Part]]:
        cols = tensor.target.cols
        padding = self._loaded[tensor.name].models[0][slab.first * cols : slab.last * cols]
        return self._write(tensor, slab, [padding.to(tensor.target.dtype)] * len(self.outputs))

    def _write(self, tensor: TensorPlan, slab: Slab, rounded: Iterable[torch.Tensor]):
        """Write the slab to every output; returns the parts of each."""
        target, parts = tensor.target, []
        copies = [target.patches, *target.replicas]
        for output, values in zip(self.outputs, rounded, strict=True):
            rows = values.view(-1, target.cols)
            written = [_write_patch(output, patch, slab, rows) for copy in copies for patch in copy]
            parts.append([part for part in written if part is not None])
            self.progress(values.nbytes)
        return parts

    def _thread_scratch(self) -> Scratch:
        if not hasattr(self._scratch, "value"):
            self._scratch.value = Scratch(len(self.plan.inputs), len(self.outputs))
        return self._scratch.value

    def _run(self, tasks: Iterable[tuple]) -> list:
        """Results of (function, *arguments) tasks, in order; the first error stops the rest."""
        futures: list[Future] = [self._pool.submit(*task) for task in tasks]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        wait(waiting)
        for future in done:
            if not future.cancelled() and (error := future.exception()) is not None:
                raise error
        return [future.result() for future in futures]


class Loaded:
    """A tensor of all models in memory.

    Attributes:
        models: per model, its elements in logical order, 1-d, at the stored dtype.
    """

    def __init__(self, tensor: TensorPlan, slot: torch.Tensor):
        self.models = [
            row[: source.nbytes].view(source.dtype)
            for row, source in zip(slot, tensor.sources, strict=True)
        ]
        dtypes = {source.dtype for source in tensor.sources}
        self._stacked = slot.view(dtypes.pop()) if len(dtypes) == 1 else None

    def block(self, start: int, stop: int) -> Block:
        """Elements [start, stop) of every model, in as few pieces as possible."""
        if self._stacked is not None:
            return self._stacked[:, start:stop]
        return [values[start:stop] for values in self.models]


def _extend(parts: list[list[Part]], new: list[list[Part]]) -> None:
    for known, added in zip(parts, new, strict=True):
        known.extend(added)


def _write_patch(output: Output, patch: Patch, slab: Slab, rows: torch.Tensor) -> Part | None:
    first, last = max(slab.first, patch.row), min(slab.last, patch.row + patch.rows)
    if first >= last:
        return None
    window = rows[first - slab.first : last - slab.first, patch.col : patch.col + patch.cols]
    window = window.contiguous()
    start = patch.start + (first - patch.row) * patch.cols * window.element_size()
    return output.write(patch.record, start, memoryview(window.view(torch.uint8).numpy()).cast("B"))


def _bytes_of(values: torch.Tensor, tensor: LogicalTensor) -> np.ndarray:
    """[rows, cols * itemsize] uint8 view of a loaded tensor."""
    return values.view(torch.uint8).numpy().reshape(tensor.rows, -1)


def _slot_bytes(tensor: TensorPlan) -> int:
    """Room for a tensor in the arena: that of its largest source, aligned."""
    size = max(source.nbytes for source in tensor.sources)
    return size + -size % _ALIGNMENT
