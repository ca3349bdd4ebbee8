"""A second set of a model's weights, in fp32, split over the data-parallel group.

Every rank already holds only its tensor- and pipeline-parallel shard; `ShardedWeights` splits that
shard again over the data-parallel ranks, so it costs 4/DP bytes per local parameter. Arithmetic on
it (the EMA update, interpolation) is elementwise and needs no communication; using it as a model is
one all-gather over the data-parallel group, after which the parameters point at the gathered
buffer instead of their own storage. Nothing travels through the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor


@dataclass(frozen=True)
class _Span:
    """The part of one parameter that lies in this rank's slice."""

    parameter: Tensor
    start: int  # in the flattened parameter
    stop: int
    offset: int  # of the part in this rank's slice


def model_parameters(model: Any) -> list[Tensor]:
    """The parameters on this rank in model order, each once (tied embeddings are one)."""
    if (model.cfg.get("expert_model_parallel_size") or 1) > 1:
        raise ValueError(
            "expert_model_parallel_size > 1: experts are not replicated over the data-parallel "
            "group, which the anchor is split over; set it to 1"
        )
    unique: dict[int, Tensor] = {}
    for module in model.get_model_module_list():
        for parameter in module.parameters():
            unique[id(parameter)] = parameter
    return list(unique.values())


class ShardedWeights:
    """fp32 copy of ``model``'s weights: this rank's 1/DP slice of its local parameters.

    The slice is contiguous: all local parameters laid end to end, padded to a multiple of the
    data-parallel size, cut into equal parts.

    Args:
        model: a NeMo Megatron model whose parameters exist; its weights are copied.
        offload: keep the slice in (pinned) host memory; arithmetic then moves it to and fro.
    """

    def __init__(self, model: Any, offload: bool = False) -> None:
        self._model = model
        self._parameters = model_parameters(model)
        self._group = parallel_state.get_data_parallel_group()
        dp_size, dp_rank = self._group.size(), self._group.rank()
        total = sum(p.numel() for p in self._parameters)
        self._slice_numel = -(-total // dp_size)
        self._spans = list(self._find_spans(dp_rank * self._slice_numel))
        self._device = self._parameters[0].device
        self._offloaded = offload and self._device.type == "cuda"
        self._slice = torch.zeros(self._slice_numel, dtype=torch.float32, device=self._device)
        self._store(self._slice)
        self.copy_from_model_()

    @property
    def nbytes(self) -> int:
        """Bytes this rank keeps permanently."""
        return self._slice.numel() * self._slice.element_size()

    @property
    def shard(self) -> Tensor:
        """This rank's slice, float32 [ceil(local parameters / DP)]. Not a copy."""
        return self._slice

    def copy_from_model_(self) -> None:
        """Take over the model's present weights, in place."""
        self.lerp_model_(1.0)

    @torch.no_grad()
    def lerp_model_(self, weight: float) -> None:
        """Slice <- (1 - weight) * slice + weight * model, in place, fp32, without communication.

        Weight 0 leaves every bit as it is; weight 1 gives the model's weights exactly (torch's
        lerp is a + w(b-a) below 1/2 and b - (1-w)(b-a) from there on).
        """
        own = self._load()
        parts = [own[s.offset : s.offset + s.stop - s.start] for s in self._spans]
        policy = [s.parameter.detach().view(-1)[s.start : s.stop].float() for s in self._spans]
        torch._foreach_lerp_(parts, policy, weight)
        self._store(own)

    @torch.no_grad()
    def lerp_(self, other: ShardedWeights, weight: float) -> None:
        """Slice <- (1 - weight) * slice + weight * other, in place; any weight (LITI to eta 2)."""
        own = self._load()
        own.lerp_(other._load(), weight)
        self._store(own)

    def clone(self) -> ShardedWeights:
        """An independent copy for the same model."""
        copy = object.__new__(ShardedWeights)
        copy.__dict__.update(self.__dict__)
        copy._slice = self._slice.clone()
        return copy

    @contextmanager
    def gathered(self, dtype: torch.dtype | None = None) -> Iterator[GatheredWeights]:
        """All-gather the slices; yields weights that can be put in place any number of times.

        Costs one full set of local weights for the time being. Collective over the data-parallel
        group: all its ranks must enter.

        Args:
            dtype: of the gathered weights; by default each parameter's own.
        """
        yield GatheredWeights(self._parameters, self._gather(dtype))

    @contextmanager
    def in_place(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Run the model with these weights; its own come back even if the body raises."""
        with self.gathered(dtype) as weights, weights.in_place():
            yield

    def sharded_state_dict(self, prefix: str) -> dict[str, Any]:
        """Megatron's distributed-checkpoint view of these weights: fp32, ``prefix`` + model key.

        Made by the model itself while the gathered fp32 weights are in place, so that layouts
        (stacked layers, SwiGLU, padded vocabulary) are the model's own. Resharding on load is
        Megatron's.
        """
        with self.in_place(torch.float32):
            state = self._model.sharded_state_dict(prefix=prefix)
            # The entries hold the parameters themselves, which soon point elsewhere again.
            for entry in nested_values(state):
                if isinstance(entry, ShardedTensor | ShardedTensorFactory):
                    entry.data = entry.data.detach()
            return state

    @torch.no_grad()
    def load_state_dict_(
        self, state_dict: dict[str, Any], prefix: str, strict: bool = True
    ) -> None:
        """Take over loaded local tensors, in place; the inverse of `sharded_state_dict`."""
        with self.in_place(torch.float32):
            stripped = {
                key.removeprefix(f"{prefix}model."): value for key, value in state_dict.items()
            }
            for module in self._model.get_model_module_list():
                module.load_state_dict(stripped, strict=strict)
            self.copy_from_model_()

    def _find_spans(self, slice_start: int) -> Iterator[_Span]:
        slice_stop = slice_start + self._slice_numel
        begin = 0
        for parameter in self._parameters:
            end = begin + parameter.numel()
            start, stop = max(begin, slice_start), min(end, slice_stop)
            if start < stop:
                yield _Span(parameter, start - begin, stop - begin, start - slice_start)
            begin = end

    def _load(self) -> Tensor:
        """The slice on the model's device; the slice itself unless offloaded."""
        return self._slice.to(self._device, non_blocking=True)

    def _store(self, own: Tensor) -> None:
        if not self._offloaded:
            self._slice = own
        elif self._slice.device.type == "cpu":
            self._slice.copy_(own)
        else:
            self._slice = own.cpu().pin_memory()

    @torch.no_grad()
    def _gather(self, dtype: torch.dtype | None) -> list[Tensor]:
        """Full local weights, one tensor per parameter; one collective per dtype."""
        own = self._load()
        dtypes = [dtype or p.dtype for p in self._parameters]
        flat = {}
        for wanted in sorted(set(dtypes), key=str):
            source = own.to(wanted)
            flat[wanted] = source.new_empty(self._slice_numel * self._group.size())
            torch.distributed.all_gather_into_tensor(flat[wanted], source, group=self._group)
        tensors, begin = [], 0
        for parameter, wanted in zip(self._parameters, dtypes, strict=True):
            end = begin + parameter.numel()
            tensors.append(flat[wanted][begin:end].view(parameter.shape))
            begin = end
        return tensors


@dataclass(frozen=True)
class GatheredWeights:
    """A full set of local weights that can stand in for the model's own."""

    parameters: list[Tensor]
    tensors: list[Tensor]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Point the parameters at these tensors (no copy), and back, even if the body raises."""
        own = [parameter.data for parameter in self.parameters]
        try:
            for parameter, tensor in zip(self.parameters, self.tensors, strict=True):
                parameter.data = tensor
            yield
        finally:
            for parameter, tensor in zip(self.parameters, own, strict=True):
                parameter.data = tensor
