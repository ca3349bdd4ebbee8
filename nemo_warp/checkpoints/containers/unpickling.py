"""Unpicklers that can build tensor descriptions and nothing else.

A pickle is a program. These resolve a global only if it is on a short list, and what the list
gives is our own: functions that build plain descriptions, and `Inert` objects, the only ones whose
state a pickle may set. So a hostile ``.metadata`` or ``data.pkl`` stops at its first import, by
name, and cannot change a class of torch's. No opcode makes more than the file has bytes for.
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

from nemo_warp.checkpoints.containers import dcp_metadata as dcp
from nemo_warp.checkpoints.dtypes import DTYPES, Dtype
from nemo_warp.checkpoints.errors import CheckpointError

_MAX_AXES = 16
_MAX_NUMBER = 1 << 60


@dataclass(frozen=True)
class StoredStorage:
    """A storage of a torch.save file: its record name, element type and length."""

    key: str
    dtype: Dtype
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
        # An axis of size 1 may have any stride: nothing is reached by it.
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            ok &= size == 1 or stride == expected
            expected *= size
        return ok


@dataclass(frozen=True)
class Opaque:
    """An object that is carried over as bytes and never interpreted."""

    content: tuple[Any, ...]


class Inert:
    """An object of a class that the pickle names, as data: nothing of that class is run.

    Attributes:
        arguments: what it is made from.
        state: what its state is set to.
    """

    __slots__ = ("arguments", "state")
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Inert:  # noqa: D102
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def fields(self) -> dict[str, Any]:
        """The state of a dataclass; {} if it is none."""
        return self.state if isinstance(self.state, dict) else {}


class Discarded(Inert):
    """A note of the writer (Megatron-core leaves its save plans in ``.metadata``), not kept."""


class _Metadata(Inert):
    pass


class _TensorStorage(Inert):
    pass


class _BytesStorage(Inert):
    pass


class _Chunk(Inert):
    pass


class _Properties(Inert):
    pass


class _Place(Inert):
    pass


class _Index(Inert):
    """A key of ``storage_data``: equal if name and offset are."""

    def place(self) -> tuple[str, dcp.Size | None]:
        fields = self.fields()
        name, offset = fields.get("fqn"), fields.get("offset")
        if isinstance(name, str) and isinstance(offset, dcp.Size | None):
            return name, offset
        raise CheckpointError("a tensor index is malformed")

    def __hash__(self) -> int:
        return hash(self.place())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Index) and self.place() == other.place()


_STORAGE_DTYPES = {
    "DoubleStorage": DTYPES["float64"],
    "FloatStorage": DTYPES["float32"],
    "HalfStorage": DTYPES["float16"],
    "BFloat16Storage": DTYPES["bfloat16"],
    "LongStorage": DTYPES["int64"],
    "IntStorage": DTYPES["int32"],
    "ShortStorage": DTYPES["int16"],
    "CharStorage": DTYPES["int8"],
    "ByteStorage": DTYPES["uint8"],
    "BoolStorage": DTYPES["bool"],
    "UntypedStorage": DTYPES["uint8"],
}


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *_ignored: Any
) -> StoredTensor:
    shape, stride = tuple(_size(size)), tuple(_size(stride))
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, StoredStorage) or len(shape) != len(stride):
        raise CheckpointError("a tensor description is malformed")
    if not all(isinstance(n, int) and 0 <= n < _MAX_NUMBER for n in numbers):
        raise CheckpointError("a tensor description has impossible sizes")
    # Address of the last element; strides are never negative in torch.
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= storage.numel:
        raise CheckpointError(
            f"a tensor of shape {list(shape)} exceeds its storage of {storage.numel} elements"
        )
    return StoredTensor(storage, offset, shape, stride)


def _rebuild_untyped(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _: Any,
    _hooks: Any,
    dtype: Any,
    *_ignored: Any,
) -> StoredTensor:
    """A dtype that has no storage class of its own, such as float8: the storage counts bytes."""
    if not isinstance(storage, StoredStorage) or not isinstance(dtype, Dtype):
        raise CheckpointError("a tensor description is malformed")
    # Offsets of _rebuild_tensor_v3 count elements of the tensor's dtype, its storage bytes.
    typed = StoredStorage(storage.key, dtype, storage.numel // dtype.itemsize)
    return _rebuild_tensor(typed, offset, size, stride)


def _size(dimensions: Any = ()) -> dcp.Size:
    """A shape; anything else, such as bytes, would grow eight times."""
    plain = isinstance(dimensions, tuple | list) and len(dimensions) <= _MAX_AXES
    if not plain or not all(type(n) is int and abs(n) < _MAX_NUMBER for n in dimensions):
        raise CheckpointError("a shape is malformed")
    return dcp.Size(dimensions)


def _rebuild_parameter(data: Any, *_ignored: Any) -> Any:
    return data


def _opaque(*arguments: Any) -> Opaque:
    return Opaque(arguments)


def _empty_dict(*arguments: Any) -> OrderedDict:
    if arguments:
        raise CheckpointError("an OrderedDict is built in an unusual way")
    return OrderedDict()


_TENSOR_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_untyped,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): _empty_dict,
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _opaque,
    ("_io", "BytesIO"): _opaque,
    **{("torch", name): dtype for name, dtype in _STORAGE_DTYPES.items()},
    ("torch.storage", "UntypedStorage"): DTYPES["uint8"],
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
}

_PLANS = "torch.distributed.checkpoint.planner"
_METADATA = "torch.distributed.checkpoint.metadata"
_METADATA_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _opaque,
    ("collections", "OrderedDict"): _empty_dict,
    # torch's StorageMeta holds the folder it was written to.
    ("pathlib", "PosixPath"): _opaque,
    ("pathlib._local", "PosixPath"): _opaque,  # Python 3.13's name for it
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): Discarded,
    **{
        (_PLANS, name): Discarded
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
    },
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    (_METADATA, "Metadata"): _Metadata,
    # Megatron-core 0.15 only
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _Metadata,
    (_METADATA, "TensorStorageMetadata"): _TensorStorage,
    (_METADATA, "BytesStorageMetadata"): _BytesStorage,
    (_METADATA, "ChunkStorageMetadata"): _Chunk,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "MetadataIndex"): _Index,
    (_METADATA, "StorageMeta"): Discarded,
    (_METADATA, "_MEM_FORMAT_ENCODING"): Discarded,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Place,
}


def _check_key(key: Any) -> None:
    """Only keys that hash in constant time and not all alike.

    Nested tuples can be made to hash for years, and numbers that are equal modulo 2^61 - 1 share
    their hash.
    """
    if isinstance(key, _Index):
        key.place()
    elif not (isinstance(key, str) or (type(key) is int and abs(key) < _MAX_NUMBER)):
        raise CheckpointError("a dictionary key is neither text, number nor tensor index")


# In pure Python, because the one in C can be told to allocate; typeshed knows no method of it.
_PythonUnpickler: Any = vars(pickle)["_Unpickler"]


class _RestrictedUnpickler(_PythonUnpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, data: bytes, allowed: dict[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed

    def _load_setitem(self) -> None:
        _check_key(self.stack[-2])
        self.load_setitem()

    def _load_setitems(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        self.load_setitems()

    def _load_reduce(self) -> None:
        # Calls are where memory could grow: each gets a short tuple and nothing else.
        self._check_arguments(self.stack[-1])
        self.load_reduce()

    def _load_newobj(self) -> None:
        self._check_arguments(self.stack[-1])
        made = self.stack[-2]
        if not (isinstance(made, type) and issubclass(made, Inert)):
            raise CheckpointError("makes an object of something that is no class; refused")
        self.load_newobj()

    def _check_arguments(self, arguments: Any) -> None:
        if type(arguments) is not tuple or len(arguments) > _MAX_AXES:
            raise CheckpointError("calls something with too many arguments; refused")

    def _load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, OrderedDict):  # a state dict's versions of modules
            raise CheckpointError("sets the attributes of something that has none; refused")

    dispatch[pickle.SETITEM[0]] = _load_setitem
    dispatch[pickle.SETITEMS[0]] = _load_setitems
    dispatch[pickle.REDUCE[0]] = _load_reduce
    dispatch[pickle.NEWOBJ[0]] = _load_newobj
    dispatch[pickle.BUILD[0]] = _load_build
    for _unused in (
        *(pickle.DICT, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
        *(pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4),
        *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    ):
        # What no checkpoint needs is not there to be misused: sets, extension codes, old-style
        # instances, out-of-band buffers.
        del dispatch[_unused[0]]

    def find_class(self, module: str, name: str) -> Callable:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise CheckpointError(
                f"wants to import {module}.{name}, which no checkpoint needs; refused"
            ) from None

    def persistent_load(self, pid: Any) -> StoredStorage:
        # Only data.pkl refers to storages; a .metadata that does wants something else.
        if self._allowed is not _TENSOR_GLOBALS:
            raise CheckpointError("refers to outside data; refused")
        match pid:
            case ("storage", Dtype() as dtype, str() as key, str(), int() as numel):
                # torch numbers storages: a key with a slash would name another record of the zip.
                if 0 <= numel < 1 << 62 and key.isalnum():
                    return StoredStorage(key, dtype, numel)
        raise CheckpointError("holds a malformed storage reference")


def load_tensor_pickle(data: bytes, what: str) -> Any:
    """The object tree of a torch.save ``data.pkl``, with tensors as `StoredTensor`.

    Raises:
        CheckpointError: anything but tensors, containers and primitives is in it.
    """
    return _load(data, _TENSOR_GLOBALS, what)


def load_metadata_pickle(data: bytes, what: str) -> dcp.Metadata:
    """A torch distributed checkpoint's ``.metadata``.

    Entries may hold anything that is harmless; who uses one checks that it makes sense.

    Raises:
        CheckpointError: it is not one, or wants to import something else.
    """
    result = _load(data, _METADATA_GLOBALS, what)
    if not isinstance(result, _Metadata):
        raise CheckpointError(f"{what} is not a torch distributed checkpoint's metadata")
    fields = result.fields()
    described, places = fields.get("state_dict_metadata"), fields.get("storage_data")
    if isinstance(described, dict):
        described = {key: _described(entry) for key, entry in described.items()}
    if isinstance(places, dict):
        places = {_key(key, what): _place(place) for key, place in places.items()}
    made = _METADATA_CLASS(described, fields.get("planner_data"), places)
    made.mcore_data = fields.get("mcore_data")
    return made


# Stand for torch's classes, filled with whatever the pickle holds: who reads a field checks it.
_METADATA_CLASS: Any = dcp.Metadata
_TENSOR_CLASS: Any = dcp.TensorStorageMetadata
_PROPERTIES_CLASS: Any = dcp.TensorProperties
_CHUNK_CLASS: Any = dcp.ChunkStorageMetadata
_PLACE_CLASS: Any = dcp.StorageInfo


def _described(entry: Any) -> Any:
    if isinstance(entry, _BytesStorage):
        return dcp.BytesStorageMetadata()
    if not isinstance(entry, _TensorStorage):
        return entry
    fields = entry.fields()
    chunks = fields.get("chunks")
    if isinstance(chunks, list):
        chunks = [_chunk(chunk) for chunk in chunks]
    properties = fields.get("properties")
    if isinstance(properties, _Properties):  # torch gives it a tuple for a state
        state = properties.state
        dtype = state[0] if isinstance(state, tuple) and state else None
        properties = _PROPERTIES_CLASS(dtype=dtype)
    return _TENSOR_CLASS(properties, fields.get("size"), chunks)


def _chunk(chunk: Any) -> Any:
    if not isinstance(chunk, _Chunk):
        return chunk
    fields = chunk.fields()
    return _CHUNK_CLASS(fields.get("offsets"), fields.get("sizes"))


def _key(key: Any, what: str) -> Any:
    if not isinstance(key, _Index):
        return key
    try:
        return dcp.MetadataIndex(*key.place())
    except CheckpointError as error:  # its state was set again after it became a key
        raise CheckpointError(f"{what}: {error}") from error


def _place(place: Any) -> Any:
    if not isinstance(place, _Place):
        return place
    fields = place.fields()
    made = _PLACE_CLASS(*(fields.get(n) for n in ("relative_path", "offset", "length")))
    if fields.get("transform_descriptors"):
        made.transform_descriptors = True  # only whether there are any matters
    return made


def _load(data: bytes, allowed: dict[tuple[str, str], Any], what: str) -> Any:
    try:
        return _RestrictedUnpickler(data, allowed).load()
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{what} cannot be unpickled: {type(error).__name__}: {error}"
        ) from error
