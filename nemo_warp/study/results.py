"""What a study's runs measured, as one JSON file: everything that tables and pictures need."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from nemo_warp.records import RecordError, read_completion, write_text_atomically
from nemo_warp.reporting.page.benchmarks import read_benchmarks
from nemo_warp.reporting.page.facts import layers
from nemo_warp.reporting.run import Curve, read_run
from nemo_warp.reporting.write import MEASURES
from nemo_warp.study.load import Run

FILE = "results.json"
_DIGITS = 6


def collect(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The measurements of the runs that are done.

    Raises:
        ValueError: none is done.
        RecordError: a measurement on disk is malformed.
    """
    found = [_measured(run) for run in runs if run.is_done]
    if not found:
        raise ValueError("no run of the study is done yet; make them: nemo-warp study FILE")
    return found


def _measured(run: Run) -> dict[str, Any]:
    completion = read_completion(run.directory / "report")
    curves = read_run(run.directory)
    more = _measures(run.directory / "report" / MEASURES)
    return {
        "variant": run.variant,
        "seed": run.seed,
        "code_version": None if completion is None else completion.code_version,
        "curves": [
            {
                "kind": curve.kind,
                "iteration": curve.iteration,
                "name": curve.name,
                "position": curve.position,
                "points": [dict(_numbers(p)) for p in more.get(curve.name, curve.points)],
            }
            for curve in (*curves, *_benchmarks(run.directory, curves), *_layers(run.directory))
        ],
    }


def _measures(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Curve's name -> its points, with what the run's report found in their responses.

    Raises:
        RecordError: the file is missing or damaged.
    """
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(f"{file} cannot be read: {error}; nemo-warp report {file.parent.parent}"
                          " writes it again") from error  # fmt: skip


def _layers(directory: Path) -> Iterator[Curve]:
    """Angles and ratios of norms of each merge, over the groups of tensors in their order."""
    for iteration, groups in layers(directory).items():
        points = [{"layer": place, **values} for place, values in enumerate(groups.values())]
        yield Curve("layers", iteration, f"iteration {iteration}, layers", "layer", points)


def _benchmarks(directory: Path, curves: Sequence[Curve]) -> Iterator[Curve]:
    """Scores along the final front, each named ``task: metric``; nothing without benchmarks."""
    found = read_benchmarks(directory, curves)
    if found:
        scores = ({b.name: v for b, v in zip(found, at, strict=True)}
                  for at in zip(*(b.values for b in found), strict=True))  # fmt: skip
        points = [
            {"eta": kappa, "kl_to_sft": kl, **values}
            for kappa, kl, values in zip(found[0].kappas, found[0].kls, scores, strict=True)
        ]
        yield Curve("benchmarks", curves[-1].iteration, "final front, benchmarks", "eta", points)


def _numbers(point: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All finite numbers of a record, those of tables inside it with dotted names."""
    for name, value in point.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
            yield f"{prefix}{name}", round(value, _DIGITS)


def write_results(results: list[dict[str, Any]], path: Path) -> None:
    """One run a line, so that a version control system shows what changed."""
    lines = (json.dumps(result, sort_keys=True) for result in results)
    write_text_atomically(path, "[\n" + ",\n".join(lines) + "\n]\n")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The inverse of `write_results`.

    Raises:
        RecordError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read: {error}") from error


def curves_of(
    results: Sequence[Mapping[str, Any]], variant: str, kind: str, iteration: int | None = None
) -> dict[int, list[Curve]]:
    """Seed -> curves of one kind; without seeds that have none.

    Args:
        results: from `collect`.
        variant: of the study.
        kind: as in `Curve`; of ``front`` those from the iteration's init.
        iteration: None for the last one; of trajectories and anchors, for all.
    """
    found = {}
    for result in (r for r in results if r["variant"] == variant):
        curves = [Curve(**curve) for curve in result["curves"] if curve["kind"] == kind]
        curves = [c for c in curves if kind != "front" or c.name.endswith("from init")]
        last = max((curve.iteration for curve in curves), default=0)
        wanted = iteration or (last if kind in ("front", "final") else None)
        found[result["seed"]] = [c for c in curves if wanted in (None, c.iteration)]
    return {seed: curves for seed, curves in found.items() if curves}
