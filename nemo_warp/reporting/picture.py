"""A run's KL-reward picture: ``curves.png``.

It holds each member's trajectory, each iteration's LITI front from the iteration's
initialisation, and the run's result, the front towards SFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nemo_warp.reporting.labels import Label, place_labels
from nemo_warp.reporting.run import Curve
from nemo_warp.reporting.style import FINAL_COLOUR, SETTINGS, iteration_colour, label_axes, save


def draw_run(curves: Sequence[Curve], path: Path, title: str = "") -> None:
    """Draw reward against KL to SFT into a PNG and an SVG beside it.

    Fronts of single iterations towards SFT are left out; the table has them.
    """
    shown = [curve for curve in curves if _is_shown(curve)]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(7.2, 5.0), layout="constrained")
        axes = figure.subplots()
        for curve in shown:
            (_draw_trajectory if curve.kind == "trajectory" else _draw_front)(axes, curve)
        label_axes(axes, "KL to SFT (nats per response)", "reward", title)
        axes.margins(0.05, 0.08)
        _legend_without_repeats(axes)
        fronts = [curve for curve in shown if curve.kind != "trajectory"]
        # The final front's first: labels get their places in order of importance.
        labels = [label for curve in reversed(fronts) for label in _ends(curve)]
        place_labels(axes, labels, _points(shown))
        save(figure, path)


def _is_shown(curve: Curve) -> bool:
    return curve.kind in ("trajectory", "final") or curve.name.endswith("from init")


def _points(curves: Sequence[Curve]) -> np.ndarray:
    """All that was measured, float [N, 2]: KL and reward."""
    places = [(p["kl_to_sft"], p["reward"]) for curve in curves for p in curve.points]
    return np.array(places, dtype=float).reshape(-1, 2)


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


def _ends(curve: Curve) -> list[Label]:
    """Where a front ends, and where SFT is."""
    final, last = curve.kind == "final", curve.points[-1]
    colour = FINAL_COLOUR if final else iteration_colour(curve.iteration)
    named = [(last, f"{'κ' if final else 'η'} = {last['eta']:g}")]
    if final and curve.points[0]["eta"] == 0:
        named.append((curve.points[0], "SFT"))
    return [Label(point["kl_to_sft"], point["reward"], text, colour) for point, text in named]


def _legend_without_repeats(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    axes.legend(entries.values(), entries.keys(), loc="lower right")
