"""Serve a Python callable as a reward: ``python -m nemo_warp.rewards.serve --help``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nemo_warp import exit_codes
from nemo_warp.rewards.callables import fingerprint, load_callable, score_samples, score_together
from nemo_warp.rewards.errors import RewardError
from nemo_warp.rewards.triton import Infer, Serving, answer, log, serve
from nemo_warp.rewards.workers import Workers

EPILOG = """
The callable takes (prompt, response), two strings, and returns a number. If it raises, or returns
something that is not a finite number, that one sample comes back as NaN with the reason, and the
rest of its batch is scored. With --batch it takes two lists and returns as many numbers: one call
per request, and one per sample if that call raises.

examples:
  python -m nemo_warp.rewards.serve --callable nemo_warp.rewards.library:vader_compound \\
      --run-id tiny-1-member_01 --endpoint-file run/endpoint_vader.json
  python -m nemo_warp.rewards.serve --callable my_rewards:judge --batch \\
      --options '{"url": "http://judge:8000"}' --host 0.0.0.0 \\
      --run-id tiny-1-member_01 --endpoint-file run/endpoint_judge.json

The endpoint file appears when the server is ready and goes when it stops (SIGTERM or Ctrl-C).
"""


def text_infer(score_batch: Callable[..., tuple[np.ndarray, list[str]]]) -> Infer:
    """The protocol's inputs to (prompts, responses), and its outputs back."""
    # PyTriton calls from a thread with a running event loop, where a callable could not use
    # asyncio.run; in a thread of its own it can.
    own_thread = Workers(1, "callable")

    def infer(sentences: np.ndarray, prompt_lengths: np.ndarray | None = None) -> dict:
        texts = [text.decode() for text in sentences[:, 0]]
        cuts = [0] * len(texts) if prompt_lengths is None else prompt_lengths[:, 0].tolist()
        prompts = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
        responses = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
        return answer(*own_thread.submit(score_batch, prompts, responses).result())

    return infer


def add_serving_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments every reward server has."""
    parser.add_argument("--run-id", required=True, help="the run this server belongs to")
    parser.add_argument("--endpoint-file", required=True, type=Path, help="written once ready")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s; 0.0.0.0 if the trainer runs elsewhere)",
    )
    parser.add_argument("--port", type=int, default=0, help="default: a free one")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_warp.rewards.serve",
        description="Serve a Python callable as a reward, with NeMo-Aligner's protocol.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--callable", required=True, metavar="MODULE:FUNCTION")
    parser.add_argument("--batch", action="store_true", help="it takes two lists at a time")
    parser.add_argument("--options", default="{}", metavar="JSON", help="its keyword arguments")
    add_serving_arguments(parser)
    return parser.parse_args(argv)


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--options is not JSON ({error}): {text!r}") from None
    if not isinstance(options, dict):
        raise ValueError(f"--options must be a JSON object, got {text!r}")
    return options


def run(arguments: argparse.Namespace) -> None:
    """Load, fingerprint and serve the callable until told to stop."""
    options = _options(arguments.options)
    score = load_callable(arguments.callable, options)
    serving = Serving(
        run_id=arguments.run_id,
        fingerprint=fingerprint(arguments.callable, {**options, "batch": arguments.batch}),
        endpoint_file=arguments.endpoint_file,
        host=arguments.host,
        port=arguments.port,
    )
    log.info("serving %s (%s)", arguments.callable, serving.fingerprint)
    serve(text_infer(partial(score_together if arguments.batch else score_samples, score)), serving)


def exit_code_of(main: Callable[[], None]) -> int:
    """Run ``main``; say in one sentence what was wrong, and turn it into an exit code."""
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISCONFIGURED
    except RewardError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.FAILED
    return exit_codes.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s reward: %(message)s")
    return exit_code_of(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
