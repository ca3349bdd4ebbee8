"""``nemo-warp logs``: what a stage printed."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from nemo_warp import exit_codes
from nemo_warp.pipeline.commands.common import add_recipe, existing, in_words
from nemo_warp.pipeline.disk import locks
from nemo_warp.pipeline.disk.attempts import failing_log, list_attempts
from nemo_warp.pipeline.disk.state import Status, inspect
from nemo_warp.pipeline.recipe.load import Recipe

_POLL_S = 0.5
_TAIL_BYTES = 1 << 20

EPILOG = """\
Without a stage: the one that failed, or runs, or ended last. Of several attempts the newest; of
one that failed, the log of the step that failed (a reward server's, or the program's own).

  nemo-warp logs runs/tiny
  nemo-warp logs runs/tiny iteration_01/member_02 -f
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.epilog = EPILOG
    add_recipe(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="until the stage has ended")
    parser.add_argument("-n", "--lines", type=int, default=200, help="the last ones (200)")


@in_words
def main(args: argparse.Namespace) -> int:
    """Print a log; returns an exit code."""
    names = [word for word in args.overrides if "=" not in word]
    args.overrides = [word for word in args.overrides if "=" in word]
    recipe = existing(args)
    name = _chosen(recipe, names)
    log = _log(recipe, name)
    if not log.exists():
        raise ValueError(f"{name} has printed nothing yet ({log} is not there)")
    print(f"==> {log} <==", flush=True)
    _print(recipe, name, log, max(1, args.lines), args.follow)
    return exit_codes.DONE


def _chosen(recipe: Recipe, names: list[str]) -> str:
    known = [stage.name for stage in recipe.stages]
    if len(names) > 1 or any(name not in known for name in names):
        raise ValueError(f"{' '.join(names)} is no stage; the stages are {', '.join(known)}")
    if names:
        return names[0]
    states = inspect(recipe)
    for status in (Status.FAILED, Status.RUNNING):
        for name, state in states.items():
            if state.status is status:
                return name
    begun = [name for name in known if list_attempts(recipe.paths.stage(name))]
    if not begun:
        raise ValueError(f"no stage of {recipe.paths.root} has begun")
    return max(begun, key=lambda name: _log(recipe, name).stat().st_mtime)


def _log(recipe: Recipe, name: str) -> Path:
    tries = list_attempts(recipe.paths.stage(name))
    return failing_log(tries[-1]) if tries else recipe.paths.task_log(name)


def _print(recipe: Recipe, name: str, log: Path, lines: int, follow: bool) -> None:
    with log.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, 2) - _TAIL_BYTES))
        shown = _readable(stream.read()).splitlines(keepends=True)[-lines:]
        print("".join(shown), end="", flush=True)
        while follow:
            # Asked before reading: what a stage wrote just before it ended is then still shown.
            running = locks.is_held(recipe.paths.stage(name).lock)
            more = stream.read()
            if more:
                print(_readable(more), end="", flush=True)
            elif not running:
                return
            else:
                time.sleep(_POLL_S)


def _readable(data: bytes) -> str:
    """Of a progress bar drawn over itself, one line each time it was drawn."""
    return data.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
