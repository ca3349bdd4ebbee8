"""Labels beside points, where they cover neither points nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

_AWAY = 9.0
"""Points between a label and what it names."""
_PLACES = (
    *((1, -1), (-1, 1), (1, 1), (-1, -1)),
    *((0, 1), (0, -1), (1, 0), (-1, 0)),
)
_SIDES = {-1: "right", 0: "center", 1: "left"}
_HEIGHTS = {-1: "top", 0: "center", 1: "bottom"}


@dataclass(frozen=True)
class Label:
    """What stands beside the point (x, y), in the axes' units."""

    x: float
    y: float
    text: str
    colour: str


def place_labels(axes: Axes, labels: Sequence[Label], points: np.ndarray) -> None:
    """Write each label on that side of its point where it covers least.

    To be called last: the places are right for the limits and the legend that the axes have now.

    Args:
        axes: drawn into.
        labels: in order of importance.
        points: float [N, 2], what must stay visible, in the axes' units.
    """
    figure: Any = axes.figure
    # Sizes of texts and of the legend are known only once the figure has been laid out.
    figure.draw_without_rendering()
    visible = axes.transData.transform(points)
    taken = [legend.get_window_extent()] if (legend := axes.get_legend()) is not None else []
    for label in labels:
        # All eight are written, measured, and seven taken away again: matplotlib has no way to
        # measure a text that is not there.
        written = [_write(axes, label, place) for place in _PLACES]
        boxes = [one.get_window_extent() for one in written]
        costs = [_covered(box, visible, taken, axes.bbox) for box in boxes]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        for index, one in enumerate(written):
            if index != best:
                one.remove()


def _write(axes: Axes, label: Label, place: tuple[int, int]) -> Annotation:
    right, up = place
    return axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=(right * _AWAY, up * _AWAY),
        textcoords="offset points",
        horizontalalignment=_SIDES[right],
        verticalalignment=_HEIGHTS[up],
        color=label.colour,
        fontsize=8,
    )


def _covered(box: Bbox, points: np.ndarray, taken: Sequence[Bbox], inside: Bbox) -> float:
    """How many points and labels lie under the box, and whether it leaves the axes."""
    (left, bottom), (right, top) = box.min, box.max
    x, y = points.T
    hidden = int(((left <= x) & (x <= right) & (bottom <= y) & (y <= top)).sum())
    collisions = sum(box.overlaps(other) for other in taken)
    within = inside.x0 <= left and right <= inside.x1 and inside.y0 <= bottom and top <= inside.y1
    # A label over a label is unreadable, one outside of the axes is ugly, one over a point hides
    # one of many: hence 10, 5 and 1.
    return hidden + 10 * collisions + (0 if within else 5)
