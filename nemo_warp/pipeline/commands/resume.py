"""``nemo-warp resume``: go on after a stop or a failure."""

from __future__ import annotations

import argparse

from nemo_warp.pipeline.commands.common import EXIT_CODES, add_recipe, existing, in_words, look_at
from nemo_warp.pipeline.commands.run import go
from nemo_warp.pipeline.disk import attempts, cancelled
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


@in_words
def main(args: argparse.Namespace) -> int:
    """Forgive, then run; returns an exit code."""
    recipe = existing(args)
    recipe.paths.stop.unlink(missing_ok=True)
    look = look_at(recipe)
    for name, state in inspect(recipe, look.active, look.cancelled).items():
        if state.status is Status.FAILED:
            print(f"another chance for {name}: {state.reason}")
            attempts.forgive(recipe.paths.stage(name))
        cancelled.forgive(recipe.paths.stage(name), *look.cancelled_jobs(name))
    return go(recipe)
