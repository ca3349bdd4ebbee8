"""Megatron's folders of iterations: which one is the newest, and how a merged one is loaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from nemo_warp.checkpoints.checkpoint import TRACKER
from nemo_warp.merge.plan import MergePlan
from nemo_warp.records import write_text_atomically

logger = logging.getLogger(__name__)

_ITERATION = re.compile(r"iter_(\d{7,})|(release)")
FLAGS = "--ckpt-format torch_dist --no-load-optim --no-load-rng"
"""What Megatron-LM needs to go on from weights without an optimizer."""


def megatron_reads(plan: MergePlan) -> bool:
    """Whether the outputs are folders as Megatron-LM and Megatron-Bridge have them."""
    init = plan.inputs[0]
    return init.format in ("torch_dist", "zarr") and not init.weights


def track(final: Path, inputs: Iterable[Path]) -> None:
    """Have the tracker beside an ``iter_...`` folder name it, if it may.

    A tracker that is there stays where inputs lie beside it, since a training run would go on from
    the merge, and where it names a newer iteration.

    Args:
        final: the output, by its name.
        inputs: of the merge.
    """
    match = _ITERATION.fullmatch(final.name)
    if match is None:
        return
    tracker, wanted = final.parent / TRACKER, match[2] or str(int(match[1]))
    there = tracker.read_text().strip() if tracker.is_file() else None
    if there == wanted:
        return
    folder = final.parent.resolve()
    beside = any(folder == path.resolve().parent for path in inputs)
    if there is not None and (beside or not _is_older(there, wanted)):
        logger.warning("%s names %s and was left as it is, not set to %s", tracker, there, wanted)
        return
    write_text_atomically(tracker, f"{wanted}\n")


def how_to_load(final: Path) -> str:
    """The flags with which Megatron-LM goes on from an output."""
    if _ITERATION.fullmatch(final.name):
        return f"--load {final.parent} {FLAGS}"
    return f"--load PARENT {FLAGS}, after renaming {final.name} to iter_0000001 in PARENT"


def _is_older(one: str, other: str) -> bool:
    return one.isdecimal() and other.isdecimal() and int(one) < int(other)
