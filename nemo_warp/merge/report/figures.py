"""Pictures of a merge: angles and norm ratios over layers (Figure 11), and angles by depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nemo_warp.reporting.style import MUTED, SETTINGS, label_axes, save, series_colour

_RIGHT = 90.0
"""Degrees between task vectors that have nothing in common."""
_BINS = 36
_KINDS = {"task_vectors": "task vectors", "weights": "full weights"}
_FILLED: dict[str, dict[str, Any]] = {
    "task_vectors": {"histtype": "stepfilled", "alpha": 0.55},
    "weights": {"histtype": "step"},
}


def draw_figures(statistics: dict[str, Any], folder: Path) -> None:
    """Write ``histograms`` and ``angle_by_depth``, PNG and SVG; nothing for a single policy."""
    layers = [row for row in statistics["units"].values() if row["depth"] is not None]
    rows = layers or list(statistics["units"].values())
    if not rows or not rows[0]["pairs"]:
        return
    with matplotlib.rc_context(SETTINGS):
        _histograms(rows, folder / "histograms.png")
        _angle_by_depth(statistics["units"], folder / "angle_by_depth.png")


def _histograms(rows: list[dict[str, Any]], path: Path) -> None:
    """Task vectors (filled) and full weights (outlined) of a pair share an axis and a colour."""
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    angles, ratios = figure.subplots(1, 2)
    # The axis of angles is the same in every report: 0 is the same direction, 180 the opposite.
    _histogram(angles, rows, "angle", np.linspace(0.0, 180.0, _BINS + 1))
    _mark_right_angle(angles.axvline)
    angles.set_xticks(range(0, 181, 30))
    label_axes(angles, "angle between two policies (degrees)", "layers", "angles")
    _histogram(ratios, rows, "norm_ratio", _edges(rows))
    label_axes(ratios, "norm ratio of two policies", "layers", "norm ratios")
    for axes in (angles, ratios):
        axes.locator_params(axis="y", integer=True)
    ratios.ticklabel_format(axis="x", useOffset=False)
    angles.legend()
    save(figure, path)


def _histogram(axes: Axes, rows: list[dict[str, Any]], quantity: str, edges: np.ndarray) -> None:
    for index, pair in enumerate(rows[0]["pairs"]):
        for kind, name in _KINDS.items():
            axes.hist(
                _values(rows, index, kind, quantity),
                bins=edges.tolist(),
                color=series_colour(index),
                label=f"{_name(pair)}: {name}",
                **_FILLED[kind],
            )


def _values(rows: list[dict[str, Any]], pair: int, kind: str, quantity: str) -> list[float]:
    found = [row["pairs"][pair][kind][quantity] for row in rows]
    return [value for value in found if value is not None]


def _edges(rows: list[dict[str, Any]]) -> np.ndarray:
    """Bins over all ratios, 1 among them, wide enough where all are nearly equal."""
    pairs = range(len(rows[0]["pairs"]))
    found = [v for p in pairs for kind in _KINDS for v in _values(rows, p, kind, "norm_ratio")]
    low, high = min([1.0, *found]), max([1.0, *found])
    # Members of one recipe have norms within a per mille: bins of no width would be an error.
    margin = max(0.05 * (high - low), 1e-3)
    return np.linspace(low - margin, high + margin, _BINS + 1)


def _angle_by_depth(units: dict[str, dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axes = figure.subplots()
    layers = {name: row for name, row in units.items() if row["depth"] is not None}
    others = {name: row for name, row in units.items() if row["depth"] is None}
    for index, pair in enumerate(next(iter(units.values()))["pairs"]):
        points = sorted((row["depth"], _angle(row, index)) for row in layers.values())
        depths, degrees = zip(*points, strict=True) if points else ((), ())
        colour = series_colour(index)
        axes.plot(depths, degrees, "o-", color=colour, markersize=4, label=_name(pair))
        outside = [_angle(row, index) for row in others.values()]
        places = [_right_of(layers) + position for position in range(len(others))]
        axes.plot(places, outside, "s", color=colour, markersize=5)
    _name_places(axes, layers, others)
    _mark_right_angle(axes.axhline)
    axes.set_ylim(0.0, max(100.0, 1.05 * axes.get_ylim()[1]))
    label_axes(axes, "layer, then groups outside the layers", "degrees", "angle of task vectors")
    axes.legend(loc="lower right")
    save(figure, path)


def _name_places(axes: Axes, layers: dict[str, Any], others: dict[str, Any]) -> None:
    shown = sorted({row["depth"] for row in layers.values()})
    shown = shown[:: max(1, len(shown) // 12)]
    names = [name.split(".")[-1] for name in others] if len(others) <= 12 else []
    ticks = [_right_of(layers) + position for position in range(len(names))]
    axes.set_xticks([*shown, *ticks], [*map(str, shown), *names], rotation=45, ha="right")


def _mark_right_angle(line: Any) -> None:
    line(_RIGHT, color=MUTED, linewidth=1.0, linestyle=":", label="90°: nothing in common")


def _name(pair: dict[str, Any]) -> str:
    return "policies {} and {}".format(*pair["policies"])


def _angle(row: dict[str, Any], pair: int) -> float:
    """NaN, which is not drawn, where a task vector is zero."""
    degrees = row["pairs"][pair]["task_vectors"]["angle"]
    return float("nan") if degrees is None else degrees


def _right_of(layers: dict[str, dict[str, Any]]) -> int:
    return 2 + max((row["depth"] for row in layers.values()), default=-1)
