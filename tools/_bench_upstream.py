"""NeMo-Aligner's side of bench_member.py: its own classes, put together as its scripts do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from _bench_common import KL_COEFFICIENT, Size, Stopwatch, check_length, prompt_tokens, score


def upstream_step(config: Any, size: Size) -> Callable:
    """A function that takes one step of unmodified NeMo-Aligner and returns its times."""
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
    from nemo_aligner.algorithms.reinforce import ReinforceTrainer
    from nemo_aligner.data.nlp.builders import build_dataloader
    from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import (
        MegatronGPTReinforceActorModel,
    )
    from nemo_aligner.utils.batch_iterators import DefaultBatchIterator
    from nemo_aligner.utils.train_script_utils import (
        extract_optimizer_scheduler_from_ptl_model,
        init_distributed,
        init_using_ptl,
    )
    from nemo_aligner.utils.utils import (
        collate_with_batch_max_sequence_length,
        load_from_nemo,
        retrieve_model_state_dict_in_cpu,
    )
    from omegaconf import OmegaConf

    from nemo_warp.aligner.policy.nemo_config import nemo_config

    tree = nemo_config(config, config.init, size.batch, config.run.total_steps)
    ptl = MegatronTrainerBuilder(tree).create_trainer()
    model = load_from_nemo(
        MegatronGPTReinforceActorModel, tree.model, ptl, strict=True, restore_path=config.init
    )
    model.init_policy_state_dict = retrieve_model_state_dict_in_cpu(
        model, megatron_amp_O2=tree.model.megatron_amp_O2
    )
    init_distributed(ptl, model, tree.model.get("transformer_engine", False))
    # Each of its ranks takes global_batch_size / DP of the WHOLE batch per optimizer step: DP times
    # the batch makes it one optimizer step per batch, as ours (else it would take DP of them).
    model.cfg.global_batch_size = size.batch * config.trainer.devices
    placeholder = torch.utils.data.DataLoader([0])
    init_using_ptl(ptl, model, placeholder, placeholder.dataset)
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    dataset = [
        {"text": row, "length": len(row), "loss_multiplier": True} for row in prompt_tokens(size)
    ]
    settings = {
        "initial_policy_kl_penalty": KL_COEFFICIENT,
        "use_absolute_kl": True,
        "gradient_clip_val": config.trainer.gradient_clip_val,
        "max_epochs": 1,
        "rollout_batch_seq_length": None,
        "num_rollouts_per_prompt": size.samples,
    }
    trainer = ReinforceTrainer(
        cfg=OmegaConf.create(settings),
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader_builder=partial(
            build_dataloader,
            OmegaConf.create({"model": {"data": {"num_workers": 0}}}),
            dataset,
            mbs=size.micro_batch,
            gbs=size.prompts,
            load_gbs=False,
            use_random_sampler=False,
        ),
        val_dataloader_builder=None,
        collate_fn=partial(
            collate_with_batch_max_sequence_length,
            response_token_length=size.response,
            eos_id=model.tokenizer.eos_id,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            generate_masks_and_position_ids=False,
        ),
        rm=_TheirRewards(model),
        batch_iterator_cls=DefaultBatchIterator,
        logger=SimpleNamespace(log_metrics=lambda *_, **__: None),
        ckpt_callback=None,
        run_timer=None,
    )
    return partial(_take_their_step, trainer, size, Stopwatch())


def _take_their_step(trainer: Any, size: Size, watch: Stopwatch) -> dict[str, list[float]]:
    """The body of upstream's `fit`, without its logging and the second of its `clear_memory`."""
    from nemo.collections.nlp.modules.common.megatron.utils import get_iterator_k_split
    from nemo_aligner.utils.utils import clear_memory

    with watch.measure("step"):
        clear_memory()
        with watch.measure("rollout and log_prob"):
            data, metrics, _ = trainer.generate_rollouts()
        with watch.measure("train"):
            trainer.run_training(get_iterator_k_split(data, 1))
    if metrics["rollout_size"] != size.batch:
        raise AssertionError(f"upstream rolled out {metrics['rollout_size']}, not {size.batch}")
    check_length(metrics["generation_length"], size)
    trainer.step += 1
    return watch.take()


class _TheirRewards:
    """Stands where upstream's client of a reward server does."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def infer_rm(self, rollout_batch: dict[str, torch.Tensor]) -> Any:
        from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_mp

        from nemo_warp.aligner.sampling.rewards import response_texts

        # The end of sequence is forbidden here, so a response is all of its tokens.
        texts = response_texts(self._model.tokenizer.ids_to_text, rollout_batch)
        scores = torch.as_tensor(score(texts))
        column = scores.float().to(torch.cuda.current_device()).unsqueeze(1)
        return SimpleNamespace(result=lambda: broadcast_2d_tensor_within_mp(column))
