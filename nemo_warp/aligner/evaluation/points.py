"""The points of a front: which are wanted, and which are on record. No NeMo."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from nemo_warp.schema.evaluation import Front

POINTS_FILE = "points.jsonl"
CHOSEN_FILE = "chosen.json"
"""The point at a KL budget: kappa, its measured KL, and all of the point."""


def wanted_points(config: Front) -> Iterator[tuple[str, float]]:
    """(base, eta) of every point of the front, in the order they are measured."""
    bases = ["init"]
    if config.towards_sft and config.sft != config.base:
        bases.append("sft")
    for base in bases:
        for eta in config.etas:
            yield base, float(eta)


def best_kl(point: dict[str, Any]) -> float:
    """KL to SFT in nats: exact over the vocabulary where that was measured, its error is less."""
    exact = point.get("kl_to_sft_exact")
    return float(point["kl_to_sft"] if exact is None else exact)


def measured_points(
    path: Path, judges: Collection[str] = ()
) -> dict[tuple[str, float], dict[str, Any]]:
    """Points on record that these judges have seen; an incomplete last line does not count."""
    points = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            point = json.loads(line)
            place = point["base"], float(point["eta"])
            if set(judges) <= set(point.get("judges") or {}):
                points[place] = point
        except (ValueError, KeyError, TypeError):
            continue
    return points
