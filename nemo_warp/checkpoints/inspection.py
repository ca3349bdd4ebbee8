"""Describe a checkpoint, hash its weights independently of their layout, compare two.

The hash is the one that a merge records for its inputs: over the canonical names and the CRC-32 of
every tensor's bytes in logical order, vocabulary padding left out. The same model has the same hash
in every format and layout. Different models have different hashes unless one was forged. CRC-32 is
computed at the speed of reading memory; SHA-256 of all bytes would take longer than the rest of a
merge.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from nemo_warp.checkpoints.checkpoint import PROVENANCE, Checkpoint
from nemo_warp.checkpoints.digest import weights_digest
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.io.crc import crc32
from nemo_warp.checkpoints.io.direct import pages
from nemo_warp.checkpoints.io.parts import Part
from nemo_warp.checkpoints.io.reading import (
    FileCache,
    check_records,
    check_replicas,
    read_slab,
    slab_room,
)
from nemo_warp.checkpoints.io.slabs import slabs_of
from nemo_warp.checkpoints.logical import LogicalTensor
from nemo_warp.checkpoints.names import depth_of, group_of, group_order
from nemo_warp.checkpoints.vocabulary import true_rows, true_vocab_size


def read_tensor(files: FileCache, tensor: LogicalTensor) -> torch.Tensor:
    """The whole tensor as [rows, cols], its CRC-32s and copies checked.

    Raises:
        CheckpointError: the file is truncated or damaged.
    """
    data = np.empty((tensor.rows, tensor.row_bytes), dtype=np.uint8)
    parts: list[Part] = []
    slabs = list(slabs_of(0, tensor.rows, tensor.cols))
    # One piece of memory for all slabs of the tensor.
    room = pages(max(slab_room(tensor, slab) for slab in slabs))
    for slab in slabs:
        rows, read = read_slab(files, tensor, slab, room)
        check_replicas(files, tensor, slab, rows)
        data[slab.first : slab.last] = rows
        parts += read
    check_records(files, [tensor], parts)
    return torch.from_numpy(data).view(tensor.dtype.of_torch())


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Format, layout, groups, dtypes, parameter counts and provenance, without reading weights."""
    groups: dict[str, dict[str, Any]] = {}
    for name in sorted(checkpoint.tensors, key=lambda n: (group_order(group_of(n)), n)):
        tensor = checkpoint.tensors[name]
        group = groups.setdefault(group_of(name), {"parameters": 0, "tensors": {}})
        group["parameters"] += tensor.numel
        dtype = tensor.dtype.name
        group["tensors"][name] = [list(tensor.shape), dtype, len(tensor.patches)]
    dtypes: dict[str, int] = defaultdict(int)
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype.name] += tensor.numel
    return {
        "path": str(checkpoint.path),
        "container": "tar" if checkpoint.archive.is_tar else "folder",
        "format": checkpoint.format,
        "files": len(checkpoint.archive.members),
        "layers": sum(depth_of(group) is not None for group in groups),
        "parameters": sum(dtypes.values()),
        "dtypes": dict(dtypes),
        "true_vocab_size": true_vocab_size(checkpoint),
        "fp32_masters": len(checkpoint.store.masters()),
        "other_entries": len(checkpoint.store.foreign),
        "groups": groups,
        "provenance": _provenance(checkpoint),
    }


def hash_weights(checkpoint: Checkpoint) -> str:
    """The layout-independent digest of the weights; reads them all."""
    vocab_size, crcs = true_vocab_size(checkpoint), {}
    with FileCache() as files:
        for name, tensor in checkpoint.tensors.items():
            values = read_tensor(files, tensor)[: true_rows(tensor, vocab_size)]
            crcs[name] = crc32(values.view(torch.uint8).numpy())
    return weights_digest([crcs])


def diff(first: Checkpoint, second: Checkpoint) -> dict[str, dict[str, float]]:
    """Per group: norm of the difference, relative to ``first``, cosine, share of changed weights.

    Raises:
        CheckpointError: the two are not the same model.
    """
    if first.tensors.keys() != second.tensors.keys():
        other = sorted(first.tensors.keys() ^ second.tensors.keys())[0]
        raise CheckpointError(f"only one of {first.path} and {second.path} has {other}")
    sizes = (true_vocab_size(first), true_vocab_size(second))
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(5))
    with FileCache() as files:
        for name in sorted(first.tensors, key=lambda n: (group_order(group_of(n)), n)):
            pair = (first.tensors[name], second.tensors[name])
            rows = min(true_rows(t, size) for t, size in zip(pair, sizes, strict=True))
            # float64: relative changes of 1e-3 are differences of numbers that agree in three
            # digits.
            a, b = (read_tensor(files, t)[:rows].to(torch.float64).flatten() for t in pair)
            if a.numel() != b.numel():
                raise CheckpointError(f"{name} has different shapes in the two checkpoints")
            moved = b - a
            values = [a @ a, b @ b, a @ b, moved @ moved, (moved != 0).sum()]
            sums[group_of(name)][:] += [float(value) for value in values]
    counts = describe(first)["groups"]
    return {group: _row(sums[group], counts[group]["parameters"]) for group in sums}


def _row(sums: np.ndarray, count: int) -> dict:
    aa, bb, ab, moved, changed = sums.tolist()
    product = math.sqrt(aa * bb)
    return {
        "difference": math.sqrt(moved),
        "relative": math.sqrt(moved / aa) if aa else math.nan,
        "cosine": ab / product if product else math.nan,
        "changed_share": changed / count,
    }


def _provenance(checkpoint: Checkpoint) -> dict[str, Any] | None:
    if PROVENANCE not in checkpoint.archive.members:
        return None
    try:
        return json.loads(checkpoint.archive.read(PROVENANCE, limit=1 << 24))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint.path}: {PROVENANCE} is not JSON ({error})") from error
