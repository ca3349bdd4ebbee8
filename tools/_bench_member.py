"""The pairs of bench_member.py: both sides on one checkpoint in one process, step by step."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _bench_common import Size, Stopwatch, check_length, member_config, prompt_tokens, score
from _bench_upstream import upstream_step
from tqdm import tqdm


def run(checkpoint: Path, world_size: int, size: Size) -> dict[str, Any]:
    """Alternate whole steps and weight swaps of both sides; called on every rank.

    Returns:
        Per phase (``step``, ``rollout``, ``train``, ``swap``, ``ema_update`` ...) and side a
        [wall, CPU] pair for each repetition, and the numbers of parameters and anchor bytes.
    """
    config = member_config(checkpoint, world_size, size)
    trainer = _our_trainer(config, size)
    steps = {
        "ours": partial(_take_our_step, trainer, size),
        "theirs": upstream_step(config, size),
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


def _our_trainer(config: Any, size: Size) -> Any:
    from nemo_warp.aligner.entry.prompts import Prompt
    from nemo_warp.aligner.member.stopping import StopRequest
    from nemo_warp.aligner.member.trainer import WarpReinforceTrainer
    from nemo_warp.aligner.policy.build import build_policy
    from nemo_warp.aligner.weights.anchor import EmaAnchor

    policy, _ = build_policy(config, size.batch, config.run.total_steps)
    anchor = EmaAnchor(policy.other_weights(None), config.algorithm.ema_update_rate)
    trainer = WarpReinforceTrainer(
        config=config,
        model=policy.model,
        optimizer=policy.optimizer,
        scheduler=policy.scheduler,
        prompts=[Prompt("", row.tolist()) for row in prompt_tokens(size)],
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
    check_length(metrics["length"], size)
    return trainer.timings.take()


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


def _our_rewards(config: Any) -> Any:
    from nemo_warp.aligner.sampling.rewards import RewardSource
    from nemo_warp.rewards.scores import RewardScores

    class Mixture:
        def submit(self, prompts: list[str], responses: list[str], fields: Any = None) -> Any:
            scores = score(responses)
            done = RewardScores.of(scores, [""] * len(scores))
            done = replace(done, parts={config.rewards[0].name: done.scores})
            return SimpleNamespace(result=lambda: done)

    source = RewardSource(config, "bench")
    if source._mixture is not None:
        source._mixture = Mixture()
    return source
