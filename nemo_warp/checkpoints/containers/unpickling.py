"""Unpicklers that can build tensor descriptions and nothing else.

A pickle is a program. These resolve a global only if it is on a short list of inert
constructors, so a hostile ``.metadata`` or ``data.pkl`` stops at its first import, by name.
Tensors become `StoredTensor` descriptions; no tensor memory is ever allocated.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata

from nemo_warp.checkpoints.errors import CheckpointError


@dataclass(frozen=True)
class StoredStorage:
    """A storage of a torch.save file: its record name, element type and length."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor inside a storage: element offset, shape and strides."""

    storage: StoredStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether elements lie row-major without gaps."""
        expected, ok = 1, True
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            ok &= size == 1 or stride == expected
            expected *= size
        return ok


@dataclass(frozen=True)
class Opaque:
    """An object that is carried over as bytes and never interpreted."""

    content: tuple[Any, ...]


class Discarded:
    """A note of the writer (Megatron-core leaves its save plans in ``.metadata``), not kept."""

    def __new__(cls, *_arguments):  # noqa: D102
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


_DTYPE_NAMES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128"),
)
_DTYPES = {name: getattr(torch, name) for name in _DTYPE_NAMES}
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


def _rebuild_tensor(storage, offset, size, stride, *_ignored) -> StoredTensor:
    shape, stride = tuple(size), tuple(stride)
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, StoredStorage) or len(shape) != len(stride) or len(shape) > 16:
        raise CheckpointError("a tensor description is malformed")
    if not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in numbers):
        raise CheckpointError("a tensor description has impossible sizes")
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= storage.numel:
        raise CheckpointError(
            f"a tensor of shape {list(shape)} exceeds its storage of {storage.numel} elements"
        )
    return StoredTensor(storage, offset, shape, stride)


def _rebuild_parameter(data, *_ignored):
    return data


def _opaque(*arguments) -> Opaque:
    return Opaque(arguments)


def _empty_dict(*arguments) -> OrderedDict:
    if arguments:
        raise CheckpointError("an OrderedDict is built in an unusual way")
    return OrderedDict()


_TENSOR_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): _empty_dict,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _opaque,
    ("_io", "BytesIO"): _opaque,
    **{("torch", name): dtype for name, dtype in _STORAGE_DTYPES.items()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}

_METADATA_MODULES = {
    "torch.distributed.checkpoint.metadata": (
        metadata,
        "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties "
        "MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": (filesystem, "_StorageInfo"),
}
_PLAN_NAMES = "SavePlan WriteItem WriteItemType TensorWriteData"
_METADATA_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _opaque,
    ("collections", "OrderedDict"): _empty_dict,
    ("pathlib", "PosixPath"): _opaque,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): Discarded,
    **{("torch.distributed.checkpoint.planner", name): Discarded for name in _PLAN_NAMES.split()},
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{
        (module, name): getattr(source, name)
        for module, (source, names) in _METADATA_MODULES.items()
        for name in names.split()
        if hasattr(source, name)
    },
}


def _check_key(key: Any) -> None:
    """Only keys that hash in constant time: nested tuples can be made to hash for years."""
    if isinstance(key, metadata.MetadataIndex):
        if isinstance(key.fqn, str) and isinstance(key.offset, torch.Size | None):
            return
    elif isinstance(key, str | int):
        return
    raise CheckpointError("a dictionary key is neither text, number nor tensor index")


class _RestrictedUnpickler(pickle._Unpickler):  # pure Python: the C one can be told to allocate
    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, data: bytes, allowed: dict[tuple[str, str], Any]):
        super().__init__(io.BytesIO(data))
        self._allowed = allowed

    def _load_setitem(self):
        _check_key(self.stack[-2])
        self.load_setitem()

    def _load_setitems(self):
        for key in self.stack[::2]:
            _check_key(key)
        self.load_setitems()

    dispatch[pickle.SETITEM[0]] = _load_setitem
    dispatch[pickle.SETITEMS[0]] = _load_setitems
    for _unused in (pickle.DICT, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.INST):
        del dispatch[_unused[0]]

    def find_class(self, module: str, name: str) -> Callable:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise CheckpointError(
                f"wants to import {module}.{name}, which no checkpoint needs; refused"
            ) from None

    def persistent_load(self, pid: Any) -> StoredStorage:
        if self._allowed is not _TENSOR_GLOBALS:
            raise CheckpointError("refers to outside data; refused")
        match pid:
            case ("storage", torch.dtype() as dtype, str() as key, str(), int() as numel):
                if 0 <= numel < 1 << 62 and key.isalnum():
                    return StoredStorage(key, dtype, numel)
        raise CheckpointError("holds a malformed storage reference")


def load_tensor_pickle(data: bytes, what: str) -> Any:
    """The object tree of a torch.save ``data.pkl``, with tensors as `StoredTensor`.

    Raises:
        CheckpointError: anything but tensors, containers and primitives is in it.
    """
    return _load(data, _TENSOR_GLOBALS, what)


def load_metadata_pickle(data: bytes, what: str) -> metadata.Metadata:
    """A torch distributed checkpoint's ``.metadata``.

    Raises:
        CheckpointError: it is not one, or wants to import something else.
    """
    result = _load(data, _METADATA_GLOBALS, what)
    if not isinstance(result, metadata.Metadata):
        raise CheckpointError(f"{what} is not a torch distributed checkpoint's metadata")
    return result


def _load(data: bytes, allowed: dict[tuple[str, str], Any], what: str) -> Any:
    try:
        return _RestrictedUnpickler(data, allowed).load()
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{what} cannot be unpickled: {type(error).__name__}: {error}"
        ) from error
