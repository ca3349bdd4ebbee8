"""Folders of Megatron-LM's and Megatron-Bridge's iterations, and the files that name the newest.

Megatron-LM writes a tracker of text. Megatron-Bridge (training/checkpointing.py) writes, in this
order, the weights, ``train_state.pt`` beside them, a copy of it as ``latest_train_state.pt`` in the
parent, Megatron-LM's tracker, and ``run_config.yaml`` beside the weights. It reads its own tracker
first, and the text where there is none.
"""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from nemo_warp.checkpoints.containers.torch_zip import read_torch_zip
from nemo_warp.checkpoints.containers.unpickling import StoredTensor
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.record import Record

TRACKER = "latest_checkpointed_iteration.txt"
BRIDGE_TRACKER = "latest_train_state.pt"
TRAIN_STATE = "train_state.pt"
RUN_CONFIG = "run_config.yaml"

_MAX_TRACKER_BYTES = 32
_MAX_STATE_BYTES = 1 << 20  # Megatron-Bridge writes 3.5 kB
_COUNTERS = ("int32", "int64", "float32", "float64", "bool")


def tracked_iteration(path: Path) -> Path:
    """The ``iter_…`` folder that the trackers in ``path`` name; ``path`` itself without one.

    Raises:
        CheckpointError: a tracker cannot be read, two differ, or they name no folder that is there.
    """
    named = newest_iteration(path)
    if named is None:
        return path
    folder = named if named == "release" else f"iter_{int(named):07d}"
    if not (path / folder).is_dir():
        tracker = path / (BRIDGE_TRACKER if (path / BRIDGE_TRACKER).is_file() else TRACKER)
        raise CheckpointError(f"{tracker} names {folder}, which is not in {path}")
    return path / folder


def newest_iteration(parent: Path) -> str | None:
    """What the trackers in a folder name: a number, ``release``, or None where there is none.

    Raises:
        CheckpointError: a tracker cannot be read, or there are two and they differ.
    """
    text, state = parent / TRACKER, parent / BRIDGE_TRACKER
    from_text = _read_text(text) if text.is_file() else None
    if not state.is_file():
        return from_text
    from_state = str(int(read_train_state(state)["step"]))
    if from_text is not None and from_text != from_state:
        raise CheckpointError(
            f"{text} names {from_text} and {state} names {from_state}, perhaps because a save was "
            "interrupted or something else writes here; name the iter_ folder that you mean"
        )
    return from_state


def refuse_interrupted_save(path: Path, names: Collection[str]) -> None:
    """Raise if Megatron-Bridge began to write what goes beside the weights and did not end.

    Args:
        path: of the checkpoint, for the message.
        names: of its files.
    """
    if TRAIN_STATE in names and RUN_CONFIG not in names:
        raise CheckpointError(
            f"{path} holds {TRAIN_STATE} and no {RUN_CONFIG}, which Megatron-Bridge writes after "
            "it and cannot load a checkpoint without: its save was interrupted"
        )


def read_train_state(path: Path) -> dict[str, np.ndarray]:
    """The counters of Megatron-Bridge's training by name, []; nothing in the file is run.

    Raises:
        CheckpointError: it is damaged or hostile, or no table of scalars with a ``step``.
    """
    size = path.stat().st_size
    if size > _MAX_STATE_BYTES:
        raise CheckpointError(f"{path} has {size} bytes, too many for a training state")
    data = path.read_bytes()
    stored = read_torch_zip(Record(path, 0, size), str(path))
    if not isinstance(stored.root, dict):
        raise CheckpointError(f"{path} is no table of counters")
    found = {}
    for name, value in stored.root.items():
        if not _is_counter(name, value):
            raise CheckpointError(f"{path} holds {name!r}, which is no counter of a training state")
        place = stored.storage(value.storage.key)
        stored_bytes = data[place.offset : place.offset + place.size]
        if len(stored_bytes) != value.storage.dtype.itemsize:
            raise CheckpointError(f"{path}: {name} is cut short")
        found[name] = np.frombuffer(stored_bytes, value.storage.dtype.name).reshape(())
    if "step" not in found or found["step"].dtype.kind != "i" or found["step"] < 0:
        raise CheckpointError(f"{path} does not say at which step it was written")
    return found


def train_state_at(state: dict[str, np.ndarray], step: int) -> bytes:
    """The same training state at another step, as Megatron-Bridge's tracker has it."""
    import torch  # only here: a merge of other checkpoints does without it

    moved = {**state, "step": np.array(step, state["step"].dtype)}
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(value.copy()) for name, value in moved.items()}, buffer)
    return buffer.getvalue()


def _is_counter(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, StoredTensor)
        and value.shape == ()
        and value.offset == 0
        and value.storage.numel == 1
        and value.storage.dtype.name in _COUNTERS
    )


def _read_text(tracker: Path) -> str:
    found = tracker.read_bytes()[:_MAX_TRACKER_BYTES].decode(errors="replace").strip()
    # Megatron-LM writes a number, or "release" for a converted model (training/checkpointing.py);
    # a folder's name, which neither writes, says the same.
    number = found.removeprefix("iter_")
    if number.isascii() and number.isdigit():
        return str(int(number))
    if found != "release":
        raise CheckpointError(f"{tracker} names {found!r}, which is neither a number nor 'release'")
    return found
