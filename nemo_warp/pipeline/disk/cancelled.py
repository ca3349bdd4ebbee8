"""Stages whose Slurm job a person cancelled: the driver submits them again after ``resume`` only.

    cancelled/iteration_01.member_02.json   {"jobs": ["17_2"], "forgiven": ["12_2"]}

Slurm remembers a cancelled job for minutes (MinJobAge); the driver knows from this file
which of these it has dealt with.
"""

from __future__ import annotations

import json

from nemo_warp.pipeline.recipe.paths import StagePaths
from nemo_warp.records import RecordError, write_json_atomically


def note(paths: StagePaths, job: str) -> None:
    """Record that ``job`` of this stage was cancelled, unless it was forgiven before."""
    record = _read(paths)
    # Otherwise a job that Slurm still remembers would be cancelled anew after every `resume`.
    if job not in record["jobs"] + record["forgiven"]:
        _write(paths, record["jobs"] + [job], record["forgiven"])


def standing(paths: StagePaths, seen: str | None = None) -> str | None:
    """The stage's cancelled job; None if there is none, or ``resume`` was given since.

    Args:
        paths: of the stage.
        seen: a cancelled job of it that Slurm remembers, noted or not.
    """
    record = _read(paths)
    if seen is not None and seen not in record["forgiven"]:
        return seen
    return record["jobs"][-1] if record["jobs"] else None


def forgive(paths: StagePaths, *also: str) -> None:
    """The stage may be made again; ``also``: cancelled jobs that were not noted."""
    record = _read(paths)
    if record["jobs"] or also:
        _write(paths, [], sorted({*record["forgiven"], *record["jobs"], *also}))


def withdraw(paths: StagePaths, job: str) -> None:
    """Slurm has started ``job`` again: it was not cancelled after all."""
    record = _read(paths)
    if job in record["jobs"]:
        _write(paths, [j for j in record["jobs"] if j != job], record["forgiven"])


def _read(paths: StagePaths) -> dict[str, list[str]]:
    try:
        return {"jobs": [], "forgiven": [], **json.loads(paths.cancelled.read_text())}
    except FileNotFoundError:
        return {"jobs": [], "forgiven": []}
    except ValueError as error:
        raise RecordError(f"{paths.cancelled} cannot be read ({error}); remove it") from error


def _write(paths: StagePaths, jobs: list[str], forgiven: list[str]) -> None:
    paths.cancelled.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(paths.cancelled, {"jobs": jobs, "forgiven": forgiven})
