"""Command line of the merger."""

from __future__ import annotations

import logging
import sys

from nemo_warp import exit_codes
from nemo_warp.merge_arguments import build_parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parsed = vars(build_parser().parse_args(arguments))
    inputs = [parsed["init"], *parsed["policies"], parsed["liti_towards"]]
    missing = next((path for path in inputs if path is not None and not path.exists()), None)
    if missing is not None:
        print(f"error: {missing} does not exist", file=sys.stderr)
        return exit_codes.MISCONFIGURED
    # Only now: numba takes seconds, and a typo should not.
    from nemo_warp.checkpoints.errors import CheckpointError
    from nemo_warp.merge import merge
    from nemo_warp.merge.ranks import RankFailure

    # On standard error: standard output stays empty, for scripts.
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        merge(**parsed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISCONFIGURED
    except (CheckpointError, RankFailure, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.FAILED
    # The transaction has removed what was written by now.
    except KeyboardInterrupt:
        print("interrupted; nothing was published, run the same command again", file=sys.stderr)
        return exit_codes.FAILED
    return exit_codes.DONE
