"""Stand-ins for NVIDIA packages that NeMo needs and that exist only in its container.

Apex, Transformer Engine and TensorRT-LLM are looked for one by one, and only what is absent is
stood in for, with or without a GPU. In the container all three are there and nothing happens.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch

from nemo_warp.aligner.compat import torch_adam
from nemo_warp.aligner.compat.gemma2 import gemma2_layer_spec
from nemo_warp.aligner.compat.norm import LayerNorm
from nemo_warp.aligner.compat.padded_rows import allow_other_padding
from nemo_warp.aligner.compat.replacements import Replacements

PACKAGES = ("apex", "transformer_engine", "tensorrt_llm")
"""Import names of the packages that can be stood in for."""

_MEGATRON = "nemo.collections.nlp.modules.common.megatron"
_GPT_MODEL = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model"
_ASSUMED_CONTAINER = "24.07"  # any release whose options the pinned NeMo knows


def absent() -> list[str]:
    """The packages of `PACKAGES` that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


def replace_before_nemo(replacements: Replacements, missing: Sequence[str]) -> None:
    """What must be in place before NeMo and NeMo-Aligner are imported."""
    if missing and "NVIDIA_PYTORCH_VERSION" not in os.environ:
        os.environ["NVIDIA_PYTORCH_VERSION"] = _ASSUMED_CONTAINER
        replacements.record("NVIDIA_PYTORCH_VERSION", f"{_ASSUMED_CONTAINER}, NeMo parses it")
    if "tensorrt_llm" in missing:
        replacements.add_module(
            "nemo_aligner.utils.trt_llm",
            # NeMo-Aligner 0.7, utils/trt_llm.py; its actor model imports that module.
            "upstream imports TensorRT-LLM even where it is not used",
            GPTGenerateTRTLLM=TensorRTLLMMissing,
        )


def replace_in_nemo(replacements: Replacements, missing: Sequence[str]) -> None:
    """What has to be set in NeMo's and Megatron's own modules (imports them)."""
    if "apex" in missing:
        _replace_apex(replacements)
    if "transformer_engine" in missing:
        _replace_transformer_engine(replacements)
    # Either of the two brings a fused Adam, which Megatron-core then takes.
    if "apex" in missing and "transformer_engine" in missing:
        _replace_fused_adam(replacements)
    _adapt_checkpoint_writer(replacements)
    allow_other_padding(replacements)


class TensorRTLLMMissing:
    """Takes the place of NeMo-Aligner's generator; says what is missing when it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "generation through TensorRT-LLM was asked for, but tensorrt_llm is not installed: "
            "run in the NeMo container, or set rollout.trt_llm.enable=false"
        )


# --------------------------------------------------------------------------------------- apex


def _replace_apex(replacements: Replacements) -> None:
    """NeMo's uses of apex on the way of a Megatron-core GPT, in plain torch.

    `import apex` itself keeps failing, so that Megatron-core takes its own way without apex and
    the optimizers that exist only in apex (`distributed_fused_adam`) stay refused by NeMo.
    """
    # Imports of NeMo stand in functions throughout: this module is imported before NeMo may be.
    from megatron.core.tensor_parallel import layers as megatron_layers

    overrides = importlib.import_module("nemo.collections.nlp.parts.nlp_overrides")
    replacements.set(overrides, "HAVE_APEX", True, "the strategies refuse to start without apex")

    mcore_optim = importlib.import_module("nemo.core.optim.mcore_optim")
    replacements.set(
        overrides, "MegatronDistributedFusedAdam", _NoSuchClass, "no optimizer is apex's"
    )
    replacements.set(
        overrides,
        "McoreDistributedOptimizer",
        mcore_optim.McoreDistributedOptimizer,
        "NeMo imports it only beside apex's",
    )

    build_model = importlib.import_module(f"{_MEGATRON}.build_model")
    name = "set_defaults_if_not_set_tensor_model_parallel_attributes"
    replacements.set(
        build_model, name, getattr(megatron_layers, name), "Megatron-core's, instead of apex's"
    )

    utils = importlib.import_module(f"{_MEGATRON}.utils")
    replacements.set(utils, "listify_model", _as_list, "a list, as apex's makes")
    # NeMo names these classes in isinstance tests when it groups parameters by weight decay.
    for norm in ("FusedLayerNorm", "FastLayerNorm", "MixedFusedRMSNorm"):
        replacements.set(utils, norm, _NoSuchClass, "no module is one of apex's norms")

    clip_grads = importlib.import_module(f"{_MEGATRON}.clip_grads")
    main_params = importlib.import_module("nemo.core.optim.optimizer_with_main_params")
    replacements.set(main_params, "HAVE_APEX", True, "megatron_amp_O2 without apex")
    kernels = SimpleNamespace(
        multi_tensor_l2norm=multi_tensor_l2norm, multi_tensor_scale=multi_tensor_scale
    )
    # Both bound the names of apex's kernels at their own import, so both get them.
    for module in (clip_grads, main_params):
        replacements.set(module, "amp_C", kernels, "torch foreach kernels")
        replacements.set(module, "multi_tensor_applier", _apply_kernel, "torch foreach kernels")


class _NoSuchClass:
    """For ``isinstance`` only; nothing is an instance of it."""


def _as_list(model: Any) -> list[Any]:
    return model if isinstance(model, list) else [model]


def _apply_kernel(
    kernel: Callable[..., Any], overflow: torch.Tensor, tensor_lists: list[Any], *args: Any
) -> Any:
    return kernel(overflow, tensor_lists, *args)


def multi_tensor_l2norm(
    overflow: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """L2 norm over all tensors together, as apex's kernel of that name: ``([1], None | [n])``."""
    # The norm of the tensors' norms is the norm of all elements together.
    norms = torch.stack(torch._foreach_norm(tensor_lists[0]))
    total = torch.linalg.vector_norm(norms).reshape(1)
    # Shape [1], not a scalar: NeMo's clip_grads squares it and all-reduces it in place.
    return total, norms if per_tensor else None


def multi_tensor_scale(
    overflow: torch.Tensor, tensor_lists: list[list[torch.Tensor]], scale: float
) -> None:
    """``target = source * scale`` in place, as apex's kernel; infinities are not looked for."""
    sources, targets = tensor_lists
    # NeMo scales between bf16 and fp32 lists; copy_ casts, and source may be target.
    torch._foreach_copy_(targets, torch._foreach_mul(sources, scale))


def _replace_fused_adam(replacements: Replacements) -> None:
    """For Megatron's distributed optimizer, which then runs torch's Adam."""
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    optimizer = module.DistributedOptimizer
    for name, change in (
        ("_get_main_param_and_optimizer_states", torch_adam.without_step),
        ("_set_main_param_and_optimizer_states", torch_adam.without_step),
        ("state_dict", torch_adam.with_states),
        ("load_state_dict", torch_adam.with_own_steps),
    ):
        replacements.set(
            optimizer, name, change(getattr(optimizer, name)), "torch's Adam counts per parameter"
        )


# ------------------------------------------------------------------------- Transformer Engine


def _replace_transformer_engine(replacements: Replacements) -> None:
    gpt_model = importlib.import_module(_GPT_MODEL)
    nlp_model = importlib.import_module("nemo.collections.nlp.models.nlp_model")
    replacements.set(
        gpt_model, "get_specs", local_layer_spec, "Megatron-core's local layers, same checkpoints"
    )
    replacements.set(
        nlp_model,
        "get_megatron_pretrained_bert_models",
        list,
        "Megatron-BERT cannot be imported without Transformer Engine",
    )
    specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    block = importlib.import_module("megatron.core.transformer.transformer_block")
    for module, name in ((specs, "LNImpl"), (block, "LayerNormImpl")):
        replacements.set(
            module, name, LayerNorm, "knows sequence parallelism and zero-centred weights"
        )


def local_layer_spec(spec_name: str, transformer_config: Any = None, *_: Any, **__: Any) -> Any:
    """Megatron-core's layer specification without Transformer Engine (NeMo's ``get_specs``).

    Its sharded state dict has the keys of the Transformer Engine layers, so that a ``.nemo``
    written with one is read with the other.

    Raises:
        ValueError: the model asks for layers that only Transformer Engine has.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    if spec_name == "megatron_gemma2":
        return gemma2_layer_spec()
    # NeMo makes "te_gpt" of "" where the checkpoint says transformer_engine
    # (megatron_gpt_model.py l.154), as published ones do; the local layers stand for it.
    if spec_name not in ("", "te_gpt"):
        raise ValueError(
            f"model.name={spec_name!r} needs Transformer Engine, which is not installed: run in "
            "the NeMo container, or use a model with model.name=''"
        )
    if transformer_config is None:
        return get_gpt_layer_local_spec()
    return get_gpt_layer_local_spec(
        transformer_config.num_moe_experts,
        transformer_config.moe_grouped_gemm,
        transformer_config.qk_layernorm,
    )


# ------------------------------------------------------------- torch newer than the container's


def _adapt_checkpoint_writer(replacements: Replacements) -> None:
    """Megatron-core 0.11 calls torch's private ``_write_item`` as it was up to torch 2.6."""
    from torch.distributed.checkpoint import filesystem

    # Read from the function and not from torch's version: 2.7 put `transforms` first, a later one
    # added the serialization format, and containers carry patched builds.
    parameters = list(inspect.signature(filesystem._write_item).parameters)
    if parameters[:1] != ["transforms"]:
        return
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def write_item(stream: Any, data: Any, item: Any, storage_key: str) -> Any:
        return filesystem._write_item(
            filesystem._StorageWriterTransforms(),
            stream,
            data,
            item,
            storage_key,
            # Megatron-core reads the items back with torch.load, whatever torch's default becomes.
            *([filesystem.SerializationFormat.TORCH_SAVE] if len(parameters) > 5 else []),
        )

    replacements.set(
        filesystem_async, "_write_item", write_item, f"signature of torch {torch.__version__}"
    )
