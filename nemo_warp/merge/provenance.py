"""What an output says about itself, in ``warp_merge.json`` inside it."""

from __future__ import annotations

import json

import numpy as np
import torch

from nemo_warp.merge.plan import MergePlan
from nemo_warp.records import code_version


def provenance_bytes(plan: MergePlan) -> bytes:
    """Inputs, options and versions as JSON, without times and hosts: equal merges, equal bytes."""
    roles = ["init", *(f"policy_{m}" for m in range(1, len(plan.options.policies) + 1))]
    if plan.options.liti_towards is not None:
        roles.append("liti_towards")
    inputs = [
        {"role": role, "name": checkpoint.path.name, "format": checkpoint.format}
        for role, checkpoint in zip(roles, plan.inputs, strict=True)
    ]
    versions = {"nemo_warp": code_version(), "torch": torch.__version__, "numpy": np.__version__}
    record = {"inputs": inputs, "options": plan.options.recorded(), "versions": versions}
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
