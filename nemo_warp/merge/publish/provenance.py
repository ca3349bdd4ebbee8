"""What an output says about itself, in ``warp_merge.json`` inside it."""

from __future__ import annotations

import json
from typing import Any

from nemo_warp.checkpoints.digest import weights_digest
from nemo_warp.merge.plan import MergePlan
from nemo_warp.merge.results import GroupResult


def provenance(plan: MergePlan, groups: list[GroupResult]) -> dict[str, Any]:
    """Inputs with hashes, options and versions, without times and hosts."""
    roles = ["init", *(f"policy_{m}" for m in range(1, len(plan.options.policies) + 1))]
    if plan.options.liti_towards is not None:
        roles.append("liti_towards")
    inputs = [
        {
            **{"role": role, "name": checkpoint.path.name, "format": checkpoint.format},
            "weights_digest": weights_digest([group.crcs[index] for group in groups]),
        }
        for index, (role, checkpoint) in enumerate(zip(roles, plan.inputs, strict=True))
    ]
    return {"inputs": inputs, "options": plan.options.recorded(), "versions": plan.versions}


def provenance_bytes(plan: MergePlan, groups: list[GroupResult], eta: float) -> bytes:
    """`provenance` of the output with this eta, as JSON: equal merges, equal bytes."""
    record = {"eta": eta, **provenance(plan, groups)}
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
