"""One stage, supervised: ``python -m nemo_warp.pipeline.task RUN STAGE``.

Both launchers start this, the local one as a subprocess, Slurm as the batch script of a job. It
takes the stage's lock, sets the stage up, starts reward servers and the stage's program, watches
all of them, and ends with the true exit code of the first that ended. Under Slurm it requeues
itself, and only itself, before the job reaches a terminal state.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_warp import exit_codes, yaml_text
from nemo_warp.disk_errors import in_a_sentence
from nemo_warp.pipeline.disk import attempts, cancelled, locks
from nemo_warp.pipeline.disk.request import Request, build_request, read_request
from nemo_warp.pipeline.disk.state import Status, inspect, is_done
from nemo_warp.pipeline.launch import slurm, slurm_jobs
from nemo_warp.pipeline.launch.steps import Allocation, slurm_allocation
from nemo_warp.pipeline.launch.supervise import Outcome, Supervisor
from nemo_warp.pipeline.recipe.load import Recipe, load_recipe
from nemo_warp.pipeline.recipe.paths import StagePaths
from nemo_warp.pipeline.recipe.plan import Stage
from nemo_warp.records import (
    RecordError,
    code_version,
    write_json_atomically,
    write_text_atomically,
)

_LOCK_WAIT_S = 30.0
_VISIBILITY_WAIT_S = 60.0
"""How long a shared file system may take to show another node's completion record."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns one of `nemo_warp.exit_codes` or the program's own exit code."""
    parser = argparse.ArgumentParser(prog="python -m nemo_warp.pipeline.task", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("stage", help="e.g. iteration_01/merge; {:02d} is the array index")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the stored recipe")
    parser.add_argument("--array-begins-after", type=int, default=0, metavar="MEMBER",
                        help="the member before the one that array index 1 is")  # fmt: skip
    options = parser.parse_args(argv)
    index = options.array_begins_after + int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    try:
        recipe = load_recipe(options.run, options.overrides)
        stage = _find(recipe, options.stage.replace("{:02d}", f"{index:02d}"))
        with locks.hold(recipe.paths.stage(stage.name).lock, _LOCK_WAIT_S) as lock:
            return run_stage(recipe, stage, lock)
    except locks.LockHeldError as error:
        print(f"somebody else is at it: {error} is held", flush=True)
        return exit_codes.IN_PROGRESS
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return exit_codes.MISCONFIGURED
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return exit_codes.FAILED
    except OSError as error:
        sentence = in_a_sentence(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        return exit_codes.FAILED


def _find(recipe: Recipe, name: str) -> Stage:
    for stage in recipe.stages:
        if stage.name == name:
            return stage
    raise ValueError(f"{name} is not a stage of {recipe.name}")


def run_stage(recipe: Recipe, stage: Stage, lock: int) -> int:
    """Make one attempt at ``stage``, unless it is done or has failed. The lock is held."""
    paths, job = recipe.paths.stage(stage.name), slurm_jobs.own_job(recipe, stage)
    if job is not None:
        # Slurm runs this job, so it was not cancelled after all: a requeue may look like it from
        # outside.
        cancelled.withdraw(paths, job)
    # Under Slurm the job before may have ended on another node, whose file system cache is ahead.
    _await_needs(recipe, stage, _VISIBILITY_WAIT_S if job is not None else 0.0)
    request = build_request(recipe, stage)
    if is_done(recipe, stage, request):
        print(f"{stage.name} is done already", flush=True)
        return exit_codes.DONE
    _require_inputs(stage, request)
    _set_up(recipe, stage, request)
    cap = recipe.values["retries"]["without_progress"]
    # After the set-up: attempts at another request do not count, and were moved aside with it.
    stuck = attempts.failure(paths, cap)
    if stuck is not None:
        print(f"error: {stage.name}: {stuck}", file=sys.stderr, flush=True)
        return exit_codes.FAILED
    allocation = _allocation(recipe, stage, job)
    attempt = attempts.begin(paths, _record(request, allocation))
    try:
        outcome = Supervisor(recipe, stage, request, allocation, attempt.directory, lock).run()
    except ValueError as error:  # no such program, a command's {placeholder}
        outcome = Outcome(exit_codes.MISCONFIGURED, f"cannot be started: {error}")
    outcome = _judge(recipe, stage, request, outcome)
    attempts.end(attempt, outcome.exit_code, outcome.reason, outcome.asked)
    print(f"{stage.name} attempt {attempt.number}: {outcome.reason}", flush=True)
    if job is not None:
        _requeue_if_worthwhile(paths, outcome, cap, job)
    return outcome.exit_code


def _await_needs(recipe: Recipe, stage: Stage, wait_s: float) -> None:
    """Raise RecordError unless all the stages before are done (records may take time to show)."""
    deadline = time.monotonic() + wait_s
    while True:
        states = inspect(recipe)
        missing = [n for n in stage.needs if states[n].status is not Status.DONE]
        if not missing:
            return
        if time.monotonic() >= deadline:
            state = states[missing[0]]
            raise RecordError(
                f"{stage.name} needs {missing[0]}, which is {state.status.value}"
                f"{': ' + state.reason if state.reason else ''}"
            )
        time.sleep(1.0)


def _require_inputs(stage: Stage, request: Request) -> None:
    for path in request.reads:
        if not path.exists():
            raise RecordError(
                f"{stage.name} reads {path}, which is gone; remove the directory of the stage that "
                "made it to make it again"
            )


def _set_up(recipe: Recipe, stage: Stage, request: Request) -> None:
    """Make the stage's directory; move one that was made for other inputs out of the way."""
    paths = recipe.paths.stage(stage.name)
    _supersede(recipe, stage, request)
    paths.directory.mkdir(parents=True, exist_ok=True)
    write_text_atomically(paths.config, yaml_text.dump(request.config))
    write_json_atomically(paths.request, request.record())


def _supersede(recipe: Recipe, stage: Stage, request: Request) -> None:
    """Rename a directory whose inputs are not the wanted ones to ``superseded/...``."""
    paths = recipe.paths.stage(stage.name)
    recorded = read_request(paths)
    if recorded is None or recorded == request.record():
        return
    recipe.paths.superseded.mkdir(exist_ok=True)
    taken = [p.name.partition(".")[0] for p in recipe.paths.superseded.iterdir()]
    number = max((int(n) for n in taken if n.isdigit()), default=0) + 1  # some may be deleted
    target = recipe.paths.superseded / f"{number:03d}.{stage.name.replace('/', '.')}"
    paths.directory.rename(target)
    print(f"{stage.name}: its inputs have changed; the old one is in {target}", flush=True)


def _allocation(recipe: Recipe, stage: Stage, job: str | None) -> Allocation:
    if job is not None:
        shape = slurm_jobs.stage_shape(recipe, stage)
        return slurm_allocation(recipe.cluster, shape.gpus_per_node, job)
    launcher = recipe.values["launcher"]
    return Allocation(side_by_side=launcher["side_by_side"] if launcher["kind"] == "local" else 1)


def _record(request: Request, allocation: Allocation) -> dict[str, Any]:
    """What runs: kept with the attempt."""
    kept = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")
    image = allocation.cluster.get("container", {}).get("image")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "hosts": allocation.hosts,
        "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "slurm": {key: os.environ[key] for key in kept if key in os.environ},
        "config_hash": request.config_hash,
        "code_version": code_version(),
        "container_image": image,
        "python": platform.python_version(),
    }


def _judge(recipe: Recipe, stage: Stage, request: Request, outcome: Outcome) -> Outcome:
    """An exit code proves nothing: only the completion record makes a stage done."""
    try:
        done = is_done(recipe, stage, request)
    except RecordError as error:
        return Outcome(exit_codes.FAILED, str(error), outcome.asked)
    if done:
        return Outcome(exit_codes.DONE, "done", outcome.asked)
    if outcome.exit_code == exit_codes.DONE:
        reason = "the program ended with exit code 0, but wrote no completion record"
        return Outcome(exit_codes.FAILED, reason, outcome.asked)
    return outcome


def _requeue_if_worthwhile(paths: StagePaths, outcome: Outcome, cap: int, job: str) -> None:
    """Requeue this job or array task (and no other), then wait to be ended."""
    if outcome.exit_code == exit_codes.DONE or outcome.asked or not outcome.again:
        return
    stuck = attempts.failure(paths, cap)
    if stuck is not None:
        print(f"not requeued: {stuck}", flush=True)
        return
    # The supervisor's handler would only remember the signal, and Slurm wait for KillWait.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print(f"requeueing {job}", flush=True)
    slurm.requeue_this_job(job)


if __name__ == "__main__":
    sys.exit(main())
