"""What a run has cost so far, from its attempts' records; no accounting of Slurm's is needed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nemo_warp.pipeline.commands.estimate import rounded, seconds_each
from nemo_warp.pipeline.disk.attempts import Attempt, duration_s, list_attempts
from nemo_warp.pipeline.disk.progress import measure
from nemo_warp.pipeline.disk.state import StageState, Status
from nemo_warp.pipeline.launch import slurm_jobs
from nemo_warp.pipeline.launch.local import device_shares
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.paths import StagePaths
from nemo_warp.pipeline.recipe.plan import BENCHMARKS, EVALUATION, FRONT, MEMBER, PICK, Stage


@dataclass
class Spent:
    """Hours of all stages of one kind.

    Attributes:
        node_hours, gpu_hours: of all attempts, those of stages made again since included.
        lost_node_hours: of attempts that brought their stage no further, and of stages made again.
        left_node_hours: to the end, at the recipe's estimate or the pace measured; None if neither
            is known.
    """

    kind: str
    attempts: int = 0
    node_hours: float = 0.0
    gpu_hours: float = 0.0
    lost_node_hours: float = 0.0
    left_node_hours: float | None = 0.0


def spent(recipe: Recipe, states: Mapping[str, StageState]) -> list[Spent]:
    """By kind, in the plan's order."""
    found = {stage.kind: Spent(stage.kind) for stage in recipe.stages}
    for state in states.values():
        stage, row = state.stage, found[state.stage.kind]
        nodes, gpus = _shape(recipe, stage)
        _add(row, list_attempts(recipe.paths.stage(stage.name)), nodes, gpus, state)
        left = _left_hours(recipe, state)
        known = row.left_node_hours is not None and left is not None
        row.left_node_hours = row.left_node_hours + nodes * left if known else None  # type: ignore
        for tries in _superseded(recipe, stage):
            _add(row, tries, nodes, gpus, None)
    return list(found.values())


def _add(row: Spent, tries: list[Attempt], nodes: int, gpus: int, state: StageState | None) -> None:
    for attempt, after in itertools.zip_longest(tries, tries[1:]):
        hours = duration_s(attempt) / 3600
        nodes_used = len(attempt.record.get("hosts") or ()) or nodes
        row.attempts += 1
        row.node_hours += nodes_used * hours
        row.gpu_hours += gpus * hours
        stuck = after is not None and after.record.get("step") == attempt.record.get("step")
        failed_last = after is None and state is not None and state.status is Status.FAILED
        if state is None or stuck or failed_last:
            row.lost_node_hours += nodes_used * hours


def _superseded(recipe: Recipe, stage: Stage) -> list[list[Attempt]]:
    """Attempts at earlier makings of the stage."""
    flat, lock = stage.name.replace("/", "."), recipe.paths.stage(stage.name).lock
    old = recipe.paths.superseded.glob(f"*.{flat}")
    return [list_attempts(StagePaths(directory, lock, lock)) for directory in sorted(old)]


def _shape(recipe: Recipe, stage: Stage) -> tuple[int, int]:
    """Nodes and GPUs of the stage's job."""
    if recipe.values["launcher"]["kind"] == "slurm":
        shape = slurm_jobs.stage_shape(recipe, stage)
        return shape.nodes, shape.nodes * shape.gpus_per_node
    shares = device_shares(recipe.values["launcher"])
    return 1, len(shares[0].split(",")) if shares and stage.kind in _ON_GPUS else 0


_ON_GPUS = (MEMBER, EVALUATION, FRONT, PICK, BENCHMARKS)


def _left_hours(recipe: Recipe, state: StageState) -> float | None:
    if state.status is Status.DONE:
        return 0.0
    done = measure(recipe, state)
    if done.total is None:  # merges and reports: minutes, which nobody estimates
        return 0.0
    if done.remaining_s is not None:
        return done.remaining_s / 3600
    each = seconds_each(recipe, state.stage.kind)
    return None if each is None else (done.total - (done.step or 0)) * each / 3600


def as_rows(recipe: Recipe, states: Mapping[str, StageState]) -> list[dict[str, Any]]:
    """For programs."""
    return [asdict(row) for row in spent(recipe, states)]


def cost_table(recipe: Recipe, states: Mapping[str, StageState]) -> list[str]:
    """For people."""
    header = ("kind", "attempts", "node-hours", "GPU-hours", "lost", "left")
    rows = spent(recipe, states)
    lines = [header, *map(_cells, rows), _cells(_sum(rows))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["  ".join(c.rjust(w) for c, w in zip(li, widths, strict=True)) for li in lines]
    return [*text, "", "lost, left: node-hours; lost to attempts that got no further"]


def _cells(row: Spent) -> tuple[str, ...]:
    left = "unknown" if row.left_node_hours is None else rounded(row.left_node_hours)
    hours = (row.node_hours, row.gpu_hours, row.lost_node_hours)
    return (row.kind, str(row.attempts), *map(rounded, hours), left)


def _sum(rows: list[Spent]) -> Spent:
    left = [row.left_node_hours for row in rows]
    return Spent(
        "together",
        sum(row.attempts for row in rows),
        sum(row.node_hours for row in rows),
        sum(row.gpu_hours for row in rows),
        sum(row.lost_node_hours for row in rows),
        None if None in left else sum(hours or 0.0 for hours in left),
    )
