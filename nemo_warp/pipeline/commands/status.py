"""``nemo-warp status``: what is done, running, failed, why, and what happens next."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from nemo_warp import exit_codes
from nemo_warp.pipeline.commands.common import EXIT_CODES, add_recipe, existing, in_words
from nemo_warp.pipeline.commands.spent import as_rows, cost_table
from nemo_warp.pipeline.commands.terminal import clip, in_red, is_terminal, size_of
from nemo_warp.pipeline.commands.view import table
from nemo_warp.pipeline.disk import locks
from nemo_warp.pipeline.disk.attempts import failing_log, last_words, list_attempts
from nemo_warp.pipeline.disk.progress import measure
from nemo_warp.pipeline.disk.state import QueuedJob, StageState, Status, counts, exit_code, inspect
from nemo_warp.pipeline.launch import slurm, slurm_jobs
from nemo_warp.pipeline.recipe.load import Recipe

_MARK_FAILED = "FAILED"
EPILOG = f"""\
Reads the run directory (and the queue, under Slurm); writes nothing.

  nemo-warp status runs/tiny
  nemo-warp status runs/tiny --json | jq .next
  nemo-warp status runs/tiny --cost       # hours so far, lost to retries, and left

{EXIT_CODES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.epilog = EPILOG
    add_recipe(parser)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--cost", action="store_true", help="node- and GPU-hours by kind, from the attempts"
    )


@in_words
def main(args: argparse.Namespace) -> int:
    """Print the state; returns the run's exit code."""
    recipe = existing(args)
    look, problem = _look(recipe)
    queue = look.active if look is not None else None
    states = inspect(recipe, queue, look.cancelled if look is not None else None)
    code = _code(recipe, states)
    following = what_next(recipe, states, queue)
    if args.json:
        print(json.dumps(as_json(recipe, states, code, following, problem), indent=2))
        return code
    if args.cost:
        print("\n".join(cost_table(recipe, states)))
        return code
    print("\n".join(_fitting(table(recipe, states))))
    print("".join(f"\n{line}" for line in why(recipe, states)), end="")
    print(f"\n{problem or ''}{' ' if problem else ''}next: {following}")
    return code


def _look(recipe: Recipe) -> tuple[slurm_jobs.Look | None, str | None]:
    if recipe.values["launcher"]["kind"] != "slurm":
        return None, None
    try:
        return slurm_jobs.look(recipe, patience_s=5.0), None
    except slurm.SlurmError as error:
        return None, f"the queue cannot be read ({error}); this is what the disk says."


def _fitting(lines: list[str]) -> list[str]:
    """On a terminal, lines that do not wrap; whole reasons of failures follow the table."""
    if not is_terminal(sys.stdout):
        return lines
    columns, _ = size_of(sys.stdout)
    clipped = [clip(line, columns - 1) for line in lines]
    return [in_red(line) if _MARK_FAILED in line else line for line in clipped]


def why(recipe: Recipe, states: Mapping[str, StageState]) -> Iterator[str]:
    """Of each failed stage: the reason, the failing step's own last words, and its log."""
    for name, state in states.items():
        tries = list_attempts(recipe.paths.stage(name))
        if state.status is not Status.FAILED:
            continue
        yield f"{name}: {state.reason}"
        log = failing_log(tries[-1]) if tries else recipe.paths.task_log(name)
        words = last_words(log)
        if words and words.removeprefix("error: ") not in state.reason:
            yield f"  its last words: {words}"
        if log.exists():
            yield f"  log: {log}"


def _code(recipe: Recipe, states: Mapping[str, StageState]) -> int:
    code = exit_code(states)
    active = {s.status for s in states.values()} & {Status.RUNNING, Status.QUEUED}
    if code == exit_codes.IN_PROGRESS and recipe.paths.stop.exists() and not active:
        return exit_codes.STOPPED_RESUMABLE
    return code


def what_next(
    recipe: Recipe,
    states: Mapping[str, StageState],
    queue: Mapping[str, QueuedJob] | None,
) -> str:
    """What happens next, and whether somebody has to do something for it."""
    root = recipe.paths.root
    named = {
        status: [name for name, state in states.items() if state.status is status]
        for status in Status
    }
    if len(named[Status.DONE]) == len(states):
        return f"nothing, it is done: {recipe.paths.stage('final').policy}"
    if recipe.paths.stop.exists():
        return f"nothing, it was stopped; go on with: nemo-warp resume {root}"
    if named[Status.FAILED] and not named[Status.RUNNING] and not named[Status.QUEUED]:
        return f"nothing until you act: nemo-warp resume {root}"
    by_slurm = queue is not None and slurm_jobs.DRIVER in queue
    driven = by_slurm or locks.is_held(recipe.paths.driver_lock)
    coming = (named[Status.READY] + named[Status.QUEUED] + named[Status.WAITING])[:1]
    step = f"{coming[0]}" if coming else "the end"
    if driven:
        return step
    return f"{step}, but no driver is at work; nemo-warp run {root}"


def as_json(
    recipe: Recipe,
    states: Mapping[str, StageState],
    code: int,
    following: str,
    problem: str | None,
) -> dict[str, Any]:
    """Everything the table says, for programs."""
    stages = [
        {
            "name": name,
            "kind": state.stage.kind,
            "status": state.status.value,
            "reason": state.reason,
            "job": state.job.job_id if state.job else None,
            **asdict(measure(recipe, state)),
        }
        for name, state in states.items()
    ]
    return {
        "name": recipe.name,
        "run_directory": str(recipe.paths.root),
        "exit_code": code,
        "counts": counts(states),
        "next": following,
        "problem": problem,
        "stages": stages,
        "cost": as_rows(recipe, states),
    }
