"""The ``rewards`` and ``reward_client`` sections of a configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from nemo_warp.rewards.scale import KEYS
from nemo_warp.rewards.scores import FailureBudget
from nemo_warp.schema.rules import check_clip

_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class RewardClientSettings:
    """The ``reward_client`` section of a member's configuration.

    Attributes:
        ready_deadline_s: how long `RewardClient.connect` waits for the server.
        request_timeout_s: of one attempt. A server that knows `keys` answers at once with what it
            has; there it is how long a call, or a line that finishes nothing, may last.
        retries: further attempts after a transport error or a timeout. A server that hangs costs
            (retries + 1) * request_timeout_s.
        backoff_s: wait before the first of them; doubles each time, up to a minute, +-50 %.
        batch_size: samples per request.
        in_flight: requests at a time.
        max_failure_rate, failure_window: see `FailureBudget`.
    """

    ready_deadline_s: float = 600.0
    request_timeout_s: float = 120.0
    retries: int = 4
    backoff_s: float = 1.0
    batch_size: int = 32
    in_flight: int = 4
    max_failure_rate: float = 0.1
    failure_window: int = 512

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            # bool is an int to Python: retries=true would be one retry.
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"reward_client.{name} must be a number, got {value!r}")
        # "not > 0" and not "<= 0": NaN fails both comparisons, and has to be refused.
        for name in ("ready_deadline_s", "request_timeout_s", "batch_size", "in_flight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"reward_client.{name} must be > 0, got {getattr(self, name)}")
        for name in ("retries", "backoff_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"reward_client.{name} must be >= 0, got {getattr(self, name)}")
        self.failure_budget()

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> RewardClientSettings:
        """From a configuration section; keys left out keep their defaults.

        Raises:
            ValueError: an unknown key or a value out of range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(section) - known):
            raise ValueError(f"reward_client has no {unknown[0]!r}; it has {sorted(known)}")
        return cls(**{str(key): value for key, value in section.items()})

    def failure_budget(self) -> FailureBudget:
        """A fresh budget with this section's limits."""
        return FailureBudget(self.max_failure_rate, self.failure_window)


def check_rewards(rewards: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a malformed list of rewards before anything is started.

    Raises:
        ValueError: no reward, a repeated or malformed name, an unknown or missing key, a weight
            that is not a finite number.
    """
    if not rewards:
        raise ValueError("rewards is empty: name at least one {name, weight, endpoint}")
    seen: set[str] = set()
    for position, reward in enumerate(rewards):
        _check_reward(reward, f"rewards[{position}]", seen)


def _check_reward(reward: Mapping[str, Any], where: str, seen: set[str]) -> None:
    known = {"name", "weight", "endpoint", "fingerprint", "shared", *KEYS}
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
    check_clip(reward, where)
