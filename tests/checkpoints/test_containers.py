"""torch.save layouts, checksums and tilings, against torch and zlib."""

import importlib
import io
import os
import sys
import zipfile
import zlib
from itertools import product
from pathlib import Path

import pytest
import torch

from nemo_warp.checkpoints.containers.image import retype_pickle
from nemo_warp.checkpoints.containers.torch_zip import ZipEntry, ZipImage, read_torch_zip
from nemo_warp.checkpoints.dtypes import FLOAT32, INT64
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.io import crc
from nemo_warp.checkpoints.io.parts import joined_crc32
from nemo_warp.checkpoints.logical import (
    LogicalTensor,
    Patch,
    Record,
    check_tiling,
    patches_of_block,
)


def saved(path: Path, value) -> Record:
    torch.save(value, path)
    return Record(path, 0, path.stat().st_size)


def written(image: ZipImage, contents: list[bytes | None], path: Path) -> None:
    """The image as a (sparse) file; None leaves a hole of zeros."""
    crcs = [123 if content is None else zlib.crc32(content) for content in contents]
    with path.open("wb") as stream:
        stream.truncate(image.size)
        for offset, content in zip(image.data_offsets, contents, strict=True):
            if content is not None:
                os.pwrite(stream.fileno(), content, offset)
        for offset, piece in image.headers() + image.trailers(crcs):
            os.pwrite(stream.fileno(), piece, offset)


def test_layout_is_that_of_torch(tmp_path):
    """Byte for byte, for names and sizes that move every alignment."""
    for size in (1, 13, 64, 1000):
        state = {f"layer_{i}": torch.randn(size + i).bfloat16() for i in range(5)}
        record = saved(tmp_path / "torch.ckpt", state)
        source = read_torch_zip(record, "test")
        original = record.path.read_bytes()
        contents = [original[r.offset : r.offset + r.size] for r in source.entries.values()]
        image = ZipImage([ZipEntry(n, r.size) for n, r in source.entries.items()])
        written(image, contents, tmp_path / "ours.ckpt")
        assert (tmp_path / "ours.ckpt").read_bytes() == original


def test_entries_beyond_four_gigabytes(tmp_path):
    """A sparse file that torch's own reader accepts, with data before and after 4 GiB."""
    count = (1 << 32) + 4096
    buffer = io.BytesIO()
    torch.save({"big": torch.zeros(5, dtype=torch.uint8), "small": torch.arange(10)}, buffer)
    entries, contents = [], []
    with zipfile.ZipFile(buffer) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("data.pkl"):  # BININT1 5 -> LONG1 count
                content = content.replace(b"K\x05", b"\x8a\x05" + count.to_bytes(5, "little"))
            is_big = name.endswith("data/0")
            contents.append(None if is_big else content)
            entries.append(ZipEntry(name, count if is_big else len(content)))
    path = tmp_path / "big.ckpt"
    written(ZipImage(entries), contents, path)
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded["big"].shape == (count,) and torch.equal(loaded["small"], torch.arange(10))
    found = read_torch_zip(Record(path, 0, path.stat().st_size), "test").entries
    reader = torch._C.PyTorchFileReader(str(path))
    for key in ("data/0", "data/1"):
        assert found[f"archive/{key}"].offset == reader.get_record_offset(key)


@pytest.mark.skipif(
    not hasattr(torch.serialization, "set_crc32_options"), reason="torch writes them since 2.6"
)
def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        record = saved(tmp_path / "x.ckpt", torch.ones(3))
    finally:
        torch.serialization.set_crc32_options(True)
    assert all(r.crc32 is None for r in read_torch_zip(record, "test").entries.values())


def test_retyped_pickles_load_as_the_new_dtype(tmp_path):
    state = {"a": torch.ones(4).bfloat16(), "b": torch.arange(3), "c": torch.ones(2)}
    source = read_torch_zip(saved(tmp_path / "x.ckpt", state), "test")
    changed = retype_pickle(source.pickle, lambda dtype: FLOAT32)
    entries, contents = [], []
    for name, record in source.entries.items():
        content = record.path.read_bytes()[record.offset :][: record.size]
        if name.endswith("data.pkl"):
            content = changed
        elif name.endswith("data/0"):
            content = torch.full((4,), 2.0).numpy().tobytes()
        entries.append(ZipEntry(name, len(content)))
        contents.append(content)
    written(ZipImage(entries), contents, tmp_path / "y.ckpt")
    loaded = torch.load(tmp_path / "y.ckpt", weights_only=True)
    assert loaded["a"].dtype == torch.float32 and loaded["a"].tolist() == [2.0] * 4
    assert loaded["b"].dtype == torch.int64 and loaded["c"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("isal", [True, False])
def test_checksum_of_many_pieces(monkeypatch, isal):
    if not isal:  # as in NVIDIA's containers
        monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    library = importlib.reload(crc)
    pieces = [os.urandom(size) for size in (100, 0, 1, 4096)]
    whole = library.crc32(pieces[0])
    for piece in pieces[1:]:
        whole = library.crc32_combine(whole, library.crc32(piece), len(piece))
    assert whole == zlib.crc32(b"".join(pieces))
    assert joined_crc32((zlib.crc32(piece), len(piece)) for piece in pieces) == whole
    monkeypatch.undo()
    importlib.reload(crc)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((6,), (3,)),
        ((4, 6), (2, 1)),
        ((4, 6), (1, 3)),
        ((2, 4, 6), (2, 2, 3)),
        ((3, 2, 2), (1, 2, 1)),
    ],
)
def test_blocks_become_rectangles_of_the_flattened_tensor(shape, parts):
    """Every element ends up where indexing the whole tensor finds it."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    sizes = tuple(n // p for n, p in zip(shape, parts, strict=True))
    data, patches = b"", []
    for index in product(*map(range, parts)):
        offsets = tuple(i * n for i, n in zip(index, sizes, strict=True))
        window = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        block = whole[window].contiguous().numpy().tobytes()
        record = Record(Path("x"), 0, 8 * whole.numel())
        patches += patches_of_block(shape, offsets, sizes, record, len(data), 8)
        data += block
    tensor = LogicalTensor("t", shape, INT64, tuple(patches))
    check_tiling(tensor, tensor.patches, "test")
    found = torch.full((tensor.rows, tensor.cols), -1)
    for patch in patches:
        end = patch.start + 8 * patch.rows * patch.cols
        values = torch.frombuffer(bytearray(data[patch.start : end]), dtype=torch.int64)
        rows, cols = (
            slice(patch.row, patch.row + patch.rows),
            slice(patch.col, patch.col + patch.cols),
        )
        found[rows, cols] = values.view(patch.rows, patch.cols)
    assert torch.equal(found.view(shape), whole)


@pytest.mark.parametrize(
    "places",
    [
        [(0, 0, 2, 4)],
        [(0, 0, 2, 4), (1, 0, 2, 4)],
        [(0, 0, 4, 2), (0, 1, 4, 2)],
        [(0, 0, 4, 4), (3, 3, 1, 1)],
        [(0, 0, 2, 4), (2, 0, 3, 4)],
        [(-1, 0, 4, 4)],
    ],
)
def test_gaps_and_overlaps_are_refused(places):
    record = Record(Path("x"), 0, 1000)
    patches = tuple(Patch(*place, record, 0) for place in places)
    tensor = LogicalTensor("weight", (4, 4), FLOAT32, patches)
    with pytest.raises(CheckpointError, match="weight"):
        check_tiling(tensor, patches, "model.nemo")
