"""The policy: NeMo-Aligner's REINFORCE actor with a loss that does not depend on the layout.

What differs from upstream 0.7.0 (models/nlp/gpt/megatron_gpt_reinforce_actor.py):
- the loss is -sum(weights * log pi) with per-token weights computed on the global batch, so micro
  batch and data-parallel sizes cannot change the gradient (upstream l.135 broadcasts [B, S-1] with
  [B], l.137-141 averages within the micro batch);
- log-probabilities are those of the law that was sampled from: tempered, padded vocabulary out;
- sampling is seeded per micro batch.
Optimizers, precision paths, parallelism and generation (NeMo or TensorRT-LLM) are upstream's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state as megatron_parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from nemo.collections.nlp.modules.common.megatron.utils import (
    average_losses_across_data_parallel_group,
    get_iterator_k_split,
)
from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.distributed import (
    _compute_distributed_log_softmax,
    broadcast_tensor_within_pp,
    from_parallel_logits_to_logprobs,
)
from nemo_aligner.utils.train_utils import set_sync_funcs
from omegaconf import DictConfig
from torch import Tensor

from nemo_warp.aligner.weights.sharded import ShardedWeights


class WarpActorModel(MegatronGPTReinforceActorModel):
    """Policy of one member.

    Attributes:
        restored: whether weights were read from a ``.nemo``.
        file_shard: this rank's fp32 slice (see `ShardedWeights`) of what the ``.nemo`` holds, where
            the parameters are of lower precision; None where they are fp32, or unknown (formats
            other than a distributed checkpoint).
    """

    restored: bool = False
    file_shard: Tensor | None = None

    def __init__(self, cfg: DictConfig, trainer: Any) -> None:
        super().__init__(cfg, trainer)
        if self.use_trtllm_generation:  # upstream builds all engines of a machine in one directory
            exporter = self.trtllm_generate.trt_llm_exporter
            exporter.model_dir = cfg.reinforce.engine_directory

    def temper(self, vocab_parallel_logits: Tensor) -> Tensor:
        """Logits of the law that responses are sampled from, float32 [b, S, V/TP].

        Divided by ``reinforce.log_prob_temperature``. Rows that only pad the vocabulary, which
        sampling never draws, are cut off; with TP > 1, where all ranks need the same V/TP, they
        get the most negative finite value (whose exp is 20 times as slow on a CPU).
        """
        columns = vocab_parallel_logits.size(-1)
        real = self.tokenizer.vocab_size - parallel_state.get_tensor_model_parallel_rank() * columns
        cut = parallel_state.get_tensor_model_parallel_world_size() == 1
        logits = vocab_parallel_logits[..., :real] if cut else vocab_parallel_logits
        logits = logits.float() / self.cfg.reinforce.log_prob_temperature
        if not cut and real < columns:
            padding = torch.arange(columns, device=logits.device) >= real
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min / 2)
        return logits

    def get_actor_forward_output_and_loss_func(self) -> Callable:
        """Forward step for Megatron's schedules."""
        scale = get_num_microbatches() * parallel_state.get_data_parallel_world_size()

        def forward_step(data_iterator: Iterator, model: Any) -> tuple[Tensor, Callable]:
            batch = {k: v.cuda(non_blocking=True) for k, v in next(data_iterator).items()}
            logits = model(
                batch["response_tokens"],
                batch["position_ids"],
                batch["attention_mask"],
                labels=None,
            )

            def loss_func(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                log_probs = from_parallel_logits_to_logprobs(
                    vocab_parallel_logits=self.temper(logits),
                    target=batch["response_tokens"],
                    higher_stability=True,
                )
                # Megatron divides by the number of micro batches, gradient reduction by DP.
                loss = -(log_probs * batch["weights"]).sum() * scale
                return loss, {"loss": average_losses_across_data_parallel_group([loss])}

            return logits, loss_func

        return forward_step

    def get_logprob_output_only_func(self, inference_only: bool = True) -> Callable:
        """As upstream, of the tempered law."""
        return self._output_only_func(
            lambda logits, tokens: from_parallel_logits_to_logprobs(
                vocab_parallel_logits=self.temper(logits),
                target=tokens,
                inference_only=inference_only,
                higher_stability=True,
            )
        )

    def get_vocab_parallel_log_probs(self, response_tokens: Tensor) -> Tensor | None:
        """Log pi over this rank's part of the vocabulary, float32 [b, S-1, V/TP].

        One micro batch. None off the last pipeline stage.
        """
        func = self._output_only_func(
            lambda logits, _: _compute_distributed_log_softmax(self.temper(logits))[:, :-1]
        )
        outputs = self._forward_only(response_tokens, len(response_tokens), func)
        return outputs[0] if outputs else None

    @torch.no_grad()
    def get_exact_kl(self, response_tokens: Tensor, mask: Tensor, reference: Any) -> Tensor:
        """Rao-Blackwellised KL(policy || reference) of each response, float32 [b], in nats.

        Sums over the whole vocabulary at each sampled prefix instead of using the sampled token.

        Args:
            response_tokens: int64 [b, S].
            mask: float [b, S-1] of response positions.
            reference: `GatheredWeights` of the same model.
        """
        policy = self.get_vocab_parallel_log_probs(response_tokens)
        with reference.in_place():
            other = self.get_vocab_parallel_log_probs(response_tokens)
        kl = None
        if policy is not None:
            kl = (policy.exp() * (policy - other)).sum(-1)
            torch.distributed.all_reduce(
                kl, group=megatron_parallel_state.get_tensor_model_parallel_group()
            )
            kl = (kl * mask).sum(-1)
        return broadcast_tensor_within_pp(kl)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Generate and score inside; refits the TensorRT-LLM engine, where that is in use."""
        self.prepare_for_inference()
        embeddings = self._without_reduce_scatter()
        try:
            yield
        finally:
            for embedding in embeddings:
                embedding.reduce_scatter_embeddings = True
            self.finish_inference()

    def _without_reduce_scatter(self) -> list[torch.nn.Module]:
        """Embeddings that were told to leave the sequence whole, as sequence parallelism is off.

        NeMo's reset (megatron_gpt_model.py l.2166) knows ``sequence_parallel`` only; the embedding
        would go on to scatter its output over TP, and the layers after it to expect all of it.
        """
        found = [
            module
            for part in self.get_model_module_list()
            for module in part.modules()
            if getattr(module, "reduce_scatter_embeddings", False)
        ]
        for module in found:
            module.reduce_scatter_embeddings = False
        return found

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """As NeMo's; while a ``.nemo`` is read it asks for fp32, whatever the parameters are."""
        state = super().sharded_state_dict(prefix=prefix)
        if not self.restored:
            for entry in nested_values(state):
                if isinstance(entry, ShardedTensor | ShardedTensorFactory):
                    entry.data = entry.data.detach().float()
                    if isinstance(entry, ShardedTensor):
                        entry.dtype = torch.float32
        return state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep this rank's fp32 slice of a ``.nemo`` before its weights are rounded.

        Masters, anchor and SFT copy start from it: an init that was merged in fp32 differs from its
        bf16 rounding by 12 to 36 % of a merge's update (T = 9000 to 3000, simulated).
        """
        if not self.restored and any(p.dtype != torch.float32 for p in self.parameters()):
            weights = ShardedWeights(self)
            weights.load_state_dict_(checkpoint["state_dict"], "")
            self.file_shard = weights.shard
        self.restored = True  # from here on the model's own dtypes
        super().on_load_checkpoint(checkpoint)

    def seed_sampling(self, seed: int) -> None:
        """Make the next `infer` a function of ``seed``, equal on all ranks that sample together."""
        torch.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed(seed)
        if self.use_trtllm_generation:
            self.trtllm_generate.rng_generator.manual_seed(seed)

    def _output_only_func(self, compute: Callable[[Tensor, Tensor], Tensor]) -> Callable:
        """A forward step whose non-loss data is ``compute(logits, tokens)``."""
        forward = self.get_forward_output_only_func()

        def forward_step(data_iterator: Iterator, model: Any) -> tuple[Tensor, Callable]:
            batch = next(data_iterator)
            logits, _ = forward(iter([batch]), model)
            return logits, lambda logits, non_loss_data=True: compute(logits, batch[0])

        return forward_step

    def _forward_only(self, tokens: Tensor, micro_batch_size: int, func: Callable) -> list[Tensor]:
        """Run ``func`` over ``tokens``: a tensor per micro batch on the last stage, else none."""
        set_sync_funcs(self, forward_only=True)
        attention_mask, _, position_ids = self.get_ltor_masks_and_position_ids(tokens)
        num_microbatches = len(tokens) // micro_batch_size
        batches = get_iterator_k_split([tokens, attention_mask, position_ids], num_microbatches)
        return get_forward_backward_func()(
            forward_step_func=func,
            data_iterator=self._make_data_iterator_list(batches),
            model=self.model,
            num_microbatches=num_microbatches,
            forward_only=True,
            seq_length=tokens.size(1),
            micro_batch_size=micro_batch_size,
            collect_non_loss_data=True,
        )
