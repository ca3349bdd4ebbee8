"""Hugging Face folders: ``model.safetensors``, or shards with ``model.safetensors.index.json``.

A shard is eight bytes (the header's size), a JSON header (name -> dtype, shape, [begin, end) of its
bytes) and the tensors, row-major and without gaps (safetensors' format description). Everything is
read here rather than by the library, since every tensor must become a place on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast

from nemo_warp.checkpoints import dtypes
from nemo_warp.checkpoints.containers.archive import MAX_SMALL_FILE_BYTES, read_record
from nemo_warp.checkpoints.containers.image import CheckpointImage, DtypeRule, FileImage
from nemo_warp.checkpoints.dtypes import Dtype
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.logical import LogicalTensor
from nemo_warp.checkpoints.names import hugging_face_name, logical_tensors
from nemo_warp.checkpoints.record import Record
from nemo_warp.checkpoints.stored import Block, StackedTensor

SINGLE, INDEX, HF_CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
DTYPES = {
    **{"F64": dtypes.FLOAT64, "F32": dtypes.FLOAT32, "F16": dtypes.FLOAT16},
    **{"BF16": dtypes.BFLOAT16, "F8_E4M3": dtypes.FLOAT8_E4M3FN, "F8_E5M2": dtypes.FLOAT8_E5M2},
    **{"I64": dtypes.INT64, "I32": dtypes.INT32, "I16": dtypes.INT16, "I8": dtypes.INT8},
    **{"U8": dtypes.UINT8, "BOOL": dtypes.BOOL},
}
"""Name in a header -> dtype."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_SIZE_BYTES = 8
_KEPT = {".json", ".jinja", ".model", ".py", ".tiktoken", ".txt"}
"""Suffixes of what goes along; other weights (.bin, .gguf, .pth) and the init's README do not."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a shard."""

    key: str
    shape: tuple[int, ...]
    dtype: Dtype
    record: Record

    @property
    def is_merged(self) -> bool:
        """Whether it takes part in merges: floating, with elements."""
        return self.dtype.is_floating_point and self.record.size > 0


@dataclass(frozen=True)
class Shard:
    """A ``.safetensors`` file: its header's metadata, and its tensors in stored order."""

    header: bytes
    metadata: dict[str, str] | None
    tensors: tuple[Stored, ...]


class SafetensorsStore:
    """The weights of a Hugging Face folder.

    Attributes:
        shards: file name -> its contents.
        tensors: canonical name -> floating tensor.

    Raises:
        CheckpointError: a shard is missing, damaged or hostile.
    """

    def __init__(self, members: dict[str, Record], where: str):
        self.foreign: list[str] = []  # nothing but the model is in such a folder
        self.where, self._members = where, members
        self.index = _read_json(members, INDEX, where) if INDEX in members else None
        self.shards = {n: read_shard(members[n], f"{where}/{n}") for n in self._shard_names()}
        self.stored = self._by_key()
        merged = ((t.key, t.dtype, t.shape, t.record) for t in self.stored.values() if t.is_merged)
        self.tensors = _logical(merged, where)

    @property
    def others(self) -> dict[str, Dtype]:
        """Canonical name -> dtype of the tensors that are not floating."""
        rest = [t for t in self.stored.values() if not t.is_merged]
        return {hugging_face_name(t.key): t.dtype for t in rest}

    def masters(self) -> dict[str, LogicalTensor]:
        """None: a Hugging Face folder holds no optimizer state."""
        return {}

    def image(self, rule: DtypeRule, prefix: str) -> CheckpointImage:
        """Layout of an output with this folder's shards; index and ``torch_dtype`` follow."""
        files, places, total = [], [], 0
        for name, shard in self.shards.items():
            files.append(FileImage(prefix + name))
            places += list(_fill(files[-1], shard, rule))
            header = cast("bytes", files[-1].pieces[0][1])
            # The index counts tensor bytes only, without headers.
            total += files[-1].size - len(header)
        if self.index is not None:
            metadata = {**(self.index.get("metadata") or {}), "total_size": total}
            files.append(_json_file(prefix + INDEX, {**self.index, "metadata": metadata}))
        written = {dtype for _, dtype, *_ in places}
        changed = any(rule(t.dtype) != t.dtype for t in self.stored.values() if t.is_merged)
        # transformers loads in the dtype that config.json names: fp32 weights would be rounded
        # again. With several dtypes there is none to name.
        if changed and len(written) == 1 and HF_CONFIG in self._members:
            config = _read_json(self._members, HF_CONFIG, self.where)
            name = written.pop().name
            for key in [k for k in ("torch_dtype", "dtype") if k in config]:
                config[key] = name
            files.append(_json_file(prefix + HF_CONFIG, config))
        return CheckpointImage(files, _logical(places, self.where))

    def _shard_names(self) -> list[str]:
        if self.index is None:
            return [SINGLE]
        table = self.index.get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(n, str) for n in table.values()):
            raise CheckpointError(f"{self.where}: {INDEX} has no weight_map of tensors to files")
        names = sorted(set(table.values()))
        for name in names:
            if name not in self._members:
                raise CheckpointError(
                    f"{self.where}: the shard {name}, which {INDEX} names, is missing; "
                    "the download or copy is incomplete"
                )
        return names

    def _by_key(self) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        table: dict[str, str] = (self.index or {}).get("weight_map") or {}
        for name, shard in self.shards.items():
            for tensor in shard.tensors:
                # A shard of another download would otherwise replace weights of the model without a
                # word.
                if tensor.key in found or (table and table.get(tensor.key) != name):
                    raise CheckpointError(
                        f"{self.where}: {name} holds {tensor.key}, which is not where {INDEX} says"
                    )
                found[tensor.key] = tensor
        for key in table:
            if key not in found:
                raise CheckpointError(
                    f"{self.where}: {key} is not in {table[key]}, where {INDEX} says; "
                    "a shard of another checkpoint lies in this folder"
                )
        return found


def is_safetensors(members: dict[str, Record]) -> bool:
    """Whether a folder holds a Hugging Face model in safetensors."""
    return SINGLE in members or INDEX in members


def goes_along(name: str) -> bool:
    """Whether a file beside the weights (configuration, tokenizer, templates) goes into outputs."""
    path = PurePosixPath(name)
    beside = len(path.parts) == 1 or path.parts[0] == "additional_chat_templates"
    return beside and path.suffix in _KEPT


def read_hf_config(members: dict[str, Record], where: str) -> dict[str, Any]:
    """``config.json``, {} without one.

    Raises:
        CheckpointError: not JSON, or of quantised weights.
    """
    config = _read_json(members, HF_CONFIG, where) if HF_CONFIG in members else {}
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{where} is quantised (quantization_config in {HF_CONFIG}); quantised weights cannot "
            "be merged or converted, use the model in bfloat16 or float32"
        )
    return config


def read_shard(record: Record, where: str) -> Shard:
    """The header of a ``.safetensors`` file.

    Raises:
        CheckpointError: cut short, damaged or hostile.
    """
    if record.size < _SIZE_BYTES:
        raise CheckpointError(f"{where} has {record.size} bytes and is no safetensors file")
    head = Record(record.path, record.offset, _SIZE_BYTES)
    size = int.from_bytes(read_record(head, _SIZE_BYTES, where), "little")
    begin = _SIZE_BYTES + size
    if size > _MAX_HEADER_BYTES or begin > record.size:
        raise CheckpointError(
            f"{where} claims a header of {size} bytes in {record.size}; it is truncated or damaged"
        )
    text = Record(record.path, record.offset + _SIZE_BYTES, size)
    header = read_record(text, _MAX_HEADER_BYTES, where)
    table = _parse_json(header, where)
    metadata = table.pop("__metadata__", None)
    found = [_stored(key, entry, record, begin, where) for key, entry in table.items()]
    # By size as well: tensors without elements begin where the next one does.
    found.sort(key=lambda tensor: (tensor.record.offset, tensor.record.size))
    end = record.offset + begin
    # As the library demands: without gaps no byte of the file is left unmerged and uncopied, and
    # without overlaps no tensor is written twice.
    for tensor in found:
        if tensor.record.offset != end:
            raise CheckpointError(f"{where}: the bytes of {tensor.key} overlap or leave a gap")
        end += tensor.record.size
    if end != record.offset + record.size:
        raise CheckpointError(
            f"{where} ends at {record.offset + record.size} where its header says {end}; "
            "it is truncated or damaged"
        )
    return Shard(head_bytes(header), metadata, tuple(found))


def head_bytes(header: bytes) -> bytes:
    """A header with its size in front."""
    return len(header).to_bytes(_SIZE_BYTES, "little") + header


def make_header(tensors: list[tuple[str, Dtype, tuple[int, ...]]], metadata: dict | None) -> bytes:
    """Size and header of a shard that holds these tensors in this order."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        table[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return head_bytes(text + b" " * (-len(text) % 8))  # so that elements lie aligned


def _stored(key: str, entry: Any, file: Record, base: int, where: str) -> Stored:
    try:
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        # type() and not isinstance: JSON's true is an int to Python.
        numbers = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        fits = numbers and end - begin == math.prod(shape) * dtype.itemsize
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{where}: the header's entry of {key!r:.80} is unknown") from None
    if not fits or base + end > file.size:
        raise CheckpointError(
            f"{where}: {key!r:.80} does not fit its shape or the file, which may be truncated"
        )
    return Stored(key, shape, dtype, Record(file.path, file.offset + base + begin, end - begin))


def _fill(file: FileImage, shard: Shard, rule: DtypeRule) -> Iterator[tuple]:
    """Lay out a shard; yields (key, dtype, shape, place) of what is merged."""
    dtypes = [rule(t.dtype) if t.is_merged else t.dtype for t in shard.tensors]
    same = all(d == t.dtype for d, t in zip(dtypes, shard.tensors, strict=True))
    described = [(t.key, d, t.shape) for t, d in zip(shard.tensors, dtypes, strict=True)]
    # The very bytes where nothing changes: key order and spaces of the writer stay.
    file.append(shard.header if same else make_header(described, shard.metadata))
    for tensor, dtype in zip(shard.tensors, dtypes, strict=True):
        if not tensor.is_merged:
            file.append(tensor.record)
            continue
        size = math.prod(tensor.shape) * dtype.itemsize
        yield tensor.key, dtype, tensor.shape, file.hole(file.size, size)
        file.size += size


def _logical(
    placed: Iterable[tuple[str, Dtype, tuple[int, ...], Record]], where: str
) -> dict[str, LogicalTensor]:
    found = (
        (
            hugging_face_name(key),
            StackedTensor(key, shape, dtype, (Block((0,) * len(shape), shape, record, 0),)),
        )
        for key, dtype, shape, record in placed
    )
    return logical_tensors(found, where)


def _json_file(name: str, content: dict) -> FileImage:
    file = FileImage(name)
    file.append((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    return file


def _read_json(members: dict[str, Record], name: str, where: str) -> dict[str, Any]:
    what = f"{where}/{name}"
    return _parse_json(read_record(members[name], MAX_SMALL_FILE_BYTES, what), what)


def _parse_json(text: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return found
