"""What may go: optimizer checkpoints nobody reads any more, superseded and half-built stages."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from nemo_warp.pipeline.disk import locks
from nemo_warp.pipeline.disk.state import StageState, Status, inspect
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import MEMBER, evaluation_name, merge_name


def retain(recipe: Recipe, states: Mapping[str, StageState] | None = None) -> None:
    """Apply the recipe's ``retention``; a checkpoint that cannot be removed is a warning."""
    if recipe.values["retention"] == "all":
        return
    for path in optimizer_checkpoints(recipe, states or inspect(recipe)):
        remove(path)


def optimizer_checkpoints(recipe: Recipe, states: Mapping[str, StageState]) -> Iterator[Path]:
    """Training checkpoints of members whose iteration is merged and evaluated."""
    done = {name for name, state in states.items() if state.status is Status.DONE}
    for stage in recipe.stages:
        # Merged alone is not enough: with average_steps a merge that is made again reads the
        # checkpoints, and an evaluation may still ask for one.
        over = {stage.name, merge_name(stage.iteration), evaluation_name(stage.iteration)}
        checkpoints = recipe.paths.stage(stage.name).checkpoints
        if stage.kind == MEMBER and over <= done and checkpoints.is_dir():
            yield checkpoints


def leftovers(recipe: Recipe, states: Mapping[str, StageState]) -> Iterator[Path]:
    """Stages that were made again, and what a killed merge left half-built."""
    if recipe.paths.superseded.is_dir():
        yield from sorted(recipe.paths.superseded.iterdir())
    for name, state in states.items():
        paths = recipe.paths.stage(name)
        # Both: a running stage may be known to the queue only, or to its lock only.
        at_work = state.status is Status.RUNNING or locks.is_held(paths.lock)
        if paths.building.is_dir() and not at_work:
            yield paths.building


def remove(path: Path) -> bool:
    """Remove a directory tree; whether that worked. Why not goes to standard error."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        print(f"warning: {path} cannot be removed: {error.strerror}", file=sys.stderr)
        return False
    return True


def bytes_below(path: Path) -> int:
    """Size of all files below ``path``; links are not followed."""
    return sum(p.lstat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())
