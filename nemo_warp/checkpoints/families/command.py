"""What import and export have in common as commands: progress, errors, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_warp import exit_codes
from nemo_warp.checkpoints.errors import CheckpointError


def run_command(
    convert: Callable[[Callable[[int], Any]], Any], total: Callable[[], int], output: Path
) -> int:
    """Convert under a progress bar; returns the exit code.

    Args:
        convert: takes a function that is called with numbers of bytes.
        total: bytes in all.
        output: what is written.
    """
    try:
        with tqdm(total=total(), unit="B", unit_scale=True, disable=None) as bar:
            convert(bar.update)
    except (ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISCONFIGURED
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.FAILED
    print(f"wrote {output}")
    return exit_codes.DONE
