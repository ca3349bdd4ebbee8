#!/usr/bin/env python3
"""Turn a Hugging Face folder into a distributed .nemo (docs/models.md), without GPU or NeMo."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nemo_warp.checkpoints.families.command import run_command
from nemo_warp.checkpoints.families.importing import import_hf, total_bytes

_EPILOG = """\
example:
  import_hf.py Llama-3.2-1B-Instruct llama.nemo

Families: Llama 2 and 3 (rope scaling too), Mistral, Qwen 2 and 2.5, Gemma, Gemma 2; dense ones. The
folder holds config.json, safetensors and a tokenizer; nothing is fetched. What NeMo cannot express
is refused by name, with exit code 2, and nothing is written.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="config.json, safetensors, tokenizer")
    parser.add_argument("output", type=Path, help="the .nemo to write")
    parser.add_argument(
        "--ignore",
        metavar="KEY",
        action="append",
        default=[],
        help="a key of config.json that makes no difference to what the model computes",
    )
    parsed = parser.parse_args(arguments)
    return run_command(
        lambda progress: import_hf(parsed.folder, parsed.output, parsed.ignore, progress),
        lambda: total_bytes(parsed.folder),
        parsed.output,
    )


if __name__ == "__main__":
    sys.exit(main())
