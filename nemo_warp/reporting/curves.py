"""Write a run's report: ``python -m nemo_warp.reporting.curves RUN``, the program of report stages.

People type ``nemo-warp report RUN``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nemo_warp import exit_codes
from nemo_warp.records import RecordError
from nemo_warp.reporting.write import write_report


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns an exit code of `nemo_warp.exit_codes`."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_warp.reporting.curves",
        description="Draw a run's KL-reward picture (curves.png) and write the table behind it "
        "(table.md, table.csv). Works while the run is still going on.",
        epilog="example: python -m nemo_warp.reporting.curves runs/tiny",
    )
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("--output", type=Path, help="directory to write into [RUN/front]")
    parsed = parser.parse_args(arguments)
    try:
        files = write_report(parsed.run, parsed.output or parsed.run / "front")
    except (ValueError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        # Also for damaged records: another attempt of the report stage would read the same ones.
        return exit_codes.MISCONFIGURED
    print("\n".join(str(path) for path in files))
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
