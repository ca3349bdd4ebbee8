"""Write, or read back, one checkpoint with the Megatron-core that is on the path.

A child of tools/make_written.py, with another Megatron-core than ours: nothing of nemo_warp is
imported but the CPU's stand-ins for CUDA calls.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"
import torch
import written_weights as known

warnings.simplefilter("ignore")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--policy", default="init")
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--one-key-per-part", action="store_true", help="singleton_local_shards")
    parser.add_argument("--optimizer", help="distrib_optim_sharding_type; none without it")
    parser.add_argument("--expected", type=Path, help="torch.save of what reading must give")
    arguments = parser.parse_args()
    # Before the fork, and before torch.cuda is replaced: torch's compiler lists its functions.
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401

    answer_cuda_calls_on_the_cpu()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(r, arguments)) for r in range(arguments.ranks)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return max(abs(rank.exitcode or 0) for rank in ranks)


def answer_cuda_calls_on_the_cpu() -> None:
    from nemo_warp.aligner.compat import cuda_on_cpu
    from nemo_warp.aligner.compat.replacements import Replacements

    cuda_on_cpu.replace_before_nemo(Replacements())


def _rank(rank: int, arguments: argparse.Namespace) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(arguments.ranks), "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state

    tensor, expert = (1, arguments.ranks) if arguments.experts else (arguments.ranks, 1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, expert_model_parallel_size=expert
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)
    model = _model(arguments, tensor, expert)
    if arguments.what == "write":
        fill(model, arguments.policy)
        exact = {name: param.detach().clone() for name, param in model.named_parameters()}
        model.to(torch.bfloat16 if arguments.optimizer else torch.float32)
        _write(model, exact, arguments)
    else:
        _read(model, arguments)
    torch.distributed.barrier()
    for (
        child
    ) in multiprocessing.active_children():  # writers of Megatron's, which may wait for ever
        child.kill()
    sys.stderr.flush()
    os._exit(0)


def _model(arguments: argparse.Namespace, tensor: int, expert: int) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    moe = {"num_moe_experts": known.EXPERTS, "moe_ffn_hidden_size": known.FFN}
    moe |= {"moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "alltoall"}
    config = TransformerConfig(
        **{"num_layers": known.LAYERS, "hidden_size": known.HIDDEN, "ffn_hidden_size": known.FFN},
        **{"num_attention_heads": known.HEADS, "gated_linear_unit": True},
        **{"activation_func": torch.nn.functional.silu, "add_bias_linear": False},
        **{"use_cpu_initialization": True, "bias_activation_fusion": False},
        **{"tensor_model_parallel_size": tensor, "expert_model_parallel_size": expert},
        **{"params_dtype": torch.float32, "pipeline_dtype": torch.float32},
        **(moe if arguments.experts else {}),
    )
    spec = get_gpt_layer_local_spec(known.EXPERTS if arguments.experts else None)
    model = GPTModel(
        config,
        spec,
        vocab_size=known.VOCABULARY,
        max_sequence_length=8,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return model


def shards(state: dict[str, Any]):
    """(canonical name, whole shape, where, data) of every tensor, in the usual spelling."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(state)
    pending: list[Any] = [state]
    while pending:
        one = pending.pop()
        if isinstance(one, dict | list):
            pending.extend(one.values() if isinstance(one, dict) else one)
        elif isinstance(one, ShardedTensor):
            yield _place(one)


def _place(shard: Any):
    name, shape = shard.key, tuple(shard.global_shape)
    name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")  # as in dense models
    own = tuple(
        slice(offset, offset + size)
        for offset, size in zip(
            shard.global_offset[-shard.data.dim() :], shard.data.shape, strict=True
        )
    )
    lead = shard.global_offset[: shard.prepend_axis_num]
    if lead and ".layers." in name:
        name = name.replace(".layers.", f".layers.{lead[0]}.")
        lead, shape = lead[1:], shape[1:]
    return name, shape, (*lead, *own), shard.data


@torch.no_grad()
def fill(model: torch.nn.Module, policy: str) -> None:
    for name, shape, where, data in shards(model.sharded_state_dict()):
        data.copy_(torch.from_numpy(known.weight(policy, name, shape))[where])


def _metadata(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if arguments.one_key_per_part:
        found |= {"singleton_local_shards": True, "non_homogeneous_layers": True}
    if arguments.optimizer:
        found["distrib_optim_sharding_type"] = arguments.optimizer
        found["chained_optim_avoid_prefix"] = arguments.optimizer == "fully_reshardable"
    return found


def _write(model: Any, exact: dict[str, torch.Tensor], arguments: argparse.Namespace) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    metadata = _metadata(arguments)
    weights = model.sharded_state_dict(metadata=metadata)
    place = ((torch.distributed.get_rank(),), (torch.distributed.get_world_size(),))
    state = {
        **{"args": argparse.Namespace(seed=1), "checkpoint_version": 3.0},
        **{"iteration": known.ITERATION, "model": weights, "content_metadata": metadata},
        "rng_state": ShardedObject("rng_state", [torch.get_rng_state()], place[1], place[0]),
    }
    if arguments.optimizer:
        state["optimizer"] = _optimizer_state(model, exact, metadata)
    if torch.distributed.get_rank() == 0:
        arguments.folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(arguments.folder), _strategy())


def _strategy() -> Any:
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    return TorchDistSaveShardedStrategy("torch_dist", 1)


def _optimizer_state(model: Any, exact: dict[str, torch.Tensor], metadata: dict[str, Any]) -> Any:
    """Of Megatron's distributed optimizer; its masters hold the unrounded weights."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(model.config, settings, model)
    config = OptimizerConfig(
        **{"optimizer": "adam", "lr": 1e-3, "bf16": True, "params_dtype": torch.bfloat16},
        **{"use_distributed_optimizer": True},
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    names = {param: name for name, param in model.named_parameters()}
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        set_masters(one, {param: exact[name] for param, name in names.items()})
    return optimizer.sharded_state_dict(
        model.sharded_state_dict(metadata=metadata), metadata=metadata
    )


@torch.no_grad()
def set_masters(optimizer: Any, exact: dict[Any, torch.Tensor]) -> None:
    """Fill the optimizer's shards of the masters; a step of nothing makes its state."""
    groups = zip(
        optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True
    )
    for params, masters in groups:
        for param, master in zip(params, masters, strict=True):
            part = optimizer._get_model_param_range_map(param)["param"]
            master.copy_(exact[param].reshape(-1)[part.start : part.end])
    for group in optimizer.optimizer.param_groups:
        group["lr"] = 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.optimizer.step()


def _read(model: torch.nn.Module, arguments: argparse.Namespace) -> None:
    """Load strictly, and compare every shard with what is expected."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    metadata = _metadata(arguments)
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    loaded, missing, unexpected = dist_checkpointing.load(
        state, str(arguments.folder), strict=StrictHandling.RETURN_ALL
    )
    assert not unexpected, f"not in the checkpoint: {unexpected}"
    assert missing <= {"rng_state"}, f"in the checkpoint and not in the model: {missing}"
    model.load_state_dict(loaded["model"], strict=True)
    compare(model, arguments.expected)


def compare(model: torch.nn.Module, file: Path) -> None:
    """Raise unless every shard of the model's is what a file says."""
    expected = torch.load(file)
    found = 0
    for name, _, where, data in shards(model.sharded_state_dict()):
        torch.testing.assert_close(data, expected[name][where].to(data.dtype), rtol=0, atol=0)
        found += 1
    assert found >= len(expected), f"{found} shards of {len(expected)} tensors"


if __name__ == "__main__":
    sys.exit(main())
