"""Training checkpoints: policy, optimizer, scheduler and anchor in one distributed checkpoint.

    checkpoints/step_00000040/    Megatron's torch_dist files, trainer_state.json

A checkpoint is written under a temporary name, fsynced and renamed, so one that has its final name
is complete; nothing about its state is in its name but the step it belongs to, and that is checked
against ``trainer_state.json``. The anchor lies in the same files as the policy: a policy can never
meet another step's anchor.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from nemo.utils import logging
from torch.distributed.checkpoint.api import CheckpointException

from nemo_warp.aligner.weights.anchor import EmaAnchor
from nemo_warp.records import RecordError, fsync_directory, write_json_atomically

STATE_FILE = "trainer_state.json"
_UNREADABLE = (
    CheckpointingException,  # Megatron's
    # KeyError and RuntimeError come from Megatron's and torch's planners, for a missing tensor and
    # for one of another shape; OSError and EOFError from files that are gone or cut short.
    CheckpointException,  # torch's, which is no Exception
    KeyError,
    OSError,
    EOFError,
    RuntimeError,
)
_NAME = re.compile(r"step_(\d{8})")
_FULL_BYTES = 1 << 20
"""Less than this is full: a writer was stopped by its last block, not by the last byte."""


def completed_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    # Names with a leading dot, ".step_00000040.writing", do not match: they were not finished.
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's own state.

    Raises:
        RecordError: it is missing, malformed, or of another step than the directory's name says.
    """
    path = checkpoint / STATE_FILE
    try:
        state = json.loads(path.read_text())
        step = int(state["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"{path} cannot be read ({error}); remove {checkpoint} to resume from an "
            "older checkpoint"
        ) from error
    if checkpoint.name != checkpoint_name(step):
        raise RecordError(f"{path} is of step {step}, but lies in {checkpoint.name}; was it moved?")
    return state


def checkpoint_name(step: int) -> str:
    """``step_00000040``."""
    return f"step_{step:08d}"


def save(
    directory: Path, model: Any, anchor: EmaAnchor | None, state: dict[str, Any], keep: int
) -> Path:
    """Write and publish a checkpoint, then remove all but the newest ``keep``. Collective.

    One that is already there is complete, and of the same step of the same run: it stays.
    """
    # Saving is asked for twice at one step when an interval's save and a stop coincide.
    final = directory / checkpoint_name(state["step"])
    if final.exists():
        return final
    temporary = directory / f".{final.name}.writing"
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        # Emptied first: Megatron-core 0.11 refuses to save into a folder that has files.
        temporary.mkdir(parents=True)
    torch.distributed.barrier()
    with telling_full_disks(directory):
        strategy = model.trainer.strategy
        strategy.checkpoint_io.save_checkpoint(_sharded_state(model, anchor), str(temporary))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        with telling_full_disks(directory):
            # After Megatron's files and before the rename: a directory under its final name has
            # both.
            write_json_atomically(temporary / STATE_FILE, state)
            publish_directory(temporary, final)
        # Only after the new one was published: at every moment there is one to resume from.
        for old in completed_checkpoints(directory)[:-keep]:
            _remove(old)
    torch.distributed.barrier()
    return final


def _remove(old: Path) -> None:
    """Remove a checkpoint; one that cannot be removed is no reason to end a run."""
    try:
        shutil.rmtree(old)
    except OSError as error:
        logging.warning(f"cannot remove the old checkpoint {old} ({error}); remove it by hand")


@contextmanager
def telling_full_disks(directory: Path) -> Iterator[None]:
    """Turn any error that a writer raises on a full disk into one sentence.

    torch raises "unexpected pos 704 vs 598" or "file write failed", and Megatron's writer processes
    pass that on: the error need not name the cause, so the free space is looked up.

    Raises:
        RecordError: the disk, or the quota, of ``directory`` is full.
    """
    try:
        yield
    except Exception as error:
        # Looked at after the failure, when what the writer freed in its clean-up counts as well; so
        # a little room is still called full.
        free = shutil.disk_usage(directory).free
        if _is_full(error) or free < _FULL_BYTES:
            raise RecordError(
                f"no space left on the disk of {directory} ({free / 1e6:.0f} MB free): make room "
                "and run it again, it goes on from its newest checkpoint"
            ) from error
        raise


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # Megatron's writer processes and torch wrap the OSError in errors of their own.
        error = error.__cause__ or error.__context__
    return False


def publish_directory(temporary: Path, final: Path) -> None:
    """Make all files of ``temporary`` durable and give it its final name."""
    for path in temporary.rglob("*"):
        # torch_dist files were written by other processes; fsync flushes what other processes
        # wrote, too.
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    # The directory's own entry becomes durable only with the fsync of its parent below.
    temporary.rename(final)
    fsync_directory(final.parent)


def load(checkpoint: Path, model: Any, anchor: EmaAnchor | None) -> None:
    """Restore model, optimizer, scheduler and anchor in place; any TP/PP/DP. Collective.

    Raises:
        RecordError: the checkpoint lacks something, the anchor above all: a policy never goes on
            with an anchor that was silently reset.
    """
    io = model.trainer.strategy.checkpoint_io
    if anchor is not None:
        _load_anchor(checkpoint, io, anchor)
    state: dict[str, Any] = {
        "state_dict": model.sharded_state_dict(),
        "optimizer_states": [_sharded_optimizer(model, is_loading=True)],
    }
    try:
        loaded = io.load_checkpoint(str(checkpoint), sharded_state_dict=state)
    except _UNREADABLE as error:
        raise RecordError(f"{checkpoint} cannot be restored: {error}") from error
    model.on_load_checkpoint(loaded)
    optimizer = model.optimizers(use_pl_optimizer=False)
    state = loaded["optimizer_states"][0]
    if not model.use_mcore_dist_optim:  # Megatron's keeps its steps by itself
        state = _with_step(state, loaded["optimizer_step"])
    optimizer.load_state_dict(state)
    model.lr_schedulers().load_state_dict(loaded["lr_schedulers"][0])
    logging.info(f"resumed from {checkpoint}")


def _load_anchor(checkpoint: Path, io: Any, anchor: EmaAnchor) -> None:
    try:
        loaded = io.load_checkpoint(
            str(checkpoint), sharded_state_dict={"anchor": anchor.sharded_state_dict()}
        )
    except _UNREADABLE as error:
        raise RecordError(
            f"{checkpoint} holds no complete anchor ({error}). Resuming without it would silently "
            "reset the KL reference to the initialisation; resume from another checkpoint, or "
            "start the member again in a new directory"
        ) from error
    anchor.load_state_dict_(loaded["anchor"])


def _sharded_state(model: Any, anchor: EmaAnchor | None) -> dict[str, Any]:
    state = {
        "state_dict": model.sharded_state_dict(),
        "optimizer_states": [_sharded_optimizer(model, is_loading=False)],
        "optimizer_step": _common_step(model.optimizers(use_pl_optimizer=False)),
        "lr_schedulers": [model.lr_schedulers().state_dict()],
    }
    if anchor is not None:
        state["anchor"] = anchor.sharded_state_dict()
    return state


def _sharded_optimizer(model: Any, is_loading: bool) -> dict[str, Any]:
    optimizer = model.optimizers(use_pl_optimizer=False)
    with _without_steps(optimizer):
        return model.trainer.strategy.optimizer_sharded_state_dict(
            unsharded_optim_state=None if is_loading else optimizer.state_dict(),
            is_loading=is_loading,
        )


@contextmanager
def _without_steps(optimizer: Any) -> Iterator[None]:
    """Hide the step counters that torch's Adam keeps per parameter.

    Megatron-core 0.11 wants every tensor of an optimizer's state in the shape of its parameter
    (dist_checkpointing/optimizer.py l.92); NeMo's own optimizers count per group.
    """
    step = _common_step(optimizer)
    if step is None:
        yield
        return
    for state in _parameter_states(optimizer):
        state.pop("step", None)
    try:
        yield
    finally:
        for state in _parameter_states(optimizer):
            state["step"] = torch.tensor(step)


def _common_step(optimizer: Any) -> float | None:
    """The step counter of torch's Adam, the same for all parameters; None for other optimizers."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
        return None
    steps = {float(state["step"]) for state in _parameter_states(optimizer) if "step" in state}
    assert len(steps) <= 1, f"parameters were updated {steps} times"
    return steps.pop() if steps else 0.0


def _with_step(state: dict[str, Any], step: float | None) -> dict[str, Any]:
    """A loaded optimizer state, torch's step counters put back in place."""
    if step is not None:
        for parameter_state in state.get("optimizer", state)["state"].values():
            parameter_state["step"] = torch.tensor(step)
    return state


def _parameter_states(optimizer: Any) -> list[dict[str, Any]]:
    """Per-parameter states of torch's Adam, also behind NeMo's fp32-masters wrapper."""
    return list(getattr(optimizer, "optimizer", optimizer).state.values())
