"""What is done, running, failed and next: read from the disk (and the queue), every time anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from nemo_warp import exit_codes
from nemo_warp.pipeline.disk import attempts, cancelled, locks
from nemo_warp.pipeline.disk.request import Request, build_request, read_request
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.paths import StagePaths
from nemo_warp.pipeline.recipe.plan import MEMBER, Stage
from nemo_warp.records import Completion, RecordError, read_completion


class Status(str, Enum):
    """Where a stage stands."""

    DONE = "done"
    RUNNING = "running"
    QUEUED = "queued"
    READY = "ready"
    """Could start now."""
    WAITING = "waiting"
    """Needs a stage that is not done."""
    FAILED = "failed"
    """No further attempt is made without ``resume``."""


_HELD_UP = ("SUSPENDED", "STOPPED")
_WITH_NODES = ("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "RESIZING", "SIGNALING",
               *_HELD_UP)  # fmt: skip


@dataclass(frozen=True)
class QueuedJob:
    """One job or array task of this run in Slurm's queue."""

    job_id: str
    state: str
    reason: str = ""

    @property
    def running(self) -> bool:
        """Whether it has an allocation: no stop may take it out of the queue."""
        return self.state in _WITH_NODES

    @property
    def why(self) -> str:
        """What holds it up, for people."""
        return self.reason or (self.state.lower() if self.state in _HELD_UP else "")


@dataclass(frozen=True)
class StageState:
    """A stage's status; `reason` says why, in words, when that is not obvious."""

    stage: Stage
    status: Status
    reason: str = ""
    job: QueuedJob | None = None


def inspect(
    recipe: Recipe,
    queue: Mapping[str, QueuedJob] | None = None,
    cancelled_jobs: Mapping[str, str] | None = None,
) -> dict[str, StageState]:
    """The state of every stage by name, in the plan's order.

    Args:
        recipe: of an existing run directory.
        queue: this run's jobs by stage name; None for the local launcher.
        cancelled_jobs: ids of jobs by stage name that Slurm remembers as cancelled.
    """
    states: dict[str, StageState] = {}
    for stage in recipe.stages:
        job, seen = (queue or {}).get(stage.name), (cancelled_jobs or {}).get(stage.name)
        states[stage.name] = _inspect_stage(recipe, stage, states, job, seen)
    return states


def _inspect_stage(
    recipe: Recipe,
    stage: Stage,
    before: dict[str, StageState],
    job: QueuedJob | None,
    cancelled_job: str | None,
) -> StageState:
    paths = recipe.paths.stage(stage.name)
    missing = [name for name in stage.needs if before[name].status is not Status.DONE]
    # Done is asked first, and of the disk alone: neither a queue that forgets nor a lock that a
    # dying process still holds can make a finished stage unfinished.
    if not missing:
        try:
            request = build_request(recipe, stage)
            if is_done(recipe, stage, request):
                return StageState(stage, Status.DONE)
        except RecordError as error:
            return StageState(stage, Status.FAILED, str(error), job)
    # The queue before the lock: a pending job holds no lock.
    if job is not None:
        return StageState(stage, Status.RUNNING if job.running else Status.QUEUED, job.why, job)
    if locks.is_held(paths.lock):
        return StageState(stage, Status.RUNNING)
    # Cancelled before "failed": it says whose doing it was, and survives Slurm's memory.
    cancelled_job = cancelled.standing(paths, cancelled_job)
    if cancelled_job is not None:
        return StageState(stage, Status.FAILED, f"its job {cancelled_job} was cancelled")
    if missing:
        return _waiting(stage, missing, before)
    stuck = attempts.failure(paths, recipe.values["retries"]["without_progress"])
    # Attempts at an earlier request (before a change of the recipe) do not count for this one.
    if stuck is not None and _was_made_for(paths, request):
        return StageState(stage, Status.FAILED, stuck)
    return StageState(stage, Status.READY)


def _waiting(stage: Stage, missing: list[str], before: dict[str, StageState]) -> StageState:
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    failed = [name for name in missing if before[name].status is Status.FAILED]
    verb = "blocked by" if failed else "needs"
    return StageState(stage, Status.WAITING, f"{verb} {(failed or missing)[0]}{more}")


def is_done(recipe: Recipe, stage: Stage, request: Request) -> bool:
    """Whether the stage's completion record is there and is of this very request.

    A record that was made for another request (an input came out differently, the recipe was
    changed) does not count: the stage will be made again.

    Raises:
        RecordError: there is a record for this request, but it says that it is of another
            configuration, or of a member that did not reach its last step.
    """
    paths = recipe.paths.stage(stage.name)
    completion = read_completion(paths.directory)
    if completion is None or not _was_made_for(paths, request):
        return False
    _check_completion(paths, completion, stage, request)
    return True


def _was_made_for(paths: StagePaths, request: Request) -> bool:
    return read_request(paths) == request.record()


def _check_completion(
    paths: StagePaths, completion: Completion, stage: Stage, request: Request
) -> None:
    remedy = f"remove {paths.directory} to make it again"
    if completion.config_hash != request.config_hash:
        raise RecordError(
            f"{paths.completion} is of another configuration ({completion.config_hash[:12]}, "
            f"expected {request.config_hash[:12]}); {remedy}"
        )
    if stage.kind == MEMBER:
        # NeMo-Aligner's fit() returns normally at a time limit (algorithms/reinforce.py l.546), so
        # an exit code of 0 proves nothing: the record's step does.
        wanted = request.config["run"]["total_steps"]
        if completion.details.get("step") != wanted:
            found = completion.details.get("step")
            raise RecordError(f"{paths.completion} is of step {found}, not {wanted}; {remedy}")
    for name in request.outputs:
        if name not in completion.files:
            raise RecordError(f"{paths.completion} does not mention {name}; {remedy}")


def exit_code(states: Mapping[str, StageState]) -> int:
    """`nemo_warp.exit_codes` for the whole run: done, in progress, or failed.

    A stage that has failed for good fails the run at once, whether its siblings run or not.
    """
    found = {state.status for state in states.values()}
    if found == {Status.DONE}:
        return exit_codes.DONE
    return exit_codes.FAILED if Status.FAILED in found else exit_codes.IN_PROGRESS


def counts(states: Mapping[str, StageState]) -> dict[str, Any]:
    """How many stages are in each status."""
    found = [state.status.value for state in states.values()]
    return {status.value: found.count(status.value) for status in Status}
