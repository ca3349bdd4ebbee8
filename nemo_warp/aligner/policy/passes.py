"""Passes through the policy: losses with gradients, log-probabilities, and the exact KL.

All of them end in `nemo_warp.aligner.policy.log_probs`, at the positions that count, in micro
batches of sequences of about one length. Megatron's schedules, pipeline and gradient reduction are
as NeMo-Aligner uses them (models/nlp/gpt/megatron_gpt_reinforce_actor.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from nemo.collections.nlp.parts.utils_funcs import get_last_rank
from nemo_aligner.utils.distributed import broadcast_tensor_within_pp
from nemo_aligner.utils.train_utils import set_sync_funcs
from torch import Tensor

from nemo_warp.aligner.policy.log_probs import (
    FinalStates,
    OutputLayer,
    exact_kl,
    likeliest_tokens,
    log_probs_at,
    target_log_probs,
)
from nemo_warp.aligner.policy.micro_batches import MicroBatch, needed_inputs, plan_micro_batches
from nemo_warp.aligner.weights.sharded import bare_module
from nemo_warp.core.reinforce import IMPORTANCE_SUMS, importance


class ForwardPasses:
    """Takes the place of the actor's own passes; a base of `WarpActorModel`."""

    cfg: Any
    model: Any
    tokenizer: Any
    forward_micro_batch_size: int
    get_model_module_list: Callable[[], list[Any]]
    _make_data_iterator_list: Callable[[Iterator], Any]

    def get_loss_and_metrics(
        self, batch: dict[str, Tensor], forward_only: bool
    ) -> tuple[float, dict[str, float]]:
        """Loss and, unless ``forward_only``, gradients of this rank's rows of a batch. Collective.

        The loss is -sum(weights * log pi) and, with the keys ``kl_...``, the part of the KL that
        the sampled tokens do not carry: sum(kl_weights * sum_k pi_k * d_k), d = log pi - log pi of
        the anchor held fixed (see `nemo_warp.core.reinforce.top_k_kl`).

        Args:
            batch: ``response_tokens`` int64 [B, S]; ``weights`` float32 [B, S-1]; optionally
                ``kl_weights`` [B, S-1], ``kl_tokens`` int64 and ``kl_anchor`` float32 [B, S-1, K],
                tokens at each position and the anchor's log pi of them. With ``sampled_log_probs``
                float32 [B, S-1], of the policy that sampled, each response's part counts by
                `importance`, and the metrics tell of it.
        """
        weights = batch["weights"]
        others = {key: batch[key] for key in batch if key != "response_tokens"}
        limit = self.cfg.reinforce.importance_limit
        direct = batch.get("kl_weights", torch.zeros_like(weights))
        others["trained"] = ((weights != 0) | (direct != 0)).float()
        plan = self._plan(
            others["trained"], self.cfg.micro_batch_size, self.cfg.reinforce.train_tokens
        )
        # Megatron divides by the number of micro batches, gradient reduction by DP.
        scale = len(plan) * parallel_state.get_data_parallel_world_size()

        def loss_func(micro: dict[str, Tensor], log_probs: Tensor) -> tuple[Tensor, dict]:
            # A plain sum: the weights were normalised over the global batch.
            own = log_probs[..., 0]
            losses = -own * micro["weights"]
            if "kl_weights" in micro:
                top = log_probs[..., 1:]
                # The gradient goes through pi only: d is held fixed, as its own gradient has
                # expectation 0.
                kl = (top.exp() * (top.detach() - micro["kl_anchor"])).sum(-1)
                losses = losses + kl * micro["kl_weights"]
            told: dict[str, Tensor] = {}
            if "sampled_log_probs" in micro:
                ratio, told = importance(own, micro["sampled_log_probs"], micro["trained"], limit)
                losses = losses * ratio[:, None]
            loss = losses.sum()
            return loss * scale, {"loss": loss.detach(), **told}

        parts = self._run(plan, batch["response_tokens"], others,
                          self._target_step("trained", loss_func), forward_only)  # fmt: skip
        names = ["loss", *(IMPORTANCE_SUMS if "sampled_log_probs" in batch else ())]
        sums = torch.zeros(len(names), device=weights.device)
        for part in parts:
            sums += torch.stack([part[name] for name in names])
        if parts:
            torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        # Only the last pipeline stage has losses; NeMo-Aligner broadcasts them the same way.
        torch.distributed.broadcast(sums, get_last_rank())
        found = dict(zip(names, sums.tolist(), strict=True))
        if "sampled_log_probs" in batch:
            responses = max(found.pop("responses"), 1.0)
            found |= {name: found[name] / responses for name in IMPORTANCE_SUMS if name in found}
        return found["loss"], found

    def get_inference_log_probs(
        self, response_tokens: Tensor, mask: Tensor | None = None, **score: Any
    ) -> Tensor:
        """Log pi of tokens 1.. of each row, float32 [B, S-1]; see `score`."""
        return self.score(response_tokens, mask, **score)[0]

    @torch.no_grad()
    def score(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        temperature: float | None = None,
        micro_batch_size: int | None = None,
    ) -> Tensor:
        """Log pi of each token, and of the likeliest one in its place, float32 [2, B, S-1], nats.

        Args:
            tokens: int64 [B, S].
            mask: [B, S-1], positions that are wanted, the others are 0; None for all.
            temperature: that logits are divided by; None for the one that is sampled at.
            micro_batch_size: sequences at a time; None for the configured one, or token budget.
        """
        mask = torch.ones_like(tokens[:, 1:]) if mask is None else mask
        size, budget = micro_batch_size, None
        if size is None:
            size, budget = self.forward_micro_batch_size, self.cfg.reinforce.forward_tokens
        plan = self._plan(mask, size, budget)
        step = self._target_step(
            "mask", lambda _, found, non_loss_data=True: found, temperature, likeliest=True
        )
        found = self._run(plan, tokens, {"mask": mask}, step, forward_only=True, collect=True)
        scores = None
        if found:
            scores = torch.zeros(2, *mask.shape, device=tokens.device)
            for micro, part in zip(plan, found, strict=True):
                width = min(micro.width, mask.size(1))
                scores[:, micro.rows, :width] = part[..., :width]
        # All stages of a pipeline need the scores, for the same global batch on every rank.
        return broadcast_tensor_within_pp(scores)

    @torch.no_grad()
    def get_exact_kl(self, response_tokens: Tensor, mask: Tensor, reference: Any) -> Tensor:
        """Rao-Blackwellised KL(policy || reference) of each response, float32 [b], in nats.

        Sums over the whole vocabulary at each sampled prefix instead of using the sampled token.

        Args:
            response_tokens: int64 [b, S].
            mask: float [b, S-1] of response positions.
            reference: `GatheredWeights` of the same model.
        """
        policy = self._final_states(response_tokens, mask)
        with reference.in_place():
            other = self._final_states(response_tokens, mask)
        kl = None
        if policy is not None and other is not None:  # on the last pipeline stage
            per_token = torch.zeros_like(mask)
            per_token[mask != 0] = exact_kl(policy, other)
            kl = per_token.sum(-1)
        return broadcast_tensor_within_pp(kl)

    @torch.no_grad()
    def get_likeliest(
        self, response_tokens: Tensor, mask: Tensor, count: int, reference: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The policy's likeliest tokens in place of each token, and their log pi in both models.

        Args:
            response_tokens: int64 [b, S].
            mask: float [b, S-1] of response positions; the others get zeros.
            count: tokens at each position, at most the vocabulary.
            reference: `GatheredWeights` of the same model.

        Returns:
            int64 tokens and float32 log pi of policy and reference, [b, S-1, count] each.
        """
        policy = self._final_states(response_tokens, mask)
        with reference.in_place():
            other = self._final_states(response_tokens, mask)
        tokens = scores = None
        if policy is not None and other is not None:
            found = likeliest_tokens(policy, count)
            tokens = found.new_zeros(*mask.shape, count)
            tokens[mask != 0] = found
            scores = torch.zeros(2, *tokens.shape, device=tokens.device)
            scores[0, mask != 0] = log_probs_at(policy, found)
            scores[1, mask != 0] = log_probs_at(other, found)
        tokens = broadcast_tensor_within_pp(tokens, dtype=torch.int64)
        scores = broadcast_tensor_within_pp(scores)
        return tokens, scores[0], scores[1]

    def _final_states(self, tokens: Tensor, mask: Tensor) -> FinalStates | None:
        """Of the positions in ``mask``, in its order; one micro batch. None off the last stage."""
        width = max(needed_inputs(mask), default=1)
        plan = [MicroBatch(list(range(len(tokens))), width)]

        def forward_step(batches: Iterator, model: Any) -> tuple[Tensor, Callable]:
            micro = next(batches)
            states, layer = self._forward(micro, model, None)
            found = None
            if layer is not None:
                index = _state_rows(micro["mask"] != 0)
                found = FinalStates(states.flatten(0, 1).index_select(0, index), layer)
            return states, lambda _, non_loss_data=True: found

        found = self._run(plan, tokens, {"mask": mask}, forward_step, True, collect=True)
        return found[0] if found else None

    def _target_step(
        self,
        positions: str,
        finish: Callable,
        temperature: float | None = None,
        likeliest: bool = False,
    ) -> Callable:
        """A forward step for Megatron's schedules.

        Its output is log pi of the targets where ``positions`` of the micro batch is not 0,
        float32 [b, width, 1 + K] (K tokens beside the target where the micro batch has
        ``kl_tokens``), or with ``likeliest`` what `score` returns. ``finish(micro batch, output)``
        is what Megatron calls on the last stage.
        """

        def forward_step(batches: Iterator, model: Any) -> tuple[Tensor, Callable]:
            micro = next(batches)
            states, layer = self._forward(micro, model, temperature)
            if layer is None:
                return states, lambda _: None
            where = micro[positions] != 0
            targets = micro["targets"][..., None]
            if "kl_tokens" in micro:
                targets = torch.cat([targets, micro["kl_tokens"]], -1)
            found, best = target_log_probs(
                states.flatten(0, 1), layer, _state_rows(where), targets[where]
            )
            whole = _spread(found, where)
            if likeliest:
                whole = torch.stack([whole[..., 0], _spread(best[:, None], where)[..., 0]])
            return whole, partial(finish, micro)

        return forward_step

    def _forward(
        self, micro: dict[str, Tensor], model: Any, temperature: float | None
    ) -> tuple[Tensor, OutputLayer | None]:
        """Hidden states and, on the last stage, the output layer that they have yet to go through.

        Returns:
            States [S, b, H], whole on every tensor-parallel rank on the last stage. Their gradient
            is summed over tensor parallel there, as the output layer would.
        """
        inputs = micro["inputs"]
        # Padding is behind the text, so that positions start at 0 in every row, as in generation.
        positions = torch.arange(inputs.size(1), device=inputs.device).expand_as(inputs)
        gpt = bare_module(model)
        # Without it Megatron's GPT ends with logits of all positions in fp32, which is what is
        # avoided.
        last, gpt.post_process = gpt.post_process, False  # the decoder's own, the final norm, stays
        try:
            # Megatron's causal mask is made where none is given, as in NeMo's generation.
            states = model(inputs, positions, None)
        finally:
            gpt.post_process = last
        if not last:
            return states, None
        layer = self._output_layer(gpt, temperature)
        states = states.to(layer.dtype)  # NeMo's wrapper makes them fp32 in training
        if gpt.output_layer.sequence_parallel:
            return gather_from_sequence_parallel_region(states), layer
        return copy_to_tensor_model_parallel_region(states), layer

    def _output_layer(self, gpt: Any, temperature: float | None) -> OutputLayer:
        module, reinforce = gpt.output_layer, self.cfg.reinforce
        shared = gpt.share_embeddings_and_output_weights
        weight = gpt.shared_embedding_or_output_weight() if shared else module.weight
        assert module.bias is None, "Megatron's GPT has an output layer without bias"
        customized = self.cfg.get("mcore_customization_config") or {}
        autocast = torch.is_autocast_enabled("cuda")
        return OutputLayer(
            # Of these very values: the parameter may point at others in a moment, see `in_place`.
            weight=weight if torch.is_grad_enabled() else weight.detach(),
            first=parallel_state.get_tensor_model_parallel_rank() * len(weight),
            vocabulary=self.tokenizer.vocab_size,
            temperature=reinforce.log_prob_temperature if temperature is None else temperature,
            soft_cap=customized.get("final_logit_softcapping") or 0.0,  # as NeMo asks for it
            dtype=torch.get_autocast_dtype("cuda") if autocast else weight.dtype,
        )

    def _plan(self, positions: Tensor, size: int, tokens: int | None) -> list[MicroBatch]:
        parallel = self.cfg.get("sequence_parallel", False)  # NeMo says no inside `inference`
        multiple = parallel_state.get_tensor_model_parallel_world_size() if parallel else 1
        return plan_micro_batches(needed_inputs(positions), size, tokens, multiple)

    def _run(
        self,
        plan: list[MicroBatch],
        tokens: Tensor,
        others: dict[str, Tensor],
        forward_step: Callable,
        forward_only: bool,
        collect: bool = False,
    ) -> list[Any]:
        """Megatron's schedule over the micro batches; what ``forward_step`` has on the last stage.

        Args:
            others: [B, S-1], see `MicroBatch.cut`.
            collect: the forward step's values are no losses.
        """
        # NeMo-Aligner's: gradients are reduced after the last micro batch only.
        set_sync_funcs(self, forward_only)
        batches = (micro.cut(tokens, others, self.tokenizer.eos_id) for micro in plan)
        shapes = {(len(micro.rows), micro.width) for micro in plan}
        with self._stages_tell_shapes(len(shapes) > 1):
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=self._make_data_iterator_list(batches),
                model=self.model,
                num_microbatches=len(plan),
                forward_only=forward_only,
                seq_length=plan[0].width,
                micro_batch_size=len(plan[0].rows),
                collect_non_loss_data=collect,
            )

    @contextmanager
    def _stages_tell_shapes(self, needed: bool) -> Iterator[None]:
        """Pipeline stages tell each other the shapes of micro batches that are not all alike."""
        configs = [module.config for module in self.get_model_module_list()]
        for config in configs:
            # Costs a small message for each micro batch and stage, so only where widths differ.
            config.variable_seq_lengths = needed
        try:
            yield
        finally:
            for config in configs:
                config.variable_seq_lengths = False


def _spread(found: Tensor, where: Tensor) -> Tensor:
    """Rows [N, K] at the positions that are set in ``where`` [b, S], zeros elsewhere: [b, S, K]."""
    whole = found.new_zeros(*where.shape, found.size(1))
    return whole.masked_scatter(where[..., None], found)


def _state_rows(where: Tensor) -> Tensor:
    """Rows of the flattened states [S * b, H] of positions that are set in ``where`` [b, S]."""
    sequence, position = where.nonzero(as_tuple=True)
    return position * len(where) + sequence
