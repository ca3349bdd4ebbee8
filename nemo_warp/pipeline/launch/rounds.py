"""One round of the Slurm driver: look at plan, disk and queue; submit what is missing; end.

A round submits the next round's driver, which starts when this one's merge has ended in whatever
way, the members of one iteration (those that are missing, as one array), its merge and its
evaluation. It may be repeated at any moment, by two people at once: a stage that is done or queued
is not submitted again, and one whose job a person cancelled is submitted again only after
``resume``.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Iterator

from nemo_warp import exit_codes
from nemo_warp.pipeline.disk import cancelled, locks
from nemo_warp.pipeline.disk.attempts import list_attempts, progress
from nemo_warp.pipeline.disk.state import QueuedJob, StageState, Status, exit_code, inspect
from nemo_warp.pipeline.launch import slurm, slurm_jobs
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import Stage, merge_name
from nemo_warp.records import config_hash, write_text_atomically

# A round takes seconds, or minutes while the controller is asked again.
_LOCK_WAIT_S = 120.0
_MAX_IDLE_ROUNDS = 2
"""After so many rounds in which no stage began the driver gives up, also if cron runs it again."""

Submit = Callable[[list[str]], str]


def run_round(recipe: Recipe, say: Callable[[str], None] = print) -> int:
    """Submit what is missing; returns an exit code of `nemo_warp.exit_codes`.

    Raises:
        LockHeldError: another driver has been at it for minutes.
        SlurmError: a submission was refused, or the controller is away.
    """
    # Two rounds at once would both find a stage missing and submit it.
    with locks.hold(recipe.paths.driver_lock, _LOCK_WAIT_S):
        return _run_round(recipe, say)


def _run_round(recipe: Recipe, say: Callable[[str], None]) -> int:
    # The order is: look at the queue, then at the disk. A job that ends in between has written its
    # record by then; the other way round it would be neither queued nor done, and be submitted
    # again.
    slurm_jobs.keep_tag(recipe)
    look = slurm_jobs.look(recipe)
    _cancel_hopeless(look.active, say)
    for name, job in look.cancelled.items():
        if name != slurm_jobs.DRIVER:
            # Noted at once: Slurm forgets cancelled jobs after MinJobAge (300 s by default).
            cancelled.note(recipe.paths.stage(name), job)
    states = inspect(recipe, look.active)
    code = exit_code(states)
    if code == exit_codes.DONE:
        return code
    if recipe.paths.stop.exists():
        say(f"stopped: {recipe.paths.stop} exists; `nemo-warp resume` removes it")
        return exit_codes.STOPPED_RESUMABLE
    for state in states.values():
        if state.status is Status.FAILED:
            say(f"{state.stage.name} has failed: {state.reason}")
    # A job that dies before its task begins makes no attempt, so no cap on attempts stops it.
    if _too_idle(recipe, states, look.active, say):
        return exit_codes.FAILED
    recipe.paths.slurm_logs.mkdir(exist_ok=True)

    def submit(words: list[str]) -> str:
        answer = slurm.submit(words, look.ids) if words[0] == "sbatch" else slurm.ask(words)
        look.ids.add(answer)
        say(f"{answer}: {shlex.join(words)}" if answer else shlex.join(words))
        return answer

    follower = look.active.get(slurm_jobs.DRIVER)
    jobs, refused = submit_round(recipe, states, submit, follower is not None)
    if refused is not None and not jobs:
        raise refused
    if refused is not None:
        say(f"not submitted: {refused}; tried again by the next round")
    failed = code == exit_codes.FAILED
    return exit_codes.IN_PROGRESS if jobs and not failed else exit_codes.FAILED


def _too_idle(
    recipe: Recipe,
    states: dict[str, StageState],
    queue: dict[str, QueuedJob],
    say: Callable[[str], None],
) -> bool:
    """Whether rounds go by in which nothing begins; leaves word for the next driver."""
    mark, idle = _mark(recipe, states), 0
    last = recipe.paths.last_round
    before, _, count = (last.read_text() if last.exists() else "").partition(":")
    if before == mark and not queue:
        idle = int(count) + 1
    last.parent.mkdir(exist_ok=True)
    write_text_atomically(last, f"{mark}:{idle}")
    if idle < _MAX_IDLE_ROUNDS:
        return False
    say(f"{idle} rounds in which no stage began: see {recipe.paths.slurm_logs}")
    return True


def submit_round(
    recipe: Recipe, states: dict[str, StageState], submit: Submit, followed: bool = False
) -> tuple[dict[str, str], slurm.SlurmError | None]:
    """Submit what this round can, and first of all the driver of the next one.

    Whatever refuses a job (a limit on their number, memory that no node has) may do so half-way.
    A driver that waits in the queue already follows what was taken; if this process dies, it
    begins in an hour. One that is refused leaves nothing behind.

    Args:
        recipe: under Slurm.
        states: with the jobs that are in the queue.
        submit: runs an ``sbatch`` line and returns the job's id, or a ``scontrol`` line.
        followed: a driver is in the queue.

    Returns:
        Stage name -> job id of all that is in the queue now; the refusal that came up.

    Raises:
        SlurmError: the driver was refused; nothing was submitted.
    """
    jobs = {name: state.job.job_id for name, state in states.items() if state.job is not None}
    # A rehearsal with ids of no meaning: is there anything to submit, or in the queue?
    if not submit_missing(recipe, states, dict(jobs), lambda _words: "0"):
        return jobs, None
    # Before the stages: if this process dies half-way, the next driver looks again. It begins in an
    # hour unless the line below brings that forward.
    driver = None if followed else submit(slurm_jobs.sbatch_driver(recipe))
    refused = None
    try:
        submit_missing(recipe, states, jobs, submit)
    # Kept, not raised: jobs that were accepted before it need a driver that follows them.
    except slurm.SlurmError as error:
        refused = error
    if driver is not None and jobs:
        submit(slurm_jobs.follow(driver, driver_waits_for(recipe, jobs)))
    elif driver is not None:
        slurm.cancel([driver])
    return jobs, refused


def _mark(recipe: Recipe, states: dict[str, StageState]) -> str:
    """Changes whenever a stage was done, began, or got further."""
    stages = [recipe.paths.stage(name) for name in states]
    facts = [(len(list_attempts(p)), progress(p), p.completion.exists()) for p in stages]
    return config_hash({"facts": facts})[:16]


def submit_missing(
    recipe: Recipe, states: dict[str, StageState], jobs: dict[str, str], submit: Submit
) -> dict[str, str]:
    """Submit every stage of this round that is neither done nor queued nor failed.

    Args:
        recipe: under Slurm.
        states: of all stages.
        jobs: stage name -> job id of all that is queued or running; added to.
        submit: runs an ``sbatch`` line.

    Returns:
        ``jobs``.
    """
    for stages in _groups(recipe, states):
        missing = [s for s in stages if _is_missing(s, states, jobs)]
        if missing:
            # Needs that are done have no job: nothing to wait for.
            after = sorted({jobs[n] for s in missing for n in s.needs if n in jobs})
            job = submit(slurm_jobs.sbatch_stage(recipe, missing, after))
            # A new array is waited for as a whole, an older one only for the tasks still in it.
            jobs |= {stage.name: job for stage in missing}
    return jobs


def _groups(recipe: Recipe, states: dict[str, StageState]) -> Iterator[list[Stage]]:
    """This round's stages, those of one job together, in the plan's order."""
    last = recipe.values["iterations"]
    now = next(
        (i for i in range(1, last + 1) if states[merge_name(i)].status is not Status.DONE), last
    )
    chosen = [s for s in recipe.stages if s.iteration <= now and not _at_the_end(s, now, last)]
    # The plan is in order of iteration and kind, which groupby needs.
    for _, stages in itertools.groupby(chosen, key=lambda s: (s.iteration, s.kind)):
        yield from _alike(recipe, list(stages))


def _alike(recipe: Recipe, stages: list[Stage]) -> Iterator[list[Stage]]:
    """The tasks of one array ask for the same: members that need more nodes are another array."""
    alike: dict[tuple[slurm_jobs.JobShape, int], list[Stage]] = {}
    for stage in stages:
        array = slurm_jobs.stage_shape(recipe, stage), slurm_jobs.begins_after(recipe, stage)
        alike.setdefault(array, []).append(stage)
    yield from alike.values()


def _at_the_end(stage: Stage, now: int, last: int) -> bool:
    return "/" not in stage.name and now < last


def _is_missing(stage: Stage, states: dict[str, StageState], jobs: dict[str, str]) -> bool:
    state = states[stage.name]
    if stage.name in jobs or state.status not in (Status.READY, Status.WAITING):
        return False
    return all(n in jobs or states[n].status is Status.DONE for n in stage.needs)


def driver_waits_for(recipe: Recipe, jobs: dict[str, str]) -> list[str]:
    """The next round begins when this one's merge has ended; without one, when all jobs have."""
    # Not the last iteration's: after it there is no next one, only the front and what follows it.
    merges = [merge_name(i) for i in range(1, recipe.values["iterations"]) if merge_name(i) in jobs]
    return [jobs[merges[-1]]] if merges else sorted(set(jobs.values()))


def _cancel_hopeless(queue: dict[str, QueuedJob], say: Callable[[str], None]) -> None:
    """Jobs whose dependency can never be satisfied would wait for ever: remove them."""
    for name, job in list(queue.items()):
        # Seen on 22.05: such a job stays for ever, even when the job it depends on is requeued by
        # hand and succeeds. --kill-on-invalid-dep removes most of them; sites may switch that off.
        if job.reason == slurm_jobs.NEVER_SATISFIED:
            say(f"cancelling {job.job_id} ({name}): its dependency failed")
            slurm.cancel([job.job_id])
            del queue[name]
