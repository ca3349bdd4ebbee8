"""Members in pieces for tests: configurations, given rollouts, and weights put together again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_warp.config import CONF_DIRECTORY, load_config

SEQUENCE = 16
VOCABULARY = 128


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        return f"tp{self.tensor}-pp{self.pipeline}-dp{self.data}"


SINGLE = Layout()
LAYOUTS = [Layout(2), Layout(1, 2), Layout(1, 1, 2), Layout(2, 2), Layout(1, 1, 4)]


@dataclass(frozen=True)
class Materials:
    """Files every member of these tests uses."""

    sft: Path
    other: Path
    train: Path
    heldout: Path


def member_config(materials: Materials, directory: Path, layout: Layout = SINGLE, **changes: Any):
    """A complete member configuration; ``changes`` are sections, ``also`` holds ``a.b=c``."""
    base = {
        "run": {
            "name": "test",
            "directory": str(directory),
            "total_steps": 4,
            "eval_interval": 2,
            "save_interval": 2,
        },
        "init": str(materials.sft),
        "prompts": {"train": str(materials.train), "heldout": str(materials.heldout)},
        "rollout": {
            "prompts_per_step": 4,
            "samples_per_prompt": 2,
            "max_response_tokens": 6,
            "micro_batch_size": 2,
        },
        "rewards": [{"name": "vader", "weight": 1.0, "endpoint": "unused"}],
        "evaluation": {"num_prompts": 8, "num_samples_shown": 1},
        "optim": {"name": "adamw", "lr": 1e-3, "warmup_steps": 2},
        "trainer": {"devices": layout.ranks, "accelerator": "auto", "precision": "32"},
        "model": {
            "tensor_model_parallel_size": layout.tensor,
            "pipeline_model_parallel_size": layout.pipeline,
            "sequence_parallel": False,
            "megatron_amp_O2": False,
            "micro_batch_size": 1,
        },
        "loggers": {"tensorboard": False},
    }
    also = changes.pop("also", [])
    return load_config(CONF_DIRECTORY / "member.yaml", base, changes, also)


def given_rollouts(seed: int, prompts: int = 4, samples: int = 2) -> Any:
    """Random rollouts that do not come from a policy; one of them is truncated, none failed."""
    from nemo_warp.aligner.sampling.rollouts import Rollouts

    generator = torch.Generator().manual_seed(seed)
    batch = prompts * samples
    tokens = torch.randint(4, VOCABULARY, (batch, SEQUENCE), generator=generator)
    prompt_lengths = torch.randint(2, 6, (prompts,), generator=generator)
    prompt_lengths = prompt_lengths.repeat_interleave(samples)
    for first in range(0, batch, samples):
        tokens[first : first + samples] = torch.where(
            torch.arange(SEQUENCE) < prompt_lengths[first], tokens[first], tokens[first:][:samples]
        )
    lengths = torch.randint(8, SEQUENCE + 1, (batch,), generator=generator)
    tokens[torch.arange(SEQUENCE) >= lengths[:, None]] = 2
    is_end = torch.ones(batch, dtype=torch.bool)
    is_end[1] = False
    rewards = torch.randn(batch, generator=generator)
    failed = torch.zeros(batch, dtype=torch.bool)
    return Rollouts(tokens, prompt_lengths, lengths, is_end, rewards, failed)


def build_trainer(config: Any) -> Any:
    """A trainer that is fed rollouts by hand: no prompts, rewards, evaluation or log."""
    from nemo_warp.aligner.member.stopping import StopRequest
    from nemo_warp.aligner.member.trainer import WarpReinforceTrainer
    from nemo_warp.aligner.policy.build import build_policy
    from nemo_warp.aligner.weights.anchor import EmaAnchor

    rollout = config.rollout
    batch = rollout.prompts_per_step * rollout.samples_per_prompt
    policy, _ = build_policy(config, batch // rollout.updates_per_rollout, config.run.total_steps)
    moving = None
    if config.algorithm.anchor == "ema":
        moving = EmaAnchor(policy.other_weights(None), config.algorithm.ema_update_rate)
    static = policy.other_weights(None) if config.algorithm.anchor == "sft" else None
    return WarpReinforceTrainer(
        config=config,
        model=policy.model,
        optimizer=policy.optimizer,
        scheduler=policy.scheduler,
        prompts=[],
        rewards=None,
        anchor=moving,
        reference=moving.weights if moving else static,
        evaluator=None,
        log=None,
        stop=StopRequest(None, 0.0, 0.0),
        step=0,
    )


def local_tensors(model: Any) -> list[tuple[str, tuple, tuple, np.ndarray]]:
    """(key, global shape, offset, values) of this rank's part of every logical tensor, float32."""
    return state_tensors(model.sharded_state_dict())


def gradient_parts(model: Any) -> list[tuple[str, tuple, tuple, np.ndarray]]:
    """As `local_tensors`, of the gradients."""
    parameters = list(model.parameters())
    swapped = [(p, p.data, p.grad.clone()) for p in parameters]
    for parameter, _, gradient in swapped:
        parameter.data = gradient
    parts = local_tensors(model)
    for parameter, weights, _ in swapped:
        parameter.data = weights
    return parts


def state_tensors(state: dict[str, Any]) -> list[tuple[str, tuple, tuple, np.ndarray]]:
    """As `local_tensors`, of a sharded state dict."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(state)
    parts = []
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor):
            values = entry.data.detach().float().numpy().copy()
            values = values.reshape((1,) * entry.prepend_axis_num + values.shape)
            parts.append((entry.key, entry.global_shape, entry.global_offset, values))
    return parts


def assemble(per_rank: list[list]) -> dict[str, np.ndarray]:
    """Whole logical tensors from `local_tensors` of all ranks; replicas must agree."""
    whole: dict[str, np.ndarray] = {}
    for parts in per_rank:
        for key, shape, offset, values in parts:
            target = whole.setdefault(key, np.full(shape, np.nan, dtype=np.float32))
            place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            known = target[place]
            assert np.array_equal(known[~np.isnan(known)], values[~np.isnan(known)]), key
            target[place] = values
    assert not any(np.isnan(tensor).any() for tensor in whole.values())
    return whole


def write_prompts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|, in float64."""
    difference = found.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-30))
