"""``nemo-warp stop``: let the members save, and start nothing more."""

from __future__ import annotations

import argparse
import time

from nemo_warp import exit_codes
from nemo_warp.pipeline.commands.common import add_recipe, existing, in_words, queue_of
from nemo_warp.pipeline.disk import cancelled
from nemo_warp.pipeline.disk.state import Status, inspect
from nemo_warp.pipeline.launch import slurm, slurm_jobs
from nemo_warp.pipeline.recipe.load import Recipe

EPILOG = """\
Writes the run's STOP file: running members save at the next step and end, nothing new starts, no
job requeues itself. Pending Slurm jobs are cancelled. `nemo-warp resume` goes on where it stopped.

  nemo-warp stop runs/gemma-7b --wait 900

exit codes: 0 nothing runs any more; 75 something still does (it is saving)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.epilog = EPILOG
    add_recipe(parser)
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="for what runs to end"
    )


@in_words
def main(args: argparse.Namespace) -> int:
    """Stop; returns an exit code."""
    recipe = existing(args)
    recipe.paths.stop.touch()
    _cancel_pending(recipe)
    deadline = time.monotonic() + args.wait
    while True:
        running = _running(recipe)
        if not running:
            print("stopped")
            return exit_codes.DONE
        if time.monotonic() >= deadline:
            print(f"told to stop, still saving: {', '.join(running)}")
            return exit_codes.IN_PROGRESS
        time.sleep(0.5)


def _cancel_pending(recipe: Recipe) -> None:
    """Jobs that a stop cancels are no failures, also one that begins just then."""
    queue = queue_of(recipe) or {}
    pending = {name: job.job_id for name, job in queue.items() if not job.running}
    for name, job in pending.items():
        if name != slurm_jobs.DRIVER:
            cancelled.forgive(recipe.paths.stage(name), job)
    slurm.cancel(list(pending.values()))


def _running(recipe: Recipe) -> list[str]:
    states = inspect(recipe, queue_of(recipe))
    return [n for n, s in states.items() if s.status in (Status.RUNNING, Status.QUEUED)]
