"""The policy: NeMo-Aligner's REINFORCE actor with a loss that does not depend on the layout.

What differs from upstream 0.7.0 (models/nlp/gpt/megatron_gpt_reinforce_actor.py):
- the loss is -sum(weights * log pi) with per-token weights computed on the global batch, so micro
  batch and data-parallel sizes cannot change the gradient (upstream l.135 broadcasts [B, S-1] with
  [B], l.137-141 averages within the micro batch);
- log-probabilities are those of the distribution that responses were sampled from: at its
  temperature, without the rows that pad the vocabulary;
- sampling is seeded per micro batch.
Optimizers, precision paths, parallelism and generation (NeMo or TensorRT-LLM) are upstream's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
from nemo_aligner.utils.distributed import (
    broadcast_2d_tensor_within_mp,
    broadcast_tensor_within_pp,
)
from omegaconf import DictConfig
from torch import Tensor

from nemo_warp.aligner.entry.special_tokens import Encode, encoder_of, with_begin
from nemo_warp.aligner.policy import engine_law
from nemo_warp.aligner.policy.passes import ForwardPasses
from nemo_warp.aligner.policy.stored_config import needs_begin_token
from nemo_warp.aligner.weights.sharded import ShardedWeights


class WarpActorModel(ForwardPasses, MegatronGPTReinforceActorModel):
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

    def _build_tokenizer(self) -> None:
        """NeMo's, which also reads special tokens that a text spells out (prompts, end strings)."""
        super()._build_tokenizer()
        self.tokenizer.text_to_ids = encoder_of(self.tokenizer)

    def prompt_encoder(self) -> Encode:
        """From a prompt's text to its tokens, BOS first where the family needs it.

        Gemma does, and who was imported from a folder whose tokenizer adds it.
        """
        begin = getattr(self.tokenizer, "bos_id", None)
        if begin is None or begin < 0 or not needs_begin_token(self.cfg):
            return self.tokenizer.text_to_ids
        return with_begin(self.tokenizer.text_to_ids, begin)

    def response_text(self, tokens: list[int]) -> str:
        """A response without its end: the end-of-sequence token, or an end string's one token."""
        return str(self.tokenizer.ids_to_text([t for t in tokens if t not in self._end_tokens]))

    @cached_property
    def _end_tokens(self) -> set[int]:
        ends = self.cfg.reinforce.sampling_params.end_strings
        encoded = [self.tokenizer.text_to_ids(text) for text in ends]
        return {self.tokenizer.eos_id} | {ids[0] for ids in encoded if len(ids) == 1}

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Generate and score inside; refits the TensorRT-LLM engine, where that is in use."""
        # NeMo-Aligner's: switches sequence and activation settings of training off (generation has
        # sequences of one token), and builds or refits the engine.
        self.prepare_for_inference()
        embeddings = self._without_reduce_scatter()
        try:
            yield
        finally:
            for embedding in embeddings:
                embedding.reduce_scatter_embeddings = True
            self.finish_inference()

    @torch.no_grad()
    def infer(self, inference_batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As upstream; with an engine also ``sampler``, its own log pi, see `Responses`."""
        if not (self.use_trtllm_generation and self.cfg.reinforce.measure_sampler):
            return super().infer(inference_batch)
        from nemo.export.trt_llm import tensorrt_llm_run

        decoder = engine_law.ask(tensorrt_llm_run.tensorrt_llm_worker_context)
        output = super().infer(inference_batch)
        # As the tokens themselves: from the first pipeline stage, then to all of the model's ranks.
        placed = broadcast_tensor_within_pp(decoder.placed(output), from_last=False)
        return output | {"sampler": broadcast_2d_tensor_within_mp(placed)}

    def _without_reduce_scatter(self) -> list[Any]:
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
                    # Megatron reads into the tensors of this state, in their dtype: bf16 ones would
                    # round what the file holds in fp32.
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
        # NeMo samples with torch's global generators; TensorRT-LLM takes seeds from a generator of
        # NeMo-Aligner's own (utils/trt_llm.py l.97-100), which a resume would start anew.
        torch.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed(seed)
        if self.use_trtllm_generation:
            self.trtllm_generate.rng_generator.manual_seed(seed)
