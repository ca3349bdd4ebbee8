"""Slurm's commands: what is asked of them, and how they say no."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from enum import Enum

from nemo_warp.pipeline.launch import environment

PATIENCE_S = 600.0
"""How long a controller that does not answer (restarting, overloaded) is asked again."""
_BEFORE_SIGKILL_S = 10.0
"""What may be spent on a question between SIGTERM and SIGKILL (KillWait, 30 s by default)."""


class SlurmError(Exception):
    """Slurm refused a command or does not answer."""


class Ended(Enum):
    """Why Slurm ends a job."""

    CANCELLED = "cancelled"
    REQUEUED = "requeued"
    """Preempted, or requeued by hand: Slurm starts it again by itself."""
    TIME_LIMIT = "at its time limit"
    UNKNOWN = "ended by Slurm"


def own_job_id(name: str) -> str | None:
    """Id of the job called ``name`` if this process is in it; of the array task, in an array.

    The process may be in a job of another name: a driver that a person starts in an interactive
    allocation is. ``SLURM_JOB_ID`` of an array's last task is the id of the whole array: requeueing
    it would requeue the other tasks as well.
    """
    if "SLURM_JOB_ID" not in os.environ or os.environ.get("SLURM_JOB_NAME") != name:
        return None
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        # Seen on 22.05: `scontrol requeue $SLURM_JOB_ID` in the last task killed a healthy sibling,
        # too.
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def requeue_this_job(job: str) -> None:
    """Requeue this job before it ends, then wait for Slurm to end this process.

    Returns when the controller will not (the job is being cancelled, or may not be requeued).
    """
    try:
        ask(["scontrol", "requeue", job])
    except SlurmError as error:
        print(f"cannot be requeued: {error}", flush=True)
        return
    # scontrol returns before Slurm has killed this job's processes (KillWait, 30 s by default).
    # Going on would end the job by itself, with an exit code, before it is requeued.
    time.sleep(300)


def why_ended(job: str) -> Ended | None:
    """Why Slurm is ending this job, None if it is not; ask before SIGKILL follows SIGTERM.

    Measured on 22.05: the job is COMPLETING before any of its processes gets SIGTERM, whatever the
    reason. At its time limit it has the reason ``TimeLimit``; one that Slurm has requeued counts
    one restart more than this process was told of. A warning before preemption (GraceTime) finds
    it RUNNING.
    """
    # squeue and not sacct: accounting is optional, and lags behind.
    words = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={job}"]
    words += ["--Format=state:20,reason:40,restartcnt:10"]
    try:
        # A reason may hold spaces: state first, restart count last, the reason is what is between.
        state, *_ = line = ask(words, _BEFORE_SIGKILL_S).splitlines()[0].split()
        again = int(line[-1]) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    except (SlurmError, IndexError, ValueError):
        # Never an exception: the caller is being killed and has seconds left to write its record.
        return Ended.UNKNOWN
    if again:
        return Ended.REQUEUED
    if state == "RUNNING":
        return None
    reason = " ".join(line[1:-1])
    return Ended.TIME_LIMIT if reason == "TimeLimit" else Ended.CANCELLED


def submit(words: Sequence[str], known: Collection[str] = ()) -> str:
    """Submit; returns the job id.

    Args:
        words: the ``sbatch`` line, with its ``--job-name=``.
        known: ids of the jobs of that name from before: when sbatch's answer is lost, a job that
            is not among them is the one just submitted.

    Raises:
        SlurmError: refused.
    """
    name = next(w.removeprefix("--job-name=") for w in words if w.startswith("--job-name="))
    # "--parsable" prints "id" or, on federated clusters, "id;cluster".
    return ask(words, lost=lambda: _appeared(name, known)).strip().split(";")[0]


def _appeared(name: str, known: Collection[str]) -> str:
    # %F is the id of the whole array, as sbatch prints it; %i would be that of each task.
    query = ["squeue", "--noheader", "--states=all", f"--name={name}", "--format=%F"]
    # sbatch can fail after slurmctld has taken the job (its answer timed out): submitting again
    # without looking would train the same member twice.
    return next((job for job in ask(query).split() if job not in known), "")


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended meanwhile do not matter."""
    if job_ids:
        # --quiet: jobs that are over are no error.
        ask(["scancel", "--quiet", *job_ids])


def ask(
    words: Sequence[str],
    patience_s: float = PATIENCE_S,
    lost: Callable[[], str] | None = None,
    with_errors: bool = False,
) -> str:
    """Run a Slurm command and return what it prints; asks again while the controller is away.

    Args:
        words: the command line.
        patience_s: how long to ask again.
        lost: called before asking again; what it returns, unless empty, is the answer.
        with_errors: return what it says on standard error as well.

    Raises:
        SlurmError: it refused, is not installed, or did not answer for minutes.
    """
    deadline, pause = time.monotonic() + patience_s, 1.0
    while True:
        try:
            result = subprocess.run(
                words, capture_output=True, text=True, check=False, env=environment.for_slurm(),
                timeout=patience_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise SlurmError(f"{shlex.join(words)}: no answer in {patience_s:g} s") from None
        except FileNotFoundError:
            raise SlurmError(f"{words[0]} is not installed here; run this where Slurm is") from None
        if result.returncode == 0:
            return result.stdout + (result.stderr if with_errors else "")
        message = result.stderr.strip()
        # Only the controller's absence is waited for; a refusal would be the same again.
        if not _controller_away(message) or time.monotonic() > deadline:
            raise SlurmError(f"{shlex.join(words)}: {message or f'exit code {result.returncode}'}")
        print(f"{words[0]}: {message}; asking again", file=sys.stderr, flush=True)
        time.sleep(pause)
        # Doubling: hundreds of tasks that ask a controller which restarts must not keep it down.
        pause = min(2 * pause, 30.0)
        found = lost() if lost is not None else ""
        if found:
            return found


def _controller_away(message: str) -> bool:
    # Texts of Slurm's own errors (slurm_strerror); there is no exit code for it (always 1).
    # "slurm_load_jobs" stands before every failure of squeue, also before the one for an unknown
    # id.
    signs = ("Unable to contact", "Socket timed out", "Connection refused", "slurm_load_jobs",
             "Zero Bytes were transmitted", "Communication connection failure")  # fmt: skip
    return any(sign in message for sign in signs) and "Invalid job id" not in message
