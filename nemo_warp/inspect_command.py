"""Show what a NeMo checkpoint holds, hash its weights, or compare two layer by layer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_warp import exit_codes

_EPILOG = """\
examples:
  nemo-inspect policy.nemo                  layout, layers, dtypes, provenance of a merge
  nemo-inspect policy.nemo --tensors        every tensor with its shape and shards
  nemo-inspect policy.nemo --hash           digest of the weights, the same in every layout
  nemo-inspect merged.nemo --diff sft.nemo  per layer: how far, in which direction, how many
"""


def build_parser() -> argparse.ArgumentParser:
    """Without torch, so that ``--help`` and a typo are answered at once."""
    parser = argparse.ArgumentParser(
        prog="nemo-inspect",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", type=Path, help=".nemo file or folder, or a checkpoint folder"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--hash", action="store_true", help="read and hash all weights")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="compare with OTHER, per layer")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _inspect(arguments: argparse.Namespace) -> dict[str, Any]:
    from nemo_warp.checkpoints.checkpoint import open_checkpoint
    from nemo_warp.checkpoints.inspection import describe, diff, hash_weights

    checkpoint = open_checkpoint(arguments.checkpoint)
    found = describe(checkpoint)
    if arguments.hash:
        found["weights_digest"] = hash_weights(checkpoint)
    if arguments.diff:
        found["diff"] = diff(open_checkpoint(arguments.diff), checkpoint)
    return found


def as_text(found: dict[str, Any], with_tensors: bool) -> str:
    """The facts one a line, the provenance indented below them, and the groups as a table."""
    facts = {k: v for k, v in found.items() if k not in ("groups", "diff", "provenance")}
    lines = [f"{key.replace('_', ' '):<18}{_fact(value)}" for key, value in facts.items()]
    if found.get("provenance"):
        lines += ["", "provenance", *_indented(found["provenance"], 1)]
    return "\n".join([*lines, "", *_table(found, with_tensors)])


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_fact(inner)} {name}" for name, inner in value.items())
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)


def _indented(value: Any, depth: int) -> list[str]:
    """Nested mappings and lists, one entry a line; a short list stays on its line."""
    lines, margin = [], "  " * depth
    named = value.items() if isinstance(value, dict) else enumerate(value, 1)
    for name, inner in named:
        label = f"{margin}{name}"
        if isinstance(inner, dict | list) and inner and not _is_short(inner):
            lines += [label, *_indented(inner, depth + 1)]
        else:
            text = ", ".join(map(str, inner)) if isinstance(inner, list) else inner
            lines.append(f"{label:<26} {text}")
    return lines


def _is_short(value: Any) -> bool:
    flat = isinstance(value, list) and not any(isinstance(one, dict | list) for one in value)
    return flat and len(str(value)) < 80


def _table(found: dict[str, Any], with_tensors: bool) -> list[str]:
    differences = found.get("diff", {})
    head = f"{'group':<40}{'parameters':>16}"
    if differences:
        head += f"{'|difference|':>16}{'relative':>12}{'cosine':>13}{'changed':>10}"
    lines = [head]
    for name, group in found["groups"].items():
        lines.append(f"{name:<40}{group['parameters']:>16,}{_difference(differences.get(name))}")
        for tensor, (shape, dtype, shards) in group["tensors"].items() if with_tensors else ():
            lines.append(f"  {tensor:<64} {dtype:<9} {shape!s:<20} {shards} shards")
    return lines


def _difference(row: dict[str, float] | None) -> str:
    if row is None:
        return ""
    return (
        f"{row['difference']:>16.4g}{row['relative']:>12.3e}{row['cosine']:>13.8f}"
        f"{100 * row['changed_share']:>8.2f} %"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    for path in filter(None, (arguments.checkpoint, arguments.diff)):
        if not path.exists():
            print(f"error: there is no {path}", file=sys.stderr)
            return exit_codes.MISCONFIGURED
    from nemo_warp.checkpoints.errors import CheckpointError

    try:
        found = _inspect(arguments)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.FAILED
    try:
        print(json.dumps(found, indent=2) if arguments.json else as_text(found, arguments.tensors))
    except BrokenPipeError:  # `nemo-inspect ... | head`
        sys.stderr.close()
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
