"""A second set of a model's weights, in fp32, split over the data-parallel group.

Every rank already holds only its tensor- and pipeline-parallel shard; `ShardedWeights` splits that
shard again over the data-parallel ranks, so it costs 4/DP bytes per local parameter. Arithmetic on
it (the EMA update, interpolation) is elementwise and needs no communication; using it as a model is
one all-gather over the data-parallel group, after which the parameters point at the gathered
buffer instead of their own storage. Nothing travels through the host.

No live parameter ever gets data of another dtype. torch drops a parameter's gradient accumulator
when the dtype of ``.data`` changes, and with it the hooks by which apex, NeMo and Megatron collect
their main gradients: training would go on with gradients of 0 and nothing would complain. Weights
are put in place in the parameters' own dtypes only, and what is fp32 (the anchor in a checkpoint,
an exported policy) is a state dict beside the model, see `sharded_state_dict`.
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
            # Once each: updating a tied embedding twice would move it (1 - (1 - mu)^2) of the way.
            unique[id(parameter)] = parameter
    return list(unique.values())


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    """Where a tensor's memory begins, and its shape: what tells parameters apart."""
    return tensor.data_ptr(), tensor.shape


def bare_module(module: Any) -> Any:
    """The module under wrappers such as NeMo's Float16Module, whose names are the checkpoint's."""
    # Float16Module, and Megatron's DDP around it where mcore_distributed_optim is used.
    while hasattr(module, "module"):
        module = module.module
    return module


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
        # Equal parts for every rank: all_gather_into_tensor takes no others. Padding is never read.
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

    @torch.no_grad()
    def equal_model(self) -> bool:
        """Whether the slices hold the model's weights bit for bit, on all ranks. Collective."""
        # In the parameters' dtype: an fp32 slice of bf16 weights equals them when it rounds to
        # them.
        same = all(
            torch.equal(part.to(parameter.dtype), parameter)
            for part, parameter in zip(self._gather(), self._parameters, strict=True)
        )
        found = torch.tensor(float(same), device=self._device)
        # A float, since what collectives do with bool differs between backends.
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
        return bool(found.item())

    def round_(self) -> ShardedWeights:
        """Keep the slice in the parameters' own dtype, if they share one; in place.

        For weights that are only ever put in place of the model's, which rounds them anyway: the
        model computes the same, at 2/DP bytes per parameter in bf16. No arithmetic from then on.
        """
        dtypes = {parameter.dtype for parameter in self._parameters}
        if len(dtypes) == 1:
            own = self._slice.to(dtypes.pop())
            self._slice = own.pin_memory() if self._offloaded else own
        return self

    def copy_from_model_(self) -> None:
        """Take over the model's present weights, in place."""
        self.lerp_model_(1.0)

    @torch.no_grad()
    def lerp_model_(self, weight: float) -> None:
        """Slice <- (1 - weight) * slice + weight * model, in place, fp32, without communication.

        Weight 0 leaves every bit as it is; weight 1 gives the model's weights exactly (torch's
        lerp is a + w(b-a) below 1/2 and b - (1-w)(b-a) from there on).
        """
        own = self._load_fp32()
        parts = [own[s.offset : s.offset + s.stop - s.start] for s in self._spans]
        # From the model's own weights, bf16 or not: an fp32 average of bf16 weights follows the
        # policy to 1e-3 relative (simulated over 9000 steps), so fp32 masters are not needed. In
        # bf16 arithmetic the same average goes 22 to 31 % of the way, in a wrong direction.
        policy = [s.parameter.detach().view(-1)[s.start : s.stop].float() for s in self._spans]
        # One fused call over all parameters: a loop launches a kernel for each of some hundred
        # tensors. Private in torch, but what its own optimizers use.
        torch._foreach_lerp_(parts, policy, weight)
        self._store(own)

    @torch.no_grad()
    def lerp_(self, other: ShardedWeights, weight: float) -> None:
        """Slice <- (1 - weight) * slice + weight * other, in place; any weight (LITI to eta 2)."""
        own = self._load_fp32()
        own.lerp_(other._load_fp32(), weight)
        self._store(own)

    def clone(self) -> ShardedWeights:
        """An independent copy for the same model."""
        copy = object.__new__(ShardedWeights)
        # Not deepcopy, which would copy the model as well.
        copy.__dict__.update(self.__dict__)
        copy._slice = self._slice.clone()
        return copy

    @contextmanager
    def gathered(self) -> Iterator[GatheredWeights]:
        """All-gather the slices; yields weights that can be put in place any number of times.

        Costs one full set of local weights, in the parameters' dtypes, for the time being.
        Collective over the data-parallel group: all its ranks must enter.
        """
        yield GatheredWeights(self._parameters, self._gather())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Run the model with these weights; its own come back even if the body raises."""
        with self.gathered() as weights, weights.in_place():
            yield

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """Full local weights of ``dtype``, one tensor per parameter in model order. Collective."""
        return self._gather(dtype)

    def sharded_state_dict(self, prefix: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Megatron's distributed-checkpoint view of these weights: ``prefix`` + model key.

        It is the model's own state (so that stacked layers, SwiGLU, padded vocabulary and layouts
        are the model's), in whose entries our gathered tensors take the parameters' places.
        Resharding on load is Megatron's. Collective over the data-parallel group.
        """
        state = self._model.sharded_state_dict(prefix=prefix)
        ours = dict(zip(map(_place, self._parameters), self._gather(dtype), strict=True))
        for entry in nested_values(state):
            if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
                continue
            # The entries hold the parameters themselves (state_dict(keep_vars=True)).
            # Matched by place in memory, since factories (SwiGLU) and stacked layers change keys
            # and shapes.
            tensor = ours.get(_place(entry.data))
            entry.data = entry.data.detach() if tensor is None else tensor
            if isinstance(entry, ShardedTensor):
                # Megatron checks it against the data when it saves
                # (ShardedTensor.validate_metadata_integrity).
                entry.dtype = entry.data.dtype
        return state

    @torch.no_grad()
    def load_state_dict_(
        self, state_dict: dict[str, Any], prefix: str, strict: bool = True
    ) -> None:
        """Take over loaded local tensors, in place; the inverse of `sharded_state_dict`.

        The model's own weights are not touched.

        Args:
            strict: refuse a state dict that lacks a parameter; else it keeps the slice's values.

        Raises:
            KeyError: a parameter is missing.
            RuntimeError: a tensor has another shape than its parameter.
        """
        # A loaded state dict has the model's local names again, layers numbered within the stage.
        loaded = {key.removeprefix(f"{prefix}model."): value for key, value in state_dict.items()}
        found = {
            id(parameter): loaded[name]
            for module in self._model.get_model_module_list()
            for name, parameter in bare_module(module).named_parameters(remove_duplicate=False)
            # remove_duplicate=False: a tied weight is loaded under either of its names.
            if name in loaded
        }
        missing = self.take_(found)
        if strict and missing:
            raise KeyError(f"no weights for a parameter of shape {tuple(missing[0].shape)}")

    @torch.no_grad()
    def take_(self, found: dict[int, Tensor]) -> list[Tensor]:
        """Take over full local tensors, in place.

        Args:
            found: ``id`` of a parameter -> its weights, of any dtype.

        Returns:
            Parameters in this rank's slice that were not among them; they keep their values.

        Raises:
            RuntimeError: a tensor has another shape than its parameter.
        """
        own, missing = self._load(), []
        for span in self._spans:
            tensor = found.get(id(span.parameter))
            if tensor is None:
                missing.append(span.parameter)
                continue
            if tensor.shape != span.parameter.shape:
                raise RuntimeError(
                    f"weights of shape {tuple(tensor.shape)} for a parameter of shape "
                    f"{tuple(span.parameter.shape)}"
                )
            # copy_ casts: bf16 values become the fp32 numbers they stand for, exactly.
            part = tensor.reshape(-1)[span.start : span.stop]
            own[span.offset : span.offset + span.stop - span.start].copy_(part)
        self._store(own)
        return missing

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
        # Pinned memory makes the copy asynchronous; the arithmetic after it is queued on the same
        # stream.
        return self._slice.to(self._device, non_blocking=True)

    def _load_fp32(self) -> Tensor:
        """As `_load`, for arithmetic."""
        assert self._slice.dtype == torch.float32, "rounded weights can only be put in place"
        return self._load()

    def _store(self, own: Tensor) -> None:
        if not self._offloaded:
            self._slice = own
        elif self._slice.device.type == "cpu":
            self._slice.copy_(own)
        else:
            # Pinned once; later stores copy into it, since pinning costs a system call per page.
            self._slice = own.cpu().pin_memory()

    @torch.no_grad()
    def _gather(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Full local weights, one tensor per parameter; one collective per dtype."""
        own = self._load()
        dtypes = [dtype or p.dtype for p in self._parameters]
        flat = {}
        # Sorted, because ranks must call collectives in the same order, and sets have none. There
        # is more than one dtype where some parameters are fp32.
        for wanted in sorted(set(dtypes), key=str):
            # Cast before the all-gather: in bf16 it moves half the bytes.
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

    def __post_init__(self) -> None:
        """Raise TypeError for tensors of another dtype: see the module's docstring."""
        for parameter, tensor in zip(self.parameters, self.tensors, strict=True):
            if parameter.dtype != tensor.dtype:
                raise TypeError(
                    f"weights of {tensor.dtype} cannot stand in for a parameter of "
                    f"{parameter.dtype}: it would lose its gradient hooks"
                )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Point the parameters at these tensors (no copy), and back, even if the body raises."""
        # References, not copies: the policy's storage waits, so swapping costs no memory.
        own = [parameter.data for parameter in self.parameters]
        try:
            for parameter, tensor in zip(self.parameters, self.tensors, strict=True):
                parameter.data = tensor
            yield
        finally:
            for parameter, tensor in zip(self.parameters, own, strict=True):
                parameter.data = tensor
