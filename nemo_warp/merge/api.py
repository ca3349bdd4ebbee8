"""The merge as one call: options, plan, work, report."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_warp.merge.compute import loops
from nemo_warp.merge.compute.budget import memory_for_groups, too_large
from nemo_warp.merge.execute import check_outputs, execute
from nemo_warp.merge.options import MergeOptions, outputs_of
from nemo_warp.merge.plan import MergePlan, make_plan, open_inputs
from nemo_warp.merge.publish.tracker import how_to_load, megatron_reads
from nemo_warp.merge.ranks import world_from_environment
from nemo_warp.merge.report.meter import summary
from nemo_warp.merge.report.statistics import merge_statistics
from nemo_warp.merge.results import MergeResult

logger = logging.getLogger(__name__)

__all__ = ["MergeOptions", "MergeResult", "merge"]


def merge(
    init: str | Path,
    policies: Sequence[str | Path],
    output: str,
    *,
    eta: float | Sequence[float] = 0.3,
    workers: int | None = None,
    report: str | Path | None = None,
    dry_run: bool = False,
    **options: Any,
) -> MergeResult | None:
    """Merge ``policies`` around ``init`` and write one output per eta.

    Args:
        init: theta_init; the outputs take its format, layout, configuration and artifacts.
        policies: theta_1 .. theta_M, in the order of slerpm.
        output: path of the output; with several etas it holds ``{eta}``.
        eta: LITI coefficients, all written in one read of the inputs.
        workers: threads; None uses every CPU this process may use.
        report: folder for report.json, table and pictures.
        dry_run: check and plan only.
        **options: the other fields of `MergeOptions`.

    Returns:
        What was measured; None for a dry run and for ranks above 0.

    Raises:
        ValueError: the options are wrong or do not fit the inputs.
        CheckpointError: an input is damaged, unfinished or not the same model.
    """
    etas = [float(value) for value in ([eta] if isinstance(eta, int | float) else eta)]
    anchor = options.pop("liti_towards", None)
    chosen = MergeOptions(
        init=Path(init),
        policies=tuple(Path(policy) for policy in policies),
        outputs=outputs_of(str(output), etas),
        liti_towards=None if anchor is None else Path(anchor),
        # What this process may use, not what the machine has: Slurm binds a job to its processors.
        workers=workers or len(os.sched_getaffinity(0)),
        report=None if report is None else Path(report),
        **options,
    )
    if not dry_run:
        threading.Thread(target=loops.load).start()  # while the disk looks for the inputs' headers
    plan = make_plan(chosen, open_inputs(chosen))
    _log_plan(plan)
    world = world_from_environment()
    if dry_run:
        check_outputs(plan)
        return None
    result = execute(plan, world)
    if result is not None:
        _log_result(result)
    return result


def _log_result(result: MergeResult) -> None:
    for warning in merge_statistics(result)["warnings"]:
        if warning not in result.plan.notes:  # these were shown before the merge
            logger.warning("%s", warning)
    logger.info("%s", summary(result.timing))
    for final in result.plan.options.outputs.values() if megatron_reads(result.plan) else ():
        logger.info("%s", how_to_load(final))


def _log_plan(plan: MergePlan) -> None:
    numel = sum(tensor.target.numel for group in plan.groups for tensor in group.tensors)
    logger.info(
        "%d parameters in %d groups; reading %.2f GB from %d inputs, writing %d x %.2f GB",
        *(numel, len(plan.groups), plan.input_bytes / 1e9, len(plan.inputs)),
        *(len(plan.options.outputs), plan.output_bytes / 1e9),
    )
    for note in plan.notes:
        logger.info("note: %s", note)
    if twice := too_large(plan):
        largest = max(twice, key=twice.__getitem__)
        logger.warning(
            "%d groups are read twice: %s alone takes %.2f GB in all inputs, and %.2f GB of memory "
            "are at hand; more memory, or fewer ranks on this node, would save the second reading",
            *(len(twice), largest, twice[largest] / 1e9, memory_for_groups(plan) / 1e9),
        )
