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
import io
import json
import mmap
import os
import pickle
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

EPILOG = """\
examples:
  # 2 GB per model, one and six outputs, one and two threads (about 40 GB of disk)
  tools/bench_merge.py --directory /scratch

  # a quick look
  tools/bench_merge.py --gigabytes 0.2 --repeats 2

  # the same tensors merged by mergekit, installed from PyPI into an environment of its own
  tools/bench_merge.py --mergekit --outputs 6

Caches: inputs are dropped from the page cache before every run (posix_fadvise); with
--drop-caches everything is, which needs root and slows down others on the machine. A disk's own
cache, or a virtual disk's host, is out of reach: compare the ratio, not the seconds.
"""
CHUNK = 8 << 20
FLUSH = 256 << 20
DIRECT_CHUNK, DIRECT_THREADS = 4 << 20, 4
WAYS = ("cached", "flushed", "direct")
ETAS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
MODELS = ("init", "a", "b")
METADATA = {
    **{"sharded_backend": "torch_dist", "sharded_backend_version": 1},
    **{"common_backend": "torch", "common_backend_version": 1},
}


def shapes_of(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """Logical tensors of a Llama with about that many bytes in bfloat16."""
    hidden, ffn, vocab = 2560, 6912, 32000
    if gigabytes < 1.0:
        hidden, ffn, vocab = 1024, 2816, 16000
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": (hidden * 3 // 2, hidden),
        "self_attention.linear_proj.weight": (hidden, hidden),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    per_layer = sum(torch.Size(shape).numel() for shape in layer.values())
    layers = max(2, round((gigabytes * 1e9 / 2 - 2 * vocab * hidden) / per_layer))
    shapes = {"embedding.word_embeddings.weight": (vocab, hidden)}
    for i in range(layers):
        shapes |= {f"decoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (vocab, hidden),
    }


class Weights:
    """bfloat16 tensors of the three models, from a pool of random numbers."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self._shapes = shapes
        largest = max(torch.Size(shape).numel() for shape in shapes.values())
        self._pool = torch.randn(largest + (1 << 20), generator=torch.Generator().manual_seed(0))

    def get(self, model: str, name: str) -> torch.Tensor:
        """theta_init, or theta_init plus an update of a hundredth of its size."""
        value = self._noise("init", name).mul(0.02)
        if model != "init":
            value += self._noise(model, name).mul(2e-4)
        return value.to(torch.bfloat16)

    def _noise(self, model: str, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        numel = torch.Size(shape).numel()
        places = len(self._pool) - numel
        start = int.from_bytes(f"{model}/{name}".encode()[-8:], "little") * 2654435761 % places
        start = (start + MODELS.index(model) * 7919) % places
        return self._pool[start : start + numel].clone().view(shape)


def write_nemo(path: Path, shapes: dict[str, tuple[int, ...]], weights: Weights) -> None:
    """A ``.nemo`` as NeMo writes it: layers stacked, two data files, metadata.json last."""
    folder = path.with_suffix(".unpacked") / "model_weights"
    folder.mkdir(parents=True)
    layers = 1 + max(int(n.split(".")[2]) for n in shapes if ".layers." in n)
    described, storage, sizes = {}, {}, [0, 0]
    streams = [(folder / f"__0_{i}.distcp").open("wb") for i in range(2)]
    for name, shape in shapes.items():
        value, (key, offset, size) = weights.get(path.stem, name), _place(name, shape, layers)
        value = value[None] if offset[: len(size) - len(shape)] else value
        offset = torch.Size(offset)
        entry = described.setdefault(
            key,
            dcp.TensorStorageMetadata(
                dcp.TensorProperties(dtype=value.dtype), torch.Size(size), []
            ),
        )
        entry.chunks.append(dcp.ChunkStorageMetadata(offset, value.shape))
        buffer = io.BytesIO()
        torch.save(value, buffer)
        file = sizes.index(min(sizes))
        index = dcp.MetadataIndex(key, offset)
        storage[index] = _StorageInfo(f"__0_{file}.distcp", sizes[file], buffer.tell())
        sizes[file] += buffer.tell()
        streams[file].write(buffer.getbuffer())
    for stream in streams:
        stream.close()
    planner = {key: (key,) for key in described}
    metadata = dcp.Metadata(described, planner_data=planner, storage_data=storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(METADATA))
    (folder.parent / "model_config.yaml").write_text("activation: fast-swiglu\n")
    with tarfile.open(path, "w:") as tar:
        tar.add(folder.parent, arcname=".")
    shutil.rmtree(folder.parent)


def _place(name: str, shape: tuple[int, ...], layers: int):
    """(key, offset, whole shape) of a tensor, stacked over layers if it is a layer's."""
    if ".layers." not in name:
        return f"model.{name}", (0,) * len(shape), shape
    before, _, after = name.partition(".layers.")
    number, _, rest = after.partition(".")
    key = f"model.{before}.layers.{rest}"
    return key, (int(number), *(0,) * len(shape)), (layers, *shape)


def make_cold(paths: list[Path], everything: bool) -> None:
    """Drop files from the page cache; with ``everything``, the whole cache."""
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if everything:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


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


def merge_here(arguments: argparse.Namespace) -> None:
    """Run one merge in this process and print what it took as JSON (``--child``)."""
    from nemo_warp.merge import merge

    folder, etas = Path(arguments.child), ETAS[-arguments.outputs[0] :]
    before, imports = resource.getrusage(resource.RUSAGE_SELF), _peak_bytes()
    begin = time.perf_counter()
    merge(
        folder / "init.nemo",
        [folder / "a.nemo", folder / "b.nemo"],
        str(folder / "out_{eta}.nemo"),
        eta=etas,
        workers=arguments.workers[0],
        granularity=arguments.granularity,
        allow_similar=True,
    )
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    numbers = {"seconds": seconds, "cpu": cpu, "peak": _peak_bytes(), "imports": imports}
    print(json.dumps(numbers))


def _peak_bytes() -> int:
    """Peak resident memory since exec; getrusage's would include the parent's before it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def measure_merge(folder: Path, outputs: int, workers: int, granularity: str) -> dict:
    """Numbers of one merge in a process of its own, start-up time not counted; keeps outputs."""
    command = [sys.executable, __file__, "--child", str(folder), "--granularity", granularity]
    command += ["--outputs", str(outputs), "--workers", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the merge failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


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
        if arguments.mergekit:
            from bench_mergekit import compare_with_mergekit

            compare_with_mergekit(folder, shapes, weights, arguments)
        else:
            compare_with_floor(folder, arguments, group_bytes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
