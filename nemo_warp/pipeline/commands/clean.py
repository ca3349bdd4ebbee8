"""``nemo-warp clean``: remove what a run needs no more, and nothing else."""

from __future__ import annotations

import argparse

from nemo_warp import exit_codes
from nemo_warp.pipeline.commands.common import add_recipe, existing, in_words, look_at
from nemo_warp.pipeline.commands.estimate import size
from nemo_warp.pipeline.commands.housekeeping import (
    bytes_below,
    leftovers,
    optimizer_checkpoints,
    remove,
)
from nemo_warp.pipeline.disk import locks
from nemo_warp.pipeline.disk.state import inspect
from nemo_warp.pipeline.recipe.load import Recipe

EPILOG = """\
Removes optimizer checkpoints of members whose iteration is merged and evaluated, stages that were
made again (superseded/), and what a killed merge left half-built. Policies, merges, points, logs
and records stay. The recipe's `retention: evaluated` does the first by itself.

  nemo-warp clean runs/gemma-7b --dry-run
  nemo-warp clean runs/gemma-7b
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.epilog = EPILOG
    add_recipe(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")


@in_words
def main(args: argparse.Namespace) -> int:
    """Remove, or say what would be; returns an exit code."""
    recipe = existing(args)
    if args.dry_run:
        return _clean(args, recipe)
    # No driver may look at the disk while things go.
    with locks.hold(recipe.paths.driver_lock):
        return _clean(args, recipe)


def _clean(args: argparse.Namespace, recipe: Recipe) -> int:
    look = look_at(recipe)
    states = inspect(recipe, look.active, look.cancelled)
    freed, complete = 0, True
    for path in [*optimizer_checkpoints(recipe, states), *leftovers(recipe, states)]:
        held = bytes_below(path)
        if args.dry_run or remove(path):
            freed += held
            print(f"{size(held):>10}  {path.relative_to(recipe.paths.root)}")
        else:
            complete = False
    print(f"{size(freed):>10}  {'would be freed' if args.dry_run else 'freed'}")
    return exit_codes.DONE if complete else exit_codes.FAILED
