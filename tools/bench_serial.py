#!/usr/bin/env python3
"""What of a merge its threads do one after the other: Python's own time per parameter.

Reads, writes, moves in memory, checksums and arithmetic, all of which leave Python's lock to other
threads, are replaced by nothing; what is left takes it.
Two models of different size are merged with one worker. The difference of their processor times
over that of their parameters is the cost per parameter, whatever a merge costs beside it.
Goal: under 0.15 ns per parameter and process at one output.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _bench_merging import ETAS, MODELS, Weights, shapes_of, write_nemo

GOAL = 0.15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--directory", type=Path, default=Path(), help="where the temporary folder goes")
    add("--gigabytes", type=float, nargs=2, default=[0.1, 1.0], help="of the two models")
    add("--outputs", type=int, nargs="+", default=[1, 6], help="numbers of etas (default: 1 6)")
    add("--repeats", type=int, default=5, help="merges of each (default: 5)")
    add("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(merge_with_nothing(arguments.child, *arguments.outputs)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench_serial_", dir=arguments.directory) as name:
        folders = [Path(name) / str(size) for size in arguments.gigabytes]
        counts = [_write(f, size) for f, size in zip(folders, arguments.gigabytes, strict=True)]
        for outputs in arguments.outputs:
            runs = [[_seconds(f, outputs) for f in folders] for _ in range(arguments.repeats)]
            small, large = np.min(np.array(runs), axis=0)
            slope = 1e9 * (large - small) / (counts[1] - counts[0])
            print(
                f"K = {outputs}: {slope:.3f} ns per parameter and process (goal at K = 1: {GOAL}); "
                f"{1e-9 * slope * 70.6e9:.0f} s for 70.6e9; smallest of {arguments.repeats}: "
                f"{small:.2f} and {large:.2f} s for {counts[0] / 1e9:.2f}e9 and "
                f"{counts[1] / 1e9:.2f}e9"
            )
    return 0


def _write(folder: Path, gigabytes: float) -> int:
    """Init and two policies; the number of their parameters."""
    folder.mkdir()
    shapes = shapes_of(gigabytes)
    weights = Weights(shapes)
    for model in MODELS:
        write_nemo(folder / f"{model}.nemo", shapes, weights)
    return sum(int(np.prod(shape)) for shape in shapes.values())


def _seconds(folder: Path, outputs: int) -> float:
    command = [sys.executable, __file__, "--child", str(folder), "--outputs", str(outputs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def merge_with_nothing(folder: Path, outputs: int) -> float:
    """Processor seconds of a merge that neither moves a byte nor computes."""
    from nemo_warp.checkpoints.io import direct, reading
    from nemo_warp.merge import merge
    from nemo_warp.merge.compute import kernel, loops
    from nemo_warp.merge.publish import output

    def read(_file, room: np.ndarray, size: int, offset: int) -> np.ndarray:
        skip = offset % direct.ALIGNMENT
        return room[skip : skip + size]

    def gram(*arguments) -> None:
        arguments[-1][:] = np.eye(arguments[-1].shape[1])

    def combine(*arguments) -> None:
        for result in arguments[-2:]:
            result[:] = 0

    def run() -> float:
        begin = time.process_time()
        merge(
            folder / "init.nemo",
            [folder / "a.nemo", folder / "b.nemo"],
            str(folder / "out_{eta}.nemo"),
            eta=ETAS[-outputs:],
            workers=1,
            overwrite=True,
            allow_similar=True,
        )
        return time.process_time() - begin

    loops.load()
    direct.DirectFile.read, direct.DirectFile.write = read, lambda *_: None
    for module in (reading, output, kernel):
        module.crc32 = lambda *_: 0
    reading._check_crc = lambda *_: None
    loops.gram, loops.combine = gram, combine
    ctypes.memmove = lambda *_: None
    return min(run() for _ in range(2))


if __name__ == "__main__":
    sys.exit(main())
