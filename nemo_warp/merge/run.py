"""From a plan to published outputs: resume, one or two passes, seal, check, publish."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nemo_warp.merge.compute.engine import Engine
from nemo_warp.merge.compute.passes import Pass
from nemo_warp.merge.decisions import refuse_similar, unit_coefficients
from nemo_warp.merge.plan import GroupPlan, MergePlan
from nemo_warp.merge.publish.journal import Journal
from nemo_warp.merge.publish.output import Output, check_space
from nemo_warp.merge.publish.provenance import provenance_bytes
from nemo_warp.merge.ranks import Meeting, World
from nemo_warp.merge.results import GroupResult, MergeResult, exact_sum

GROUPS_AHEAD = 2
"""Groups whose reading is started before their turn: some, like a norm, are small."""


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
            check_space(self.outputs)

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
                merging = self._merge_each(engine, groups, self._model_gram(engine))
                flushes = [
                    flusher.submit(self._flush, started.result()) for started in _ahead(merging, 1)
                ]
                _raise_first(flushes)
                self.plan.check_unchanged()
        finally:
            engine.close()

    def _merge_each(
        self, engine: Engine, groups: list[GroupPlan], model_gram: np.ndarray | None
    ) -> Iterator[Pass[GroupResult]]:
        """Passes that merge the groups, in order, when all is merged and some is still written."""
        measuring = _ahead(map(engine.measure, groups), GROUPS_AHEAD)
        for group, started in zip(groups, measuring, strict=True):
            measure = started.result()
            if model_gram is not None:
                measure.grams = {"model": model_gram}
            coefficients = {u: unit_coefficients(self.plan, u, g) for u, g in measure.grams.items()}
            merging = engine.merge(group, measure, coefficients)
            merging.wait()
            yield merging

    def _model_gram(self, engine: Engine) -> np.ndarray | None:
        """Granularity ``model``: one Gram matrix over everything, in a pass of its own."""
        if self.options.granularity != "model":
            return None
        grams = []
        for measuring in _ahead(map(engine.measure, self.plan.groups), GROUPS_AHEAD):
            measure = measuring.result()
            engine.forget(measure)
            grams.append(measure.grams["model"])
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
            refuse_similar(result)
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


def _ahead(passes: Iterator[Pass], count: int) -> Iterator[Pass]:
    """Passes in order, each with ``count`` more started before it is waited for."""
    started = deque()
    for one in passes:
        started.append(one)
        if len(started) > count:
            yield started.popleft()
    yield from started


def _raise_first(futures: list[Future]) -> None:
    for future in futures:
        future.result()
