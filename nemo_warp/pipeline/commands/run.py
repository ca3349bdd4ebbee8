"""``nemo-warp run``: start a recipe, or go on with it."""

from __future__ import annotations

import argparse

from nemo_warp import exit_codes
from nemo_warp.pipeline.commands.common import EXIT_CODES, add_recipe, in_words, load
from nemo_warp.pipeline.commands.view import Live
from nemo_warp.pipeline.disk import locks
from nemo_warp.pipeline.disk.opening import open_run
from nemo_warp.pipeline.launch.local import LocalDriver
from nemo_warp.pipeline.launch.rounds import run_round
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.validate import check_counts, check_files, check_prompts

EPILOG = f"""\
What is on disk decides what is left to do, so run it as often as you like: what is done is not
done again. On this machine (launcher.kind=local) it works until the recipe is done. Under Slurm
it submits what is missing, and the job that will do the next round, and returns.

  nemo-warp run recipes/tiny
  nemo-warp run recipes/tiny iterations=1 launcher.side_by_side=1
  nemo-warp run recipes/gemma_7b cluster_overrides.account=my-team
  sbatch slurm/warp_iter.sh recipes/gemma_7b        # the same, as a job from the start

{EXIT_CODES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.epilog = EPILOG
    add_recipe(parser)


@in_words
def main(args: argparse.Namespace) -> int:
    """Start or go on; returns an exit code."""
    recipe = load(args)
    if recipe.paths.stop.exists():
        print(f"stopped: {recipe.paths.stop} exists; nemo-warp resume {recipe.paths.root}")
        return exit_codes.STOPPED_RESUMABLE
    return go(recipe)


def go(recipe: Recipe) -> int:
    """Open the run directory and hand over to the launcher."""
    check_files(recipe.values)
    check_prompts(recipe.values)
    check_counts(recipe.values)
    wait_s = 120.0 if recipe.values["launcher"]["kind"] == "slurm" else 0.0
    with locks.hold(recipe.paths.driver_lock, wait_s):
        open_run(recipe)
    if recipe.values["launcher"]["kind"] == "slurm":
        code = run_round(recipe)
    else:
        with locks.hold(recipe.paths.driver_lock):
            code = LocalDriver(recipe, Live(recipe)).run()
    _announce(recipe, code)
    return code


def _announce(recipe: Recipe, code: int) -> None:
    root = recipe.paths.root
    if code == exit_codes.DONE:
        print(f"{recipe.name} is done.")
        print(f"  picture:  {recipe.paths.stage('report').directory / 'curves.png'}")
        print(f"  table:    {recipe.paths.stage('report').directory / 'table.md'}")
        print(f"  policy:   {recipe.paths.stage('final').policy}")
    elif code == exit_codes.FAILED:
        print(f"failed; why: nemo-warp status {root}; then: nemo-warp resume {root}")
    elif code == exit_codes.STOPPED_RESUMABLE:
        print(f"stopped; go on with: nemo-warp resume {root}")
