"""How merged tensors are cut into pieces and written to all outputs."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from nemo_warp.checkpoints.dtypes import BFLOAT16
from nemo_warp.checkpoints.io.direct import ALIGNMENT
from nemo_warp.checkpoints.io.slabs import Slab
from nemo_warp.checkpoints.logical import LogicalTensor, Patch, Record
from nemo_warp.merge.compute import writer
from nemo_warp.merge.compute.writer import Writer

ROWS, COLS, WIDTH = 3000, 100, 2
BASE, START = 640, 192
"""Where the output has the record, and where in the record a tensor begins."""
PIECE_BYTES = 1 << 17


class Files:
    """Outputs as arrays in memory; the disk itself is tested with `DirectFile`."""

    def __init__(self, fails: bool = False, base: int = BASE):
        self.content = np.zeros(base + START + ROWS * COLS * WIDTH, np.uint8)
        self.fails, self.base, self.lock = fails, base, threading.Lock()

    def place(self, record: Record, start: int) -> int:
        return self.base + record.offset + start

    def write(self, record: Record, start: int, data: np.ndarray) -> int:
        if self.fails:
            raise OSError("no space")
        place = self.place(record, start)
        with self.lock:
            assert not self.content[place : place + len(data)].any()  # never twice
            self.content[place : place + len(data)] = data
        return len(data)


def tensor(*columns: int) -> LogicalTensor:
    """[ROWS, COLS] bfloat16, split at some columns."""
    patches, start = [], START
    for left, right in pairwise((0, *columns, COLS)):
        record = Record(Path("w"), 0, ROWS * COLS * WIDTH)
        patches.append(Patch(0, left, ROWS, right - left, record, start))
        start += ROWS * (right - left) * WIDTH
    return LogicalTensor("w", (ROWS, COLS), BFLOAT16, tuple(patches))


@pytest.fixture
def open_writer(monkeypatch):
    monkeypatch.setattr(writer, "PIECE_BYTES", PIECE_BYTES)
    opened = []

    def make(*outputs: Files) -> Writer:
        opened.append(Writer(list(outputs), 2, lambda size: None))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


@pytest.mark.parametrize("num_outputs", [1, 2, 6])
def test_inner_cuts_fall_between_the_outputs_pages(open_writer, num_outputs):
    pieces = list(open_writer(*[Files()] * num_outputs).pieces(tensor(), Slab(7, ROWS)))
    assert (pieces[0].start, pieces[-1].stop) == (7 * COLS, ROWS * COLS)
    assert all(one.stop == two.start for one, two in pairwise(pieces))
    places = [BASE + START + piece.start * WIDTH for piece in pieces]
    assert all(place % ALIGNMENT == 0 for place in places[1:])
    assert [piece.skip * WIDTH for piece in pieces] == [place % ALIGNMENT for place in places]
    sizes = [piece.length * WIDTH * num_outputs for piece in pieces]
    assert max(sizes) <= PIECE_BYTES


def test_a_slab_that_begins_inside_a_page_leaves_no_rest_for_a_piece_of_its_own(open_writer):
    one, rows = open_writer(Files()), 4 * PIECE_BYTES // (COLS * WIDTH)
    pieces = list(one.pieces(tensor(), Slab(7, 7 + rows)))
    assert len(pieces) == 4
    assert max(piece.length for piece in pieces) * WIDTH <= PIECE_BYTES + ALIGNMENT
    sizes = {len(one.room(tensor(), piece)) for piece in pieces}  # more than one has to wait for
    assert len(sizes) == 1


def test_a_tensor_split_by_columns_is_cut_into_whole_rows(open_writer):
    pieces = list(open_writer(Files()).pieces(tensor(30, 60), Slab(0, ROWS)))
    assert len(pieces) > 2
    assert all(piece.start % COLS == 0 and piece.stop % COLS == 0 for piece in pieces)


@pytest.mark.parametrize("base", [BASE, BASE + 1])  # elements may lie across pages
@pytest.mark.parametrize("columns", [(), (30, 60)])
def test_everything_arrives_where_it_belongs(open_writer, columns, base):
    target, outputs = tensor(*columns), [Files(base=base), Files(base=base)]
    values = np.random.default_rng(0).integers(1, 255, (2, ROWS, COLS * WIDTH)).astype(np.uint8)
    one, started = open_writer(*outputs), []
    for piece in one.pieces(target, Slab(0, ROWS)):
        room = one.room(target, piece)
        bounds = slice(piece.start * WIDTH, piece.stop * WIDTH)
        rows = piece.within(room, 2, WIDTH)
        rows[:] = values.reshape(2, -1)[:, bounds]
        started += one.write(target, piece, rows, room)
    assert sum(sum(future.result(timeout=60)) for future in started) == values.size
    for output, expected in zip(outputs, values, strict=True):
        for patch in target.patches:
            size = patch.rows * patch.cols * WIDTH
            found = output.content[base + patch.start :][:size].reshape(ROWS, -1)
            left = patch.col * WIDTH
            assert np.array_equal(found, expected[:, left : left + patch.cols * WIDTH])


def test_memory_comes_back_from_writes_that_fail(open_writer):
    target = tensor()
    one = open_writer(Files(), Files(fails=True))
    for piece in list(one.pieces(target, Slab(0, ROWS))) * 3:  # more than there is memory for
        room = one.room(target, piece)
        good, bad = one.write(target, piece, np.zeros((2, 10), np.uint8), room)
        assert good.result(timeout=60)
        with pytest.raises(OSError, match="no space"):
            bad.result(timeout=60)
