"""Merge policies: SLERP of task vectors per layer, then LITI, on distributed checkpoints.

from nemo_warp.merge import merge
result = merge(init="sft.nemo", policies=["a.nemo", "b.nemo"], output="merged.nemo", eta=[0.3])
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nemo_warp.merge.options import MergeOptions, outputs_of
from nemo_warp.merge.plan import make_plan
from nemo_warp.merge.ranks import world_from_environment
from nemo_warp.merge.run import MergeResult, execute, open_inputs

__all__ = ["MergeOptions", "MergeResult", "merge"]


def merge(
    init: str | Path,
    policies: Sequence[str | Path],
    output: str,
    *,
    eta: float | Sequence[float] = 0.3,
    workers: int | None = None,
    dry_run: bool = False,
    **options,
) -> MergeResult | None:
    """Merge ``policies`` around ``init`` and write one output per eta.

    Args:
        init: theta_init; the outputs take its format, layout, configuration and artifacts.
        policies: theta_1 .. theta_M, in the order of slerpm.
        output: path of the output; with several etas it holds ``{eta}``.
        eta: LITI coefficients, all written in one read of the inputs.
        workers: threads; None uses every CPU this process may use.
        dry_run: check and plan only.
        **options: the other fields of `MergeOptions`.

    Returns:
        What was measured, or None for a dry run.

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
        workers=workers or len(os.sched_getaffinity(0)),
        **options,
    )
    plan = make_plan(chosen, open_inputs(chosen))
    if dry_run:
        return None
    run, result = execute(plan, world_from_environment())
    if result is not None:
        run.publish()
    return result
