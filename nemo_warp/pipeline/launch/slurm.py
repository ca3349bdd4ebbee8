"""Slurm's commands: what is asked of them, and how they say no."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

PATIENCE_S = 600.0
"""How long a controller that does not answer (restarting, overloaded) is asked again."""


class SlurmError(Exception):
    """Slurm refused a command or does not answer."""


def in_job() -> bool:
    """Whether this process is the batch script of a job."""
    return "SLURM_JOB_ID" in os.environ


def own_job_id() -> str:
    """Id that means this job or this array task only.

    ``SLURM_JOB_ID`` of an array's last task is the id of the whole array: requeueing it would
    take the healthy siblings along.
    """
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def requeue_this_job() -> None:
    """Requeue this job before it ends, then wait for Slurm to end this process.

    Returns when the controller will not (the job is being cancelled, or may not be requeued).
    """
    try:
        ask(["scontrol", "requeue", own_job_id()])
    except SlurmError as error:
        print(f"cannot be requeued: {error}", flush=True)
        return
    time.sleep(300)


def submit(words: Sequence[str]) -> str:
    """Submit; returns the job id.

    Raises:
        SlurmError: refused.
    """
    return ask(words).strip().split(";")[0]


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended meanwhile do not matter."""
    if job_ids:
        ask(["scancel", "--quiet", *job_ids])


def ask(words: Sequence[str], patience_s: float = PATIENCE_S) -> str:
    """Run a Slurm command and return what it prints; asks again while the controller is away.

    Raises:
        SlurmError: it refused, is not installed, or did not answer for minutes.
    """
    deadline, pause = time.monotonic() + patience_s, 1.0
    while True:
        try:
            result = subprocess.run(
                words, capture_output=True, text=True, check=False, env=_clean_environment(words)
            )
        except FileNotFoundError:
            raise SlurmError(f"{words[0]} is not installed here; run this where Slurm is") from None
        if result.returncode == 0:
            return result.stdout
        message = result.stderr.strip()
        if not _controller_away(message) or time.monotonic() > deadline:
            raise SlurmError(f"{shlex.join(words)}: {message or f'exit code {result.returncode}'}")
        print(f"{words[0]}: {message}; asking again", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


def _controller_away(message: str) -> bool:
    signs = ("Unable to contact", "Socket timed out", "Connection refused", "slurm_load_jobs",
             "Zero Bytes were transmitted", "Communication connection failure")  # fmt: skip
    return any(sign in message for sign in signs) and "Invalid job id" not in message


def _clean_environment(words: Sequence[str]) -> dict[str, Any]:
    """Without this job's own limits, which a job submitted from here would inherit."""
    if words[0] != "sbatch":
        return dict(os.environ)
    kept = ("SLURM_CONF", "SLURM_CONF_SERVER")
    return {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k in kept}
