"""Benchmarks along the final front: what lm-evaluation-harness said at each kappa."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_warp.records import RecordError
from nemo_warp.reporting.run import Curve
from nemo_warp.reporting.series import read_records

_ERROR = "_stderr"


@dataclass(frozen=True)
class Benchmark:
    """One metric of one task along the front.

    Attributes:
        name: ``task: metric``.
        kappas: where it was measured, ascending.
        kls: KL to SFT there (nats), linear between the front's points; NaN outside of them.
        values, errors: of the metric, in its own units; an error is NaN where lm-eval gives none.
    """

    name: str
    kappas: list[float]
    kls: list[float]
    values: list[float]
    errors: list[float]


def read_benchmarks(run: Path, curves: Sequence[Curve]) -> list[Benchmark]:
    """All that were measured, in lm-eval's order; none where the run has no benchmarks.

    Raises:
        RecordError: a line is not a point.
    """
    path = run / "benchmarks/points.jsonl"
    if not path.exists():
        return []
    points: dict[float, dict[str, dict[str, float]]] = {}
    for where, record in read_records(path):
        if not isinstance(record.get("scores"), dict) or "eta" not in record:
            raise RecordError(f"{where} has no scores; remove the line")
        points[float(record["eta"])] = record["scores"]
    kappas = sorted(points)
    kls = _kls(kappas, curves)
    names = dict.fromkeys(
        (task, metric)
        for kappa in kappas
        for task, metrics in points[kappa].items()
        for metric in metrics
        if _ERROR not in metric
    )
    found = []
    for task, metric in names:
        columns = [points[kappa].get(task, {}) for kappa in kappas]
        # lm-eval's "acc,none" is "acc" here, "exact_match,strict" is "exact_match.strict"; errors
        # carry their mark before the filter's name.
        head, dot, tail = metric.partition(".")
        error = f"{head}{_ERROR}{dot}{tail}"
        values = [float(c.get(metric, math.nan)) for c in columns]
        errors = [float(c.get(error, math.nan)) for c in columns]
        found.append(Benchmark(f"{task}: {metric}", kappas, kls, values, errors))
    return found


def _kls(kappas: Sequence[float], curves: Sequence[Curve]) -> list[float]:
    front = [c for c in curves if c.kind == "final"][-1:]
    if not front:
        return [math.nan] * len(kappas)
    known, kls = front[0].column("eta"), front[0].column("kl_to_sft")
    # NaN outside: what lies beyond the measured front is not made up.
    return np.interp(kappas, known, kls, math.nan, math.nan).tolist()


def rows_of(benchmarks: Sequence[Benchmark]) -> tuple[list[str], list[list[str]]]:
    """A row per metric, a column per kappa."""
    kappas = benchmarks[0].kappas
    header = ["task: metric", *(f"kappa {kappa:g}" for kappa in kappas)]
    return header, [
        [b.name, *(_cell(v, e) for v, e in zip(b.values, b.errors, strict=True))]
        for b in benchmarks
    ]


def _cell(value: float, error: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.4g}" + ("" if math.isnan(error) else f" \N{PLUS-MINUS SIGN} {error:.2g}")
