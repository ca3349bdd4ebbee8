"""How fast a step was: tokens per second, model FLOPs utilisation, memory."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from nemo_warp.aligner.policy.device import peak_flops, peak_memory, sizes_of
from nemo_warp.aligner.sampling.rollouts import Rollouts
from nemo_warp.core.transformer import Sizes


class Throughput:
    """Counts a step's tokens and turns its seconds into rates.

    Args:
        model: the policy.
        ranks: of the whole job.
        peak: operations per second of one device, see `device.peak_flops`; None: unknown.
    """

    def __init__(self, model: Any, ranks: int, peak: float | None = None) -> None:
        self._sizes: Sizes | None = None
        with contextlib.suppress(ValueError):  # it has experts: no utilisation then
            self._sizes = sizes_of(model)
        self._devices_peak = ranks * peak if peak else None
        self._generated = self._trained = 0
        self._operations = 0.0

    @classmethod
    def of_job(cls, model: Any) -> Throughput:
        """For this job's ranks on this kind of device."""
        return cls(model, torch.distributed.get_world_size(), peak_flops())

    def count(self, rollouts: Rollouts) -> None:
        """Add a rollout batch that is generated and trained on once."""
        tokens = int(rollouts.lengths.sum())
        self._generated += int(rollouts.response_lengths.sum())
        self._trained += tokens
        if self._sizes is not None:
            length = tokens / len(rollouts.lengths)
            # Forward 1, backward 2: gradients to inputs and to weights.
            self._operations += 3 * self._sizes.forward_flops(tokens, length)

    def take(self, seconds: dict[str, float]) -> dict[str, float]:
        """A step's seconds and, beside them, its rates.

        Args:
            seconds: by part, of `Timings.take`.

        Returns:
            ``seconds`` with ``generated_tokens_per_second`` (response tokens over the seconds of
            ``rollout``) and ``trained_tokens_per_second`` (prompts and responses, without padding,
            over those of ``train``), of all devices together; ``flops_utilisation`` of training,
            where the device is known; ``peak_memory_bytes`` of this rank since the last call.
        """
        found = dict(seconds)
        for name, tokens, part in (
            ("generated_tokens_per_second", self._generated, "rollout"),
            ("trained_tokens_per_second", self._trained, "train"),
        ):
            if tokens and seconds.get(part):
                found[name] = tokens / seconds[part]
        if self._operations and self._devices_peak and seconds.get("train"):
            found["flops_utilisation"] = self._operations / seconds["train"] / self._devices_peak
        found["peak_memory_bytes"] = peak_memory()
        self._generated = self._trained = 0
        self._operations = 0.0
        return found
