"""The device a rank computes on, and the policy's sizes in the terms of `nemo_warp.core`."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import Any

import torch

from nemo_warp.core.footprint import member_footprint
from nemo_warp.core.transformer import Sizes

_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
}
"""Dense bf16 operations per second, from NVIDIA's data sheets; the first name that fits counts."""


def sizes_of(model: Any) -> Sizes:
    """Sizes of a NeMo GPT.

    Raises:
        ValueError: it has experts.
    """
    return Sizes.of_nemo(model.cfg, model.tokenizer.vocab_size)


def peak_flops() -> float | None:
    """Of this device in bf16; None without a GPU, or for one that is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((flops for known, flops in _PEAK_FLOPS.items() if known in name), None)


def memory_bytes() -> float | None:
    """Of this device; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def nearly_full() -> bool:
    """Whether torch holds nine tenths of the device, which may be in pieces that nothing fits."""
    total = memory_bytes()
    return total is not None and torch.cuda.memory_reserved() > 0.9 * total


def peak_memory() -> int:
    """Bytes that tensors took at most since the last call; without a GPU, the process ever."""
    if not torch.cuda.is_available():
        # ru_maxrss is in kilobytes on Linux, and can never be reset.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def describe_footprint(model: Any, member: Mapping[str, Any]) -> list[str]:
    """What this rank will hold, line by line, against the device's memory.

    Args:
        member: the member's configuration, plain.
    """
    try:
        found = member_footprint(sizes_of(model), member)
    except ValueError as error:
        return [f"memory of a rank: {error}"]
    head = "memory of a rank (an estimate, for the longest sequences that are allowed)"
    return [head, *found.lines(memory_bytes())]
