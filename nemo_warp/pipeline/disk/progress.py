"""How far the stages are, from the files they append to; cheap enough for every second."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_warp.pipeline.disk import attempts
from nemo_warp.pipeline.disk.state import StageState, Status
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import BENCHMARKS, EVALUATION, FRONT, MEMBER, PICK, Stage

_TAIL_BYTES = 65536


@dataclass(frozen=True)
class Progress:
    """One stage's progress; None where it has no meaning.

    Attributes:
        step, total: optimizer steps of a member, points of an evaluation.
        reward, kl_to_sft: the last ones measured (at a step before `step`, for members).
        attempt: number of attempts so far.
        elapsed_s, remaining_s: of the running attempt; the rest at its mean pace.
    """

    step: int | None = None
    total: int | None = None
    reward: float | None = None
    kl_to_sft: float | None = None
    attempt: int = 0
    elapsed_s: float | None = None
    remaining_s: float | None = None


def measure(recipe: Recipe, state: StageState) -> Progress:
    """The progress of a stage, whatever its status."""
    stage, paths = state.stage, recipe.paths.stage(state.stage.name)
    if not paths.directory.is_dir():
        return Progress(total=_total(recipe, stage))
    records = _tail(paths.metrics if stage.kind == MEMBER else paths.points)
    step = _step(stage, records)
    measured = [r for r in records if r.get("kind", "eval") == "eval" and "reward" in r][-1:]
    values = measured[0] if measured else {}
    tries = attempts.list_attempts(paths)
    elapsed = remaining = None
    total = _total(recipe, stage)
    if state.status is Status.RUNNING and tries and "started" in tries[-1].record:
        elapsed = time.time() - tries[-1].record["started"]
        remaining = _remaining(elapsed, step, tries[-1].record.get("step", 0), total)
    reward, kl = values.get("reward"), values.get("kl_to_sft")
    return Progress(step, total, reward, kl, len(tries), elapsed, remaining)


def _total(recipe: Recipe, stage: Stage) -> int | None:
    if stage.kind == MEMBER:
        return recipe.total_steps(stage.iteration, stage.member)
    if stage.kind in (FRONT, BENCHMARKS):
        return len(recipe.values[stage.kind]["kappas"])
    return recipe.num_points(stage.iteration) if stage.kind == EVALUATION else None


def _step(stage: Stage, records: list[dict[str, Any]]) -> int | None:
    if stage.kind == MEMBER:
        return max((r["step"] for r in records if isinstance(r.get("step"), int)), default=0)
    if stage.kind in (EVALUATION, FRONT, PICK, BENCHMARKS):
        # A set: a point that was measured again after a kill is in the file twice.
        return len({(r.get("base"), r["eta"]) for r in records if "eta" in r})
    return None


def _remaining(elapsed: float, step: int | None, began: int, total: int | None) -> float | None:
    if not step or not total or step <= began:
        return None
    # The pace of this attempt; earlier ones may have run on other nodes, or waited for something.
    return elapsed / (step - began) * (total - step)


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last records of a file of JSON lines; a line that is being written is left out."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - _TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    # The first line of the tail is most likely the end of a longer one.
    if size > _TAIL_BYTES:
        lines = lines[1:]
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
