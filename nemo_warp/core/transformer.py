"""Sizes of a dense GPT, and what follows from them: parameters of a rank, operations of a pass.

Standard library only, so that a login node can compute with them. What is counted is what NeMo
2.2.1 builds (megatron_gpt_model.py, Megatron-core's GPTModel); a test holds the counts against real
models, layout by layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_GATED = ("geglu", "reglu", "swiglu")
"""Activations with a second up-projection; NeMo also knows each with ``fast-`` before it."""


@dataclass(frozen=True)
class Sizes:
    """A dense GPT, whole.

    Attributes:
        ffn: width of the feed-forward layers.
        groups: key-value heads.
        channels: of one head.
        vocabulary: true entries, without padding.
        context: longest sequence (tokens).
        gated: whether the feed-forward layers have a second up-projection.
        tied: whether output layer and embedding are one.
        bias: whether linear layers have biases.
        qkv_bias: whether queries, keys and values have (Qwen 2).
        norm_weights: vectors per norm: 1 (RMSNorm), 2 (LayerNorm).
        learned_positions: rows of the position embedding, 0 with rotary ones.
        divisible_by: the vocabulary is padded to a multiple of it times TP.
        fused_attention: whether attention scores stay inside a kernel (Transformer Engine).
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    channels: int
    vocabulary: int
    context: int
    gated: bool = True
    tied: bool = False
    bias: bool = False
    qkv_bias: bool = False
    norm_weights: int = 1
    learned_positions: int = 0
    divisible_by: int = 128
    fused_attention: bool = True

    @classmethod
    def of_nemo(cls, config: Mapping[str, Any], vocabulary: int) -> Sizes:
        """Sizes of a ``model_config.yaml``, with NeMo's defaults where it says nothing.

        Args:
            vocabulary: the tokenizer's; the configuration does not hold it.

        Raises:
            ValueError: the model is none whose sizes are known here (experts).
        """
        # Refused and not approximated: each rank would hold other experts, and how many tokens an
        # expert gets (its activations) is not known before a run.
        if config.get("num_moe_experts"):
            raise ValueError("a model with experts, whose memory is not estimated")
        heads, activation = config["num_attention_heads"], config.get("activation", "gelu")
        # The defaults below are NeMo's own (megatron_gpt_model.py l.501-556).
        learned = config.get("position_embedding_type", "learned_absolute") == "learned_absolute"
        return cls(
            layers=config["num_layers"],
            hidden=config["hidden_size"],
            ffn=config.get("ffn_hidden_size") or 4 * config["hidden_size"],
            heads=heads,
            groups=config.get("num_query_groups") or heads,
            channels=config.get("kv_channels") or config["hidden_size"] // heads,
            vocabulary=vocabulary,
            context=min(config["max_position_embeddings"], config["encoder_seq_length"]),
            gated=str(activation).removeprefix("fast-") in _GATED,
            tied=config.get("share_embeddings_and_output_weights", True),
            bias=config.get("bias", True),
            qkv_bias=config.get("qkv_bias", False),
            norm_weights=1 if config.get("normalization") == "rmsnorm" else 2,
            learned_positions=config["max_position_embeddings"] if learned else 0,
            divisible_by=config.get("make_vocab_size_divisible_by", 128),
            fused_attention=bool(config.get("transformer_engine", False)),
        )

    @property
    def attention(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.channels

    @property
    def keys_values(self) -> int:
        """Width of keys and values of a layer together."""
        return 2 * self.groups * self.channels

    @property
    def up(self) -> int:
        """Width of what the first feed-forward matrix gives."""
        return self.ffn * (2 if self.gated else 1)

    def padded_vocabulary(self, tensor: int) -> int:
        """Rows of embedding and output layer over all TP ranks."""
        # As NeMo pads (megatron_base_model.py l.616-628): the padded size depends on TP.
        multiple = self.divisible_by * tensor
        return -(-self.vocabulary // multiple) * multiple

    def layer_parameters(self, tensor: int = 1) -> int:
        """Parameters of a layer on one of ``tensor`` ranks; norms and some biases are on each."""
        qkv = self.attention + self.keys_values
        # QKV and output projection; up-projection (both halves where gated) and down-projection.
        split = self.hidden * (qkv + self.attention + self.up + self.ffn)
        whole = 2 * self.norm_weights * self.hidden
        if self.bias:
            # Column-parallel layers split their bias; row-parallel ones add a whole one after the
            # sum.
            split += qkv + self.up
            whole += 2 * self.hidden
        elif self.qkv_bias:
            split += qkv
        return split // tensor + whole

    def stage_parameters(self, tensor: int = 1, pipeline: int = 1, stage: int = 0) -> int:
        """Parameters on a rank of a pipeline stage; a tied embedding is on both ends of it."""
        first, last = stage == 0, stage == pipeline - 1
        found = self.layers // pipeline * self.layer_parameters(tensor)
        rows = self.padded_vocabulary(tensor) // tensor
        if first:
            found += (rows + self.learned_positions) * self.hidden
        if last:
            found += self.norm_weights * self.hidden
            # With pipeline stages a tied embedding has a second copy on the last one
            # (Megatron-core's language_module.py), which is kept equal by an all-reduce of its
            # gradients.
            found += 0 if self.tied and first else rows * self.hidden
        return found

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.stage_parameters()

    def forward_flops(self, tokens: float, length: float) -> float:
        """Of a forward pass over ``tokens`` tokens in sequences of ``length``.

        Two operations for each weight that a token is multiplied with (the output layer's included,
        the embedding's not), and 4 L d S for attention scores and their sums, causal or not, as
        usual for model FLOPs (PaLM, arXiv 2204.02311, appendix B). Training takes three times as
        many: recomputation is not counted.
        """
        # True vocabulary rows: the padding does no useful work.
        matrices = self.layers * self.layer_parameters() + self.vocabulary * self.hidden
        return tokens * (2 * matrices + 4 * self.layers * self.attention * length)


KNOWN = {
    "gemma-2b": Sizes(18, 2048, 16384, 8, 1, 256, 256000, 8192, tied=True),
    "gemma-7b": Sizes(28, 3072, 24576, 16, 16, 256, 256000, 8192, tied=True),
    "llama2-7b": Sizes(32, 4096, 11008, 32, 32, 128, 32000, 4096),
    "llama2-13b": Sizes(40, 5120, 13824, 40, 40, 128, 32000, 4096),
    "llama2-70b": Sizes(80, 8192, 28672, 64, 8, 128, 32000, 4096),
    "llama3-8b": Sizes(32, 4096, 14336, 32, 8, 128, 128256, 8192),
    "llama3-70b": Sizes(80, 8192, 28672, 64, 8, 128, 128256, 8192),
    "llama3.2-1b": Sizes(16, 2048, 8192, 32, 8, 64, 128256, 131072, tied=True),
    "mistral-7b": Sizes(32, 4096, 14336, 32, 8, 128, 32000, 32768),
    "qwen2.5-0.5b": Sizes(24, 896, 4864, 14, 2, 64, 151936, 32768, tied=True, qkv_bias=True),
    "qwen2.5-7b": Sizes(28, 3584, 18944, 28, 4, 128, 152064, 32768, qkv_bias=True),
}
"""Published models, for a plan that is made where no checkpoint is (``estimate.model``)."""
