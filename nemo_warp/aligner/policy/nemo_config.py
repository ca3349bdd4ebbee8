"""A member's configuration in NeMo's terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_warp.aligner.entry.engine import engine_batch_size, engine_directory
from nemo_warp.aligner.entry.validation import max_prompt_tokens
from nemo_warp.aligner.policy.stored_config import imported_end_strings, stored_config
from nemo_warp.config import overlaid, to_plain
from nemo_warp.schema.member import Member

_DISTRIBUTED_ADAM = "distributed_fused_adam"
_MCORE_DISTRIBUTED = "mcore_distributed_optim"


def nemo_config(
    config: Member, checkpoint: str, global_batch_size: int, max_steps: int
) -> DictConfig:
    """NeMo's tree (``trainer``, ``model``) for a checkpoint, whose artifacts the model refers to.

    The model section is the checkpoint's own configuration under our overrides; what a recipe puts
    into ``model.extra`` and ``optim.extra`` wins over everything.
    """
    plain = to_plain(config)
    trainer = dict(plain["trainer"])
    if plain["optim"]["name"] != _MCORE_DISTRIBUTED:
        # We clip by ourselves; Megatron's optimizer does, and NeMo takes the limit from here
        # (megatron_base_model.py, setup_mcore_distributed_optimizer).
        del trainer["gradient_clip_val"]
    tree = OmegaConf.create(
        {
            "trainer": trainer
            | {
                # Lightning's own loop is never run: loggers, checkpoints and bars are ours.
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
                "max_epochs": 1,
                "max_steps": max_steps,
            },
            "exp_manager": {"log_tflops_per_sec_per_gpu": False},
        }
    )
    longest = max_prompt_tokens(config, checkpoint)
    overrides = _model_overrides(plain, longest, global_batch_size, max_steps)
    ends = overrides["reinforce"]["sampling_params"]["end_strings"]
    ends += [text for text in imported_end_strings(Path(checkpoint)) if text not in ends]
    with open_dict(tree):
        tree.model = stored_config(checkpoint, OmegaConf.create(overrides))
    return tree


def _model_overrides(
    plain: dict[str, Any], longest_prompt: int, global_batch_size: int, max_steps: int
) -> dict:
    model = {k: v for k, v in plain["model"].items() if k != "extra"}
    tensor = plain["model"]["tensor_model_parallel_size"]
    overrides = model | {
        # Megatron-core refuses it at TP 1, before NeMo would switch it off
        "sequence_parallel": plain["model"]["sequence_parallel"] and tensor > 1,
        "global_batch_size": global_batch_size,
        "precision": plain["trainer"]["precision"],
        "seed": 1234,  # of NeMo itself; prompt order and sampling are seeded per step
        # Dropout would make log-probabilities of the same weights differ between passes.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "peft": {"peft_scheme": "none"},
        "data": {"reset_position_ids": False, "reset_attention_mask": False},
        "gradient_as_bucket_view": True,
        # NeMo's wrapper for adam under O2 would reduce after every micro batch, and clip a gradient
        # whose reduction may be under way still (it waits in its step, after the clipping).
        "async_grad_allreduce": False,
        "dist_ckpt_format": "torch_dist",
        # Else the first data-parallel rank writes alone what all of them hold.
        "dist_ckpt_parallel_save": True,
        "optim": _optimizer(plain["optim"], max_steps),
        "reinforce": _reinforce(plain, longest_prompt),
        # NeMo-Aligner merges sections key by key otherwise: keys of the checkpoint's optimizer
        # would stay (load_and_override_model_config, utils/utils.py).
        "overwrite_base_config": {"optim": True, "data": True},
    }
    return to_plain(overlaid(overrides, plain["model"]["extra"]))


def _optimizer(optim: dict[str, Any], max_steps: int) -> dict[str, Any]:
    distributed = {
        # As in NeMo's own configurations of apex's distributed Adam.
        "bucket_cap_mb": 200,
        "overlap_grad_sync": False,
        "contiguous_grad_buffer": True,
    }
    return {
        "name": optim["name"],
        "lr": optim["lr"],
        "betas": optim["betas"],
        "weight_decay": optim["weight_decay"],
        # linear warm-up, then constant; past max_steps NeMo's policy would fall to min_lr
        "sched": {
            "name": "WarmupPolicy",
            "warmup_steps": optim["warmup_steps"],
            "max_steps": max_steps + 1,
        },
        **(distributed if optim["name"] == _DISTRIBUTED_ADAM else {}),
        **optim["extra"],
    }


def _reinforce(plain: dict[str, Any], longest_prompt: int) -> dict[str, Any]:
    """What NeMo-Aligner's actor reads from ``model.reinforce``."""
    rollout = plain["rollout"]
    return {
        # upstream gives this one to TensorRT-LLM's engine only
        "rollout_micro_batch_size": engine_batch_size(rollout, plain["evaluation"]),
        "engine_directory": engine_directory(plain),  # ours: upstream has no key for it
        "forward_micro_batch_size": rollout["forward_micro_batch_size"],
        "forward_tokens": rollout["forward_tokens"],  # ours, as the next
        "train_tokens": rollout["train_tokens"],
        "measure_sampler": (plain.get("alarms") or {}).get("sampler_gap") is not None,
        "importance_limit": plain["algorithm"]["importance_limit"],
        "offload_adam_states": plain["optim"]["name"] == _DISTRIBUTED_ADAM,
        "log_prob_temperature": plain["algorithm"]["log_prob_temperature"],
        # min_length 0: a longer one would forbid EOS, so that responses come from another
        # distribution than the one that they are scored with
        "length_params": {"max_length": rollout["max_response_tokens"], "min_length": 0},
        "sampling_params": {
            "use_greedy": False,
            "temperature": rollout["temperature"],
            "top_k": rollout["top_k"],
            "top_p": rollout["top_p"],
            # Any other value samples from a distribution that no log-probability here describes.
            "repetition_penalty": 1.0,
            "add_BOS": False,
            "all_probs": False,
            "compute_logprob": False,
            "end_strings": rollout["end_strings"],
        },
        "trt_llm": rollout["trt_llm"] | {"max_input_len": longest_prompt},
    }
