"""Pictures of a merge: the paper's Figure 11 (four histograms over layers) and angles by depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_PANELS = (
    ("task_vectors", "cosine", "cosine of task vectors"),
    ("weights", "cosine", "cosine of full weights"),
    ("task_vectors", "norm_ratio", "norm ratio of task vectors"),
    ("weights", "norm_ratio", "norm ratio of full weights"),
)


def draw_figures(statistics: dict[str, Any], folder: Path) -> None:
    """Write ``histograms.png`` and ``angle_by_depth.png``; nothing for a single policy."""
    layers = [row for row in statistics["units"].values() if row["depth"] is not None]
    rows = layers or list(statistics["units"].values())
    if not rows or not rows[0]["pairs"]:
        return
    _histograms(rows, folder / "histograms.png")
    _angle_by_depth(statistics["units"], folder / "angle_by_depth.png")


def _histograms(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    for axes, (of, quantity, label) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        values, names = [], []
        for index, pair in enumerate(rows[0]["pairs"]):
            found = [row["pairs"][index][of][quantity] for row in rows]
            values.append([value for value in found if value is not None])
            names.append("policies {} and {}".format(*pair["policies"]))
        if any(values):
            axes.hist(values, bins=12, range=_span(values), label=names)
        axes.set_xlabel(label)
        axes.set_ylabel("layers")
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.locator_params(axis="x", nbins=5)
        axes.locator_params(axis="y", integer=True)
    _save(figure, figure.axes[0], path)


def _span(values: list[list[float]]) -> tuple[float, float]:
    """Smallest and largest value, kept apart enough to be cut into bins."""
    low, high = min(map(min, filter(None, values))), max(map(max, filter(None, values)))
    margin = 1e-9 * max(1.0, abs(high)) if high - low < 1e-9 else 0.0
    return low - margin, high + margin


def _angle_by_depth(units: dict[str, dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    layers = {name: row for name, row in units.items() if row["depth"] is not None}
    others = {name: row for name, row in units.items() if row["depth"] is None}
    first = next(iter(units.values()))
    for index, pair in enumerate(first["pairs"]):
        points = [(row["depth"], _angle(row, index)) for row in layers.values()]
        points = sorted((depth, degrees) for depth, degrees in points if degrees is not None)
        name = "policies {} and {}".format(*pair["policies"])
        (line,) = (
            axes.plot(*zip(*points, strict=True), "o-", label=name) if points else axes.plot([], [])
        )
        for position, row in enumerate(others.values()):
            degrees = _angle(row, index)
            if degrees is not None:
                axes.plot(_right_of(layers) + position, degrees, "s", color=line.get_color())
    if len(others) <= 12:
        ticks = [_right_of(layers) + position for position in range(len(others))]
        shown = sorted({row["depth"] for row in layers.values()})
        shown = shown[:: max(1, len(shown) // 12)]
        labels = [*map(str, shown), *(name.split(".")[-1] for name in others)]
        axes.set_xticks([*shown, *ticks], labels, rotation=45, ha="right")
    axes.set_xlabel("layer, then groups outside the layers")
    axes.set_ylabel("angle between task vectors (degrees)")
    _save(figure, axes, path)


def _angle(row: dict[str, Any], pair: int) -> float | None:
    return row["pairs"][pair]["task_vectors"]["angle"]


def _right_of(layers: dict[str, dict[str, Any]]) -> int:
    return 2 + max((row["depth"] for row in layers.values()), default=-1)


def _save(figure: Figure, legend: Axes, path: Path) -> None:
    legend.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(str(path))
