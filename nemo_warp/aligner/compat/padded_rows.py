"""Loading a checkpoint whose vocabulary was padded for another TP, under newer torch.

NeMo pads the vocabulary to a multiple of 128 x TP: 128256 rows are 128512 at TP 4. Megatron-core
0.11 marks such tensors (``allow_shape_mismatch``), fills the rows that a checkpoint does not have
with zeros, and leaves it at that; torch from 2.7 on refuses any difference in size while it plans
what to read (distributed/checkpoint/default_planner.py, create_default_local_load_plan).
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from nemo_warp.aligner.compat.replacements import Replacements

_REFUSAL = "Size mismatch between saved "


def allow_other_padding(replacements: Replacements) -> None:
    """Plan with the model's own sizes; Megatron-core has checked those that must be equal."""
    from torch.distributed.checkpoint import default_planner

    # Read from the function and not from torch's version: containers carry patched builds.
    constants = default_planner.create_default_local_load_plan.__code__.co_consts
    if _REFUSAL not in constants:
        return
    from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner

    def create_local_plan(self: Any) -> Any:
        self._validate_global_shapes(self.metadata, self.shapes_validation_sharded_tensors)
        own = self.metadata
        self.metadata = _with_sizes_of(self.state_dict, own)
        try:
            return default_planner.DefaultLoadPlanner.create_local_plan(self)
        finally:
            self.metadata = own

    replacements.set(
        MCoreLoadPlanner,
        "create_local_plan",
        create_local_plan,
        f"torch {torch.__version__} refuses a vocabulary that was padded for another TP",
    )


def _with_sizes_of(state: dict[str, Any], metadata: Any) -> Any:
    """The metadata with the sizes of tensors in ``state``; what is stored where stays as it is."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    changed = copy.copy(metadata)
    changed.state_dict_metadata = dict(metadata.state_dict_metadata)
    for name, tensor in state.items():
        stored = changed.state_dict_metadata.get(name)
        if isinstance(stored, TensorStorageMetadata) and hasattr(tensor, "size"):
            changed.state_dict_metadata[name] = dataclasses.replace(stored, size=tensor.size())
    return changed
