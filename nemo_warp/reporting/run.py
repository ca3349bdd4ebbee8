"""What a run has measured so far: trajectories of its members, fronts of its iterations."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_warp.records import RecordError
from nemo_warp.reporting.series import read_metrics, read_points


@dataclass(frozen=True)
class Curve:
    """Measurements that belong together, in order.

    Attributes:
        kind: ``trajectory`` (a member over its steps), ``anchor`` (a member's EMA anchor over
            them), ``front`` (an iteration's LITI points from one base) or ``final`` (the run's
            front towards SFT).
        iteration: counted from 1; for ``final`` the last iteration of the run.
        name: for people, e.g. ``iteration 1, member 2``.
        position: what the measurements differ in: ``step`` or ``eta``.
        points: records with ``reward`` and ``kl_to_sft`` (nats) and, where measured,
            ``reward_stderr``, ``kl_to_sft_stderr``, ``length``, ``ended_share``, ``num_prompts``.
        directory: of the stage that measured it, where its responses are.
    """

    kind: str
    iteration: int
    name: str
    position: str
    points: list[dict[str, Any]]
    directory: Path | None = None

    def column(self, key: str) -> list[float]:
        """One number per point, NaN where it was not measured."""
        return column(self.points, key)


def column(points: list[dict[str, Any]], key: str) -> list[float]:
    """One number per point, NaN where it was not measured."""
    values = (point.get(key) for point in points)
    return [math.nan if value is None else float(value) for value in values]


def read_run(run: Path) -> list[Curve]:
    """Every curve that is on disk below ``run``, trajectories first, the final front last.

    Raises:
        ValueError: ``run`` is not a run directory, or nothing has been measured in it yet.
        RecordError: a measurement on disk is malformed.
    """
    iterations = _numbered(run, "iteration")
    if not iterations:
        raise ValueError(f"{run} is not a run: it has no iteration_01 directory")
    trajectories, fronts = [], []
    for iteration, directory in iterations:
        trajectories += _trajectories(iteration, directory)
        fronts += _fronts(iteration, directory / "evaluation/points.jsonl")
    final = _final(iterations[-1][0], run / "front/points.jsonl")
    curves = [curve for curve in (*trajectories, *fronts, *final) if curve.points]
    if not curves:
        raise ValueError(f"nothing has been measured yet in {run}")
    return curves


def _trajectories(iteration: int, directory: Path) -> list[Curve]:
    curves = []
    for member, path in _numbered(directory, "member"):
        # A member that has only begun has a directory and no metrics yet.
        if (path / "metrics.jsonl").exists():
            name = f"iteration {iteration}, member {member}"
            for kind, record, suffix in (
                ("trajectory", "eval", ""),
                ("anchor", "anchor", " anchor"),
            ):
                points = read_metrics(path / "metrics.jsonl", record)
                curves.append(Curve(kind, iteration, name + suffix, "step", points, path))
    return curves


def _fronts(iteration: int, path: Path) -> list[Curve]:
    points = read_points(path) if path.exists() else []
    # Points of earlier versions do not name their base: it was the init.
    bases = sorted({str(point.get("base", "init")) for point in points})
    return [
        Curve(
            "front",
            iteration,
            f"iteration {iteration}, LITI from {base}",
            "eta",
            [point for point in points if str(point.get("base", "init")) == base],
            path.parent,
        )
        for base in bases
    ]


def _final(iteration: int, path: Path) -> list[Curve]:
    if not path.exists():
        return []
    name = "final front, LITI from sft"
    return [Curve("final", iteration, name, "eta", read_points(path), path.parent)]


def _numbered(directory: Path, prefix: str) -> list[tuple[int, Path]]:
    """Subdirectories ``prefix_NN`` with their numbers, in order."""
    pattern = re.compile(rf"{prefix}_(\d+)")
    try:
        entries = [(pattern.fullmatch(path.name), path) for path in directory.iterdir()]
    except OSError as error:
        raise RecordError(f"cannot list {directory}: {error.strerror}") from error
    # As numbers: iteration_100 comes after iteration_99.
    return sorted((int(match[1]), path) for match, path in entries if match and path.is_dir())
