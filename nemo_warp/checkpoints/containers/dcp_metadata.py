"""What a torch distributed checkpoint says about itself (``.metadata``), written without torch.

The classes stand for torch's of the same names (torch/distributed/checkpoint/metadata.py): they
have the fields that are read and written, and `dump` gives the pickle that torch would make.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nemo_warp.checkpoints.dtypes import Dtype


class Size(tuple):
    """A shape: ``torch.Size``."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type, tuple[tuple]]:
        return Size, (tuple(self),)


@dataclass
class ChunkStorageMetadata:
    """Where a shard lies in its tensor."""

    offsets: Size
    sizes: Size


@dataclass
class TensorProperties:
    """A tensor's dtype; all else that torch has here is what it is for any stored tensor."""

    dtype: Dtype

    def __getstate__(self) -> tuple:
        # dtype, layout, requires_grad, memory format, pin_memory
        return self.dtype, _STRIDED, False, _CONTIGUOUS, False


@dataclass
class TensorStorageMetadata:
    """A tensor and its shards."""

    properties: TensorProperties
    size: Size
    chunks: list[ChunkStorageMetadata]


@dataclass
class BytesStorageMetadata:
    """An object that is no tensor."""


@dataclass(frozen=True)
class MetadataIndex:
    """Which shard of which key."""

    fqn: str
    offset: Size | None = None

    def __getstate__(self) -> dict[str, Any]:
        # torch sets an offset only where there is one; "index" is a hint for itself.
        offset = {} if self.offset is None else {"offset": self.offset}
        return {"fqn": self.fqn, "index": None, **offset}


@dataclass
class StorageInfo:
    """Where a shard lies on the disk: torch's ``_StorageInfo``."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class Metadata:
    """All of it; ``mcore_data`` is Megatron-core's own field."""

    state_dict_metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata]
    planner_data: Any = None
    storage_data: Any = None
    storage_meta: Any = None
    version: str | None = None
    mcore_data: Any = None


class _MemoryFormat:
    """The one member of torch's ``_MEM_FORMAT_ENCODING`` that is written."""

    def __reduce__(self) -> tuple:
        return _MemoryFormat, (0,)


class _Layout:
    """``torch.strided``, which a function of torch's looks up."""

    def __reduce__(self) -> tuple:
        return _Layout, ("torch.strided",)


_STRIDED, _CONTIGUOUS = _Layout(), _MemoryFormat()
_METADATA = "torch.distributed.checkpoint.metadata"
# A text of its own beside the one that dtypes have, as in torch: a pickle refers back to a text
# that is the same object, and so the bytes are those that torch writes.
_MODULE_OF_SIZE = str(b"torch", "ascii")
_GLOBALS: dict[Any, tuple[str, str]] = {
    **{Size: (_MODULE_OF_SIZE, "Size"), _Layout: ("torch.serialization", "_get_layout")},
    **{
        one: (_METADATA, one.__name__)
        for one in (
            *(ChunkStorageMetadata, TensorProperties, TensorStorageMetadata),
            *(BytesStorageMetadata, MetadataIndex, Metadata),
        )
    },
    _MemoryFormat: (_METADATA, "_MEM_FORMAT_ENCODING"),
    StorageInfo: ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}

# In pure Python, because the one in C imports what it refers to; typeshed knows no method of it.
_PythonPickler: Any = vars(pickle)["_Pickler"]


class _Pickler(_PythonPickler):
    """Refers to torch's classes where it meets those that stand for them."""

    def reducer_override(self, found: Any) -> Any:
        return found.name if isinstance(found, Dtype) else NotImplemented

    def save_global(self, found: Any, name: str | None = None) -> None:
        names: Iterable[str]
        names = ("torch", found.name) if isinstance(found, Dtype) else _GLOBALS[found]
        for text in names:
            self.save(text)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(found)


def dump(metadata: Metadata) -> bytes:
    """The pickle of it, as torch and Megatron-core read it."""
    stream = io.BytesIO()
    _Pickler(stream, protocol=4).dump(metadata)
    return stream.getvalue()
