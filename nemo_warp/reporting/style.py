"""How every picture looks: plain, safe for colour-blind readers, the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Login nodes and jobs have no display.
matplotlib.use("Agg")

# Okabe and Ito's palette without black, which marks the final front, and without its yellow.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
FINAL_COLOUR = "#000000"
MUTED = "#8A8A8A"

SETTINGS = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "errorbar.capsize": 2.0,
    "figure.dpi": 130,
    "font.size": 9.0,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.5,
    "savefig.dpi": 130,
}


def iteration_colour(iteration: int) -> str:
    """The colour of an iteration counted from 1; colours repeat after the sixth."""
    return _COLOURS[(iteration - 1) % len(_COLOURS)]


def series_colour(index: int) -> str:
    """The colour of a series counted from 0 in a picture of one member."""
    return _COLOURS[index % len(_COLOURS)]


def label_axes(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Name both axes, and the panel if it needs a name of its own."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title, loc="left")


def save(figure: Figure, path: Path) -> None:
    """Write ``path``, a PNG, and the same as SVG beside it, for print; each atomically.

    Without matplotlib's version, a date and random identifiers in them, equal data give equal
    bytes.
    """
    unnamed: dict[str, dict[str, None]] = {
        "png": {"Software": None},
        "svg": {"Creator": None, "Date": None},
    }
    # SVG ids are random otherwise.
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        for form, metadata in unnamed.items():
            target = path.with_suffix(f".{form}")
            # A page that is open in a browser never loads half a picture.
            temporary = target.with_name(f".{target.name}.partial")
            figure.savefig(temporary, format=form, metadata=metadata)
            temporary.replace(target)
