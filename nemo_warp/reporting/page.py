"""One page for a run: ``report/index.html``.

The page holds everything it shows, plotly's script too (5 MB): it works without a network and
survives being mailed. It can be written at any time; what is not measured yet is left out.
"""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template

from nemo_warp.records import write_text_atomically
from nemo_warp.reporting import facts
from nemo_warp.reporting.run import Curve
from nemo_warp.reporting.table import COLUMNS

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


def write_page(run: Path, curves: Sequence[Curve], path: Path) -> bool:
    """Write the page of ``run``; False, with a line that says so, where plotly is not installed.

    Raises:
        RecordError: a record on disk is malformed.
    """
    if importlib.util.find_spec("plotly") is None:
        print(f"{path} is left out: plotly is not installed (pip install plotly)")
        return False
    from plotly.offline import get_plotlyjs

    sections = list(_sections(run, curves))
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


def _sections(run: Path, curves: Sequence[Curve]) -> Iterator[tuple[str, str]]:
    """Titles and HTML, in the order of a reader's questions."""
    from nemo_warp.reporting import page_figures  # needs plotly

    yield "Reward against KL", _figure(page_figures.fronts(curves))
    yield "Members while they train", _figure(page_figures.trajectories(curves))
    angles = facts.angles(run)
    if angles:
        yield "Angles between task vectors", _figure(page_figures.angles(angles))
    yield "Along the fronts", _figure(page_figures.along(curves, facts.diversity(run, curves)))
    judges = page_figures.judge_names(curves)
    if judges:
        yield "Judges", _figure(page_figures.judges(curves, judges))
    texts = facts.sample_texts(curves)
    if texts:
        yield "Sample texts along the front", _table(*texts)
    yield "Measurements", _table(*_measurements(curves))
    yield "What made it", _table(("what", "value"), facts.provenance(run))
    yield "Time spent", _table(*facts.hours(run))
    recipe = run / "recipe.yaml"
    if recipe.exists():
        text = html.escape(recipe.read_text(errors="replace"))
        yield "Recipe", f"<details><summary>recipe.yaml</summary><pre>{text}</pre></details>"


def _measurements(curves: Sequence[Curve]) -> tuple[Sequence[str], list[list[str]]]:
    rows = []
    for curve in curves:
        shown = curve.points[-1:] if curve.kind == "trajectory" else curve.points
        for point in shown:
            values = (point.get(name) for name in COLUMNS[2:])
            place = f"{curve.position} {point[curve.position]:g}"
            rows.append([curve.name, place, *("" if v is None else f"{v:.4g}" for v in values)])
    return COLUMNS, rows


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


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
