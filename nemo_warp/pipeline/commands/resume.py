"""``nemo-warp resume``: go on after a stop or a failure."""

from __future__ import annotations

import argparse

from nemo_warp.pipeline.commands.checks import check_before_start
from nemo_warp.pipeline.commands.common import (
    EXIT_CODES,
    add_recipe,
    add_redo,
    existing,
    in_words,
    look_at,
)
from nemo_warp.pipeline.commands.run import go
from nemo_warp.pipeline.disk import attempts, cancelled, locks
from nemo_warp.pipeline.disk.state import Status, inspect

EPILOG = f"""\
Removes the run's STOP file, gives failed stages a fresh budget of attempts, and runs what is
missing, nothing else: members that are done, running or queued are left alone.

  nemo-warp resume runs/gemma-7b

{EXIT_CODES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.epilog = EPILOG
    add_recipe(parser)
    add_redo(parser)


@in_words
def main(args: argparse.Namespace) -> int:
    """Forgive, then run; returns an exit code."""
    recipe = existing(args)
    # Before anything is forgiven: a recipe that would be refused must not lose its record of
    # failures.
    check_before_start(recipe)
    look = look_at(recipe)
    by_slurm = recipe.values["launcher"]["kind"] == "slurm"
    with locks.hold(recipe.paths.driver_lock, 120.0 if by_slurm else 0.0):
        pass  # another driver may be at work to obey a colleague's stop: nothing is touched
    stopped = recipe.paths.stop.exists()
    recipe.paths.stop.unlink(missing_ok=True)
    recipe.paths.last_round.unlink(missing_ok=True)
    for name, state in inspect(recipe, look.active, look.cancelled).items():
        if state.status is Status.FAILED:
            print(f"another chance for {name}: {state.reason}")
            attempts.forgive(recipe.paths.stage(name))
        cancelled.forgive(recipe.paths.stage(name), *look.cancelled_jobs(name))
    try:
        return go(recipe, args.redo, args.other_code)
    except Exception:
        if stopped:  # it could not go on, so the stop stands
            recipe.paths.stop.touch()
        raise
