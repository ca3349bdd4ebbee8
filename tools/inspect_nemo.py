#!/usr/bin/env python3
"""Show what a NeMo checkpoint holds, hash its weights, or compare two layer by layer."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from nemo_warp import exit_codes
from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.inspection import describe, diff, hash_weights

_EPILOG = """\
examples:
  inspect_nemo.py policy.nemo                  layout, layers, dtypes, provenance of a merge
  inspect_nemo.py policy.nemo --tensors        every tensor with its shape and shards
  inspect_nemo.py policy.nemo --hash           digest of the weights, the same in every layout
  inspect_nemo.py merged.nemo --diff sft.nemo  per layer: how far, in which direction, how many
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=Path, help=".nemo file or folder, or a checkpoint folder"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--hash", action="store_true", help="read and hash all weights")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="compare with OTHER, per layer")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def inspect(arguments: argparse.Namespace) -> dict:
    checkpoint = open_checkpoint(arguments.checkpoint)
    found = describe(checkpoint)
    if arguments.hash:
        found["weights_digest"] = hash_weights(checkpoint)
    if arguments.diff:
        found["diff"] = diff(open_checkpoint(arguments.diff), checkpoint)
    return found


def show(found: dict, with_tensors: bool) -> None:
    groups, differences = found.pop("groups"), found.pop("diff", {})
    for key, value in found.items():
        text = value if isinstance(value, str | int | None) else json.dumps(value, indent=2)
        print(f"{key.replace('_', ' '):16} {text}")
    print()
    for name, group in groups.items():
        print(
            f"{name:32} {group['parameters']:>14,} parameters{_difference(differences.get(name))}"
        )
        for tensor, (shape, dtype, shards) in group["tensors"].items() if with_tensors else ():
            print(f"    {tensor:64} {dtype:9} {shape!s:24} {shards} shards")


def _difference(row: dict | None) -> str:
    if row is None:
        return ""
    return (
        f"   |diff| {row['difference']:.4g}   relative {row['relative']:.3e}   "
        f"cosine {row['cosine']:.8f}   changed {100 * row['changed_share']:.2f} %"
    )


def main() -> int:
    arguments = build_parser().parse_args()
    try:
        found = inspect(arguments)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.FAILED
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, arguments.tensors)
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
