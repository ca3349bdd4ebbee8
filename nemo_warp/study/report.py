"""A study's tables and pictures, from its results alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemo_warp.evidence.intervals import Interval, over_seeds
from nemo_warp.records import write_json_atomically, write_text_atomically
from nemo_warp.reporting.bands import draw_band, mean_at
from nemo_warp.reporting.fronts import Group, cell, compare
from nemo_warp.reporting.run import Curve
from nemo_warp.reporting.style import SETTINGS, label_axes, save, series_colour
from nemo_warp.reporting.table import markdown_rows
from nemo_warp.schema.study import Picture, Study
from nemo_warp.study.results import curves_of

_UNITS = {
    "kl_to_sft": "KL to SFT (nats per response)",
    "kl_to_anchor": "KL to the anchor (nats per response)",
    "length": "tokens per response",
    "entropy": "entropy (nats per token)",
    "step": "step",
    "eta": "η or κ",
    "layer": "group of tensors: embedding, layers, final norm",
    "angle": "angle between task vectors (degrees)",
    "norm_ratio": "ratio of the task vectors' norms",
    "weights_angle": "angle between full weights (degrees)",
    "distinct_2": "distinct bigrams (share)",
    "self_bleu": "self-BLEU of a prompt's generations",
}

_KINDS = {
    "final": "LITI from SFT",
    "front": "LITI from the init",
    "trajectory": "policy",
    "anchor": "its anchor",
    "benchmarks": "benchmarks",
    "layers": "layers",
}


_NOTE = (
    "The pictures' numbers: mean over seeds [95 % interval, Student's t]; below it the difference "
    "to the first line, paired by seed (* excludes 0). Between measured points values are linear."
)
_PLACES = 8


def write_study(study: Study, results: list[dict[str, Any]], output: Path) -> list[Path]:
    """Write ``compare.md``, ``compare.json``, the pictures and, in ``pictures.md``, their numbers.

    Args:
        study: from `load_study`.
        results: from `collect` or `read_results`.
        output: directory, made if need be.

    Returns:
        The files written.
    """
    output.mkdir(parents=True, exist_ok=True)
    files = [output / "compare.md", output / "compare.json"]
    text, values = compare(_groups(study, results))
    write_text_atomically(files[0], text + "\n")
    write_json_atomically(files[1], values)
    tables = [_NOTE]
    for name, picture in study.pictures.items():
        files.append(output / f"{name}.png")
        lines = _lines(picture, results)
        draw(picture, lines, files[-1])
        tables += ["", f"## {picture.title}", "", *table(picture, lines)]
    files.append(output / "pictures.md")
    write_text_atomically(files[-1], "\n".join(tables) + "\n")
    return files


def _groups(study: Study, results: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The final fronts of the variants that are compared."""
    groups = []
    for name in study.compare or study.variants:
        fronts = [curves[-1] for curves in curves_of(results, name, "final").values()]
        if fronts:
            groups.append(Group(name, fronts))
    return groups


Line = tuple[str, dict[int, list[Curve]]]
"""A label and each seed's curves."""


def _lines(picture: Picture, results: Sequence[Mapping[str, Any]]) -> list[Line]:
    """What the picture shows; variants without results yet are left out."""
    lines = [(label, _sweep(picture, label, results)) for label in picture.sweeps]
    for variant, kind in product(picture.variants, picture.curves):
        found = {}
        for seed, curves in curves_of(results, variant, kind, picture.iteration).items():
            if measured := _measured(curves, picture.x, picture.y):
                found[seed] = measured
        label = picture.variants[variant]
        label += f", {_KINDS[kind]}" if len(picture.curves) > 1 else ""
        lines.append((label, found))
    return [line for line in lines if line[1]]


def _sweep(
    picture: Picture, label: str, results: Sequence[Mapping[str, Any]]
) -> dict[int, list[Curve]]:
    """Each seed's line through the last points of several variants' curves."""
    kind = picture.curves[0]
    found: dict[int, list[list[dict[str, Any]]]] = {}
    for variant, place in sorted(picture.sweeps[label].items(), key=lambda item: item[1]):
        for seed, curves in curves_of(results, variant, kind, picture.iteration).items():
            ends = [{**curve.points[-1], picture.x: place} for curve in curves if curve.points]
            found.setdefault(seed, []).append(ends)
    return {
        seed: [Curve(kind, 0, label, picture.x, list(points)) for points in zip(*ends, strict=True)]
        for seed, ends in found.items()
        if len(ends) == len(picture.sweeps[label])
    }


def draw(picture: Picture, lines: Sequence[Line], path: Path) -> None:
    """One picture: every curve thin, each line's mean thick, its 95 % interval as a band."""
    x, y = picture.x, picture.y
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(7.2, 5.0), layout="constrained")
        axes = figure.subplots()
        for index, (label, seeds) in enumerate(lines):
            _draw_variant(axes, list(seeds.values()), (x, y), label, series_colour(index))
        if picture.x_max is not None:
            axes.set_xlim(-0.02 * picture.x_max, picture.x_max)
        label_axes(axes, _UNITS.get(x, x), _UNITS.get(y, y), picture.title)
        if lines:
            axes.legend()
        save(figure, path)


def table(picture: Picture, lines: Sequence[Line]) -> list[str]:
    """The picture's numbers: each line's mean over seeds, and its difference to the first one's.

    Differences are paired: only seeds that both lines have, seed by seed. Places are those of the
    measurements where these are few, else round numbers that the longest curve reaches; where a
    curve was not measured, the cell is empty.
    """
    if not lines:
        return ["Nothing has been measured yet."]
    metrics = picture.x, picture.y
    curves = [curve for _, seeds in lines for of_seed in seeds.values() for curve in of_seed]
    measured = np.concatenate([curve.column(picture.x) for curve in curves])
    places = _places(measured, picture.x_max)
    at = [
        {seed: np.array([mean_at(found, metrics, p) for p in places]) for seed, found in of.items()}
        for _, of in lines
    ]
    rows, base = [], at[0]
    for (label, _), values in zip(lines, at, strict=True):
        rows.append([f"{label} ({len(values)})", *map(cell, _over(list(values.values())))])
        apart = [values[seed] - base[seed] for seed in values if seed in base]
        if values is not base and apart:
            rows.append([f"- {lines[0][0]}", *(cell(i, mark=True) for i in _over(apart))])
    header = [_UNITS.get(picture.x, picture.x), *(f"{place:g}" for place in places)]
    return markdown_rows(header, rows)


def _places(measured: np.ndarray, end: float | None) -> list[float]:
    """Where a table says what the curves have, from the places where they were measured."""
    few = np.unique(measured)
    if len(few) <= _PLACES:
        return few.tolist()
    low, high = measured.min(), measured.max() if end is None else end
    return [p for p in MaxNLocator(_PLACES).tick_values(low, high) if low <= p <= high]


def _over(seeds: Sequence[np.ndarray]) -> list[Interval]:
    """An interval over seeds at each place; of no seed where one of them was not measured."""
    return [over_seeds(of_place) for of_place in np.array(seeds).T]


def _measured(curves: Sequence[Curve], x: str, y: str) -> list[Curve]:
    """Curves whose points have both metrics."""
    return [c for c in curves if c.points and not np.isnan([c.column(x), c.column(y)]).any()]


def _draw_variant(
    axes: Axes, seeds: list[list[Curve]], metrics: tuple[str, str], label: str, colour: str
) -> None:
    x, y = metrics
    curves = [curve for of_seed in seeds for curve in of_seed]
    for curve in curves:
        axes.plot(curve.column(x), curve.column(y), color=colour, linewidth=0.6, alpha=0.35)
    name = f"{label} ({len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'})"
    draw_band(axes, seeds, metrics, name, colour, linewidth=2.0)
