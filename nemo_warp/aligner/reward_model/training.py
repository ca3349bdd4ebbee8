"""NeMo-Aligner's reward model training, from one configuration. Import after `compat.activate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.data.nlp.builders import build_dataloader
from nemo_aligner.data.nlp.datasets import RewardModelDataset
from nemo_aligner.models.nlp.gpt.megatron_gpt_reward_model import MegatronGPTRewardModel
from nemo_aligner.utils.distributed import Timer
from nemo_aligner.utils.train_script_utils import (
    FakeCheckpointCallback,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_using_ptl,
)
from nemo_aligner.utils.utils import load_from_nemo
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_warp.aligner.entry.validation import read_model_config
from nemo_warp.aligner.policy.stored_config import stored_config
from nemo_warp.aligner.reward_model.scaling import scale_as_policy
from nemo_warp.checkpoints.families.classifier import SCALED
from nemo_warp.config import overlaid, to_plain
from nemo_warp.records import code_version, config_hash, hash_file, write_json_atomically
from nemo_warp.schema.reward_model import RewardModel

_MIN_LR_SHARE = 0.1


class RewardModelInTraining(MegatronGPTRewardModel):
    """NeMo-Aligner's model, able to start from a language model with tied embeddings too.

    Upstream builds an output layer of its own (megatron_gpt_reward_model.py:97), which no forward
    pass uses, and fails to find it in such a checkpoint. Saved as upstream's class.
    """

    def __init__(self, cfg: DictConfig, trainer: Any):
        with open_dict(cfg):
            cfg.target = f"{MegatronGPTRewardModel.__module__}.{MegatronGPTRewardModel.__name__}"
        self._base_is_loaded = False
        super().__init__(cfg, trainer)

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """Upstream's; without the output layer while a base that has none is loaded."""
        state = super().sharded_state_dict(prefix)
        if self._base_is_loaded or not self.cfg.get("share_embeddings_and_output_weights", False):
            return state
        return {key: v for key, v in state.items() if not key.endswith("output_layer.weight")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Upstream's; the base model's weights are now in place."""
        super().on_load_checkpoint(checkpoint)
        self._base_is_loaded = True


def train_reward_model(config: RewardModel) -> dict[str, Any]:
    """Train, write ``config.output`` and its metrics, and return these. Collective.

    Returns:
        ``validation``: loss, accuracy and mean rewards on the held-out pairs (in whole batches);
        ``history``: the same at each validation; and what made the model.
    """
    tree = _nemo_tree(config)
    torch.manual_seed(config.seed)
    trainer = MegatronTrainerBuilder(tree).create_trainer()
    model = load_from_nemo(
        RewardModelInTraining,
        tree.model,
        trainer,
        strict=True,
        load_base_model_only=True,
        restore_path=str(config.init),
    )
    init_distributed(trainer, model, tree.model.get("transformer_engine", False))
    scale_as_policy(model)
    log = _History()
    loop = _supervised_trainer(config, tree, trainer, model, log)
    loop.fit()
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    with open_dict(model.cfg):  # not the folder that its tokenizer was unpacked to
        model.cfg.tokenizer.type = read_model_config(Path(config.init))["tokenizer"].get("type")
    model.save_to(str(config.output))
    metrics = _metrics(config, log)
    if torch.distributed.get_rank() == 0:
        write_json_atomically(Path(config.output).with_suffix(".json"), metrics)
        print(f"{config.output}: accuracy {metrics['validation']['acc']:.3f} on held-out pairs")
    return metrics


class _History:
    """The logger NeMo-Aligner writes to: keeps what was validated."""

    def __init__(self) -> None:
        self.validations: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int, prefix: str = "") -> None:
        if prefix == "val/":
            kept = {key: float(v) for key, v in metrics.items() if not key.endswith("_time")}
            self.validations.append({"step": step, **kept})

    def finalize(self) -> None:
        """Nothing to flush."""


def _nemo_tree(config: RewardModel) -> DictConfig:
    """NeMo's ``trainer`` and ``model``: the checkpoint's own configuration under our overrides."""
    plain = to_plain(config)
    trainer = {k: v for k, v in plain["trainer"].items() if k != "gradient_clip_val"}
    switched_off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer |= {"max_steps": plain["steps"], "use_distributed_sampler": False}
    trainer |= dict.fromkeys(switched_off, False)
    model = {k: v for k, v in plain["model"].items() if k != "extra"} | {
        "reward_model_type": "binary_ranking",
        SCALED: True,
        "output_sequence": False,
        "use_avg_pool": False,
        "global_batch_size": plain["global_batch_size"],
        "precision": plain["trainer"]["precision"],
        "seed": plain["seed"],
        "data": {
            "data_impl": "jsonl",
            "splits_string": None,
            "num_workers": 0,
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "eod_mask_loss": False,
            "index_mapping_dir": None,
            # Megatron's schedules take whole batches only.
            "validation_drop_last": True,
        },
        "optim": _optimizer(plain["optim"]),
        "overwrite_base_config": {"optim": True, "data": True},
    }
    overrides = overlaid(model, plain["model"]["extra"])
    tree = OmegaConf.create({"trainer": trainer, "exp_manager": {}, "model": {}})
    tree.model = stored_config(plain["init"], overrides)
    return tree


def _optimizer(optim: dict[str, Any]) -> dict[str, Any]:
    schedule = {
        "name": "CosineAnnealing",
        "warmup_steps": optim["warmup_steps"],
        "constant_steps": 0,
        "min_lr": optim["lr"] * _MIN_LR_SHARE,
    }
    plain = {key: optim[key] for key in ("name", "lr", "betas", "weight_decay")}
    return plain | {"sched": schedule} | optim["extra"]


def _supervised_trainer(
    config: RewardModel, tree: DictConfig, trainer: Any, model: Any, log: _History
) -> SupervisedTrainer:
    loaders, train_set = _dataloaders(config, tree, model)
    init_using_ptl(trainer, model, loaders["train"], train_set)
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    # NeMo-Aligner's trainer stops at whichever of epochs and steps ends first: enough epochs for
    # all steps.
    epochs = -(-config.steps // (len(train_set) // config.global_batch_size))
    loop = OmegaConf.create(
        {
            "max_epochs": epochs,
            "max_steps": config.steps,
            "val_check_interval": config.validation_interval,
            "save_interval": 0,
            "limit_val_batches": 1.0,
            "gradient_clip_val": config.trainer.gradient_clip_val,
        }
    )
    return SupervisedTrainer(
        cfg=loop,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=loaders["train"],
        val_dataloader=loaders["validation"],
        test_dataloader=None,
        logger=log,
        ckpt_callback=FakeCheckpointCallback(),
        run_timer=Timer(None),
    )


def _dataloaders(config: RewardModel, tree: DictConfig, model: Any) -> tuple[dict[str, Any], Any]:
    sets = {name: _pairs(config, tree, model, name) for name in ("train", "validation")}
    loaders = {
        name: build_dataloader(
            cfg=tree,
            dataset=dataset,
            consumed_samples=0,
            mbs=tree.model.micro_batch_size,
            gbs=config.global_batch_size,
            load_gbs=True,
            use_random_sampler=name == "train",
            collate_fn=_collate,
        )
        for name, dataset in sets.items()
    }
    return loaders, sets["train"]


def _pairs(config: RewardModel, tree: DictConfig, model: Any, name: str) -> RewardModelDataset:
    """The pairs of one file whose two texts both fit.

    NeMo-Aligner takes another pair in place of one that does not (data/nlp/datasets.py:256), which
    weighs its neighbours more and runs off the end of the file.
    """
    path = Path(getattr(config.pairs, name))
    max_tokens = config.max_tokens or tree.model.encoder_seq_length
    texts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    fits = [len(model.tokenizer.text_to_ids(text["text"])) <= max_tokens for text in texts]
    kept = [
        place
        for pair in range(0, len(texts), 2)
        if all(fits[pair : pair + 2])
        for place in (pair, pair + 1)
    ]
    if torch.distributed.get_rank() == 0:
        print(f"{path}: {len(kept) // 2} of {len(texts) // 2} pairs fit {max_tokens} tokens")
    if len(kept) // 2 < config.global_batch_size:
        raise ValueError(
            f"{path} has only {len(kept) // 2} pairs of at most {max_tokens} tokens, fewer than "
            f"one batch (global_batch_size is {config.global_batch_size})"
        )
    return RewardModelDataset(
        cfg=tree.model,
        tokenizer=model.tokenizer,
        name=name,
        data_prefix=str(path),
        documents=np.arange(len(kept), dtype=np.int32),
        data=[texts[place] for place in kept],
        seq_length=max_tokens,
        seed=config.seed,
    )


def _collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of pairs, with a mask for both texts of each.

    NeMo-Aligner puts chosen and rejected texts into one batch of twice the size, but not their
    masks (megatron_gpt_reward_model.py:130): attention that reads the mask would refuse it. All
    masks are the same causal one.
    """
    batch = torch.utils.data.default_collate(samples)
    mask = batch["attention_mask"]
    batch["attention_mask"] = mask[:1].expand(2 * len(samples), *mask.shape[1:])
    return batch


def _metrics(config: RewardModel, log: _History) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "steps": config.steps,
        "seed": config.seed,
        "validation": log.validations[-1],
        "history": log.validations,
        "config_hash": config_hash(to_plain(config)),
        "pairs": {
            name: hash_file(Path(path)).sha256 for name, path in to_plain(config)["pairs"].items()
        },
        "init": hash_file(Path(config.init)).sha256,
        "code_version": code_version(),
        "versions": {name: version(name) for name in ("torch", "nemo-toolkit", "nemo-aligner")},
    }
