"""Command line of the merger."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from nemo_warp import exit_codes
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.merge import merge
from nemo_warp.merge.options import DTYPES, GRANULARITIES, METHODS, ROUNDINGS, SOURCES
from nemo_warp.merge.ranks import RankFailure

_EPILOG = """\
examples:
  # WARP's merge: SLERP of two policies per layer, then 30 % of the way from the init
  merge_nemo.py --init sft.nemo --policies a.nemo b.nemo --output next_init.nemo

  # the whole front in one read of the inputs
  merge_nemo.py --init sft.nemo --policies a.nemo b.nemo --eta 0 0.1 0.3 0.5 0.8 1 \\
      --output front/eta_{eta}.nemo --report front/report

  # four nodes share the layers; the result is the same, byte for byte
  srun --nodes 4 --ntasks-per-node 1 python merge_nemo.py ... --workers 16
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description="Merge NeMo checkpoints: SLERP of task vectors per layer, then interpolation "
        "towards the init (LITI), shard by shard, without a GPU, a model or NeMo.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--init", type=Path, required=True, help="theta_init; outputs take its format and layout")
    add("--policies", type=Path, nargs="+", required=True, help="theta_1 .. theta_M, in order")
    add("--output", required=True, help="a .nemo file or a folder; {eta} is replaced by each eta")
    add("--method", choices=METHODS, default="slerp", help="default: slerp, of task vectors")
    add("--granularity", choices=GRANULARITIES, default="layer", help="what shares one angle")
    add("--weight", type=float, help="lambda of the second of two policies (default: uniform)")
    add("--eta", type=float, nargs="+", default=[0.3], help="LITI, 0 to 2 (default: 0.3)")
    add("--liti-towards", type=Path, help="interpolate towards this checkpoint, not the init")
    add("--dtype", choices=DTYPES, default="same", help="of the outputs (default: the init's)")
    add("--rounding", choices=ROUNDINGS, default="nearest", help="stochastic keeps small updates")
    add("--seed", type=int, default=0, help="of stochastic rounding (default: 0)")
    add("--source", choices=SOURCES, default="weights", help="masters: fp32 optimizer copies")
    add("--vocab-size", type=int, help="true rows of the embedding (default: found in the inputs)")
    add("--allow-similar", action="store_true", help="accept policies with a cosine above 0.99")
    add(
        "--allow-different-configs",
        action="store_true",
        help="merge models with another rotary base, activation, norm, heads or tokenizer",
    )
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processors to use")
    add("--report", type=Path, help="folder for report.json, table and pictures")
    add("--verify", nargs="?", const="sample", choices=("sample", "full"), help="reread and check")
    add("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    add("--overwrite", action="store_true", help="replace outputs that exist")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parsed = vars(build_parser().parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        merge(**parsed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISCONFIGURED
    except (CheckpointError, RankFailure, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.FAILED
    except KeyboardInterrupt:
        print("interrupted; nothing was published, run the same command again", file=sys.stderr)
        return exit_codes.FAILED
    return exit_codes.DONE
