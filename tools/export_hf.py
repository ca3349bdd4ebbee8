#!/usr/bin/env python3
"""Turn a .nemo into a Hugging Face folder that transformers and vLLM load (docs/models.md)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nemo_warp.checkpoints.families.command import run_command
from nemo_warp.checkpoints.families.exporting import SHARD_BYTES, export_hf
from nemo_warp.checkpoints.families.importing import total_bytes

_EPILOG = """\
examples:
  # a model that import_hf.py brought in
  export_hf.py merged.nemo merged-hf

  # any other: configuration and tokenizer of the model that training began with
  export_hf.py policy.nemo policy-hf --like gemma-7b-it
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help=".nemo file or folder of any layout")
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--like", type=Path, metavar="FOLDER", help="the Hugging Face original")
    parser.add_argument(
        "--shard-bytes", type=int, default=SHARD_BYTES, help="size of a file (default: 5e9)"
    )
    parsed = parser.parse_args(arguments)
    return run_command(
        lambda progress: export_hf(
            parsed.checkpoint, parsed.output, parsed.like, parsed.shard_bytes, progress
        ),
        lambda: total_bytes(parsed.checkpoint),
        parsed.output,
    )


if __name__ == "__main__":
    sys.exit(main())
