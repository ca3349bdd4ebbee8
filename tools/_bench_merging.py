"""Models to merge, and one merge in a process of its own, for the merger's benchmarks."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

ETAS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
MODELS = ("init", "a", "b")
METADATA = {
    **{"sharded_backend": "torch_dist", "sharded_backend_version": 1},
    **{"common_backend": "torch", "common_backend_version": 1},
}
_COMMAND = Path(__file__).with_name("bench_merge.py")


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
    command = [sys.executable, str(_COMMAND), "--child", str(folder), "--granularity", granularity]
    command += ["--outputs", str(outputs), "--workers", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the merge failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Cost:
    """What a command took: seconds as it says itself and from start to end, peak memory."""

    own_seconds: float
    seconds: float
    cpu_seconds: float
    peak_bytes: int


MEASURE = """
import json, os, sys, time
begin = time.perf_counter()
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
numbers = {"seconds": time.perf_counter() - begin, "cpu_seconds": usage.ru_utime + usage.ru_stime}
print(json.dumps({**numbers, "peak_bytes": 1024 * usage.ru_maxrss, "status": status}))
"""
"""Runs a command from a small process: Linux counts the parent's memory at exec as the child's."""


def measure_command(command: list[str], **variables: str | None) -> Cost:
    """Run a merge that says how long it took, imports left out.

    Args:
        command: program and arguments.
        **variables: changes of the environment; None takes one out.
    """
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        env={name: value for name, value in environment.items() if value is not None},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "check": True},
    )
    *said, measured = done.stdout.splitlines()
    text, cost = "\n".join(said), json.loads(measured)
    if cost.pop("status") != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{text[-3000:]}")
    own = re.search(r"total=([\d.]+)s", text) or re.search(r"GB in ([\d.]+) s", text)
    if own is None:
        raise RuntimeError(f"{command[1]} does not say how long it took:\n{text[-1000:]}")
    return Cost(float(own[1]), **cost)
