"""The optimizer's fp32 weights beside bf16 parameters: where they are, how to read and set them.

optimizer                   masters
adam, adamw                 NeMo's MainParamsOptimizerWrapper: a whole tensor per parameter
mcore_distributed_optim     Megatron's: this data-parallel rank's range of a parameter
distributed_fused_adam      apex's: 16 more bits per parameter, not reachable from here
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.parts.nlp_overrides import MainParamsOptimizerWrapper
from torch import Tensor

from nemo_warp.aligner.weights.sharded import ShardedWeights, model_parameters


@dataclass(frozen=True)
class _Master:
    """fp32 weights of ``parameter``, flattened, from ``start`` on."""

    parameter: Tensor
    weights: Tensor
    start: int


def has_masters(model: Any) -> bool:
    """Whether the optimizer keeps fp32 weights beside lower-precision parameters."""
    # Lightning's wrapper hides the optimizer's own attributes, which are needed here.
    optimizer = model.optimizers(use_pl_optimizer=False)
    wrapped = isinstance(optimizer, MainParamsOptimizerWrapper) or model.with_distributed_adam
    return bool(wrapped) and any(p.dtype != torch.float32 for p in model.parameters())


def reachable_masters(model: Any) -> bool:
    """Whether `copy_masters` and `set_masters` can be used."""
    # NeMo calls Megatron's optimizer "distributed adam", too, so the second flag tells the two
    # apart.
    apex = model.with_distributed_adam and not model.use_mcore_dist_optim
    return has_masters(model) and not apex


@torch.no_grad()
def set_masters(model: Any, weights: ShardedWeights) -> None:
    """Start the masters from ``weights`` instead of the rounded parameters. Collective."""
    # Otherwise NeMo makes the masters from bf16 parameters (optimizer_with_main_params.py,
    # param.detach().clone().float()), and an init that was merged in fp32 loses 16 bits at once.
    pairs = zip(model_parameters(model), weights.tensors(torch.float32), strict=True)
    # By identity: optimizers order parameters by group (weight decay or not), models by layer.
    own = {id(parameter): tensor for parameter, tensor in pairs}
    for master in _masters(model):
        stop = master.start + master.weights.numel()
        values = own[id(master.parameter)].reshape(-1)[master.start : stop]
        master.weights.copy_(values.view(master.weights.shape))


@torch.no_grad()
def copy_masters(model: Any) -> ShardedWeights:
    """The masters as weights of ``model``. Collective."""
    whole = {
        id(p): torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        for p in model_parameters(model)
    }
    for master in _masters(model):
        stop = master.start + master.weights.numel()
        whole[id(master.parameter)].view(-1)[master.start : stop] = master.weights.reshape(-1)
    # A sum puts the pieces together, since all but one rank have 0 there: exact in any order.
    if model.use_mcore_dist_optim:  # each rank has its own ranges; 0 elsewhere
        for values in whole.values():
            torch.distributed.all_reduce(values, group=parallel_state.get_data_parallel_group())
    copy = ShardedWeights(model)
    copy.take_(whole)
    return copy


def _masters(model: Any) -> Iterator[_Master]:
    optimizer = model.optimizers(use_pl_optimizer=False)
    if isinstance(optimizer, MainParamsOptimizerWrapper):
        groups = zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
        for parameters, masters in groups:
            for parameter, master in zip(parameters, masters, strict=True):
                yield _Master(parameter, master, 0)
        return
    optimizer = optimizer.mcore_optimizer
    groups = zip(
        optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True
    )
    for parameters, masters in groups:
        for parameter, master in zip(parameters, masters, strict=True):
            # Private, and the only place where Megatron-core 0.11 keeps which range of a parameter
            # a master is of (optimizer/distrib_optimizer.py).
            start = optimizer._get_model_param_range_map(parameter)["param"].start
            yield _Master(parameter, master, start)
