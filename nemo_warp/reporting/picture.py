"""A run's KL-reward picture: ``curves.png``.

It holds each member's trajectory, each iteration's LITI front from the iteration's
initialisation, and the run's result, the front towards SFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nemo_warp.reporting.run import Curve
from nemo_warp.reporting.style import FINAL_COLOUR, SETTINGS, iteration_colour, label_axes, save


def draw_run(curves: Sequence[Curve], path: Path) -> None:
    """Draw reward against KL to SFT into a PNG.

    Fronts of single iterations towards SFT are left out; the table has them.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(7.2, 5.0), layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            if curve.kind == "trajectory":
                _draw_trajectory(axes, curve)
            elif curve.kind == "final" or curve.name.endswith("from init"):
                _draw_front(axes, curve)
        label_axes(axes, "KL to SFT (nats per response)", "reward")
        axes.margins(0.05, 0.08)
        _legend_without_repeats(axes)
        save(figure, path)


def _draw_trajectory(axes: Axes, curve: Curve) -> None:
    axes.plot(
        curve.column("kl_to_sft"),
        curve.column("reward"),
        color=iteration_colour(curve.iteration),
        alpha=0.55,
        linewidth=0.9,
        linestyle="--",
        marker=".",
        markersize=4,
        label=f"iteration {curve.iteration}: members",
    )


def _draw_front(axes: Axes, curve: Curve) -> None:
    final = curve.kind == "final"
    axes.errorbar(
        curve.column("kl_to_sft"),
        curve.column("reward"),
        xerr=curve.column("kl_to_sft_stderr"),
        yerr=curve.column("reward_stderr"),
        color=FINAL_COLOUR if final else iteration_colour(curve.iteration),
        linewidth=1.6,
        elinewidth=0.8,
        marker="D" if final else "o",
        markersize=4.5 if final else 4,
        markerfacecolor="white" if final else None,
        label="final front, towards SFT" if final else f"iteration {curve.iteration}: LITI front",
    )
    _label_ends(axes, curve)


def _label_ends(axes: Axes, curve: Curve) -> None:
    """Name where a front ends, below it for the final one and above else, and where SFT is."""
    final = curve.kind == "final"
    last = curve.points[-1]
    labels = [(last, f"{'κ' if final else 'η'} = {last['eta']:g}")]
    if final and curve.points[0]["eta"] == 0:
        labels.append((curve.points[0], "SFT"))
    for point, text in labels:
        axes.annotate(
            text,
            (point["kl_to_sft"], point["reward"]),
            xytext=(8, -12) if final else (-12, 8),
            textcoords="offset points",
            color=FINAL_COLOUR if final else iteration_colour(curve.iteration),
            fontsize=8,
        )


def _legend_without_repeats(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    axes.legend(entries.values(), entries.keys(), loc="lower right")
