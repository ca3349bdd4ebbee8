"""Groups that do not fit in memory are told before the merge and read twice; same files."""

import logging
from pathlib import Path

import pytest
from synthetic_checkpoints import tiny_weights, write_nemo, write_torch_dist

from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.merge import merge
from nemo_warp.merge.compute import budget, engine
from nemo_warp.merge.report import meter

SIZES = {"layers": 3, "hidden": 40, "ffn": 56, "vocab": 1000}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    init = tiny_weights(0, **SIZES)
    weights = [init, *(tiny_weights(seed, **SIZES, around=init) for seed in (1, 2))]
    return [
        write_nemo(folder / f"{i}.nemo", lambda to, w=w, i=i: write_torch_dist(to, w, tp=2**i))
        for i, w in enumerate(weights)
    ]


@pytest.mark.parametrize("granularity", ["layer", "model"])
@pytest.mark.parametrize("gigabytes", [1e-6, 1.2e-4])  # nothing fits; the layers do
def test_groups_that_do_not_fit(models, tmp_path, caplog, gigabytes, granularity):
    def run(name: str, **options) -> bytes:
        output = tmp_path / f"{name}.nemo"
        options |= {"granularity": granularity, "rounding": "stochastic", "verify": "full"}
        merge(models[0], models[1:], str(output), vocab_size=990, **options)
        return output.read_bytes()

    once = run("once")
    assert "read twice" not in caplog.text
    taken, real = [], engine.Memory.take

    def take(self, size, ticket=None):
        taken.append(self.limit)
        return real(self, size, ticket)

    engine.Memory.take = take
    try:
        assert run("twice", memory_gb=gigabytes, workers=2) == once
    finally:
        engine.Memory.take = real
    assert "groups are read twice: embedding alone takes" in caplog.text
    assert max(taken) < 60e6


def test_damage_in_the_second_reading_is_found(models, tmp_path, monkeypatch):
    """The bytes that are merged are those that are checked."""
    from nemo_warp.checkpoints.io.direct import DirectFile

    reads, real = set(), DirectFile.read

    def read(self, room, size, offset):
        found = real(self, room, size, offset)
        if (self, size, offset) in reads and size > 20_000:
            found[100] ^= 1
        reads.add((self, size, offset))
        return found

    monkeypatch.setattr(DirectFile, "read", read)
    with pytest.raises(CheckpointError, match="CRC-32"):
        merge(models[0], models[1:], str(tmp_path / "out.nemo"), memory_gb=1e-6, vocab_size=990)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_shared_by_the_ranks_of_a_node(models, monkeypatch, caplog):
    monkeypatch.setattr(budget, "free_memory", lambda: 400_000)
    caplog.set_level(logging.INFO)
    options = {"dry_run": True, "vocab_size": 990}
    merge(models[0], models[1:], "nothing.nemo", **options)
    assert "read twice" not in caplog.text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    merge(models[0], models[1:], "nothing.nemo", **options)
    assert "groups are read twice: embedding alone takes" in caplog.text
    monkeypatch.undo()
    assert 1e6 < budget.free_memory() < 1e14


def test_the_share_of_the_floor_is_left_out_where_it_cannot_be_measured(
    models, tmp_path, monkeypatch
):
    def timing(name: str):
        return merge(models[0], models[1:], str(tmp_path / name), vocab_size=990).timing

    small = timing("small.nemo")
    assert small["floor_seconds"] is small["floor_fraction"] is None
    assert "%" not in meter.summary(small)
    monkeypatch.setattr(meter, "MIN_BYTES", 0)
    monkeypatch.setattr(meter, "_PROBE_SHARE", 1)
    monkeypatch.setattr(meter, "_PIECE", 1 << 12)
    rates = [(1e-9, 2e-9), (1.2e-9, 1.8e-9)]
    monkeypatch.setattr(meter.Meter, "_probe", lambda self: rates.pop())
    steady = timing("steady.nemo")
    read, written = steady["bytes_read"], steady["bytes_written"]
    assert steady["floor_seconds"] == pytest.approx(1.1e-9 * read + 1.9e-9 * written)
    assert "% of the speed of reading and writing alone" in meter.summary(steady)
    rates += [(1e-9, 2e-9), (1.6e-9, 2e-9)]
    assert timing("unsteady.nemo")["floor_seconds"] is None
    monkeypatch.undo()
    rate = meter._read_rate(models[0], 2), meter._write_rate(tmp_path, 2)
    assert all(0 < value < 1e-3 for value in rate)
    assert len(list(tmp_path.iterdir())) == 3
