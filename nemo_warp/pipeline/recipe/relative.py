"""A recipe's relative paths mean the same wherever a command, or cron, happens to start.

A path is looked for below the folder that holds ``recipes/`` (where the recipe is in one), beside
the recipe, beside the recipes that it builds on, and last below the current directory. A path that
does not exist yet, such as a new run directory, is made below the first of these. For a recipe that
lies inside an installed wheel the current directory comes first. Paths given on the command line
are relative to the current directory, as in any shell.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_warp.pipeline.recipe.paths import RunPaths
from nemo_warp.places import SHIPPED, named, shared

_FOLDER = "recipes"
_OF_REWARDS = ("model", "endpoint")


def make_absolute(values: dict[str, Any], files: Sequence[Path], overrides: Sequence[str]) -> None:
    """Turn a recipe's relative paths into absolute ones, in place; h100 is a cluster of conf.

    Args:
        values: a resolved recipe.
        files: the recipe's file, then those it builds on.
        overrides: ``a.b=c`` arguments.
    """
    given = [word.partition("=")[0].lstrip("+") for word in overrides]
    places = homes(files)

    def found(path: str, key: str, is_there: Callable[[str], bool] = os.path.exists) -> str:
        by_hand = any(f"{key}.".startswith(f"{name}.") for name in given)
        return _found(path, [Path.cwd()] if by_hand else places, is_there)

    if re.fullmatch(r"[\w-]+", values["cluster"] or ""):
        values["cluster"] = str(shared("conf") / "cluster" / f"{values['cluster']}.yaml")
    elif values["cluster"]:
        file = found(values["cluster"], "cluster")
        there = os.path.exists(file)
        values["cluster"] = file if there else str(named(Path(values["cluster"]), "conf"))
    same_init = values["init"] == values["sft"]  # its default: wherever that is
    for key in ("sft", "init", "cluster"):
        if values[key] is not None:
            values[key] = found(values[key], key)
    values["init"] = values["sft"] if same_init else values["init"]
    if values["run_directory"] is not None:
        values["run_directory"] = found(values["run_directory"], "run_directory", _is_run)
    benchmarks = values["benchmarks"]
    if benchmarks["include"] is not None:
        benchmarks["include"] = found(benchmarks["include"], "benchmarks.include")
    values["prompts"] = {k: found(p, f"prompts.{k}") for k, p in values["prompts"].items()}
    for section in ("rewards", "judges"):
        for name, entry in values[section].items():
            for key in _OF_REWARDS:
                if isinstance(entry, dict) and entry.get(key):
                    entry[key] = found(entry[key], f"{section}.{name}.{key}")


def homes(files: Sequence[Path]) -> list[Path]:
    """Where relative paths of a recipe are looked for, in order."""
    own = [file.absolute().parent for file in files]
    if any(SHIPPED in place.resolve().parents for place in own):
        return [Path.cwd(), *own]
    above = [place.parents[_depth(place)] for place in own if _FOLDER in place.parts]
    return [*above, *own, Path.cwd()]


def _depth(place: Path) -> int:
    """How far above ``place`` the folder is that holds its innermost ``recipes``."""
    return place.parts[::-1].index(_FOLDER)


def _found(path: str, places: Sequence[Path], is_there: Callable[[str], bool]) -> str:
    candidates = [os.path.abspath(place / path) for place in places]
    return next((c for c in candidates if is_there(c)), candidates[0])


def _is_run(path: str) -> bool:
    return RunPaths(Path(path)).recipe.exists()
