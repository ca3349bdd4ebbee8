"""The line from a base to the SLERP, in memory: one loading serves every eta and kappa."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from nemo_warp.aligner.policy.build import Policy, build_policy
from nemo_warp.aligner.weights.intact import refuse_damaged
from nemo_warp.config import overlaid
from nemo_warp.schema.evaluation import Front
from nemo_warp.schema.member import Member

# Nothing is trained, and none is made; but NeMo's configuration wants one.
_OPTIMIZER = {"name": "adamw", "lr": 1e-6, "betas": [0.9, 0.95], "weight_decay": 0.0}


class Line:
    """The policies (1 - eta) * base + eta * slerp, for the bases ``init`` and ``sft``.

    Args:
        config: of an evaluation; ``base``, ``slerp`` and ``sft`` are read. Collective.

    Attributes:
        policy: the model whose weights `at` replaces.
        sft: weights of the SFT policy.
    """

    def __init__(self, config: Front) -> None:
        others = tuple(p for p in (config.slerp, config.sft) if p != config.base)
        optimizer = {**_OPTIMIZER, "warmup_steps": 0, "extra": {}}
        whole = cast("Member", overlaid(config, {"init": config.base, "optim": optimizer}))
        self.policy: Policy
        self.policy, shards = build_policy(
            whole, config.evaluation.num_prompts, 1, others, trains=False
        )
        refuse_damaged(config.base, config.slerp, config.sft)
        self.sft = self.policy.other_weights(shards.get(config.sft))
        self._slerp = self.policy.other_weights(shards.get(config.slerp))
        self._bases = {"init": self.policy.other_weights(None), "sft": self.sft}
        if not config.towards_sft:
            self.sft.round_()  # the KL reference of every point, and no point's base

    @contextmanager
    def at(self, base: str, eta: float) -> Iterator[None]:
        """Put the policy at ``eta`` from ``base`` in place. Collective."""
        weights = self._bases[base].clone()
        weights.lerp_(self._slerp, eta)
        with weights.in_place():
            yield


def record(path: Path, point: dict[str, Any]) -> None:
    """Append a point durably, in place of a line that a killed run left unfinished."""
    with path.open("a+b") as stream:
        stream.truncate(path.read_bytes().rfind(b"\n") + 1)
        stream.write(json.dumps(point, sort_keys=True).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
