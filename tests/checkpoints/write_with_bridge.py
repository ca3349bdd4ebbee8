"""Write, or load, one checkpoint with the Megatron-Bridge that is on the path.

A child of tools/make_written.py, as write_with_megatron.py is. One CPU rank with gloo. What stands
in for something else: torch.cuda's calls (nemo_warp's stand-ins), and two names of Transformer
Engine that Megatron-Bridge needs to be imported and that a model of `local_layer_spec` never uses.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import socket
import sys
import types
import warnings
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch
import write_with_megatron as plain
import written_weights as known

warnings.simplefilter("ignore")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("export", "train", "load"))
    parser.add_argument("folder", type=Path, help="parent of the iter_... folder")
    parser.add_argument("--policy", default="init")
    parser.add_argument("--optimizer", help="distrib_optim_sharding_type; none without it")
    parser.add_argument("--step", type=int, help="at which training must go on")
    parser.add_argument("--expected", type=Path, help="torch.save of what loading must give")
    arguments = parser.parse_args()
    _import_bridge()
    plain.answer_cuda_calls_on_the_cpu()
    _start_one_rank()
    os.chdir(arguments.folder.parent)  # the configuration is saved with the folder's name in it
    arguments.folder = Path(arguments.folder.name)
    {"export": _export, "train": _train, "load": _load}[arguments.what](arguments)
    for child in multiprocessing.active_children():  # Megatron's writers, which may wait for ever
        child.kill()
    sys.stderr.flush()
    os._exit(0)


def _import_bridge() -> None:
    """megatron.bridge/peft/lora_layers.py imports Transformer Engine whether or not it is there.

    Its classes refer to two names as base or annotation. The stand-ins are gone before modelopt
    and Megatron-core look for the package, so both take their ways without it.
    """
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer

    engine = types.ModuleType("transformer_engine")
    engine.pytorch = types.ModuleType("transformer_engine.pytorch")
    engine.pytorch.Linear = torch.nn.Linear
    engine.pytorch.ops = types.SimpleNamespace(Sequential=torch.nn.Sequential)
    names = {"transformer_engine": engine, "transformer_engine.pytorch": engine.pytorch}
    sys.modules |= names
    import megatron.bridge

    for name in names:
        del sys.modules[name]
    import megatron.bridge.training.checkpointing  # noqa: F401


def _start_one_rank() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    init_num_microbatches_calculator(0, None, 1, 1, 1)


def _provider(dtype: torch.dtype) -> Any:
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec

    provider = GPTModelProvider(
        **{"num_layers": known.LAYERS, "hidden_size": known.HIDDEN, "seq_length": 8},
        **{"ffn_hidden_size": known.FFN, "num_attention_heads": known.HEADS},
        **{"gated_linear_unit": True, "activation_func": torch.nn.functional.silu},
        **{"add_bias_linear": False, "bias_activation_fusion": False},
        **{"position_embedding_type": "rope", "share_embeddings_and_output_weights": False},
        **{"vocab_size": known.TOKENS, "should_pad_vocab": True, "make_vocab_size_divisible_by": 8},
        **{"bf16": dtype == torch.bfloat16, "params_dtype": dtype, "pipeline_dtype": dtype},
        **{"transformer_layer_spec": local_layer_spec, "gradient_accumulation_fusion": False},
    )
    provider.finalize()
    return provider


def _model(dtype: torch.dtype) -> Any:
    return _provider(dtype).provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=True
    )[0]


def _export(arguments: argparse.Namespace) -> None:
    """As AutoBridge.import_ckpt ends: the model and its tokenizer, in iter_0000000."""
    from megatron.bridge.training.model_load_save import save_megatron_model

    model = _model(torch.float32)
    plain.fill(model, arguments.policy)
    save_megatron_model([model], arguments.folder, hf_tokenizer_path=_tokenizer(arguments.folder))


def _tokenizer(beside: Path) -> Path:
    """A tokenizer of known.TOKENS words, in a folder of its own."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(known.TOKENS)}
    folder = beside.with_name("words")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0", eos_token="w1"
    )
    fast.save_pretrained(folder)
    return folder


def _train(arguments: argparse.Namespace) -> None:
    """As training saves: optimizer, scheduler and generator states, in the step's folder."""
    from megatron.bridge.training.checkpointing import save_checkpoint

    state, model, optimizer, scheduler = _training(arguments)
    bare = model[0].module.module  # in DistributedDataParallel and Float16Module
    twin = _model(torch.float32)
    plain.fill(twin, arguments.policy)
    exact = dict(zip(bare.parameters(), twin.parameters(), strict=True))
    for rounded, unrounded in exact.items():
        rounded.data.copy_(unrounded.data)
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        plain.set_masters(one, exact)
    state.train_state.step = known.ITERATION
    _simplify_generators()
    save_checkpoint(state, model, optimizer, scheduler, 1000)


def _simplify_generators() -> None:
    """And in one of few numbers, since the states of seeds do not shrink when packed."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    random.setstate((3, (1, *[0] * 623, 624), None))
    np.random.set_state(("MT19937", [1, *[0] * 623], 624))
    torch.manual_seed(1)
    tracker = get_cuda_rng_tracker()
    tracker.set_states({name: torch.get_rng_state() for name in tracker.get_states()})


def _training(arguments: argparse.Namespace) -> tuple[Any, ...]:
    """State, model, optimizer and scheduler as megatron/bridge/training/setup.py makes them."""
    from megatron.bridge.training import config as bridge
    from megatron.bridge.training.optim import setup_optimizer
    from megatron.bridge.training.state import GlobalState
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    words = TokenizerConfig(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(_tokenizer(arguments.folder))
    )
    state = GlobalState()
    state.cfg = bridge.ConfigContainer(
        train=bridge.TrainingConfig(micro_batch_size=1, global_batch_size=1, train_iters=30),
        model=_provider(torch.bfloat16),
        optimizer=bridge.OptimizerConfig(
            **{"optimizer": "adam", "lr": 1e-3, "min_lr": 0.0, "bf16": True},
            **{"params_dtype": torch.bfloat16, "use_distributed_optimizer": True},
        ),
        ddp=bridge.DistributedDataParallelConfig(use_distributed_optimizer=True),
        scheduler=bridge.SchedulerConfig(
            start_weight_decay=0.0, end_weight_decay=0.0, lr_decay_style="constant"
        ),
        dataset=bridge.MockGPTDatasetConfig(
            seq_length=8,
            random_seed=1,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
        ),
        logger=bridge.LoggerConfig(),
        tokenizer=words,
        checkpoint=bridge.CheckpointConfig(
            save=str(arguments.folder),
            dist_ckpt_optim_fully_reshardable=arguments.optimizer == "fully_reshardable",
        ),
    )
    for part in (state.cfg.optimizer, state.cfg.ddp, state.cfg.checkpoint):
        part.finalize()
    state.cfg.dataset.tokenizer = build_tokenizer(words)
    state.cfg.scheduler.lr_decay_steps, state.cfg.scheduler.wd_incr_steps = 30, 30
    state.cfg.scheduler.lr_warmup_steps = 0
    model = state.cfg.model.provide_distributed_model(
        ddp_config=state.cfg.ddp, use_cpu_initialization=True
    )
    made = setup_optimizer(
        optimizer_config=state.cfg.optimizer, scheduler_config=state.cfg.scheduler, model=model
    )
    return state, model, *made


def _load(arguments: argparse.Namespace) -> None:
    """Load for use, as a start for other training, and to go on; compare with what is expected."""
    from megatron.bridge.training.checkpointing import load_checkpoint
    from megatron.bridge.training.model_load_save import load_megatron_model, load_tokenizer

    (place,) = arguments.folder.glob("iter_*")
    (model,) = load_megatron_model(str(place), use_cpu_init=True)
    plain.compare(getattr(model, "module", model), arguments.expected)
    words = load_tokenizer(str(place), tokenizer_model=str(place / "tokenizer"))
    assert words.vocab_size == known.TOKENS
    for options in (
        {"pretrained_checkpoint": str(arguments.folder), "load": None},
        {"load": str(arguments.folder), "load_optim": False, "load_rng": False},
    ):
        state, model, optimizer, scheduler = _training(arguments)
        for name, value in options.items():
            setattr(state.cfg.checkpoint, name, value)
        step, _ = load_checkpoint(state, model, optimizer, scheduler, strict=True)
        assert step == (0 if options["load"] is None else arguments.step), step
        plain.compare(model[0].module.module, arguments.expected)


if __name__ == "__main__":
    sys.exit(main())
