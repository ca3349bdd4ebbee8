"""Megatron's folders of iterations: which one is the newest, and how a merged one is loaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.iterations import (
    BRIDGE_TRACKER,
    TRACKER,
    TRAIN_STATE,
    newest_iteration,
    read_train_state,
    train_state_at,
)
from nemo_warp.merge.plan import MergePlan
from nemo_warp.records import write_bytes_atomically, write_text_atomically

logger = logging.getLogger(__name__)

_ITERATION = re.compile(r"iter_(\d{7,})|(release)")
FLAGS = "--ckpt-format torch_dist --no-load-optim --no-load-rng"
"""What Megatron-LM needs to go on from weights without an optimizer."""
BRIDGE_OPTION = "checkpoint.pretrained_checkpoint"
"""The same of Megatron-Bridge: it then asks for no optimizer, and counts iterations from 0."""


def megatron_reads(plan: MergePlan) -> bool:
    """Whether the outputs are folders as Megatron-LM and Megatron-Bridge have them."""
    init = plan.inputs[0]
    return init.format in ("torch_dist", "zarr") and not init.weights


def track(final: Path, inputs: Iterable[Path]) -> None:
    """Have the trackers beside an ``iter_...`` folder name it, if they may.

    Trackers that are there stay where inputs lie beside them, since a training run would go on from
    the merge, and where they name a newer iteration. Where the init is Megatron-Bridge's, so is the
    output, and Bridge's tracker is written as well: Bridge follows it rather than the text, and
    takes no iteration 0 (a converted model's) from the text.

    Args:
        final: the output, by its name.
        inputs: of the merge.
    """
    match = _ITERATION.fullmatch(final.name)
    if match is None:
        return
    folder, wanted = final.parent.resolve(), match[2] or str(int(match[1]))
    state, own = None, final / TRAIN_STATE
    try:
        there = newest_iteration(folder)
        if own.is_file() and wanted != "release":
            state = train_state_at(read_train_state(own), int(wanted))
    except CheckpointError as error:
        logger.warning("the trackers in %s were left as they are: %s", folder, error)
        return
    beside = any(folder == path.resolve().parent for path in inputs)
    if there not in (None, wanted) and (beside or not _is_older(str(there), wanted)):
        logger.warning(
            "%s names %s and was left as it is, not set to %s",
            final.parent / TRACKER,
            there,
            wanted,
        )
        return
    if state is not None:
        # First, as Bridge does: of two that differ, Bridge goes by this one.
        write_bytes_atomically(final.parent / BRIDGE_TRACKER, state)
    elif (final.parent / BRIDGE_TRACKER).is_file() and there != wanted:
        logger.warning(
            "%s names %s, which Megatron-Bridge loads, and cannot name %s; it was left as it is",
            *(final.parent / BRIDGE_TRACKER, there, final.name),
        )
        return
    if not (final.parent / TRACKER).is_file() or there != wanted:
        write_text_atomically(final.parent / TRACKER, f"{wanted}\n")


def how_to_load(final: Path) -> str:
    """What to tell Megatron-LM, or Megatron-Bridge, to go on from an output."""
    place, first = str(final.parent), ""
    if not _ITERATION.fullmatch(final.name):
        place, first = "PARENT", f", after renaming {final.name} to iter_0000001 in PARENT"
    if (final / TRAIN_STATE).is_file():
        return f"Megatron-Bridge loads it with {BRIDGE_OPTION}={place}{first}"
    return f"Megatron-LM loads it with --load {place} {FLAGS}{first}"


def _is_older(one: str, other: str) -> bool:
    return one.isdecimal() and other.isdecimal() and int(one) < int(other)
