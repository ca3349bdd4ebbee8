"""Several rewards as one: a weighted sum in which a failure stays a failure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_warp.rewards.client import RewardClient, RewardClientSettings, RewardFuture
from nemo_warp.rewards.scores import RewardScores, weighted_sum

_NAME = re.compile(r"[A-Za-z0-9._-]+")


class RewardMixture:
    """Weighted sum of several rewards. A reward of weight 0 is only reported, in ``parts``."""

    def __init__(self, clients: Sequence[RewardClient], weights: Sequence[float]):
        self.clients = list(clients)
        self.weights = dict(zip((client.name for client in clients), weights, strict=True))

    @classmethod
    def from_config(
        cls,
        rewards: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        run_id: str | None = None,
    ) -> RewardMixture:
        """From the ``rewards`` and ``reward_client`` sections; opens nothing.

        Raises:
            ValueError: no reward, a repeated or malformed name, a missing key, a weight that is
                not a finite number.
        """
        if not rewards:
            raise ValueError("rewards is empty: name at least one {name, weight, endpoint}")
        parsed = RewardClientSettings.from_config(settings)
        seen: set[str] = set()
        for position, reward in enumerate(rewards):
            _check_reward(reward, f"rewards[{position}]", seen)
        clients = [
            RewardClient(
                reward["endpoint"],
                parsed,
                name=reward["name"],
                run_id=run_id,
                fingerprint=reward.get("fingerprint"),
            )
            for reward in rewards
        ]
        return cls(clients, [float(reward.get("weight", 1.0)) for reward in rewards])

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Fingerprint of each reward by name; known after `connect`."""
        return {client.name: client.fingerprint for client in self.clients}

    def connect(self) -> None:
        """Wait for every server; raises as `RewardClient.connect`."""
        for client in self.clients:
            client.connect()

    def submit(self, prompts: Sequence[str], responses: Sequence[str]) -> RewardFuture:
        """Send samples to every reward; returns at once."""
        names = list(self.weights)
        return RewardFuture(
            [client.submit(prompts, responses) for client in self.clients],
            lambda parts: weighted_sum(dict(zip(names, parts, strict=True)), self.weights),
        )

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> RewardScores:
        """`submit` and wait."""
        return self.submit(prompts, responses).result()

    def close(self) -> None:
        """Close every client."""
        for client in self.clients:
            client.close()


def _check_reward(reward: Mapping[str, Any], where: str, seen: set[str]) -> None:
    known = {"name", "weight", "endpoint", "fingerprint"}
    if unknown := sorted(set(reward) - known):
        raise ValueError(f"{where} has no {unknown[0]!r}; it has {sorted(known)}")
    for key in ("name", "endpoint"):
        if not reward.get(key):
            raise ValueError(f"{where} lacks {key!r}")
    if not _NAME.fullmatch(reward["name"]):
        raise ValueError(f"{where}.name must be letters, digits, . _ -, got {reward['name']!r}")
    if reward["name"] in seen:
        raise ValueError(f"{where}.name {reward['name']!r} is used twice")
    seen.add(reward["name"])
    try:
        finite = math.isfinite(float(reward.get("weight", 1.0)))
    except (TypeError, ValueError):
        finite = False
    if not finite:
        raise ValueError(f"{where}.weight must be a finite number, got {reward['weight']!r}")
