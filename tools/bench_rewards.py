#!/usr/bin/env python3
"""Scores per second of a served callable, against what its own time allows.

A real server and the member's client, on this machine. The callable sleeps; "own" is what calls of
that length, so many at a time, could give at best: concurrency / seconds (where a call takes no
time there is no such number). The last column is the share of it that was reached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from nemo_warp.rewards.client import RewardClient  # noqa: E402
from nemo_warp.schema.shared import RewardClientSettings  # noqa: E402

EPILOG = """examples:
  python tools/bench_rewards.py
  python tools/bench_rewards.py --seconds 0.5 --concurrency 64 --texts 1024 --in-flight 8
"""
_PROMPT, _RESPONSE = "p" * 500, "r" * 1500


def sleeping(prompt: str, response: str, seconds: float = 0.0) -> float:
    """A callable that takes its time and no processor."""
    if seconds:
        time.sleep(seconds)
    return float(len(response))


async def sleeping_async(prompt: str, response: str, seconds: float = 0.0) -> float:
    """As `sleeping`, as a coroutine."""
    await asyncio.sleep(seconds)
    return float(len(response))


@contextmanager
def served(name: str, seconds: float, concurrency: int, directory: Path) -> Iterator[Path]:
    """A server of ``name``; yields its endpoint file."""
    endpoint = directory / "endpoint.json"
    command = [sys.executable, "-m", "nemo_warp.rewards.serve", "--run-id", "bench"]
    command += ["--callable", f"bench_rewards:{name}", "--endpoint-file", str(endpoint)]
    command += ["--options", json.dumps({"seconds": seconds}), "--concurrency", str(concurrency)]
    paths = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with (directory / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield endpoint
    finally:
        process.terminate()
        process.wait()


def measure(endpoint: Path, texts: int, in_flight: int) -> float:
    """Scores per second of one client, the best of three times."""
    settings = RewardClientSettings(in_flight=in_flight)
    client = RewardClient(endpoint, settings, run_id="bench")
    client.connect()
    client.score([_PROMPT], [_RESPONSE])
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        scores = client.score([_PROMPT] * texts, [_RESPONSE] * texts)
        best = max(best, texts / (time.perf_counter() - started))
        if scores.failed.any():
            raise RuntimeError(f"a score failed: {next(filter(None, scores.reasons))}")
    client.close()
    return best


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.0, 0.005, 0.05])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--texts", type=int, default=512, help="per measurement [%(default)s]")
    parser.add_argument("--in-flight", type=int, default=4, help="of the client [%(default)s]")
    args = parser.parse_args()
    print(f"{args.texts} texts of {len(_PROMPT + _RESPONSE)} characters, 32 in a request")
    print(f"{'callable':<10}{'seconds':>9}{'at a time':>11}{'scores/s':>11}{'own':>10}{'share':>8}")
    for name in ("sleeping", "sleeping_async"):
        for seconds in args.seconds:
            for concurrency in args.concurrency:
                with (
                    tempfile.TemporaryDirectory(prefix="bench-") as directory,
                    served(name, seconds, concurrency, Path(directory)) as endpoint,
                ):
                    texts = min(args.texts, round(20 * concurrency / max(seconds, 1e-3)))
                    rate = measure(endpoint, max(texts, 1), args.in_flight)
                own = concurrency / seconds if seconds else float("nan")
                kind = "async" if name.endswith("async") else "threads"
                print(
                    f"{kind:<10}{seconds:>9g}{concurrency:>11}{rate:>11.0f}{own:>10.0f}"
                    f"{rate / own:>8.0%}"
                    if seconds
                    else f"{kind:<10}{seconds:>9g}{concurrency:>11}{rate:>11.0f}{'':>10}{'':>8}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
