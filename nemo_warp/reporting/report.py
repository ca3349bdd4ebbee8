"""Everything a run has measured: ``nemo-warp report RUN``.

Writes curves.png (KL against reward), table.md and table.csv (the numbers), and index.html, a page
with all of it that works offline. May be repeated while the run goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_warp import exit_codes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nemo-warp report``."""
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("--output", type=Path, help="directory to write into [RUN/report]")


def main(args: argparse.Namespace) -> int:
    """Write the report and say where; an exit code of `nemo_warp.exit_codes`."""
    # here, because numpy and matplotlib take seconds that --help need not wait for
    from nemo_warp.reporting.write import write_report

    print("\n".join(map(str, write_report(args.run, args.output or args.run / "report"))))
    return exit_codes.DONE
