"""Damaged and malicious checkpoints, made by mutating a good one.

Every generator yields (label, content); content is the checkpoint's files by name, to be packed
into a tar, or the bytes of the tar itself.
"""

from __future__ import annotations

import copy
import gzip
import io
import itertools
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Iterator

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

Files = dict[str, bytes]
Case = tuple[str, Files | bytes]
METADATA, SHARD, COMMON = "model_weights/.metadata", "model_weights/__0_0.distcp", "common.pt"


def pack(files: Files, extra: list[tuple[tarfile.TarInfo, bytes]] = ()) -> bytes:
    """A tar of files, as NeMo packs it, and of further members as given."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info, content in extra:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Execute:
    """Pickles into a call of ``function`` on ``arguments``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def flip(data: bytes, rng: random.Random, low: int = 0, high: int | None = None) -> bytes:
    """``data`` with one bit changed in [low, high)."""
    place = rng.randrange(low, len(data) if high is None else high)
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def all_cases(files: Files, canary: str) -> Iterator[Case]:
    """Every case; ``canary`` is a file that malicious content tries to create."""
    yield from random_damage(files)
    yield from tars(files)
    yield from metadata_descriptions(files)
    yield from malicious_pickles(files, canary)
    yield from shards(files)
    yield from texts(files, canary)


def random_damage(files: Files) -> Iterator[Case]:
    """One bit flipped, bytes overwritten, ends cut off: each file, and the tar as a whole."""
    for name, count in ((METADATA, 70), (SHARD, 70), ("model_weights/metadata.json", 6)):
        for seed in range(count):
            yield f"flip {name} {seed}", {**files, name: flip(files[name], random.Random(seed))}
    for name in (METADATA, SHARD, "model_weights/metadata.json"):
        for seed in range(8):
            end = random.Random(seed).randrange(len(files[name]))
            yield f"truncate {name} {seed}", {**files, name: files[name][:end]}
        yield f"empty {name}", {**files, name: b""}
        yield f"zeros {name}", {**files, name: bytes(len(files[name]))}
        yield f"without {name}", _without(files, name)
    tar = pack(files)
    for seed in range(20):
        rng = random.Random(seed)
        yield f"flip tar header {seed}", flip(tar, rng, 0, 512)
        yield f"truncate tar {seed}", tar[: rng.randrange(len(tar))]
        start = rng.randrange(len(tar) - 64)
        yield f"noise {seed}", tar[:start] + rng.randbytes(64) + tar[start + 64 :]


def _member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


def tars(files: Files) -> Iterator[Case]:
    """Members that leave the archive, link, repeat, or lie about their size."""
    odd = {
        "parent": _member("./../escaped", b"x"),
        "deep parent": _member("./model_weights/../../escaped", b"x"),
        "absolute": _member("/tmp/escaped", b"x"),
        "symlink": _member("./link", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        "symlink over data": _member(f"./{SHARD}", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        "hard link": _member("./link", kind=tarfile.LNKTYPE, link="/etc/passwd"),
        "device": _member("./device", kind=tarfile.CHRTYPE),
        "fifo": _member("./fifo", kind=tarfile.FIFOTYPE),
        "second .metadata": _member(f"./{METADATA}", files[METADATA][:-7]),
        "second shard": _member(f"./{SHARD}", files[SHARD][::-1]),
        "second shard, other spelling": _member(f"././{SHARD}", files[SHARD][::-1]),
        "file as folder": _member(f"./{SHARD}/below", b"x"),
        "newline in name": _member("./a\nerror: b", b"x"),
    }
    for label, member in odd.items():
        yield f"tar {label}", pack(files, [member])
    for label, size in (("exabytes", 1 << 60), ("negative", -1), ("a bit more", 5000)):
        yield f"tar size {label}", _tar_of_claimed_size(files, size)
    for record in (b"size=9999999999999999999", b"path=../escaped", b"GNU.sparse.major=1"):
        yield f"tar pax {record}", _tar_with_pax(files, record)
    yield "tar long name of a gigabyte", _tar_with_long_name(files)
    yield "gzip", gzip.compress(pack(files))
    yield "gzip bomb", gzip.compress(bytes(1 << 24))
    yield "nothing", b""
    yield "only zeros", bytes(10240)
    yield "text", b"this is no checkpoint\n" * 100


def _tar_of_claimed_size(files: Files, size: int) -> bytes:
    name = next(reversed(files))
    info = tarfile.TarInfo(f"./{name}")
    info.size = size
    return pack(dict(list(files.items())[:-1]))[:-10240] + info.tobuf(tarfile.GNU_FORMAT)


def _tar_with_pax(files: Files, record: bytes) -> bytes:
    length = len(record) + 2
    length += len(str(length + 1))
    body = f"{length} ".encode() + record + b"\n"
    header, content = _member("./PaxHeader", body, tarfile.XHDTYPE)
    return pack({}, [(header, content), _member("./extra", b"x")])[:2048] + pack(files)


def _tar_with_long_name(files: Files) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    return info.tobuf(tarfile.GNU_FORMAT) + pack(files)


def metadata_descriptions(files: Files) -> Iterator[Case]:
    """Well-formed ``.metadata`` that describe something impossible or something else."""
    weight = "model.decoder.layers.mlp.linear_fc2.weight"
    norm = "model.decoder.final_layernorm.weight"

    def changed(label, change):
        metadata = pickle.loads(files[METADATA])
        change(metadata)
        return f".metadata {label}", {**files, METADATA: pickle.dumps(metadata)}

    def storage(change):
        def apply(metadata):
            index = next(i for i in metadata.storage_data if i.fqn == weight)
            info = copy.copy(metadata.storage_data[index])
            change(info)
            metadata.storage_data[index] = info

        return apply

    def described(**attributes):
        return lambda m: [setattr(m.state_dict_metadata[weight], *a) for a in attributes.items()]

    size = torch.Size
    sizes = (size((1 << 62, 8, 12)), size((2, -8, 12)), size((2, 1 << 40, 12)), size((2,) * 40))
    for value in (*sizes, (2, 8, 12), None, "big", size(()), size((0, 8, 12))):
        yield changed(f"size {value}", described(size=value))
    yield changed("chunks none", described(chunks=None))
    yield changed("chunks empty", described(chunks=[]))
    yield changed("properties", described(properties=None))
    for offsets, sizes in (
        ((0, 0, 0), (2, 8, 12)),
        ((-1, 0, 0), (1, 8, 12)),
        ((0, 0), (8, 12)),
        ((0, 0, 0), (1 << 60, 8, 12)),
        ((0, 0, 1 << 62), (1, 8, 1 << 62)),
        ((1.5, 0, 0), (1, 8, 12)),
    ):
        chunk = dcp.ChunkStorageMetadata(offsets, sizes)
        yield changed(f"chunk {offsets} {sizes}", described(chunks=[chunk]))
    for dtype in (torch.float8_e4m3fn, torch.int64, torch.float32, "bfloat16"):
        properties = dcp.TensorProperties(dtype=dtype)
        yield changed(f"dtype {dtype}", described(properties=properties))
    for name, values in {
        "offset": (-64, 1, 1 << 62, 1.0, None, "0"),
        "length": (-1, 0, 10, 1 << 62, None),
        "relative_path": ("../../../etc/passwd", "/etc/passwd", "", "nowhere", None, "common.pt"),
    }.items():
        for value in values:
            yield changed(f"{name} {value}", storage(lambda i, n=name, v=value: setattr(i, n, v)))
    doubling = ()
    for _ in range(64):
        doubling = (doubling, doubling)  # its repr or hash would take for ever
    for name in ("offset", "length", "relative_path"):
        yield changed(f"{name} doubling", storage(lambda i, n=name: setattr(i, n, doubling)))
    for name in ("size", "chunks", "properties"):
        yield changed(f"{name} doubling", described(**{name: doubling}))
    yield changed("no storage", lambda m: setattr(m, "storage_data", None))
    yield changed("no state", lambda m: setattr(m, "state_dict_metadata", None))
    yield changed("key gone", lambda m: m.state_dict_metadata.pop(norm))
    yield changed("data gone", lambda m: m.storage_data.pop(dcp.MetadataIndex(norm, size((0,)))))
    yield changed("number as key", lambda m: m.state_dict_metadata.update({7: 8}))
    yield changed("text as storage", lambda m: m.storage_data.update({"a": "b"}))
    yield changed("layers swapped", _swap_layers)
    yield changed("layer named twice", lambda m: _rename(m, "layers.mlp", "layers.0.mlp"))
    twice = {"model.module.decoder.final_layernorm.weight": norm}
    yield changed("wrapped twice", lambda m: _alias(m, twice))
    yield "truth", {**files, METADATA: pickle.dumps(True)}
    yield "plain object", {**files, METADATA: pickle.dumps({"state_dict_metadata": {}})}


def _swap_layers(metadata: dcp.Metadata) -> None:
    """Layer 1's chunk takes the place of layer 0's: one layer twice, the other nowhere."""
    described = metadata.state_dict_metadata["model.decoder.layers.mlp.linear_fc2.weight"]
    described.chunks[0] = described.chunks[1]


def _rename(metadata: dcp.Metadata, old: str, new: str) -> None:
    state = metadata.state_dict_metadata
    for key in [key for key in state if old in key]:
        state[key.replace(old, new)] = state.pop(key)


def _alias(metadata: dcp.Metadata, aliases: dict[str, str]) -> None:
    for new, old in aliases.items():
        metadata.state_dict_metadata[new] = metadata.state_dict_metadata[old]
        for index, info in list(metadata.storage_data.items()):
            if index.fqn == old:
                metadata.storage_data[dcp.MetadataIndex(new, index.offset)] = info


def malicious_pickles(files: Files, canary: str) -> Iterator[Case]:
    """Pickles that run code or exhaust memory, wherever a checkpoint holds a pickle."""
    touch = f"touch {canary}"
    calls = {
        "os.system": Execute(os.system, touch),
        "exec": Execute(exec, f"open({canary!r}, 'w')"),
        "eval": Execute(eval, f"open({canary!r}, 'w')"),
        "open": Execute(open, canary, "w"),
        "getattr": Execute(getattr, Execute(__import__, "os"), "system"),
        "torch.load": Execute(torch.load, canary),
        "torch.zeros": Execute(torch.zeros, 1 << 50),
        "bytearray": Execute(bytearray, 1 << 50),
    }
    pickles = {label: pickle.dumps(call) for label, call in calls.items()}
    pickles |= {
        "inst": f"(S'{touch}'\nios\nsystem\n.".encode(),
        "obj": b"(cos\nsystem\nS'" + touch.encode() + b"'\no.",
        "global of nothing": b"cnowhere\nnothing\n.",
        "layout called": b"ctorch.serialization\n_get_layout\n(X\x03\x00\x00\x00abctR.",
        "size of a giant": b"ctorch\nSize\n((I99999999999\ntl\x85R.",
        "long text": b"\x8d" + struct.pack("<Q", 1 << 60) + b".",
        "long bytes": b"\x8e" + struct.pack("<Q", 1 << 60) + b".",
        "long bytearray": b"\x96" + struct.pack("<Q", 1 << 40) + b".",
        "long integer": b"\x8b" + struct.pack("<i", 1 << 30) + b".",
        "far memo": b"Nr" + struct.pack("<I", 0xFFFFFFFF) + b".",
        "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 50) + b"N.",
        "doubling tuple": b"(t" + b"2\x86" * 64 + b".",
        "doubling list": b"]" + b"2\x86" * 200 + b".",
        "deep list": b"]" * 200000 + b"a" * 199999 + b".",
        "tuple as key": b"}" + b"(t" + b"2\x86" * 40 + b"Ns.",
        "extension": b"\x82\x01.",
        "persistent": b"Pabc\n.",
        "stop without value": b".",
        "next buffer": b"\x97.",
    }
    for label, data in pickles.items():
        yield f".metadata {label}", {**files, METADATA: data}
        yield f"data.pkl {label}", {**files, SHARD: repack(files[SHARD], pickle=data)}
        yield f"common.pt {label}", {**files, "model_weights/common.pt": data}


def repack(shards: bytes, pickle: bytes | None = None, compression: int = 0, **changes) -> bytes:
    """A .distcp file whose first torch.save zip is written anew, padded to its old length."""
    end = shards.index(b"PK\x05\x06") + 22
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(shards[:end])) as old,
        zipfile.ZipFile(out, "w", compression) as new,
    ):
        for info in old.infolist():
            content, name = old.read(info), info.filename.rpartition("/")[2]
            content = pickle if name == "data.pkl" and pickle is not None else content
            content = changes.get(name, content)
            if content is not None:
                new.writestr(info.filename, content)
        for name, content in changes.get("more", {}).items():
            new.writestr(name, content)
    data = out.getvalue()
    data = data[:-2] + struct.pack("<H", end - len(data)) if len(data) < end else data
    return data + bytes(max(0, end - len(data))) + shards[end:]


def shards(files: Files) -> Iterator[Case]:
    """torch.save files that are compressed, big-endian, lie about sizes or hold other tensors."""

    def with_shard(label, content):
        return f"shard {label}", {**files, SHARD: content}

    shard = files[SHARD]
    yield with_shard("compressed", repack(shard, compression=zipfile.ZIP_DEFLATED))
    yield with_shard("big-endian", repack(shard, byteorder=b"big"))
    yield with_shard("without data", repack(shard, **{"0": None}))
    yield with_shard("short data", repack(shard, **{"0": b"1234"}))
    yield with_shard("bomb", repack(shard, more={"archive/bomb": bytes(1 << 20)}, compression=8))
    yield with_shard("no pickle", repack(shard, **{"data.pkl": None}))
    text = zip_pickle(shard)
    for old, new in (
        (b"BFloat16Storage", b"HalfStorage"),
        (b"BFloat16Storage", b"ByteStorage"),
        (b"X\x03\x00\x00\x00cpu", b"X\x03\x00\x00\x00gpu"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00/"),
        (b"X\x01\x00\x00\x000", b"X\x02\x00\x00\x00.."),
    ):
        if old in text:
            yield with_shard(f"pickle {new}", repack(shard, pickle=text.replace(old, new)))
    giant = torch.zeros(1).expand(1 << 40)
    for label, value in {
        "stride zero": giant,
        "list": [torch.zeros(3)],
        "text": "weights",
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(1 << 40, device="meta"),
        "complex": torch.zeros(3, dtype=torch.complex64),
    }.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        padded = buffer.getvalue().ljust(len(shard), b"\0")
        yield with_shard(f"holds {label}", padded)
        yield with_shard(f"pickle of {label}", repack(shard, pickle=zip_pickle(buffer.getvalue())))
    info = next(i for i in pickle.loads(files[METADATA]).storage_data.values())
    assert isinstance(info, _StorageInfo)
    for field in range(0, 30):  # the local header of the first record
        changed = bytearray(shard)
        changed[field] ^= 0xFF
        yield with_shard(f"local header byte {field}", bytes(changed))
    for back in range(1, 120, 3):  # central directory and end records of the last item
        changed = bytearray(shard)
        changed[-back] ^= 0xFF
        yield with_shard(f"directory byte {back}", bytes(changed))


def zip_pickle(data: bytes) -> bytes:
    """``data.pkl`` of the first torch.save file in ``data``."""
    end = data.index(b"PK\x05\x06") + 22
    with zipfile.ZipFile(io.BytesIO(data[:end])) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        return archive.read(name)


def texts(files: Files, canary: str) -> Iterator[Case]:
    """Configuration and JSON that execute, expand or nest without end."""
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for previous, letter in itertools.pairwise("abcdefghi"):
        laughs += f"{letter}: &{letter} [{', '.join([f'*{previous}'] * 9)}]\n"
    merges = "a: &a {k: v}\n"
    for previous, letter in itertools.pairwise("abcdefghijklmn"):
        merges += f"{letter}: &{letter} {{<<: [{', '.join([f'*{previous}'] * 9)}]}}\n"
    configurations = {
        "merge bomb": merges.encode(),
        "deep megabytes": b"{a: " * 1000000,
        "python object": f"a: !!python/object/apply:os.system ['touch {canary}']\n".encode(),
        "python name": b"a: !!python/name:os.system\n",
        "billion laughs": laughs.encode(),
        "deep": b"[" * 20000,
        "not utf-8": b"\xff\xfe\xfa activation: x",
        "list": b"- 1\n- 2\n",
        "nothing": b"",
        "alias to itself": b"a: &a [*a]\n",
        "merge key": b"a: &a {<<: *a}\n",
        "binary": bytes(range(256)) * 40,
        "long integer": b"a: " + b"9" * 10000 + b"\n",
        "date": b"a: 9999-99-99\n",
    }
    for label, content in configurations.items():
        yield f"config {label}", {**files, "model_config.yaml": content}
    documents = {
        "deep": b"[" * 100000,
        "list": b"[]",
        "other backend": b'{"sharded_backend": "pickle", "sharded_backend_version": 1}',
        "nan": b"NaN",
        "binary": bytes(range(256)),
    }
    for label, content in documents.items():
        yield f"metadata.json {label}", {**files, "model_weights/metadata.json": content}


def legacy_cases(files: Files, canary: str) -> Iterator[Case]:
    """A single ``model_weights.ckpt`` that is damaged or malicious."""
    name = next(n for n in files if n.endswith(".ckpt"))
    data = files[name]
    for seed in range(40):
        yield f"flip {seed}", {**files, name: flip(data, random.Random(seed))}
        yield f"truncate {seed}", {**files, name: data[: random.Random(seed).randrange(len(data))]}
    touch = Execute(os.system, f"touch {canary}")
    for label, value in {"call": touch, "text": "weights", "list": [1], "number": {1: 2}}.items():
        yield f"pickle {label}", {**files, name: repack(data, pickle=pickle.dumps(value, 2))}
        yield f"only a pickle {label}", {**files, name: pickle.dumps(value)}
    yield "rank missing", {f"tp_rank_00_pp_rank_001/{name}": data, **_without(files, name)}
    yield "absurd rank", {f"mp_rank_99999999999/{name}": data, **_without(files, name)}
    yield "rank and single", {**files, f"mp_rank_00/{name}": data}


def zarr_cases(files: Files) -> Iterator[Case]:
    """zarr descriptions and chunks that do not fit; contents have no checksum to violate."""
    description = next(n for n in files if n.endswith("linear_fc2.weight/.zarray"))
    chunk = description.replace(".zarray", "0.0.0")
    text = json.loads(files[description])
    for seed in range(40):
        rng = random.Random(seed)
        yield f"flip {seed}", {**files, description: flip(files[description], rng)}
        yield f"truncate {seed}", {**files, description: files[description][: seed * 8]}
    for label, change in {
        "huge shape": {"shape": [1 << 60, 8, 12]},
        "many chunks": {"shape": [1 << 40, 8, 12], "chunks": [1, 1, 1]},
        "negative": {"shape": [-2, 8, 12]},
        "zero chunks": {"chunks": [0, 8, 12]},
        "fraction": {"shape": [2.0, 8, 12]},
        "text": {"shape": "2"},
        "compressed": {"compressor": {"id": "zlib"}},
        "filtered": {"filters": [{"id": "delta"}]},
        "column-major": {"order": "F"},
        "dtype": {"dtype": "<f4"},
        "unknown dtype": {"dtype": "object"},
        "list as dtype": {"dtype": [["a", "<f4"]]},
        "separator": {"dimension_separator": "../"},
    }.items():
        yield label, {**files, description: json.dumps({**text, **change}).encode()}
    yield "deep", {**files, description: b"[" * 60000}
    yield "large", {**files, description: b" " * (1 << 17)}
    yield "chunk missing", _without(files, chunk)
    yield "chunk short", {**files, chunk: files[chunk][:-1]}
    yield "chunk long", {**files, chunk: files[chunk] + b"\0"}


def _without(files: Files, name: str) -> Files:
    return {n: c for n, c in files.items() if n != name}
