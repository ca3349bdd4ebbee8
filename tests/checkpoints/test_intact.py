"""Changed bytes are found before anything is computed from them."""

import pytest
from synthetic_checkpoints import tiny_weights, write_nemo, write_torch_dist

from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.intact import check_intact


def test_one_changed_bit_of_any_tensor_is_found(tmp_path):
    path = write_nemo(
        tmp_path / "a.nemo", lambda folder: write_torch_dist(folder, tiny_weights(0), tp=2)
    )
    check_intact(path)
    names = sorted(open_checkpoint(path).tensors)
    for name in (names[0], names[len(names) // 2], names[-1]):
        record = open_checkpoint(path).tensors[name].patches[0].record
        place = record.offset + record.size // 2
        with path.open("r+b") as file:
            file.seek(place)
            before = file.read(1)
            file.seek(place)
            file.write(bytes([before[0] ^ 1]))
        with pytest.raises(CheckpointError, match=r"a\.nemo is damaged: .*CRC-32"):
            check_intact(path)
        found = 0
        for rank in range(3):  # each rank reads its share, one of them meets the damage
            try:
                check_intact(path, rank, 3)
            except CheckpointError:
                found += 1
        assert found == 1, name
        with path.open("r+b") as file:
            file.seek(place)
            file.write(before)
    check_intact(path)
