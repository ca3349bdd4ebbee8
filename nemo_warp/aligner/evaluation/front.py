"""Slide eta between two checkpoints in memory and measure each point of the front."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from nemo_warp import exit_codes
from nemo_warp.aligner.entry.prompts import tokenize
from nemo_warp.aligner.entry.validation import max_prompt_tokens
from nemo_warp.aligner.entry.versions import package_versions
from nemo_warp.aligner.evaluation.evaluator import Evaluator
from nemo_warp.aligner.evaluation.points import POINTS_FILE, measured_points, wanted_points
from nemo_warp.aligner.policy.build import build_policy
from nemo_warp.aligner.sampling.rewards import RewardSource
from nemo_warp.aligner.weights.intact import refuse_damaged
from nemo_warp.config import identity_hash, overlaid, to_plain
from nemo_warp.evidence.responses import responses_file
from nemo_warp.progress import progress
from nemo_warp.prompts import PromptLine
from nemo_warp.records import Completion, code_version, hash_file, write_completion

# Nothing is trained; NeMo's set-up wants an optimizer, and torch's allocates nothing before a step.
_OPTIMIZER = {"name": "adamw", "lr": 1e-6, "betas": [0.9, 0.95], "weight_decay": 0.0}


def measure_front(config: DictConfig, texts: list[PromptLine]) -> int:
    """Measure what ``points.jsonl`` lacks, then write the completion record. Collective."""
    path = Path(config.directory) / POINTS_FILE
    done = measured_points(path, [judge.name for judge in config.judges])
    missing = [point for point in wanted_points(config) if point not in done]
    if missing:
        _measure(config, texts, path, missing)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _complete(config, path)
    return exit_codes.DONE


def _measure(
    config: DictConfig, texts: list[PromptLine], path: Path, missing: list[tuple[str, float]]
) -> None:
    others = tuple(p for p in (config.slerp, config.sft) if p != config.base)
    policy, shards = build_policy(_policy_config(config), config.evaluation.num_prompts, 1, others)
    refuse_damaged(config.base, config.slerp, config.sft)
    sft = policy.other_weights(shards.get(config.sft))
    slerp = policy.other_weights(shards.get(config.slerp))
    bases = {"init": policy.other_weights(None), "sft": sft}
    rewards = RewardSource(config, config.run_id)
    rewards.connect(prompts={"heldout": texts})
    tokens = max_prompt_tokens(config, config.base)
    prompts = tokenize(texts, policy.model.tokenizer, tokens, Path(config.prompts.heldout))
    evaluator = Evaluator(config, policy.model, prompts, rewards, sft)
    silent = torch.distributed.get_rank() != 0
    for base, eta in progress(missing, desc="front", unit="point", disable=silent):
        weights = bases[base].clone()
        weights.lerp_(slerp, eta)
        with weights.in_place():
            values = evaluator.evaluate(keep=responses_file(path.parent, base, eta))
        if not silent:
            _record(path, {"base": base, "eta": eta, **values})
    rewards.close()


def _policy_config(config: DictConfig) -> DictConfig:
    """The sections `build_policy` reads."""
    optimizer = {**_OPTIMIZER, "warmup_steps": 0, "extra": {}}
    return overlaid(config, {"init": config.base, "optim": optimizer})


def _record(path: Path, point: dict[str, Any]) -> None:
    """Append a point durably, in place of a line that a killed run left unfinished."""
    with path.open("a+b") as stream:
        stream.truncate(path.read_bytes().rfind(b"\n") + 1)
        stream.write(json.dumps(point, sort_keys=True).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _complete(config: DictConfig, path: Path) -> None:
    """The record names the responses, too; points of an earlier version have none."""
    files = (responses_file(path.parent, *point) for point in wanted_points(config))
    kept = sorted(str(file.relative_to(path.parent)) for file in files if file.exists())
    record = Completion(
        kind="evaluation",
        config_hash=identity_hash(to_plain(config)),
        files={name: hash_file(path.parent / name) for name in (POINTS_FILE, *kept)},
        details={"etas": [float(eta) for eta in config.etas], "seed": config.evaluation.seed},
        code_version=code_version(),
        versions=package_versions(),
    )
    write_completion(path.parent, record)
