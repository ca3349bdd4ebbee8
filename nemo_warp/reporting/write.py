"""Writes a run's report: pictures, tables and the page."""

from __future__ import annotations

from pathlib import Path

from nemo_warp.evidence.responses import Responses
from nemo_warp.records import write_json_atomically, write_text_atomically
from nemo_warp.reporting.page.facts import caption
from nemo_warp.reporting.page.measures import (
    Measures,
    as_json,
    measure,
    responses_of,
    sft_responses,
)
from nemo_warp.reporting.page.write import PAGE, write_page
from nemo_warp.reporting.picture import draw_run
from nemo_warp.reporting.run import Curve, read_run
from nemo_warp.reporting.table import csv_table, markdown_table

MEASURES = "measures.json"
"""Every curve's points with all that was measured, for programs."""


def write_report(run: Path, output: Path) -> list[Path]:
    """Write the pictures, tables and the page of ``run`` into ``output``; the files written.

    Raises:
        ValueError: ``run`` is not a run directory, or nothing has been measured yet.
        RecordError: a measurement on disk is malformed.
    """
    curves = read_run(run)
    output.mkdir(parents=True, exist_ok=True)
    names = ("curves.png", "curves.svg", "table.md", "table.csv", MEASURES)
    files = [output / name for name in names]
    draw_run(curves, files[0], caption(run))
    write_text_atomically(files[2], markdown_table(curves))
    write_text_atomically(files[3], csv_table(curves))
    sft = sft_responses(curves)
    measured = {curve.name: _measures(curve, sft) for curve in curves}
    write_json_atomically(output / MEASURES, as_json(curves, measured))
    written = write_page(run, curves, measured, output / PAGE)
    return [*files, output / PAGE] if written else files


def _measures(curve: Curve, sft: Responses | None) -> list[Measures | None]:
    """Of each point, None where no responses were kept."""
    kept = (responses_of(curve, point) for point in curve.points)
    return [None if responses is None else measure(responses, sft) for responses in kept]
