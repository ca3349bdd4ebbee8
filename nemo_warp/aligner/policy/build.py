"""Build the policy: NeMo trainer, model and optimizer, from a ``.nemo`` and a configuration."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.utils import logging
from nemo_aligner.utils.train_script_utils import (
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_using_ptl,
)
from nemo_aligner.utils.utils import load_from_nemo
from omegaconf import DictConfig

from nemo_warp.aligner.policy.actor import WarpActorModel
from nemo_warp.aligner.policy.nemo_config import nemo_config
from nemo_warp.aligner.weights.masters import reachable_masters, set_masters
from nemo_warp.aligner.weights.sharded import ShardedWeights
from nemo_warp.schema.member import Member


@dataclass(frozen=True)
class Policy:
    """A model that is ready to generate and, with an optimizer, to train."""

    model: WarpActorModel
    optimizer: Any
    scheduler: Any
    shard: torch.Tensor | None = None
    """This rank's fp32 slice of ``config.init`` as the file has it; None: the parameters' own."""

    def other_weights(self, shard: torch.Tensor | None, offload: bool = False) -> ShardedWeights:
        """Weights for this model from a slice that `build_policy` read; those of init if None."""
        weights = ShardedWeights(self.model, offload)
        shard = self.shard if shard is None else shard
        if shard is not None:
            weights.shard.copy_(shard)
        return weights


def build_policy(
    config: Member,
    global_batch_size: int,
    max_steps: int,
    others: tuple[str, ...] = (),
    trains: bool = True,
) -> tuple[Policy, dict[str, torch.Tensor]]:
    """Load ``config.init`` and set up what training needs. Collective over all ranks.

    No two models are in memory at a time.

    Args:
        others: further ``.nemo`` files of the same architecture, read first, one at a time, through
            NeMo itself (any format it knows); only this rank's slice of each is kept.
        trains: without, nothing is allocated for gradients, masters or moments, and the policy has
            no optimizer.

    Returns:
        The policy, and per path in ``others`` the slice for `Policy.other_weights`.
    """
    trees = {
        path: nemo_config(config, path, global_batch_size, max_steps)
        for path in (*others, config.init)
    }
    # One trainer for all models: its strategy makes the process groups, which exist once.
    trainer = MegatronTrainerBuilder(trees[config.init]).create_trainer()
    shards = {}
    for path in dict.fromkeys(others):
        model = _restore(trees[path].model, trainer, path)
        shard = _file_shard(model, path)
        shards[path] = ShardedWeights(model).shard.clone() if shard is None else shard
        trainer.strategy.connect(None)  # it would keep the model while the next one is loaded
        del model
        # Models are in reference cycles (modules, hooks): without it the memory is freed some time
        # later.
        gc.collect()
    model = _restore(trees[config.init].model, trainer, config.init)
    if not trains:
        model.cuda()  # Lightning's set-up, which makes the optimizer, would do it otherwise
        return Policy(model, None, None, _file_shard(model, config.init)), shards
    placeholder: Any = torch.utils.data.DataLoader(cast("Any", [0]))  # NeMo wants one, unread
    init_using_ptl(trainer, model, placeholder, placeholder.dataset)
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    policy = Policy(model, optimizer, scheduler, _file_shard(model, config.init))
    if policy.shard is not None and reachable_masters(model):
        # NeMo has made the masters from bf16 parameters by now; they are overwritten before any
        # step.
        set_masters(model, policy.other_weights(None))
    return policy, shards


def _file_shard(model: WarpActorModel, path: str) -> torch.Tensor | None:
    shard, model.file_shard = model.file_shard, None
    if shard is None and any(p.dtype != torch.float32 for p in model.parameters()):
        logging.warning(f"{path} is no distributed checkpoint: its weights are read rounded")
    return shard


def _restore(model_config: DictConfig, trainer: Any, path: str) -> WarpActorModel:
    # strict: a missing weight would be trained from random numbers.
    model = load_from_nemo(
        WarpActorModel, model_config, trainer, strict=True, restore_path=str(Path(path))
    )
    model.restored = True  # formats other than Megatron's do not tell the model
    init_distributed(trainer, model, model_config.get("transformer_engine", False))
    return model
