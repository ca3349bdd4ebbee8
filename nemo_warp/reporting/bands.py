"""What several seeds say together: their mean over a range, with its 95 % interval as a band."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from nemo_warp.evidence.fronts import reward_at
from nemo_warp.evidence.intervals import over_seeds
from nemo_warp.reporting.run import Curve

_GRID = 60


def draw_band(
    axes: Axes,
    seeds: Sequence[Sequence[Curve]],
    metrics: tuple[str, str],
    label: str,
    colour: str,
    linewidth: float,
) -> None:
    """Draw the mean over seeds and, for more than one, its interval.

    The range is the one that every curve covers: a mean over fewer of them would jump at the ends.
    Where there is none, only the label is added.

    Args:
        axes: drawn into.
        seeds: curves of each seed; a seed's value is the mean over its curves.
        metrics: on the horizontal and on the vertical axis.
        label: of the mean, in the legend.
        colour: of the mean and the band.
        linewidth: of the mean, in points.
    """
    x = metrics[0]
    curves = [curve for of_seed in seeds for curve in of_seed]
    low = max(min(curve.column(x)) for curve in curves)
    high = min(max(curve.column(x)) for curve in curves)
    if high <= low:
        axes.plot([], [], color=colour, linewidth=linewidth, label=label)
        return
    grid = np.linspace(low, high, _GRID)
    means = [[mean_at(s, metrics, place) for s in seeds] for place in grid]
    bands = [over_seeds(np.array(of_place)) for of_place in means]
    axes.plot(grid, [b.mean for b in bands], color=colour, linewidth=linewidth, label=label)
    if len(seeds) > 1:
        ends = [b.low for b in bands], [b.high for b in bands]
        axes.fill_between(grid, *ends, color=colour, alpha=0.15, linewidth=0)


def mean_at(curves: Sequence[Curve], metrics: tuple[str, str], place: float) -> float:
    """A seed's value: the mean over its curves at ``place``; NaN where one was not measured."""
    x, y = metrics
    return float(np.mean([reward_at(c.column(x), c.column(y), float(place)) for c in curves]))
