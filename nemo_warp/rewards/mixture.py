"""Several rewards as one: a weighted sum; a sample fails if any reward in the sum failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_warp.rewards.client import RewardClient, RewardFuture
from nemo_warp.rewards.scale import Scale
from nemo_warp.rewards.scores import RewardScores, weighted_sum
from nemo_warp.rewards.settings import check_rewards, client_settings


class RewardMixture:
    """Weighted sum of several rewards. A reward of weight 0 is only reported, in ``parts``."""

    def __init__(
        self,
        clients: Sequence[RewardClient],
        weights: Sequence[float],
        scales: Sequence[Scale] | None = None,
    ):
        names = [client.name for client in clients]
        self.clients = list(clients)
        self.weights = dict(zip(names, weights, strict=True))
        self.scales = dict(zip(names, scales or [Scale()] * len(names), strict=True))

    @classmethod
    def from_config(
        cls,
        rewards: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        run_id: str | None = None,
    ) -> RewardMixture:
        """From the ``rewards`` and ``reward_client`` sections; opens nothing.

        Raises:
            ValueError: either section is malformed.
        """
        check_rewards(rewards)
        parsed = client_settings(settings)
        clients = [
            RewardClient(
                reward["endpoint"],
                parsed,
                name=reward["name"],
                # A server that several runs share belongs to none of them; its fingerprint is what
                # identifies it.
                run_id=None if reward.get("shared") else run_id,
                fingerprint=reward.get("fingerprint"),
            )
            for reward in rewards
        ]
        weights = [float(reward.get("weight", 1.0)) for reward in rewards]
        return cls(clients, weights, [Scale.of(reward) for reward in rewards])

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Fingerprint of each reward by name; known after `connect`."""
        return {client.name: client.fingerprint for client in self.clients}

    def connect(self) -> None:
        """Wait for every server; raises as `RewardClient.connect`."""
        for client in self.clients:
            client.connect()

    def check_fields(self, fields: Sequence[Mapping[str, Any]], source: str) -> None:
        """Refuse prompts that lack a field which a reward takes; after `connect`.

        Args:
            fields: of each prompt.
            source: the prompts' file.

        Raises:
            ValueError: names the reward, the field and the prompt.
        """
        for client in self.clients:
            for name in client.needs:
                lacking = [number for number, one in enumerate(fields, 1) if name not in one]
                if lacking:
                    raise ValueError(
                        f"reward '{client.name}' takes the field '{name}' of every prompt, but in "
                        f"{source} {len(lacking)} of {len(fields)} have none (the first: prompt "
                        f"{lacking[0]}); add it to their lines, or give it as an option"
                    )

    def submit(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        fields: Sequence[Mapping[str, Any]] | None = None,
    ) -> RewardFuture:
        """Send samples to every reward; returns at once. See `RewardClient.submit`."""
        names = list(self.weights)
        return RewardFuture(
            [client.submit(prompts, responses, fields) for client in self.clients],
            lambda parts: weighted_sum(
                dict(zip(names, parts, strict=True)), self.weights, self.scales
            ),
        )

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        fields: Sequence[Mapping[str, Any]] | None = None,
    ) -> RewardScores:
        """`submit` and wait."""
        return self.submit(prompts, responses, fields).result()

    def close(self) -> None:
        """Close every client."""
        for client in self.clients:
            client.close()
