#!/usr/bin/env python3
"""Benchmark of the merger: wall time against the floor of the disk, memory, mergekit.

Makes synthetic NeMo checkpoints (torch_dist, bfloat16, layers shaped like a Llama's) in a
temporary folder and removes them afterwards. For every number of outputs it alternates between
the floor - reading the same input bytes, writing and fsyncing the same output bytes, overlapped,
without looking at them - and the merge, and prints medians and their ratio. The floor is measured
three ways: through the page cache, with fdatasync now and then, and past the page cache; the
fastest counts.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from _bench_merging import (
    MODELS,
    Weights,
    make_cold,
    measure_merge,
    merge_here,
    shapes_of,
    write_nemo,
)

EPILOG = """\
examples:
  # 2 GB per model, one and six outputs, one and two threads (about 40 GB of disk)
  tools/bench_merge.py --directory /scratch

  # a quick look
  tools/bench_merge.py --gigabytes 0.2 --repeats 2

  # the same tensors merged by mergekit, installed from PyPI into an environment of its own
  tools/bench_merge.py --mergekit --outputs 6

  # Megatron-LM's own merger (pull request 5114), from a checkout
  git clone --filter=blob:none https://github.com/NVIDIA/Megatron-LM megatron-lm
  git -C megatron-lm fetch origin pull/5114/head && git -C megatron-lm checkout FETCH_HEAD
  tools/bench_merge.py --gigabytes 0.9 --workers 2 --megatron megatron-lm

Caches: inputs are dropped from the page cache before every run (posix_fadvise); with
--drop-caches everything is, which needs root and slows down others on the machine. A disk's own
cache, or a virtual disk's host, is out of reach: compare the ratio, not the seconds.
"""
CHUNK = 8 << 20
FLUSH = 256 << 20
DIRECT_CHUNK, DIRECT_THREADS = 4 << 20, 4
WAYS = ("cached", "flushed", "direct")


def measure_floor(inputs: list[Path], folder: Path, sizes: list[int], way: str) -> float:
    """Seconds to read all inputs and to write and fsync files of these sizes, at the same time.

    Args:
        way: one of `WAYS`: through the page cache; the same, written back every `FLUSH` bytes
            rather than only at the end; past the page cache with `DIRECT_THREADS` each.
    """
    outputs = [(folder / f"floor_{i}", size) for i, size in enumerate(sizes)]
    if way == "direct":
        work = [(_read_direct, inputs), (_write_direct, outputs)]
    else:
        work = [(_read_all, inputs), (_write_all, outputs, way == "flushed")]
    begin = time.perf_counter()
    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(*one) for one in work]:
            done.result()
    seconds = time.perf_counter() - begin
    for path, _ in outputs:
        path.unlink()
    return seconds


def _read_all(paths: list[Path]) -> None:
    buffer = bytearray(CHUNK)
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while stream.readinto(buffer):
                pass


def _write_all(outputs: list[tuple[Path, int]], flush: bool) -> None:
    data = os.urandom(CHUNK)
    files = [os.open(path, os.O_CREAT | os.O_WRONLY) for path, _ in outputs]
    unflushed = 0
    for start in range(0, max(size for _, size in outputs), CHUNK):
        for file, (_, size) in zip(files, outputs, strict=True):
            os.pwrite(file, data[: max(0, min(CHUNK, size - start))], start)
        unflushed += CHUNK * len(files)
        if flush and unflushed > FLUSH:
            for file in files:
                os.fdatasync(file)
            unflushed = 0
    for file in files:
        os.fsync(file)
        os.close(file)


def _read_direct(paths: list[Path]) -> None:
    files = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
    _in_pieces([(file, os.fstat(file).st_size) for file in files], os.preadv)


def _write_direct(outputs: list[tuple[Path, int]]) -> None:
    files = [os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT) for path, _ in outputs]
    sizes = [-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for _, size in outputs]
    for file, size in zip(files, sizes, strict=True):
        os.posix_fallocate(file, 0, size)
    _in_pieces(list(zip(files, sizes, strict=True)), os.pwritev)


def _in_pieces(files: list[tuple[int, int]], move: Callable) -> None:
    """Move pieces of all files in turn, from several threads; fsync and close."""
    starts = range(0, max(size for _, size in files), DIRECT_CHUNK)
    pieces = ((file, start, size) for start in starts for file, size in files if start < size)
    lock = threading.Lock()

    def work() -> None:
        buffer = memoryview(mmap.mmap(-1, DIRECT_CHUNK))
        while True:
            with lock:
                file, start, size = next(pieces, (None, 0, 0))
            if file is None:
                return
            length = min(DIRECT_CHUNK, -(-(size - start) // mmap.PAGESIZE) * mmap.PAGESIZE)
            move(file, [buffer[:length]], start)

    with ThreadPoolExecutor(DIRECT_THREADS) as pool:
        for done in [pool.submit(work) for _ in range(DIRECT_THREADS)]:
            done.result()
    for file, _ in files:
        os.fsync(file)
        os.close(file)


def compare_with_floor(folder: Path, arguments: argparse.Namespace, group_bytes: int) -> None:
    """Alternate between floor and merges; print medians, ratios and memory."""
    inputs = [folder / f"{model}.nemo" for model in MODELS]
    limit = (len(MODELS) + 1) * group_bytes + 300e6
    for outputs in arguments.outputs:
        sizes = [inputs[0].stat().st_size] * outputs
        floors = {way: [] for way in arguments.floors}
        merges = {workers: [] for workers in arguments.workers}
        for _ in range(arguments.repeats):
            for way, seconds in floors.items():
                make_cold(inputs, arguments.drop_caches)
                seconds.append(measure_floor(inputs, folder, sizes, way))
                print(f"  K = {outputs}, {way} floor: {seconds[-1]:.2f} s", file=sys.stderr)
            for workers, found in merges.items():
                make_cold(inputs, arguments.drop_caches)
                found.append(measure_merge(folder, outputs, workers, arguments.granularity))
                print(f"  K = {outputs}, {workers} workers: {found[-1]}", file=sys.stderr)
                for path in folder.glob("out_*"):
                    path.unlink()
            print(f"  load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
        moved = (3 + outputs) * sizes[0]
        for way, seconds in floors.items():
            middle = statistics.median(seconds)
            print(
                f"K = {outputs}: {way} floor {middle:.2f} s ({moved / middle / 1e9:.2f} GB/s), all "
                f"{[round(s, 2) for s in seconds]}"
            )
        for workers, found in merges.items():
            seconds = [one["seconds"] for one in found]
            ratios = {
                way: statistics.median(s / f for s, f in zip(seconds, floor, strict=True))
                for way, floor in floors.items()
            }
            cpu = statistics.median(one["cpu"] for one in found)
            peak = max(one["peak"] for one in found)
            of_ways = ", ".join(f"{ratio:.2f} x {way}" for way, ratio in ratios.items())
            print(
                f"  {workers} workers: {statistics.median(seconds):.2f} s, {of_ways} (paired "
                f"medians), cpu {cpu:.1f} s, peak {peak / 1e6:.0f} MB (imports "
                f"{found[0]['imports'] / 1e6:.0f} MB; limit {limit / 1e6:.0f} MB), all "
                f"{[round(s, 2) for s in seconds]}"
            )


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--directory", type=Path, default=Path(), help="where the temporary folder goes")
    add("--gigabytes", type=float, default=2.0, help="per model (default: 2)")
    add("--outputs", type=int, nargs="+", default=[1, 6], help="numbers of etas (default: 1 6)")
    add("--workers", type=int, nargs="+", default=[1, 2], help="threads (default: 1 2)")
    add("--floors", nargs="+", choices=WAYS, default=WAYS, help="ways to measure it (default: all)")
    add("--repeats", type=int, default=3, help="of every measurement (default: 3)")
    add("--granularity", default="layer", help="of the merge (default: layer)")
    add("--drop-caches", action="store_true", help="empty the whole page cache; needs root")
    add(
        "--mergekit",
        nargs="?",
        const="install",
        metavar="PYTHON",
        help="compare with mergekit instead of the floor; PYTHON has it (default: installed anew)",
    )
    add(
        "--megatron",
        metavar="CHECKOUT",
        help="compare with weighted_merge.py of this checkout of Megatron-LM instead",
    )
    add("--child", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    if arguments.child:
        merge_here(arguments)
        return 0
    shapes = shapes_of(arguments.gigabytes)
    layer = [n for n in shapes if n.startswith("decoder.layers.0.")]
    groups = [layer, ["embedding.word_embeddings.weight"]]
    group_bytes = max(sum(2 * torch.Size(shapes[n]).numel() for n in names) for names in groups)
    with tempfile.TemporaryDirectory(prefix="bench_merge_", dir=arguments.directory) as name:
        folder = Path(name)
        weights = Weights(shapes)
        for model in MODELS:
            print(f"  writing {model}.nemo", file=sys.stderr)
            write_nemo(folder / f"{model}.nemo", shapes, weights)
        size = (folder / "init.nemo").stat().st_size
        print(f"{size / 1e9:.2f} GB per model, largest group {group_bytes / 1e6:.0f} MB")
        if arguments.megatron:
            from bench_megatron import compare_with_megatron

            compare_with_megatron(folder, arguments)
        elif arguments.mergekit:
            from bench_mergekit import compare_with_mergekit

            compare_with_mergekit(folder, shapes, weights, arguments)
        else:
            compare_with_floor(folder, arguments, group_bytes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
