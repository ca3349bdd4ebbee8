"""Write a ``.nemo`` with a ``torch_dist`` checkpoint from the beginning to the end, in one pass.

The sizes of files in a tar stand before them: room for the header is left and filled in later. A
tensor is stored as as many shards as it comes in portions, which readers see as one tensor.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

_DATA, _PREFIX = "__0_0.distcp", "model."
_MARKER = {
    **{"sharded_backend": "torch_dist", "sharded_backend_version": 1},
    **{"common_backend": "torch", "common_backend_version": 1},
}
_LAYER = re.compile(r"^(?P<stack>.*layers)\.(?P<index>\d+)\.(?P<rest>.+)$")


class TarWriter:
    """A tar of files whose sizes are known when they have been written; same inputs, same bytes."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream

    @contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """The stream, in which everything that is written becomes the file ``name``."""
        header = self._stream.tell()
        self._stream.write(bytes(tarfile.BLOCKSIZE))
        yield self._stream
        end = self._stream.tell()
        info = tarfile.TarInfo(f"./{name}")
        info.size, info.mode = end - header - tarfile.BLOCKSIZE, 0o644
        self._stream.seek(header)
        self._stream.write(info.tobuf(tarfile.GNU_FORMAT))  # one block, also above 8 GiB
        self._stream.seek(end)
        self._stream.write(bytes(-end % tarfile.BLOCKSIZE))

    def add(self, name: str, content: bytes) -> None:
        """A small file."""
        with self.file(name) as stream:
            stream.write(content)

    def close(self) -> None:
        """The end of the tar."""
        end = self._stream.tell() + 2 * tarfile.BLOCKSIZE
        self._stream.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))


class DistributedWriter:
    """The ``.distcp`` file and the ``.metadata`` of a model, layers stacked as Megatron-core does.

    Args:
        stream: of the file.
        num_layers: length of the axis over layers.
    """

    def __init__(self, stream: BinaryIO, num_layers: int):
        self._stream, self._begin, self._num_layers = stream, stream.tell(), num_layers
        self._shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._chunks: dict[str, list[dcp.ChunkStorageMetadata]] = defaultdict(list)
        self._places: dict[dcp.MetadataIndex, _StorageInfo] = {}

    def add(self, name: str, shape: tuple[int, ...], first: int, rows: torch.Tensor) -> None:
        """Append rows [first, first + len(rows)) of a tensor of ``shape``."""
        key, offsets, whole = _PREFIX + name, (first, *(0 for _ in shape[1:])), shape
        if match := _LAYER.match(name):
            key, index = f"{_PREFIX}{match['stack']}.{match['rest']}", int(match["index"])
            offsets, whole, rows = (index, *offsets), (self._num_layers, *shape), rows[None]
        begin = self._stream.tell() - self._begin
        saved = io.BytesIO()
        # A complete torch.save file for each item: what Megatron-core's reader expects at each
        # range (torch/distributed/checkpoint/filesystem.py, _write_item).
        torch.save(rows, saved)
        self._stream.write(saved.getbuffer())
        self._shapes[key] = (torch.Size(whole), rows.dtype)
        chunk = dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(rows.shape))
        self._chunks[key].append(chunk)
        place = _StorageInfo(_DATA, begin, len(saved.getbuffer()))
        self._places[dcp.MetadataIndex(key, chunk.offsets)] = place

    def metadata(self) -> bytes:
        """``.metadata``, for when everything is added."""
        described: dict[str, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata] = {
            key: dcp.TensorStorageMetadata(
                dcp.TensorProperties(dtype=dtype), shape, self._chunks[key]
            )
            for key, (shape, dtype) in self._shapes.items()
        }
        paths = {key: (key,) for key in described}
        found = dcp.Metadata(described, planner_data=paths, storage_data=self._places)
        vars(found)["mcore_data"] = {}  # Megatron-core's own field
        return pickle.dumps(found, protocol=4)


@contextmanager
def distributed_checkpoint(tar: TarWriter, num_layers: int) -> Iterator[DistributedWriter]:
    """``model_weights/`` of a ``.nemo``: its marker of completeness is written last."""
    with tar.file(f"model_weights/{_DATA}") as stream:
        writer = DistributedWriter(stream, num_layers)
        yield writer
    common = io.BytesIO()
    # NeMo reads it and finds no training state, as in a .nemo that it writes itself.
    torch.save({}, common)
    tar.add("model_weights/common.pt", common.getvalue())
    tar.add("model_weights/.metadata", writer.metadata())
    tar.add("model_weights/metadata.json", json.dumps(_MARKER).encode())
