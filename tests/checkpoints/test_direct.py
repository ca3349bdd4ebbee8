"""Reads and writes past the page cache are those of the page cache, wherever they begin."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from nemo_warp.checkpoints.io import direct
from nemo_warp.checkpoints.io.direct import ALIGNMENT, DirectFile, pages, room_for

PLACES = [(0, 1 << 17), (1, 1 << 17), (4095, 300_001), (4096, 70_000), (8191, 65_536), (77, 12)]


@pytest.fixture
def content(tmp_path):
    """A file of random bytes that ends within a page."""
    data = np.random.default_rng(0).integers(0, 256, 500_001, dtype=np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    return data


@pytest.fixture(params=["direct", "refused on opening", "refused on use"])
def access(request, monkeypatch):
    """A file system with direct access, one without, and one that wants larger multiples."""
    refused = OSError(errno.EINVAL, "no direct access")
    counted = {"direct": 0}
    real = {name: getattr(os, name) for name in ("open", "preadv", "pwrite")}

    def open_(path, flags, *mode):
        if flags & os.O_DIRECT and request.param == "refused on opening":
            raise refused
        return real["open"](path, flags, *mode)

    def watched(name):
        def call(descriptor, *arguments):
            if os.readlink(f"/proc/self/fd/{descriptor}") and _is_direct(descriptor):
                if request.param == "refused on use":
                    raise refused
                counted["direct"] += 1
            return real[name](descriptor, *arguments)

        return call

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", watched("preadv"))
    monkeypatch.setattr(os, "pwrite", watched("pwrite"))
    return request.param, counted


def _is_direct(descriptor: int) -> bool:
    with open(f"/proc/self/fdinfo/{descriptor}") as stream:
        flags = next(line for line in stream if line.startswith("flags:"))
    return bool(int(flags.split()[1], 8) & os.O_DIRECT)


@pytest.mark.parametrize(("offset", "size"), PLACES)
def test_reads_what_is_there(tmp_path, content, access, offset, size):
    file = DirectFile(tmp_path / "file", os.O_RDONLY)
    room = pages(room_for(size))
    found = file.read(room, size, offset)
    assert np.array_equal(found, content[offset : offset + size])
    assert np.shares_memory(found, room)
    file.close()
    kind, counted = access
    assert (counted["direct"] > 0) == (kind == "direct" and size >= 1 << 16)


def test_reads_up_to_the_end_of_the_file(tmp_path, content):
    file = DirectFile(tmp_path / "file", os.O_RDONLY)
    found = file.read(pages(room_for(200_000)), 200_000, 400_000)
    assert np.array_equal(found, content[400_000:])
    assert len(file.read(pages(room_for(200_000)), 200_000, 600_000)) == 0
    file.close()


@pytest.mark.parametrize("skip", [0, 3, 4095])
@pytest.mark.parametrize(("offset", "size"), PLACES)
def test_writes_what_it_is_given_and_nothing_else(tmp_path, content, access, offset, size, skip):
    data = pages(room_for(size))[skip : skip + size]
    data[:] = np.random.default_rng(1).integers(0, 256, size)
    file = DirectFile(tmp_path / "file", os.O_RDWR)
    file.write(data, offset)
    file.close()
    expected = content.copy()
    expected[offset : offset + size] = data
    assert (tmp_path / "file").read_bytes() == expected.tobytes()
    kind, counted = access
    whole_pages = (offset + size) // ALIGNMENT - -(-offset // ALIGNMENT)
    assert (counted["direct"] > 0) == (kind == "direct" and whole_pages >= 16)


def test_a_write_cut_short_is_completed(tmp_path, content, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: len(data) // 2 + 1], at))
    data = np.random.default_rng(1).integers(0, 256, 200_000, dtype=np.uint8)
    file = DirectFile(tmp_path / "file", os.O_RDWR)
    file.write(data, 1000)
    file.close()
    assert (tmp_path / "file").read_bytes()[1000:201_000] == data.tobytes()


def test_other_errors_are_not_hidden(tmp_path, content, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    file = DirectFile(tmp_path / "file", os.O_RDWR)
    with pytest.raises(OSError, match="No space left"):
        file.write(pages(1 << 20), 0)
    file.close()


def test_reserved_space_is_there(tmp_path):
    with (tmp_path / "file").open("wb") as stream:
        direct.reserve(stream.fileno(), 1 << 20)
        assert os.fstat(stream.fileno()).st_blocks * 512 >= 1 << 20
