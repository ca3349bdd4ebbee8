"""Checking checkpoints on all ranks at once, each reading its share of the bytes."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.intact import check_intact


def damage_of(path: Path) -> str | None:
    """What is damaged in a checkpoint, the same on every rank; None if it is intact. Collective."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        check_intact(path, rank, world_size)
        found = None
    except CheckpointError as error:
        found = str(error)
    # Every rank hears of it: one that raised alone would leave the others in their next collective.
    everyone: list[str | None] = [None] * world_size
    torch.distributed.all_gather_object(everyone, found)
    return next((damage for damage in everyone if damage is not None), None)


def refuse_damaged(*paths: str) -> None:
    """Refuse inputs whose bytes have changed on the disk. Collective.

    Raises:
        ValueError: on every rank; names the file and the tensor.
    """
    # init and sft are one file in a first iteration: it is read once.
    for path in dict.fromkeys(paths):
        damage = damage_of(Path(path))
        if damage is not None:
            raise ValueError(f"{damage}; copy or export it again")
