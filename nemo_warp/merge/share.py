"""Merge some groups of a plan: angles are decided here, between the engine's two passes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nemo_warp.merge.compute.engine import Engine
from nemo_warp.merge.compute.passes import Pass
from nemo_warp.merge.decisions import unit_coefficients
from nemo_warp.merge.plan import GroupPlan, MergePlan
from nemo_warp.merge.publish.output import Output
from nemo_warp.merge.results import GroupResult, exact_sum
from nemo_warp.merge.similarity import EarlyLook, refuse_similar

GROUPS_AHEAD = 2
"""Groups whose reading is started before their turn: some, like a norm, are small."""


def merge_groups(
    plan: MergePlan,
    groups: list[GroupPlan],
    outputs: list[Output],
    progress: Callable[[int], Any],
) -> list[GroupResult]:
    """Merge the groups into all outputs; what was written need not be durable yet.

    Args:
        plan: of the merge.
        groups: this process's share.
        outputs: one per eta, in the order of the plan's etas.
        progress: called with a number of bytes read or written, from any thread.

    Raises:
        CheckpointError: damaged or non-finite inputs.
        ValueError: the weights cannot be merged.
    """
    engine = Engine(plan, outputs, progress)
    try:
        model_gram = _model_gram(plan, engine)
        merging = _merge_each(plan, engine, groups, model_gram)
        return [started.result() for started in _ahead(merging, 1)]
    finally:
        engine.close()


def _merge_each(
    plan: MergePlan, engine: Engine, groups: list[GroupPlan], model_gram: np.ndarray | None
) -> Iterator[Pass[GroupResult]]:
    """Passes that merge the groups, when all is merged and some is still written."""
    look = EarlyLook(plan, groups)
    measuring = _ahead(map(engine.measure, look.groups), GROUPS_AHEAD)
    for group, started in zip(look.groups, measuring, strict=True):
        measure = started.result()
        if model_gram is not None:
            measure.grams = {"model": model_gram}
        else:
            look.at(measure.grams.values())
        coefficients = {u: unit_coefficients(plan, u, g) for u, g in measure.grams.items()}
        merging = engine.merge(group, measure, coefficients)
        # Merged, not yet written: the next group's merge goes on beside the writes of this one.
        merging.wait()
        yield merging


def _model_gram(plan: MergePlan, engine: Engine) -> np.ndarray | None:
    """Granularity ``model``: one Gram matrix over everything, in a pass of its own."""
    if plan.options.granularity != "model":
        return None
    grams = []
    for measuring in _ahead(map(engine.measure, plan.groups), GROUPS_AHEAD):
        measure = measuring.result()
        # Only the Gram matrix is wanted in this pass; the weights are read again later.
        engine.forget(measure)
        grams.append(measure.grams["model"])
    refuse_similar(plan, grams)
    return exact_sum(grams)


def _ahead(passes: Iterator[Pass], count: int) -> Iterator[Pass]:
    """Passes in order, each with ``count`` more started before it is waited for."""
    started: deque[Pass] = deque()
    for one in passes:
        started.append(one)
        if len(started) > count:
            yield started.popleft()
    yield from started
