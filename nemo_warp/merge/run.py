"""From a plan to published outputs: resume, one or two passes, seal, check, publish."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nemo_warp.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_warp.core.merging import OppositeTaskVectorsError, liti_coefficients, merge_coefficients
from nemo_warp.merge.engine import Engine
from nemo_warp.merge.journal import Journal
from nemo_warp.merge.options import MergeOptions
from nemo_warp.merge.output import Output
from nemo_warp.merge.plan import GroupPlan, MergePlan
from nemo_warp.merge.provenance import provenance_bytes
from nemo_warp.merge.ranks import Meeting, World
from nemo_warp.merge.results import GroupResult, UnitResult, exact_sum

SIMILAR_COSINE = 0.99


@dataclass
class MergeResult:
    """What a merge did and measured.

    Attributes:
        groups: in canonical order.
        timing: see `nemo_warp.merge.meter.Meter.read`.
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


def open_inputs(options: MergeOptions) -> tuple[Checkpoint, ...]:
    """Open all inputs; a checkpoint given twice is opened once."""
    opened = {path: open_checkpoint(path) for path in dict.fromkeys(options.inputs)}
    return tuple(opened[path] for path in options.inputs)


class Run:
    """One process's part in carrying out a plan.

    Args:
        plan: what to do.
        world: how many processes share it.
    """

    def __init__(self, plan: MergePlan, world: World):
        self.plan, self.world, self.options = plan, world, plan.options
        self.outputs = [Output(self.options.outputs[eta], plan.image) for eta in self.options.etas]
        folder = self.outputs[0].folder
        self.journal = Journal(folder, plan.identity, world.rank)
        meeting = folder.with_name(f"{folder.name}.ranks")
        self.meeting = Meeting(meeting, world, plan.identity)

    def check_targets(self) -> None:
        """Refuse outputs that exist, unless a killed run of this plan had begun to publish them.

        Raises:
            ValueError: an output exists and may not be replaced.
            OSError: the outputs do not fit on the disk.
        """
        allowed = self.options.overwrite or self.journal.is_sealed()
        for output in self.outputs:
            if output.final.exists() and not allowed:
                raise ValueError(f"{output.final} exists; pass --overwrite to replace it")
        if not self.journal.is_sealed():
            _check_space(self.outputs)

    def prepare(self) -> None:
        """Rank 0: resume the outputs of a killed run of the same plan, or start afresh.

        Raises:
            OSError: no space, no permission.
        """
        if self.journal.is_sealed():
            return
        resumable = self.journal.belongs()
        if not resumable:
            for output in self.outputs:
                output.clear()
        if not resumable:
            self.journal.start()
        for output in self.outputs:
            output.create()

    def merge_groups(self, groups: list[GroupPlan], progress) -> None:
        """Bring this process's share of the groups to disk and into the journal."""
        reusable = self._reusable(groups)
        groups = [group for group in groups if group.name not in reusable]
        engine = Engine(self.plan, self.outputs, progress)
        try:
            with ThreadPoolExecutor(1, "flush") as flusher:
                flushes = [
                    flusher.submit(self._flush, result)
                    for result in self._merge_each(engine, groups, self._model_gram(engine))
                ]
                _raise_first(flushes)
        finally:
            engine.close()

    def _merge_each(self, engine: Engine, groups: list[GroupPlan], model_gram):
        for index, group in enumerate(groups):
            engine.load(group)
            if index + 1 < len(groups):
                engine.prefetch(groups[index + 1])
            grams = engine.grams(group) if model_gram is None else {"model": model_gram}
            digests = engine.digests(group)
            coefficients = {u: unit_coefficients(self.plan, u, g) for u, g in grams.items()}
            result = engine.merge(group, grams, coefficients)
            result.digests = digests
            yield result

    def _model_gram(self, engine: Engine) -> np.ndarray | None:
        """Granularity ``model``: one Gram matrix over everything, in a pass of its own."""
        if self.options.granularity != "model":
            return None
        grams = []
        for group in self.plan.groups:
            engine.load(group)
            grams.append(engine.grams(group)["model"])
        return exact_sum(grams)

    def _flush(self, result: GroupResult) -> None:
        for output in self.outputs:
            output.sync()
        self.journal.add(result)

    def _reusable(self, groups: list[GroupPlan]) -> set[str]:
        """Names of groups that an earlier attempt finished and whose bytes are still right."""
        known = self.journal.groups()
        return {g.name for g in groups if g.name in known and self._intact(known[g.name])}

    def _intact(self, group: GroupResult) -> bool:
        if len(group.parts) != len(self.outputs):
            return False
        pairs = zip(self.outputs, group.parts, strict=True)
        return all(output.holds(part) for output, parts in pairs for part in parts)

    def result(self) -> MergeResult:
        """What all processes measured.

        Raises:
            ValueError: the policies are nearly the same.
        """
        known = self.journal.groups()
        result = MergeResult(self.plan, [known[group.name] for group in self.plan.groups])
        if not self.options.allow_similar:
            _refuse_similar(result)
        return result

    def seal(self, result: MergeResult) -> None:
        """Rank 0: complete all outputs under their temporary names."""
        if self.journal.is_sealed():
            return
        for index, output in enumerate(self.outputs):
            parts = [part for group in result.groups for part in group.parts[index]]
            eta = self.options.etas[index]
            output.seal(parts, provenance_bytes(self.plan, result.groups, eta))
        self.journal.seal()

    def written(self) -> dict[float, Path]:
        """Eta -> where its complete output is now."""
        pairs = zip(self.options.etas, self.outputs, strict=True)
        return {eta: o.content if o.content.exists() else o.final for eta, o in pairs}

    def publish(self) -> None:
        """Rank 0: give the outputs their names, then forget the journal."""
        for output in self.outputs:
            if output.content.exists():
                output.publish()
        for output in reversed(self.outputs):
            shutil.rmtree(output.folder, ignore_errors=True)
        self.meeting.close()

    def discard(self) -> None:
        """Remove everything unpublished."""
        for output in self.outputs:
            output.discard()
        self.meeting.close()


def share(groups: Iterable[GroupPlan], world: World) -> list[GroupPlan]:
    """This process's groups: the largest first, each to whoever has least so far."""
    groups = list(groups)
    loads, owner = [0] * world.size, {}
    for group in sorted(groups, key=lambda g: -g.input_bytes):
        rank = loads.index(min(loads))
        loads[rank] += group.input_bytes
        owner[group.name] = rank
    return [group for group in groups if owner[group.name] == world.rank]


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


def execute(plan: MergePlan, world: World) -> tuple[Run, MergeResult | None]:
    """Do this process's share; rank 0 returns with all outputs sealed but not published.

    Raises:
        CheckpointError: damaged or non-finite inputs; whatever was written is removed.
        ValueError: outputs exist, or the weights cannot be merged; likewise.
    """
    run = Run(plan, world)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if world.rank == 0:
            return run, _lead(run)
        _follow(run)
        return run, None
    finally:
        torch.set_num_threads(threads)


def _lead(run: Run) -> MergeResult:
    run.check_targets()
    with _locked(run.outputs[0].folder):
        try:
            run.prepare()
            if not run.journal.is_sealed():
                run.meeting.admit()
                _merge_share(run)
                run.meeting.wait_for_all()
            result = run.result()
            run.seal(result)
            return result
        except Exception:
            run.discard()
            raise


def _follow(run: Run) -> None:
    run.meeting.wait_until_prepared()
    try:
        _merge_share(run)
    except Exception as error:
        run.meeting.finish(error)
        raise
    run.meeting.finish()


def _merge_share(run: Run) -> None:
    groups = share(run.plan.groups, run.world)
    total = sum(g.input_bytes + len(run.outputs) * g.output_bytes for g in groups)
    quiet = run.world.rank != 0
    with tqdm(
        total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="merge", disable=quiet
    ) as bar:
        run.merge_groups(groups, bar.update)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make and hold the outputs' hidden folder: one merge per output at a time.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"another merge is at work in {folder}; wait for it or stop it") from None
    finally:
        os.close(descriptor)


def _check_space(outputs: list[Output]) -> None:
    """Raise before the first write if the outputs do not fit.

    Raises:
        OSError: says how much is missing where.
    """
    needed: dict[int, int] = {}
    for output in outputs:
        folder = next(path for path in output.final.absolute().parents if path.is_dir())
        device = folder.stat().st_dev
        needed[device] = needed.get(device, 0) + output.missing_bytes()
        free = shutil.disk_usage(folder).free
        if needed[device] > free:
            raise OSError(
                f"{folder} has {free / 1e9:.2f} GB free, the outputs need "
                f"{needed[device] / 1e9:.2f} GB; free some space or write elsewhere"
            )


def _refuse_similar(result: MergeResult) -> None:
    gram = exact_sum([u.gram for u in result.units.values()])
    deltas = gram[1:, 1:]
    for i in range(len(result.plan.options.policies)):
        for j in range(i):
            norms = np.sqrt(deltas[i, i] * deltas[j, j])
            if norms > 0.0 and deltas[i, j] / norms > SIMILAR_COSINE:
                a, b = result.plan.options.policies[j], result.plan.options.policies[i]
                raise ValueError(
                    f"{a} and {b} are nearly the same policy (cosine {deltas[i, j] / norms:.4f} "
                    f"of their task vectors, above {SIMILAR_COSINE}): were seeds or prompt orders "
                    "shared? pass --allow-similar to merge them all the same"
                )


def _raise_first(futures: list[Future]) -> None:
    for future in futures:
        future.result()
