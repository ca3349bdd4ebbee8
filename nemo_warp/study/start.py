"""Makes a study's runs, one after the other, each by ``nemo-warp run`` in its own process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from nemo_warp import exit_codes
from nemo_warp.pipeline.recipe.plan import member_name
from nemo_warp.study.load import Run

LOG = "study.log"
_TAKEN = ".taken"
"""Suffix of members while they are copied."""


def make(runs: Sequence[Run]) -> dict[str, int]:
    """Make the runs that are not done; a failed one does not keep the others from being made.

    A recipe whose launcher is Slurm is submitted and goes on by itself; call again to see more.

    Returns:
        Exit code by name of each run that was not done before.
    """
    waiting = [run for run in runs if not run.is_done]
    codes = {}
    for run in (bar := tqdm(waiting, "runs", disable=None)):
        bar.set_postfix_str(run.name)
        codes[run.name] = _make(run)
        if codes[run.name] not in (exit_codes.DONE, exit_codes.STOPPED_RESUMABLE):
            tqdm.write(f"{run.name}: exit code {codes[run.name]}; see {run.directory / LOG}")
    return codes


def command(run: Run) -> list[str]:
    """What makes the run."""
    return [sys.executable, "-m", "nemo_warp.cli", "run", run.recipe, *run.overrides]


def _make(run: Run) -> int:
    if run.members_from is not None and not take_members(run.members_from, run.directory):
        tqdm.write(f"{run.name}: {run.members_from} has no finished members yet")
        return exit_codes.FAILED
    run.directory.mkdir(parents=True, exist_ok=True)
    with (run.directory / LOG).open("ab") as log:
        return subprocess.run(command(run), stdout=log, stderr=subprocess.STDOUT).returncode


def take_members(source: Path, run: Path) -> bool:
    """Give a new run the finished members of another one's first iteration, as hard links.

    What is on disk decides what is left to do, so ``nemo-warp run`` goes on with their merge. Files
    of a finished member are replaced, never written to, so the two runs do not disturb each other.

    Returns:
        Whether all members that ``source`` has were finished.
    """
    first = (source / member_name(1, 1)).parent
    members = sorted(first.glob("member_*")) if first.is_dir() else []
    if not members or not all((member / "completion.json").exists() for member in members):
        return False
    for member in members:
        place = run / member.relative_to(source)
        if place.exists():
            continue
        half = place.with_name(place.name + _TAKEN)
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(member, half, copy_function=os.link, symlinks=True)
        half.rename(place)  # a member is there whole, or not at all
    return True
