"""Checkpoints drawn from the grammar of each format: well-formed nearly everywhere.

Flipped bytes are stopped by the first check that they meet. These get further: an honest file is
taken apart into what its format is made of, one or a few parts are replaced by others that the
grammar allows, and it is put together again.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import random
import struct
import tarfile
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

Files = dict[str, bytes]
WEIGHTS = "model_weights/"
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 63, 64, 255, 4095, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
    *(1 << 32, 1 << 40, (1 << 60) - 1, 1 << 61, (1 << 63) - 1, 1 << 63, -(1 << 63), 1 << 200),
)


def draw(files: Files, rng: random.Random) -> Files | bytes:
    """A checkpoint's files, or a tar of them, with something else in it."""
    kind = rng.choice((tree, tree, opcodes, zip_fields, zip_fields, tar_fields, yaml_text, zarr))
    return kind(dict(files), rng)


def value(rng: random.Random, depth: int = 0) -> Any:
    """Anything that a pickle, JSON or YAML may hold."""
    plain: tuple[Callable[[], Any], ...] = (
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice((None, True, False, 0.5, float("nan"), float("inf"))),
        lambda: rng.choice(("", "a", "model.x", "../x", "\0", "0" * 300, "é", "__0_0.distcp")),
        lambda: rng.choice((torch.bfloat16, torch.int8, torch.float8_e4m3fn)),
        lambda: rng.randbytes(rng.choice((0, 1, 100, 70_000))),
        lambda: torch.Size(_some(rng, lambda: rng.choice((0, 1, 2, 8, 1 << 20, 1 << 40)), 5)),
    )
    if depth > 3 or rng.random() < 0.6:
        return rng.choice(plain)()
    inner = lambda: value(rng, depth + 1)  # noqa: E731
    return rng.choice((list, tuple, lambda n: dict.fromkeys("abcdef"[: len(n)], n)))(
        _some(rng, inner, 4)
    )


def _some(rng: random.Random, make: Callable[[], Any], most: int) -> list:
    return [make() for _ in range(rng.randrange(most + 1))]


def tree(files: Files, rng: random.Random) -> Files:
    """``.metadata`` with nodes of its tree replaced, dropped, repeated or moved."""
    metadata = pickle.loads(files[f"{WEIGHTS}.metadata"])
    for _ in range(rng.randrange(1, 4)):
        places = list(_places(metadata))
        holder, key, node = rng.choice(places)
        other = rng.choice(places)[2]
        _set(holder, key, rng.choice((value(rng), value(rng), other, _near(node, rng))))
    try:
        files[f"{WEIGHTS}.metadata"] = pickle.dumps(metadata, rng.choice((2, 4, 5)))
    except Exception:  # a tree that goes in circles, or that torch's own classes cannot pickle
        files[f"{WEIGHTS}.metadata"] = pickle.dumps(value(rng))
    return files


def _near(node: Any, rng: random.Random) -> Any:
    """Something of the same kind."""
    if type(node) is int:
        return node + rng.choice((-1, 1, 64, -64, rng.choice(NUMBERS)))
    if isinstance(node, torch.Size):
        sizes = list(node) or [1]
        sizes[rng.randrange(len(sizes))] = rng.choice((0, 1, 2, 1 << 20, 1 << 40, 1 << 62))
        return torch.Size(sizes)
    if isinstance(node, list):
        return node * rng.choice((0, 2, 3))
    if isinstance(node, str):
        return node + rng.choice((".", "/x", ".layers.9", ""))
    return node


def _places(node: Any, seen: set[int] | None = None):
    """(holder, key, node) of everything in a tree of dictionaries, lists and objects."""
    seen = set() if seen is None else seen
    if id(node) in seen or isinstance(node, torch.dtype | torch.Size):
        return
    seen.add(id(node))
    if isinstance(node, dict):
        inner = list(node.items())
    elif isinstance(node, list):
        inner = list(enumerate(node))
    elif hasattr(node, "__dict__") and not isinstance(node, dcp.MetadataIndex | type):
        inner = list(vars(node).items())
    else:
        return
    for key, child in inner:
        yield node, key, child
        yield from _places(child, seen)


def _set(holder: Any, key: Any, new: Any) -> None:
    if isinstance(holder, dict | list):
        holder[key] = new
    else:
        object.__setattr__(holder, key, new)


_GLOBALS = (
    *("torch Size", "torch bfloat16", "torch BFloat16Storage", "collections OrderedDict"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"),
    *("torch.serialization _get_layout", "_io BytesIO", "pathlib PosixPath"),
    *(f"torch.distributed.checkpoint.metadata {name}" for name in (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "MetadataIndex", "_MEM_FORMAT_ENCODING", "StorageMeta"))),
    *("torch.distributed.checkpoint.filesystem _StorageInfo", "os system", "builtins eval"),
)  # fmt: skip


def opcodes(files: Files, rng: random.Random) -> Files:
    """A pickle that is a sequence of opcodes, in ``.metadata`` or as a shard's ``data.pkl``."""
    program = io.BytesIO()
    program.write(b"\x80\x04")
    for _ in range(rng.randrange(2, 80)):
        code = rng.choice(pickletools.opcodes)
        if code.name in ("STOP", "FRAME", "PROTO"):
            continue
        program.write(code.code.encode("latin-1") + _argument(code, rng))
    program.write(b".")
    if rng.random() < 0.5:
        files[f"{WEIGHTS}.metadata"] = program.getvalue()
        return files
    buffer = io.BytesIO()
    with torch.serialization._open_zipfile_writer(buffer) as writer:
        writer.write_record("data.pkl", program.getvalue(), len(program.getvalue()))
        writer.write_record("data/0", bytes(64), 64)
    return {"model_weights.ckpt": buffer.getvalue()}


def _argument(code: pickletools.OpcodeInfo, rng: random.Random) -> bytes:
    name = code.arg.name if code.arg else ""
    size = rng.choice((0, 1, 3, 300, 70_000))
    if code.name == "GLOBAL":
        return rng.choice(_GLOBALS).replace(" ", "\n").encode() + b"\n"
    lengths = {"1": "<B", "4": "<I", "8": "<Q"}
    if name.startswith(("string", "unicodestring", "bytes", "bytearray", "long")) and name[-1:] in (
        *"148",
    ):
        claimed = rng.choice((size, size, 1 << 30, (1 << 31) - 1)) if name[-1] != "1" else size
        layout = lengths[name[-1]]
        limit = 256 ** struct.calcsize(layout) - 1
        return struct.pack(layout, min(claimed, limit)) + bytes(min(size, limit))
    fixed = {"uint1": "<B", "uint2": "<H", "uint4": "<I", "uint8": "<Q", "int4": "<i"}
    if name in fixed:
        width = struct.calcsize(fixed[name])
        number = rng.choice((0, 1, 2, 3, 1 << (8 * width - 1)))
        return struct.pack(fixed[name].upper().replace("Q", "Q"), number)
    if name == "float8":
        return struct.pack(">d", 1.5)
    if name:
        return rng.choice((b"1", b"99999999999999999999", b"'a'", b"I01", b"\\u1234")) + b"\n"
    return b""


_ZIP_PARTS = {b"PK\x03\x04": 30, b"PK\x01\x02": 46, b"PK\x05\x06": 22, b"PK\x06\x06": 56}


def zip_fields(files: Files, rng: random.Random) -> Files:
    """A field of a local header, central directory or end record says something else."""
    name = rng.choice([n for n in files if n.endswith((".distcp", "common.pt"))])
    data = bytearray(files[name])
    for _ in range(rng.randrange(1, 4)):
        kind = rng.choice(list(_ZIP_PARTS))
        found = [i for i in range(len(data)) if data.startswith(kind, i)]
        if not found:
            continue
        width = rng.choice((2, 4, 8))
        place = rng.choice(found) + rng.randrange(4, _ZIP_PARTS[kind] - width + 1)
        number = rng.choice(NUMBERS) % (1 << 8 * width)
        data[place : place + width] = number.to_bytes(width, "little")
    files[name] = bytes(data)
    return files


def tar_fields(files: Files, rng: random.Random) -> bytes:
    """Headers of odd type, size, name or pax records, among the honest ones."""
    buffer = io.BytesIO()
    odd = rng.randrange(len(files))
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for number, (name, content) in enumerate(files.items()):
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            if number == odd:
                _odd_member(info, rng)
            header = info.tobuf(rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)))
            tar.fileobj.write(header + content + bytes(-len(content) % 512))
            tar.offset = tar.fileobj.tell()
    return buffer.getvalue()


def _odd_member(info: tarfile.TarInfo, rng: random.Random) -> None:
    kinds = (
        *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE),
        *(tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE),
    )
    records = {
        "size": str(rng.choice(NUMBERS)),
        "path": rng.choice(("../x", "/x", "", "a" * 5000, "model_config.yaml")),
        "GNU.sparse.map": ",".join(str(rng.choice(NUMBERS)) for _ in range(4)),
        "GNU.sparse.major": "1",
        "hdrcharset": "BINARY",
        "mtime": "1" * 5000,
    }
    match rng.randrange(4):
        case 0:
            info.type = rng.choice(kinds)
        case 1:
            info.size = rng.choice([n for n in NUMBERS if -(1 << 63) < n < 1 << 63])
        case 2:
            info.name = rng.choice(("../x", "/abs", "x/../../y", "a/" * 2000, "", "\n"))
        case 3:
            chosen = rng.sample(list(records), rng.randrange(1, 4))
            info.pax_headers = {key: records[key] for key in chosen}


def yaml_text(files: Files, rng: random.Random) -> Files:
    """A configuration of scalars, anchors, aliases, tags and nesting."""
    lines = []
    for number in range(rng.randrange(1, 30)):
        lines.append(f"k{number}: {_yaml_value(rng, number)}")
    files["model_config.yaml"] = "\n".join(lines).encode()
    return files


def _yaml_value(rng: random.Random, number: int) -> str:
    known = rng.randrange(number) if number else 0
    return rng.choice(
        (
            f"&a{number} [*a{known}, *a{known}]",
            f"&a{number} {{x: *a{known}}}",
            ":".join(["59"] * rng.choice((2, 200, 60_000))),
            rng.choice(("0x", "0b", "0o", "-")) + "1" * rng.choice((1, 100, 60_000)),
            "!!"
            + rng.choice(("int", "float", "binary", "timestamp", "set", "python/name:os"))
            + " 1:2",
            "[" * rng.choice((1, 60, 3000)),
            "{<<: {a: 1}}",
            "2001-02-03T04:05:06.789+99:99",
            '"\\' + rng.choice(("x", "u12", "N", "0", "_")) + '"',
            str(rng.choice(NUMBERS)),
            "? [a]",
        )
    )


_ZARR_VALUES = (
    *(None, "x", "C", -1, [], 1.5, "<f4", "|V2", "bfloat16", {"id": "zlib"}),
    *([2, 8, 4], [1 << 40, 1, 1], [2, 0, 4], [1, 1, 1], [1 << 20, 1 << 20], [2.0, 8, 4]),
)


def zarr(files: Files, rng: random.Random) -> Files:
    """A ``zarr`` directory whose descriptions say something else."""
    shape = [2, 8, 4]
    described: dict[str, Any] = {
        **{"shape": shape, "chunks": [1, 8, 4], "dtype": "bfloat16", "order": "C"},
        **{"compressor": None, "filters": None, "fill_value": None, "zarr_format": 2},
    }
    for _ in range(rng.randrange(0, 3)):
        described[rng.choice(list(described))] = rng.choice(_ZARR_VALUES)
    folder = f"{WEIGHTS}model.decoder.layers.mlp.linear_fc2.weight"
    kept = {name: data for name, data in files.items() if not name.startswith(WEIGHTS)}
    names = (f"{folder}/{i}.0.0" for i in range(rng.choice((1, 2, 3))))
    return {
        **kept,
        **{name: bytes(rng.choice((64, 64, 64, 0, 65))) for name in names},
        f"{folder}/.zarray": json.dumps(described).encode(),
        f"{WEIGHTS}metadata.json": b'{"sharded_backend": "zarr"}',
    }
