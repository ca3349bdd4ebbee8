"""The ``rewards`` and ``reward_client`` sections of a configuration, held against their schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_warp.schema.check import check
from nemo_warp.schema.rules import check_clip
from nemo_warp.schema.shared import RewardClientSettings, RewardEntry

_SOURCE = "the configuration"


def client_settings(section: Mapping[str, Any]) -> RewardClientSettings:
    """From a configuration's ``reward_client``; keys left out keep their defaults.

    Raises:
        ValueError: an unknown key or a value that its schema does not allow.
    """
    return RewardClientSettings(
        **check(dict(section), RewardClientSettings, _SOURCE, "reward_client")
    )


def check_rewards(rewards: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a malformed list of rewards before anything is started.

    Raises:
        ValueError: no reward, a repeated or malformed name, an unknown or missing key, a weight
            that is not a finite number, bounds in the wrong order.
    """
    if not rewards:
        raise ValueError("rewards is empty: name at least one {name, weight, endpoint}")
    seen: set[str] = set()
    for position, reward in enumerate(rewards):
        where = f"rewards.{position}"
        check(dict(reward), RewardEntry, _SOURCE, where, complete=True)
        check_clip(reward, where)
        if not reward["endpoint"]:  # a recipe's may be null until its server is up
            raise ValueError(f"'{where}.endpoint' is {reward['endpoint']!r}, expected a file")
        if reward["name"] in seen:
            raise ValueError(f"{where}.name {reward['name']!r} is used twice")
        seen.add(reward["name"])
