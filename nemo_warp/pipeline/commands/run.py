"""``nemo-warp run``: start a recipe, or go on with it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from nemo_warp import exit_codes
from nemo_warp.pipeline.commands import housekeeping
from nemo_warp.pipeline.commands.checks import check_before_start
from nemo_warp.pipeline.commands.common import EXIT_CODES, add_recipe, add_redo, in_words, load
from nemo_warp.pipeline.commands.notify import notify
from nemo_warp.pipeline.commands.view import Live
from nemo_warp.pipeline.disk import attempts, locks
from nemo_warp.pipeline.disk.opening import open_run
from nemo_warp.pipeline.disk.state import StageState
from nemo_warp.pipeline.launch import slurm_jobs
from nemo_warp.pipeline.launch.local import LocalDriver
from nemo_warp.pipeline.launch.rounds import run_round
from nemo_warp.pipeline.recipe.load import Recipe, load_recipe
from nemo_warp.pipeline.recipe.plan import merge_name
from nemo_warp.records import code_version, write_text_atomically

EPILOG = f"""\
What is on disk decides what is left to do, so run it as often as you like: what is done is not
done again. On this machine (launcher.kind=local) it works until the recipe is done. Under Slurm
it submits what is missing, and the job that will do the next round, and returns.

A recipe may be changed in between (another eta, one more iteration, a mended reward): what the
change does not touch stays. If it would redo finished stages, `run` names them and refuses; with
--redo it makes them again. What they were goes to superseded/.

  nemo-warp run recipes/tiny
  nemo-warp run recipes/tiny iterations=1 launcher.side_by_side=1
  nemo-warp run recipes/tiny iterations=3 --redo
  nemo-warp run recipes/gemma_7b cluster_overrides.account=my-team
  sbatch slurm/warp_iter.sh recipes/gemma_7b        # the same, as a job from the start

{EXIT_CODES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.epilog = EPILOG
    add_recipe(parser)
    add_redo(parser)
    parser.add_argument(
        "--prepare", action="store_true",
        help="make the run directory and start nothing: another scheduler does (plan --json)",
    )  # fmt: skip


@in_words
def main(args: argparse.Namespace) -> int:
    """Start or go on; returns an exit code."""
    recipe = load(args)
    if recipe.paths.stop.exists():
        print(f"stopped: {recipe.paths.stop} exists; nemo-warp resume {recipe.paths.root}")
        return exit_codes.STOPPED_RESUMABLE
    if args.prepare:
        prepare(recipe, args.redo, args.other_code)
        print(f"{_short(recipe.paths.root)} is ready; nothing was started")
        return exit_codes.DONE
    return go(recipe, args.redo, args.other_code)


def go(recipe: Recipe, redo: bool = False, other_code: bool = False) -> int:
    """Open the run directory and hand over to the launcher; returns an exit code.

    Args:
        recipe: checked.
        redo: whether finished stages that a change touches may be made again.
        other_code: whether another version of this package may end an iteration.
    """
    by_slurm = recipe.values["launcher"]["kind"] == "slurm"
    prepare(recipe, redo, other_code)
    if by_slurm:
        code = run_round(recipe)
        housekeeping.retain(recipe)
    else:
        code = _run_here(recipe)
    _announce(recipe, code)
    notify(recipe, code)
    return code


def prepare(recipe: Recipe, redo: bool = False, other_code: bool = False) -> None:
    """Check the recipe and open its run directory; the arguments are those of `go`."""
    check_before_start(recipe)
    by_slurm = recipe.values["launcher"]["kind"] == "slurm"
    with locks.hold(recipe.paths.driver_lock, 120.0 if by_slurm else 0.0):
        if recipe.paths.recipe.exists():
            _refuse_other_launcher(recipe)
            refuse_other_code(recipe, code_version(), other_code)
        change = open_run(recipe, redo)
    for name, reason in change.redone.items():
        print(f"made again: {name} ({reason})")
    for name, reason in change.restarted.items():
        print(f"begins again: {name} ({reason})")


def _run_here(recipe: Recipe) -> int:
    live = _Tidy(recipe)
    with locks.hold(recipe.paths.driver_lock):
        try:
            return LocalDriver(recipe, live).run()
        finally:
            live.close()


class _Tidy(Live):
    """The live view of a run whose `retention` is applied whenever a stage has ended."""

    def show(self, states: Mapping[str, StageState]) -> None:
        """The state as it is now."""
        housekeeping.retain(self._recipe, states)
        super().show(states)


def _refuse_other_launcher(recipe: Recipe) -> None:
    """Jobs that are queued run as they were submitted, so a run changes sides without any.

    Raises:
        ValueError: the stored recipe has another launcher.kind, and its work is not over.
    """
    stored = load_recipe(recipe.paths.root, files_here=False)
    before, now = (r.values["launcher"]["kind"] for r in (stored, recipe))
    if before == now:
        return
    if before == "slurm":
        busy = [job.job_id for job in slurm_jobs.queue(stored).values()]
    else:
        stages = (stage.name for stage in stored.stages)
        busy = [name for name in stages if locks.is_held(stored.paths.stage(name).lock)]
    if busy:
        raise ValueError(
            f"launcher.kind: {recipe.paths.root} was started with {before}, and {', '.join(busy)} "
            f"are still at work or queued; use launcher.kind={before}, or first: nemo-warp stop "
            f"{recipe.paths.root}"
        )


def refuse_other_code(recipe: Recipe, version: str, agreed: bool = False) -> None:
    """Refuse a version of the code other than the one that began the iteration.

    If the user agrees to another version, the agreement is recorded, and later drivers accept that
    version as well.

    Args:
        recipe: of an existing run.
        version: of this code.
        agreed: whether this version may end the iteration that is being made.

    Raises:
        ValueError: some of the iteration that is being made were made by another version.
    """
    now = next(
        (
            i
            for i in range(1, recipe.values["iterations"] + 1)
            if not recipe.paths.stage(merge_name(i)).completion.exists()
        ),
        None,
    )
    agreement = f"{now}:{version}"
    if agreed:
        write_text_atomically(recipe.paths.other_code, agreement)
    kept = recipe.paths.other_code
    if kept.exists() and kept.read_text() == agreement:
        return
    for stage in (s for s in recipe.stages if s.iteration == now and s.member):
        for attempt in attempts.list_attempts(recipe.paths.stage(stage.name))[-1:]:
            made_by = attempt.record.get("code_version", version)
            if made_by != version:
                raise ValueError(
                    f"{stage.name} was made by nemo_warp {made_by}, this is {version}: an "
                    "iteration's members are made by the same code; check that version out, or "
                    "go on with --other-code"
                )


def _announce(recipe: Recipe, code: int) -> None:
    root = _short(recipe.paths.root)
    if code == exit_codes.DONE:
        report = recipe.paths.stage("report").directory
        print(f"{recipe.name} is done.")
        print(f"  picture:  {_short(report / 'curves.png')}")
        print(f"  table:    {_short(report / 'table.md')}")
        print(f"  page:     {_short(report / 'index.html')}")
        print(f"  policy:   {_short(recipe.paths.stage('final').policy)}")
    elif code == exit_codes.FAILED:
        print(f"failed; why: nemo-warp status {root}; then: nemo-warp resume {root}")
    elif code == exit_codes.STOPPED_RESUMABLE:
        print(f"stopped; go on with: nemo-warp resume {root}")


def _short(path: Path) -> str:
    """Relative to where the command was started, if that is above."""
    here = Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)
