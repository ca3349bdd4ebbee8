"""The KL reference of a member: the policy's own moving average, the SFT policy, or nothing.

WARP, equation (EMA): theta_ema <- (1 - mu) * theta_ema + mu * theta, once per optimizer step.
Always fp32: in bf16 with mu = 0.01 the anchor would hardly move.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from nemo.utils import logging

from nemo_warp.aligner.weights.sharded import ShardedWeights

STATE_PREFIX = "anchor."
"""Prefix of the anchor's keys in training checkpoints."""

_PROBE_ELEMENTS = 65536
_FLAT_SHARE = 0.1  # linear drift gives 0.37 after 1/mu steps; a bf16 anchor 0.02


class EmaAnchor:
    """Exponential moving average of the policy.

    Args:
        weights: what it starts from, and then owns.
        update_rate: mu in [0, 1]; 0 is a static anchor, 1 follows the policy exactly.
    """

    def __init__(self, weights: ShardedWeights, update_rate: float) -> None:
        if not 0.0 <= update_rate <= 1.0:
            raise ValueError(f"ema_update_rate is {update_rate}, expected 0 to 1")
        self.weights = weights
        self.update_rate = update_rate
        # The probe compares with the start of this process, not of the run: the start of the run is
        # nowhere in memory after a resume.
        self._reset_probe()

    def update_(self) -> None:
        """One EMA step towards the policy's present weights; call once per optimizer step."""
        # mu = 0 is skipped, not multiplied: a static anchor has to stay the same bit for bit.
        if self.update_rate > 0.0:
            self.weights.lerp_model_(self.update_rate)
        self._updates += 1
        # 1/mu updates are the EMA's time constant: by then it must have followed visibly. Measured
        # in a simulation of bf16 at mu = 0.01: an fp32 anchor travels 95 % of the way in 300 steps,
        # a bf16 one hardly moves, and the logs of the KL look healthy in both cases.
        if self.update_rate > 0.0 and self._updates == math.ceil(1 / self.update_rate):
            self._check_moving()

    def sharded_state_dict(self) -> dict[str, Any]:
        """For the training checkpoint."""
        return self.weights.sharded_state_dict(STATE_PREFIX)

    def load_state_dict_(self, state_dict: dict[str, Any]) -> None:
        """From the training checkpoint, in place."""
        self.weights.load_state_dict_(state_dict, STATE_PREFIX)
        self._reset_probe()

    def _reset_probe(self) -> None:
        self.flat: bool | None = None
        """After about 1/mu updates: whether the anchor failed to follow the policy."""
        self._updates = 0
        self._start = self._probe(self.weights)

    def _probe(self, weights: ShardedWeights) -> torch.Tensor:
        # Enough weights to tell 0.37 from 0.02, and a copy that costs 256 kB instead of a second
        # model.
        stride = max(1, weights.shard.numel() // _PROBE_ELEMENTS)
        return weights.shard[::stride].clone()

    def _check_moving(self) -> None:
        """Compare how far anchor and policy have come since the start of this process."""
        policy = self.weights.clone()
        policy.copy_from_model_()
        distances = torch.stack(
            [
                (self._probe(self.weights) - self._start).double().square().sum(),
                (self._probe(policy) - self._start).double().square().sum(),
            ]
            # NCCL reduces device tensors only, and an offloaded slice is on the host.
        ).to(torch.cuda.current_device())
        # Over all ranks, so that every rank comes to the same verdict (it is in
        # the metrics).
        torch.distributed.all_reduce(distances)
        moved, travelled = distances.sqrt().tolist()
        self.flat = moved <= _FLAT_SHARE * travelled
        if self.flat:
            logging.error(
                f"ALARM: after {self._updates} updates with ema_update_rate {self.update_rate} the "
                f"anchor has moved {moved:.3g} while the policy moved {travelled:.3g} (L2, sampled "
                "weights). A flat anchor ties the policy to its initialisation; check the learning "
                "rate and that updates run."
            )


def describe_memory(weights: dict[str, ShardedWeights]) -> str:
    """What the reference weights cost on this rank, for the start-up log."""
    parts = [f"{name} {store.nbytes / 2**20:.1f} MiB" for name, store in weights.items()]
    return "reference weights on each rank (fp32, split over data parallel): " + ", ".join(parts)
