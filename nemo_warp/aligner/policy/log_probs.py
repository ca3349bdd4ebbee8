"""Log-probabilities and KL at response positions, in chunks: never all logits at a time.

The plain way, logits [b, S, V/TP] of every position and float32 copies of them, peaks at 16 to 24
bytes per logit, which is more than a large vocabulary leaves room for. Here the hidden states of
the response positions go through the output layer chunk by chunk, and the backward pass does it
again: what is kept between the two is the hidden states and one number per position. Parallel over
the vocabulary as Megatron's output layer is; temperature, soft cap and padding are part of it.

Values and gradients are those of the plain way to fp32 accuracy (tests/aligner/policy).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import functional

from nemo_warp.core.footprint import CHUNK_LOGITS


@dataclass(frozen=True)
class OutputLayer:
    """This rank's part of the output layer, and how its logits become probabilities.

    Attributes:
        weight: [V/TP, H], padding of the vocabulary included.
        first: index in the vocabulary of the weight's first row.
        vocabulary: size without padding; the padding has no probability, as sampling never draws
            it.
        temperature: that logits are divided by.
        soft_cap: logits are capped to +- this (Gemma 2); 0 for none.
        dtype: of the product with the weight: autocast's where that is on, else the weight's.
    """

    weight: Tensor
    first: int
    vocabulary: int
    temperature: float
    soft_cap: float
    dtype: torch.dtype

    @property
    def columns(self) -> int:
        """Rows of the weight that are no padding; there may be none."""
        return min(max(self.vocabulary - self.first, 0), len(self.weight))

    def with_weight(self, weight: Tensor) -> OutputLayer:
        """The same layer with other values."""
        return OutputLayer(
            weight, self.first, self.vocabulary, self.temperature, self.soft_cap, self.dtype
        )

    def logits(self, states: Tensor) -> Tensor:
        """Tempered logits, float32 [n, columns], of hidden states [n, H]; to be changed freely."""
        # fp32 after the product: the softmax of bf16 logits is wrong in the third digit. div_ and
        # tanh_ in place, since a second copy of the logits would double the peak.
        found = torch.matmul(states, self.weight[: self.columns].t()).float()
        if self.soft_cap:
            found.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return found.div_(self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of a logit by the matrix product's output, from what `logits` returned."""
        if not self.soft_cap:
            return 1 / self.temperature
        # d tanh(x/c)c / dx = 1 - (capped/c)^2; divided by the temperature, which came after the
        # cap.
        capped = (logits * (self.temperature / self.soft_cap)).square_()
        return capped.neg_().add_(1).div_(self.temperature)

    def place(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets are in this rank's part, bool [n], and their columns (0 for the others)."""
        column = targets - self.first
        here = (column >= 0) & (column < self.columns)
        return here, column.where(here, 0)

    def chunks(self, positions: int) -> Iterator[slice]:
        """Slices of the positions whose logits are held at a time; the same on all ranks."""
        # By the padded rows, which are the same on all ranks: chunks are collective.
        size = max(1, CHUNK_LOGITS // len(self.weight))
        for start in range(0, positions, size):
            yield slice(start, start + size)


def target_log_probs(
    states: Tensor, layer: OutputLayer, index: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``targets``, and of the likeliest token at the same positions.

    Collective over tensor parallel; the same on all of its ranks. The first is differentiable in
    ``states`` and in the layer's weight.

    Args:
        states: [positions, H], of ``layer.dtype``. The same on all tensor-parallel ranks; the
            gradient is this rank's share and has to be summed over them (Megatron's
            `copy_to_tensor_model_parallel_region` does, or the gathering of a sequence).
        index: int64 [N], rows of ``states``, each at most once.
        targets: int64 [N], tokens; or [N, K], several at each position.

    Returns:
        float32, of the targets' shape and [N], in nats.
    """
    weight = layer.weight.to(layer.dtype)
    return _TargetLogProbs.apply(states, weight, layer.with_weight(weight.detach()), index, targets)


class _TargetLogProbs(torch.autograd.Function):
    """See `target_log_probs`. Keeps references to what it is given, and the normaliser [N].

    Where one chunk is all there is, its exponentials are kept, too, and not computed again: they
    take no more room than the chunk that the backward pass would make of them.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, layer: OutputLayer, index: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Normalised in two numbers per position, largest logit and sum: ranks can be joined
        # exactly.
        peak, total = torch.zeros(2, len(index), device=states.device).unbind()
        chosen = torch.zeros(_several(targets).shape, device=states.device)
        ctx.kept = None
        for rows in layer.chunks(len(index)):
            if not layer.columns:
                peak[rows] = -torch.inf
                continue
            logits = layer.logits(states.index_select(0, index[rows]))
            here, column = layer.place(_several(targets)[rows])
            chosen[rows] = logits.gather(1, column).where(here, 0.0)
            peak[rows] = logits.amax(1)
            total[rows] = logits.sub_(peak[rows, None]).exp_().sum(1)
            if len(logits) == len(index) and not layer.soft_cap:
                ctx.kept = logits
            del logits  # or it would live beside the next chunk's
        top, total, chosen = _sum_over_ranks(peak, total, chosen)
        norm = total.log()
        log_probs = (chosen - top[:, None] - norm[:, None]).view_as(targets)
        # A target in the padding has no probability (a prompt cannot hold one).
        log_probs = log_probs.where(targets < layer.vocabulary, -torch.inf)
        ctx.layer = layer
        ctx.save_for_backward(states, weight, index, targets, peak, top + norm)
        best = -norm
        ctx.mark_non_differentiable(best)
        return log_probs, best

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, index, targets, peak, normaliser = ctx.saved_tensors
        layer, kept = ctx.layer, ctx.kept
        ctx.kept = None  # changed below
        grad_states = torch.zeros_like(states)
        # fp32, as the chunks' shares are added up in it.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        own = weight[: layer.columns]
        for rows in layer.chunks(len(index)):
            chunk = states.index_select(0, index[rows])
            here, column = layer.place(_several(targets)[rows])
            wanted = _several(gradient)[rows]
            if kept is None:
                logits = layer.logits(chunk)
                slope = layer.slope(logits)
                law = logits.sub_(normaliser[rows, None]).exp_()
            else:
                slope = layer.slope(kept)
                law = kept.mul_((peak - normaliser).exp_()[:, None])
            delta = _grad_logits_(law, here, column, wanted).mul_(slope).to(layer.dtype)
            grad_states.index_copy_(0, index[rows], delta @ own)
            _add_product_(grad_weight[: layer.columns], delta.t(), chunk)
            del law, delta
        return grad_states, grad_weight.to(weight.dtype), None, None, None


def _grad_logits_(law: Tensor, here: Tensor, column: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the logits [n, columns], made of their softmax in place.

    Args:
        here, column, gradient: [n, K], see `OutputLayer.place`, and of the targets' log pi.
    """
    law.mul_(-gradient.sum(1, keepdim=True))
    if law.size(1):
        law.scatter_add_(1, column, gradient.where(here, 0.0))
    return law


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        # addmm_ takes operands of one dtype only; the product of bf16 is summed in fp32 inside
        # cuBLAS.
        total.add_(left @ right)


def _several(targets: Tensor) -> Tensor:
    """[N] as [N, 1]."""
    return targets[:, None] if targets.dim() == 1 else targets


def _sum_over_ranks(peak: Tensor, total: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The whole vocabulary's largest logit [N], sum of exp(logit - largest) [N], chosen [N, K]."""
    group = parallel_state.get_tensor_model_parallel_group()
    top = peak.clone()
    torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group=group)
    # One collective for sums and chosen logits: latency counts more than bytes here.
    both = torch.cat([(total * (peak - top).exp())[:, None], chosen], 1)
    torch.distributed.all_reduce(both, group=group)
    return top, both[:, 0], both[:, 1:]


@dataclass(frozen=True)
class FinalStates:
    """Hidden states [N, H] of N positions, and the output layer they are meant for."""

    states: Tensor
    layer: OutputLayer

    def log_probs(self, rows: slice) -> Tensor:
        """Log pi over this rank's part of the vocabulary, float32 [n, columns]. Collective."""
        group = parallel_state.get_tensor_model_parallel_group()
        logits = self.layer.logits(self.states[rows])
        top = logits.new_full(logits.shape[:1], -torch.inf)
        if self.layer.columns:
            torch.amax(logits, 1, out=top)
        torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group=group)
        total = logits.sub_(top[:, None]).exp().sum(1)
        torch.distributed.all_reduce(total, group=group)
        return logits.sub_(total.log_()[:, None])


@torch.no_grad()
def exact_kl(policy: FinalStates, reference: FinalStates) -> Tensor:
    """KL(policy || reference) at each position, float32 [N], in nats: the sum over the vocabulary.

    Both hold the same positions. Collective over tensor parallel.
    """
    kl = torch.zeros(len(policy.states), device=policy.states.device)
    for rows in policy.layer.chunks(len(kl)):
        ours, theirs = policy.log_probs(rows), reference.log_probs(rows)
        # In place, and in this order: `ours` is still needed for its exponential.
        difference = theirs.neg_().add_(ours)
        kl[rows] = ours.exp_().mul_(difference).sum(1)
    torch.distributed.all_reduce(kl, group=parallel_state.get_tensor_model_parallel_group())
    return kl


@torch.no_grad()
def likeliest_tokens(policy: FinalStates, count: int) -> Tensor:
    """The ``count`` likeliest tokens at each position, int64 [N, count], in no order.

    At most as many as the vocabulary has. Collective over tensor parallel, the same on all ranks.
    """
    layer, group = policy.layer, parallel_state.get_tensor_model_parallel_group()
    found = torch.empty(len(policy.states), count, dtype=torch.int64, device=policy.states.device)
    for rows in layer.chunks(len(found)):
        own = policy.log_probs(rows)
        # Every rank offers equally many; a rank of padding offers nothing that is ever taken.
        own = functional.pad(own, (0, len(layer.weight) - own.size(1)), value=-torch.inf)
        values, columns = own.topk(min(count, own.size(1)), sorted=False)
        values, tokens = _all_columns(values, group), _all_columns(columns + layer.first, group)
        found[rows] = tokens.gather(1, values.topk(count, sorted=False).indices)
    return found


def _all_columns(own: Tensor, group: Any) -> Tensor:
    """Columns of every rank side by side."""
    parts = [torch.empty_like(own) for _ in range(group.size())]
    torch.distributed.all_gather(parts, own.contiguous(), group=group)
    return torch.cat(parts, 1)


@torch.no_grad()
def log_probs_at(policy: FinalStates, tokens: Tensor) -> Tensor:
    """Log pi of ``tokens`` [N, K] at each position, float32 [N, K]. Collective."""
    layer = policy.layer
    found = torch.zeros(tokens.shape, device=tokens.device)
    for rows in layer.chunks(len(found)):
        own = policy.log_probs(rows)
        here, column = layer.place(tokens[rows])
        if layer.columns:
            found[rows] = own.gather(1, column).where(here, 0.0)
    torch.distributed.all_reduce(found, group=parallel_state.get_tensor_model_parallel_group())
    return found
