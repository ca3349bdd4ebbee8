"""The two sides of bench_member.py, built on the same checkpoint in one process, step by step."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nemo_warp.config import CONF_DIRECTORY, load_config

SPECIAL_TOKENS = 4
KL_COEFFICIENT = 0.1


@dataclass(frozen=True)
class Size:
    """What one step has to do: ``prompts`` times ``samples`` responses of exactly ``response``."""

    vocabulary: int
    prompts: int
    samples: int
    prompt: int
    response: int
    micro_batch: int
    repetitions: int
    also: tuple[str, ...] = ()

    @property
    def batch(self) -> int:
        return self.prompts * self.samples


def write_tokenizer(directory: Path, vocabulary: int) -> Path:
    """A SentencePiece model of exactly ``vocabulary`` tokens, from made-up words."""
    import sentencepiece

    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (vocabulary, 6))
    text, prefix = directory / "text.txt", directory / "tokenizer"
    text.write_text("\n".join("".join(word) for word in letters) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(prefix),
        vocab_size=vocabulary,
        model_type="bpe",
        num_threads=1,
        minloglevel=2,
        **{"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3},
    )
    return prefix.with_suffix(".model")


class Stopwatch:
    """Wall and CPU seconds of this process by name; takes the place of a trainer's `Timings`."""

    def __init__(self) -> None:
        self._seconds: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        torch.cuda.synchronize()
        started = np.array([time.perf_counter(), time.process_time()])
        yield
        torch.cuda.synchronize()
        now = np.array([time.perf_counter(), time.process_time()])
        self._seconds[name] = self._seconds[name] + (now - started)

    def take(self) -> dict[str, list[float]]:
        """[wall, CPU] by name since the last call."""
        taken, self._seconds = self._seconds, defaultdict(lambda: np.zeros(2))
        return {name: seconds.tolist() for name, seconds in taken.items()}


def run(checkpoint: Path, world_size: int, size: Size) -> dict[str, Any]:
    """Alternate whole steps and weight swaps of both sides; called on every rank.

    Returns:
        Per phase (``step``, ``rollout``, ``train``, ``swap``, ``ema_update`` ...) and side a
        [wall, CPU] pair for each repetition, and the numbers of parameters and anchor bytes.
    """
    config = _config(checkpoint, world_size, size)
    trainer = _our_trainer(config, size)
    steps = {
        "ours": partial(_take_our_step, trainer, size),
        "theirs": _their_step(config, size),
    }
    gc.collect()
    gc.freeze()  # as `fit` does; the other side profits as well
    times: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    _pairs(steps, size.repetitions, times, f"steps, DP {world_size}")
    _pairs(_swaps(trainer), 3 * size.repetitions, times, f"swaps, DP {world_size}")
    weights = trainer.anchor.weights
    return {
        "times": {name: dict(sides) for name, sides in times.items()},
        "parameters": sum(p.numel() for p in weights._parameters),
        "anchor_bytes": weights.nbytes,
    }


def _pairs(steps: dict[str, Callable], repetitions: int, times: dict, name: str) -> None:
    """Ours, theirs, theirs, ours, ours ...; the first pair warms up and is not counted."""
    first = torch.distributed.get_rank() == 0
    for repetition in tqdm(range(repetitions + 1), desc=name, unit="pair", disable=not first):
        for side in sorted(steps, reverse=bool(repetition % 2)):
            torch.distributed.barrier()
            for phase, seconds in steps[side]().items():
                if repetition:
                    times[phase][side].append(seconds)


def _config(checkpoint: Path, world_size: int, size: Size) -> Any:
    base = {
        "run": {"name": "bench", "directory": str(checkpoint.parent), "total_steps": 10**6},
        "init": str(checkpoint),
        "prompts": {"train": "unused", "heldout": "unused"},
        "rollout": {
            "prompts_per_step": size.prompts,
            "samples_per_prompt": size.samples,
            "max_response_tokens": size.response,
            "micro_batch_size": size.micro_batch,
        },
        "algorithm": {"kl_coefficient": KL_COEFFICIENT},
        "rewards": [{"name": "in_process", "weight": 1.0, "endpoint": "unused"}],
        "optim": {"name": "adamw", "lr": 1e-6, "warmup_steps": 1},
        "trainer": {"devices": world_size, "accelerator": "auto", "precision": "32"},
        "model": {
            "megatron_amp_O2": False,
            # no early end: every response has the same length on both sides
            "extra": {"reinforce": {"length_params": {"min_length": size.response}}},
        },
    }
    return load_config(CONF_DIRECTORY / "member.yaml", base, list(size.also))


def _prompts(size: Size, rows: int = 4096) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, size.prompt)
    return torch.randint(SPECIAL_TOKENS, size.vocabulary, shape, generator=generator)


def _our_trainer(config: Any, size: Size) -> Any:
    from nemo_warp.aligner.anchor import EmaAnchor
    from nemo_warp.aligner.policy import build_policy
    from nemo_warp.aligner.prompts import Prompt
    from nemo_warp.aligner.stopping import StopRequest
    from nemo_warp.aligner.trainer import WarpReinforceTrainer

    policy, _ = build_policy(config, size.batch, config.run.total_steps)
    anchor = EmaAnchor(policy.model, config.algorithm.ema_update_rate)
    trainer = WarpReinforceTrainer(
        config=config,
        model=policy.model,
        optimizer=policy.optimizer,
        scheduler=policy.scheduler,
        prompts=[Prompt("", row.tolist()) for row in _prompts(size)],
        rewards=_our_rewards(config),
        anchor=anchor,
        reference=anchor.weights,
        evaluator=None,
        log=None,
        stop=StopRequest(None, 0.0, 0.0),
    )
    trainer.timings = Stopwatch()
    return trainer


def _take_our_step(trainer: Any, size: Size) -> dict[str, list[float]]:
    with trainer.timings.measure("step"):
        metrics = trainer.train_step()
    _check_length(metrics["length"], size)
    return trainer.timings.take()


def _their_step(config: Any, size: Size) -> Callable:
    """NeMo-Aligner's own classes; what its train_gpt_reinforce.py does."""
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

    from nemo_warp.aligner.nemo_config import nemo_config

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
    dataset = [{"text": row, "length": len(row), "loss_multiplier": True} for row in _prompts(size)]
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
    _check_length(metrics["generation_length"], size)
    trainer.step += 1
    return watch.take()


def _check_length(length: float, size: Size) -> None:
    if length != size.response:
        raise AssertionError(f"responses of {length} tokens, expected {size.response}: not paired")


def _swaps(trainer: Any) -> dict[str, Callable]:
    """Reference weights in and out again, on the same model."""
    from nemo_aligner.utils.utils import cpu_weight_swap, retrieve_model_state_dict_in_cpu

    model, watch = trainer.model, Stopwatch()
    o2 = model.megatron_amp_O2
    held = retrieve_model_state_dict_in_cpu(model, megatron_amp_O2=o2)

    def swap(enter: Callable) -> dict[str, list[float]]:
        with watch.measure("swap"), enter():
            pass
        return watch.take()

    return {
        "ours": partial(swap, trainer.anchor.weights.in_place),
        "theirs": partial(swap, partial(cpu_weight_swap, model, held, megatron_amp_O2=o2)),
    }


def _score(texts: list[str]) -> np.ndarray:
    """An in-process reward for both sides: the share of vowels."""
    return np.array([sum(c in "aeiou" for c in text) / (len(text) or 1) for text in texts])


def _our_rewards(config: Any) -> Any:
    from nemo_warp.aligner.rewards import RewardSource
    from nemo_warp.rewards.scores import RewardScores

    class Mixture:
        def submit(self, prompts: list[str], responses: list[str]) -> Any:
            scores = _score(responses)
            done = RewardScores.of(scores, [""] * len(scores))
            return SimpleNamespace(result=lambda: done)

    source = RewardSource(config, "bench")
    if source._mixture is not None:
        source._mixture = Mixture()
    return source


class _TheirRewards:
    """Stands where upstream's client of a reward server does."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def infer_rm(self, rollout_batch: dict[str, torch.Tensor]) -> Any:
        from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_mp

        from nemo_warp.aligner.rewards import response_texts

        scores = torch.as_tensor(_score(response_texts(self._model, rollout_batch)))
        column = scores.float().to(torch.cuda.current_device()).unsqueeze(1)
        return SimpleNamespace(result=lambda: broadcast_2d_tensor_within_mp(column))
