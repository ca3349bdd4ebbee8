"""Everything a run has measured: ``nemo-warp report RUN``.

Writes curves.png (KL against reward), table.md and table.csv (the numbers), and index.html, a page
with all of it that works offline. May be repeated while the run goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_warp import exit_codes
from nemo_warp.records import write_text_atomically
from nemo_warp.reporting.page import PAGE, write_page
from nemo_warp.reporting.picture import draw_run
from nemo_warp.reporting.run import read_run
from nemo_warp.reporting.table import csv_table, markdown_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nemo-warp report``."""
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("--output", type=Path, help="directory to write into [RUN/report]")


def main(args: argparse.Namespace) -> int:
    """Write the report and say where; an exit code of `nemo_warp.exit_codes`."""
    print("\n".join(map(str, write_report(args.run, args.output or args.run / "report"))))
    return exit_codes.DONE


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
