"""Whether a checkpoint's bytes are what its writer wrote: the CRC-32 of every torch.save entry.

torch writes a CRC-32 beside each tensor and never compares it when it reads (torch.load has the
check compiled out), so a member would train on bytes that changed on
the disk without any error.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from nemo_warp.checkpoints.containers.archive import RangeReader, open_archive
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.formats.torch_dist_index import TorchDistIndex
from nemo_warp.checkpoints.record import Record

# zipfile reads in pieces of its own; a forged length is refused above this.
_MAX_READ = 1 << 26


def check_intact(path: Path, rank: int = 0, world_size: int = 1) -> None:
    """Read a checkpoint's torch.save files whole and compare their CRC-32s.

    Works on ``.nemo`` tars and folders, and on training checkpoints. Zarr has no checksums; only
    that its files are there is checked when it is read.

    Args:
        rank, world_size: this process reads every ``world_size``-th file only; when all ranks have
            returned, everything was read once.

    Raises:
        CheckpointError: names the file, and the tensor where it belongs to one.
    """
    for number, (name, record) in enumerate(_zips(path)):
        # By file and not by byte range: a CRC-32 is over a whole entry.
        if number % world_size == rank:
            _check(name, record, path)


def _zips(path: Path) -> Iterator[tuple[str, Record]]:
    """(what it is, where it lies) of every torch.save file, in stored order."""
    members = open_archive(path).members
    for name, record in members.items():
        folder, _, file = name.rpartition("/")
        if file == ".metadata":
            inside = {
                other.rpartition("/")[2]: member
                for other, member in members.items()
                if other.rpartition("/")[0] == folder
            }
            for item in TorchDistIndex(inside, str(path)).items:
                yield f"{item.key} in {item.file}", item.record
        elif file in ("common.pt", "model_weights.ckpt"):
            yield name, record


def _check(name: str, record: Record, path: Path) -> None:
    damaged = f"{path} is damaged: {name} "
    reader = RangeReader(record, _MAX_READ)
    try:
        with zipfile.ZipFile(reader) as archive:
            # In memory of one piece: testzip reads every entry through and compares, extracting
            # nothing.
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{damaged}cannot be read ({error})") from error
    finally:
        reader.close()
    if broken is not None:
        raise CheckpointError(f"{damaged}does not match its CRC-32 ({broken})")
