"""What the pipeline's commands share: naming a recipe, and ending with a sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from nemo_warp import exit_codes
from nemo_warp.pipeline.commands.checks import check_before_start
from nemo_warp.pipeline.disk.locks import LockHeldError
from nemo_warp.pipeline.disk.state import QueuedJob
from nemo_warp.pipeline.launch import slurm, slurm_jobs
from nemo_warp.pipeline.recipe.load import Recipe, load_recipe

EXIT_CODES = f"""\
exit codes:
  {exit_codes.DONE}   every stage is done
  {exit_codes.FAILED}   a stage has failed; `nemo-warp status` says which and why
  {exit_codes.MISCONFIGURED}   the recipe, cluster file or an input is wrong; nothing was started
  {exit_codes.IN_PROGRESS}  stages are running or queued; come back later
  {exit_codes.STOPPED_RESUMABLE}  stopped on request; `nemo-warp resume` goes on
"""


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The arguments every command has."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "recipe", type=Path, help="recipe file, directory with a recipe.yaml, or run directory"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. iterations=2 launcher.kind=slurm"
    )


def add_redo(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that go on with a run."""
    parser.add_argument(
        "--redo", action="store_true",
        help="the recipe or an input was changed: make finished stages that it changes again",
    )  # fmt: skip
    parser.add_argument(
        "--other-code", action="store_true",
        help="go on in the middle of an iteration with another version of nemo_warp",
    )  # fmt: skip


def load(args: argparse.Namespace, files_here: bool = True) -> Recipe:
    """The recipe the arguments name."""
    return load_recipe(args.recipe, args.overrides, files_here)


def existing(args: argparse.Namespace) -> Recipe:
    """The run the arguments name.

    Raises:
        ValueError: it has not been started.
    """
    recipe = load(args, files_here=False)  # inputs may be gone, or on another machine
    if not recipe.paths.recipe.exists():
        raise ValueError(f"{recipe.paths.root} has not been started{_why_not(recipe)}")
    return load_recipe(recipe.paths.root, args.overrides, files_here=False)


def _why_not(recipe: Recipe) -> str:
    try:
        check_before_start(recipe)
    except ValueError as error:
        return f", and run would refuse it here: {error}"
    return f"; nemo-warp run {recipe.arguments[0]}"


def queue_of(recipe: Recipe) -> dict[str, QueuedJob] | None:
    """This run's jobs, for runs that use Slurm."""
    return slurm_jobs.queue(recipe) if recipe.values["launcher"]["kind"] == "slurm" else None


def look_at(recipe: Recipe) -> slurm_jobs.Look:
    """What Slurm knows of this run's jobs; nothing, for runs that do not use it."""
    by_slurm = recipe.values["launcher"]["kind"] == "slurm"
    return slurm_jobs.look(recipe) if by_slurm else slurm_jobs.Look()


def in_words(main: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Turn what Slurm and the disk can refuse into a sentence and an exit code."""

    @wraps(main)
    def wrapped(args: argparse.Namespace) -> int:
        try:
            return main(args)
        except slurm.SlurmError as error:
            return _say(error, exit_codes.FAILED)
        except LockHeldError as error:
            message = f"another driver is at work on this run ({error} is held)"
            # Not a failure: another driver does the work.
            return _say(message, exit_codes.IN_PROGRESS)

    return wrapped


def _say(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
