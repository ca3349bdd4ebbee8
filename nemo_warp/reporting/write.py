"""Writes a run's report: pictures, tables and the page."""

from __future__ import annotations

from pathlib import Path

from nemo_warp.records import write_text_atomically
from nemo_warp.reporting.page import PAGE, write_page
from nemo_warp.reporting.picture import draw_run
from nemo_warp.reporting.run import read_run
from nemo_warp.reporting.table import csv_table, markdown_table


def write_report(run: Path, output: Path) -> list[Path]:
    """Write the pictures, tables and the page of ``run`` into ``output``; the files written.

    Raises:
        ValueError: ``run`` is not a run directory, or nothing has been measured yet.
        RecordError: a measurement on disk is malformed.
    """
    curves = read_run(run)
    output.mkdir(parents=True, exist_ok=True)
    files = [output / name for name in ("curves.png", "table.md", "table.csv")]
    draw_run(curves, files[0])
    write_text_atomically(files[1], markdown_table(curves))
    write_text_atomically(files[2], csv_table(curves))
    return [*files, output / PAGE] if write_page(run, curves, output / PAGE) else files
