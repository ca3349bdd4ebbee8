"""Gemma 2's layers without Transformer Engine: NeMo's own, over Megatron-core's local parts.

Attention, output layer and the norms behind the projections are NeMo's classes (gemma2_modules.py).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from nemo_warp.aligner.compat.norm import LayerNorm

_ENGINE = "megatron.core.extensions.transformer_engine"
_MODULES = "nemo.collections.nlp.models.language_modeling.megatron.gemma2.gemma2_modules"


def gemma2_layer_spec() -> Any:
    """Megatron-core's local layer with soft-capped attention and norms after both projections."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    modules = _modules()
    spec = get_gpt_layer_local_spec()
    attention, mlp = (getattr(spec.submodules, part) for part in ("self_attention", "mlp"))
    # The same three places as NeMo's own specification for Gemma 2 with Transformer Engine.
    attention.submodules.core_attention = modules.Gemma2DotProductAttention
    attention.submodules.linear_proj = modules.TERowParallelLinearLayerNorm
    mlp.submodules.linear_fc2 = modules.TERowParallelLinearLayerNorm
    return spec


def _modules() -> ModuleType:
    """NeMo's classes, imported while Megatron-core's parts stand for Transformer Engine's.

    Only meanwhile: Megatron-core takes other ways where it finds that module.
    """
    if _MODULES in sys.modules:
        return sys.modules[_MODULES]
    from megatron.core.tensor_parallel import RowParallelLinear

    stand_in = ModuleType(_ENGINE)
    # TENorm's own epsilon, which NeMo leaves as it is: 1e-5, whatever the checkpoint says
    vars(stand_in).update(TENorm=LayerNorm, TERowParallelLinear=RowParallelLinear)
    sys.modules[_ENGINE] = stand_in
    try:
        return importlib.import_module(_MODULES)
    finally:
        del sys.modules[_ENGINE]
