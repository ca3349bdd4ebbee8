"""The layer norms of a model that is built without Transformer Engine.

Megatron-core 0.11 then takes torch's own (transformer/torch_norm.py), which refuse sequence
parallelism and zero-centred weights: with them neither an H100 layout nor a Gemma could be built,
and so not be tested, off a GPU. This module imports no NeMo.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class LayerNorm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, with the options of Transformer Engine's.

    - ``layernorm_zero_centered_gamma`` (Gemma, ``layernorm1p``): the stored weight is what is added
      to 1. The sum is taken in fp32, since bf16 would round away weights below 2^-9.
    - ``sequence_parallel``: each rank sees a part of the sequence, so gradients have to be summed
      over tensor parallel; NeMo and Megatron-core find the parameters by this mark.
    - ``persist_layer_norm`` and ``memory_efficient_layer_norm`` choose kernels, not results.

    In fp32 it is torch's function bit for bit; lower precisions are computed in fp32 and rounded
    once, as Transformer Engine does.

    Args:
        config: Megatron's `TransformerConfig`.
        hidden_size: of the last dimension.
        eps: added to the mean square (RMSNorm) or the variance.
        persist_layer_norm, zero_centered_gamma, normalization: not read, here for Megatron-core's
            signature; its own norms read ``config`` as well.

    Raises:
        ValueError: another normalization is asked for.
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "LayerNorm",
    ) -> None:
        super().__init__()
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(
                f"model.normalization is {config.normalization!r}; expected LayerNorm or RMSNorm"
            )
        self.centred_on_mean = config.normalization == "LayerNorm"
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        self.eps = eps
        # What is stored is the difference from 1 (NeMo's layernorm1p, Gemma).
        start = 0.0 if self.zero_centered_gamma else 1.0
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), start))
        if self.centred_on_mean:
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size))
        for parameter in self.parameters():
            # Set through vars: mypy knows no such attribute of a Parameter. Megatron-core sums the
            # gradients of parameters with this mark (distributed/finalize_model_grads.py), NeMo
            # likewise.
            vars(parameter)["sequence_parallel"] = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalised ``x`` [..., hidden_size], of its own dtype."""
        weight = self.weight.float() + 1 if self.zero_centered_gamma else self.weight.float()
        if self.centred_on_mean:
            bias = self.bias.float()
            y = functional.layer_norm(x.float(), weight.shape, weight, bias, self.eps)
        else:
            y = functional.rms_norm(x.float(), weight.shape, weight, self.eps)
        return y.to(x.dtype)
