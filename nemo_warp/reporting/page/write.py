"""One page for a run: ``report/index.html``.

The page holds everything it shows, plotly's script too (5 MB): it works without a network and
survives being mailed. It can be written at any time; what is not measured yet is left out.
"""

from __future__ import annotations

import html
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template

from nemo_warp.records import write_text_atomically
from nemo_warp.reporting.page import facts
from nemo_warp.reporting.page.benchmarks import read_benchmarks, rows_of
from nemo_warp.reporting.page.measures import TITLES, Measures
from nemo_warp.reporting.run import Curve
from nemo_warp.reporting.table import COLUMNS, judge_columns, shown_points

PAGE = "index.html"

_TEMPLATE = Template(
    """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; margin: .5em 0; display: block;
        overflow-x: auto; }
td, th { border-bottom: 1px solid #e4e4e4; padding: .25em .6em; text-align: left;
         vertical-align: top; }
th { white-space: nowrap; } .muted { color: #666; } pre { background: #f6f6f6; padding: 1em;
     overflow-x: auto; font-size: 12px; } nav a { margin-right: 1em; }
</style>
<script>$script</script></head>
<body><h1>$title</h1><p class="muted">$subtitle</p><nav>$links</nav>
$sections
</body></html>
"""
)


def write_page(
    run: Path,
    curves: Sequence[Curve],
    measured: Mapping[str, Sequence[Measures | None]],
    path: Path,
) -> bool:
    """Write the page of ``run``; False, with a line that says so, where plotly is not installed.

    Raises:
        RecordError: a record on disk is malformed.
    """
    # An optional package: tables and pictures need no plotly, and a report stage must not fail of
    # it.
    if importlib.util.find_spec("plotly") is None:
        print(f"{path} is left out: plotly is not installed (pip install plotly)")
        return False
    from plotly.offline import get_plotlyjs

    sections = list(_sections(run, curves, measured))
    links = " ".join(f'<a href="#{_anchor(t)}">{html.escape(t)}</a>' for t, _ in sections)
    body = "\n".join(
        f'<h2 id="{_anchor(title)}">{html.escape(title)}</h2>\n{content}'
        for title, content in sections
    )
    text = _TEMPLATE.substitute(
        title=html.escape(facts.title(run)),
        subtitle=html.escape(facts.subtitle(run)),
        script=get_plotlyjs(),
        links=links,
        sections=body,
    )
    write_text_atomically(path, text)
    return True


def _sections(
    run: Path, curves: Sequence[Curve], measured: Mapping[str, Sequence[Measures | None]]
) -> Iterator[tuple[str, str]]:
    """Titles and HTML, in the order of a reader's questions."""
    from nemo_warp.reporting.page import figures  # needs plotly

    yield "Reward against KL", _figure(figures.fronts(curves)) + _lines(facts.published(run))
    judges = judge_columns(curves)
    if judges:
        shown = _figure(figures.judges(curves, judges))
        yield "Judges", shown + _lines(facts.judge_lines(curves))
    preferred = _preferred(measured)
    if preferred:
        yield "Side by side with SFT", _figure(figures.against_kl(curves, preferred))
    yield "Length, entropy and diversity", _figure(figures.along(curves, _by_title(measured)))
    header, rows = facts.best_of_rows(curves, measured)
    if rows:
        shown = _figure(figures.best_of(curves, measured))
        yield "Best of N", shown + _folded("numbers", _table(header, rows))
    scored = read_benchmarks(run, curves)
    if scored:
        yield "Benchmarks", _figure(figures.benchmarks(scored)) + _table(*rows_of(scored))
    yield "Members while they train", _figure(figures.trajectories(curves))
    alarms = facts.alarms(curves)
    if alarms:
        yield "Alarms", _table(("member", "first at step", "alarm"), alarms)
    layers = facts.layers(run)
    if layers:
        yield "Angles between task vectors", _figure(figures.angles(layers))
    texts = facts.sample_texts(curves)
    if texts:
        yield "Sample texts along the front", _table(*texts)
    yield "Measurements", _table(*_measurements(curves))
    yield "What made it", _table(("what", "value"), facts.provenance(run))
    yield "Time spent", _table(*facts.hours(run))
    recipe = run / "recipe.yaml"
    if recipe.exists():
        text = html.escape(recipe.read_text(errors="replace"))
        yield "Recipe", _folded("recipe.yaml", f"<pre>{text}</pre>")


def _by_title(
    measured: Mapping[str, Sequence[Measures | None]],
) -> dict[str, dict[str, list[float]]]:
    """Measure's title -> curve's name -> one number per point, NaN where unknown."""
    return {title: _of_each(measured, lambda m: m.values, name) for name, title in TITLES.items()}


def _preferred(
    measured: Mapping[str, Sequence[Measures | None]],
) -> dict[str, dict[str, list[float]]]:
    """As `_by_title`, for the reward and each judge: how often it prefers the point to SFT."""
    points = [m for of_curve in measured.values() for m in of_curve if m is not None]
    names = dict.fromkeys(name for point in points for name in point.preferred)
    return {
        f"preferred to SFT by {name} (share)": _of_each(measured, lambda m: m.preferred, name)
        for name in names
    }


def _of_each(
    measured: Mapping[str, Sequence[Measures | None]],
    numbers: Callable[[Measures], Mapping[str, float]],
    name: str,
) -> dict[str, list[float]]:
    """Curve's name -> one of each point's numbers, NaN where it is unknown."""
    return {
        curve: [math.nan if m is None else numbers(m).get(name, math.nan) for m in points]
        for curve, points in measured.items()
    }


def _measurements(curves: Sequence[Curve]) -> tuple[Sequence[str], list[list[str]]]:
    judges = judge_columns(curves)
    rows = []
    for curve in curves:
        for point in shown_points(curve):
            values = [point.get(name) for name in COLUMNS[2:]]
            values += [(point.get("judges") or {}).get(name) for name in judges]
            place = f"{curve.position} {point[curve.position]:g}"
            rows.append([curve.name, place, *("" if v is None else f"{v:.4g}" for v in values)])
    return (*COLUMNS, *judges), rows


def _figure(figure: object) -> str:
    bar = {"displayModeBar": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=False, config=bar)  # type: ignore[attr-defined]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(str(name))}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    return f"<table><tr>{cells}</tr>\n{body}</table>"


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>\n" for line in lines)


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def _anchor(title: str) -> str:
    return title.lower().replace(",", "").replace(" ", "-")
