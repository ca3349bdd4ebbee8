"""Kernels that a checkpoint's configuration asks for and that are not installed. No NeMo."""

from __future__ import annotations

from importlib.util import find_spec

_NEEDED = {
    "apply_rope_fusion": ("apex", "transformer_engine"),
    "masked_softmax_fusion": ("apex",),
    "gradient_accumulation_fusion": ("apex",),
    "use_flash_attention": ("flash_attn",),
    "bias_activation_fusion": ("torch",),
    "bias_dropout_add_fusion": ("torch",),
}
"""Key of ``model_config.yaml`` -> what its kernel comes with, any one of them; all need a GPU.

Each chooses a kernel and not a result. Without it Megatron-core refuses the first when a model is
built, the second and third at a bf16 step; NeMo refuses the fourth, which Megatron-core models do
not read. The last two are torch.compile's, which `cuda_on_cpu` cannot have.
"""


def absent_kernels() -> list[str]:
    """Keys to switch off on this machine; none in the NeMo container with a GPU."""
    import torch

    # torch here and not at the top: the module is read by checks on login nodes.
    gpu = torch.cuda.is_available()
    return [k for k, names in _NEEDED.items() if not gpu or not any(map(find_spec, names))]
