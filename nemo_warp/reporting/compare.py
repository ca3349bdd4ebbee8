"""Compare two policies by their responses, or runs by their fronts.

Two points (a file of responses, or RUN@KAPPA, or STAGE@ETA):

  nemo-warp compare runs/warp@1 runs/sft_anchor@1        the same prompts, every judge both have
  nemo-warp compare a.jsonl.gz b.jsonl.gz --tie 0.05     files of responses, wherever they came from

Runs (any number; runs of one group differ in their seed and are named together with commas):

  nemo-warp compare warp=runs/w1,runs/w2,runs/w3 sft=runs/s1,runs/s2,runs/s3 --output report

Differences come with 95 % intervals: bootstrap over prompts, paired, for two policies; Student's t
over seeds for groups of runs. --output writes compare.md, compare.json and, for runs, fronts.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_warp import exit_codes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nemo-warp compare``."""
    parser.add_argument("what", nargs="+", metavar="A", help="two points, or runs")
    parser.add_argument(
        "--judge", action="append", help="only this reward or judge (repeatable) [all both have]"
    )
    parser.add_argument(
        "--tie", type=float, default=0.0, metavar="D", help="scores at most D apart tie [0]"
    )
    parser.add_argument("--output", type=Path, help="directory for the table, JSON and picture")


def main(args: argparse.Namespace) -> int:
    """Print the comparison; an exit code of `nemo_warp.exit_codes`."""
    # here, because numpy, scipy and matplotlib take seconds that --help need not wait for
    from nemo_warp.reporting.comparison import compare

    if args.tie < 0:
        raise ValueError(f"--tie is {args.tie:g}, expected 0 or more")
    print(compare(args.what, args.judge, args.tie, args.output))
    return exit_codes.DONE
