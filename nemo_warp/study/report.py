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

from nemo_warp.records import write_json_atomically, write_text_atomically
from nemo_warp.reporting.bands import draw_band
from nemo_warp.reporting.fronts import Group, compare
from nemo_warp.reporting.run import Curve
from nemo_warp.reporting.style import SETTINGS, label_axes, save, series_colour
from nemo_warp.schema.study import Picture, Study
from nemo_warp.study.results import curves_of

_UNITS = {
    "kl_to_sft": "KL to SFT (nats per response)",
    "kl_to_anchor": "KL to the anchor (nats per response)",
    "length": "tokens per response",
    "entropy": "entropy (nats per token)",
    "step": "step",
    "eta": "η or κ",
}

_KINDS = {
    "final": "LITI from SFT",
    "front": "LITI from the init",
    "trajectory": "policy",
    "anchor": "its anchor",
    "benchmarks": "benchmarks",
}


def write_study(study: Study, results: list[dict[str, Any]], output: Path) -> list[Path]:
    """Write ``compare.md``, ``compare.json`` and the pictures; the files written.

    Args:
        study: from `load_study`.
        results: from `collect` or `read_results`.
        output: directory, made if need be.
    """
    output.mkdir(parents=True, exist_ok=True)
    files = [output / "compare.md", output / "compare.json"]
    text, values = compare(_groups(study, results))
    write_text_atomically(files[0], text + "\n")
    write_json_atomically(files[1], values)
    for name, picture in study.pictures.items():
        files.append(output / f"{name}.png")
        draw(picture, results, files[-1])
    return files


def _groups(study: Study, results: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The final fronts of the variants that are compared."""
    groups = []
    for name in study.compare or study.variants:
        fronts = [curves[-1] for curves in curves_of(results, name, "final")]
        if fronts:
            groups.append(Group(name, fronts))
    return groups


def draw(picture: Picture, results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One picture: every curve thin, each variant's mean thick, its 95 % interval as a band.

    Variants without results yet are left out.
    """
    x, y = picture.x, picture.y
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(7.2, 5.0), layout="constrained")
        axes = figure.subplots()
        for index, (variant, kind) in enumerate(product(picture.variants, picture.curves)):
            seeds = curves_of(results, variant, kind, picture.iteration)
            seeds = [_measured(curves, x, y) for curves in seeds]
            seeds = [curves for curves in seeds if curves]
            label = picture.variants[variant]
            label += f", {_KINDS[kind]}" if len(picture.curves) > 1 else ""
            if seeds:
                _draw_variant(axes, seeds, (x, y), label, series_colour(index))
        if picture.x_max is not None:
            axes.set_xlim(-0.02 * picture.x_max, picture.x_max)
        label_axes(axes, _UNITS.get(x, x), _UNITS.get(y, y), picture.title)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
        save(figure, path)


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
