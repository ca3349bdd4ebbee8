"""Seeds and the order of prompts: functions of (seed, step), so that a resumed run repeats nothing.

There is no state to save. Step t of member seed s always reads the same prompts and draws the same
random numbers, whatever happened before and however the batch is split over ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts; changing any part gives an unrelated seed."""
    # Not hash(): Python salts it anew in every process, so ranks would disagree.
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    # 63 bits: it has to fit a signed 64-bit integer (torch tensors, TensorRT-LLM, JSON readers).
    return int.from_bytes(digest[:8], "big") >> 1


@lru_cache(maxsize=2)  # a step reads one epoch, or the end of one and the beginning of the next
def epoch_order(seed: int, epoch: int, num_prompts: int) -> tuple[int, ...]:
    """The permutation of ``range(num_prompts)`` that one epoch reads."""
    # A generator of its own, on the CPU: torch's global one is moved on by sampling, and CUDA's
    # gives another permutation for the same seed. NeMo-Aligner has one model.seed (1234) for all
    # runs, so that members with its defaults read the same prompts in the same order.
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return tuple(torch.randperm(num_prompts, generator=generator).tolist())


def prompt_indices(seed: int, start: int, count: int, num_prompts: int) -> list[int]:
    """Prompts number ``start`` to ``start + count - 1`` of the member's endless stream.

    Every prompt is read once per epoch; a batch may straddle two epochs.
    """
    places = (divmod(position, num_prompts) for position in range(start, start + count))
    return [epoch_order(seed, epoch, num_prompts)[offset] for epoch, offset in places]


def order_hash(prompts: Sequence[str], seed: int) -> str:
    """SHA-256 (hex) of the prompts in the order of epoch 0: two members must not share it."""
    digest = hashlib.sha256()
    for index in epoch_order(seed, 0, len(prompts)):
        # The zero byte keeps ["ab", "c"] from equalling ["a", "bc"].
        digest.update(prompts[index].encode() + b"\0")
    return digest.hexdigest()
