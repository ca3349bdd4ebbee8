"""Reward, KL to SFT and KL to the anchor of the present policy on held-out prompts.

Sampling seeds depend on the evaluation's own seed only (common random numbers), so two policies, or
two steps of one, differ by their weights and not by their luck.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_warp.aligner.entry.prompts import Prompt
from nemo_warp.aligner.sampling.rewards import RewardSource
from nemo_warp.aligner.sampling.rollouts import Rollouts, gather_rows, generate, local_rows
from nemo_warp.aligner.weights.sharded import GatheredWeights, ShardedWeights
from nemo_warp.core.reinforce import sequence_kl


class Evaluator:
    """Measures the weights that are in ``model`` when `evaluate` is called.

    Args:
        config: holds the section ``evaluation``.
        prompts: the held-out prompts in use; their number is a multiple of the micro batch size
            times the data-parallel size.
        sft: weights of the SFT policy.
    """

    def __init__(
        self,
        config: Any,
        model: Any,
        prompts: list[Prompt],
        rewards: RewardSource,
        sft: ShardedWeights,
    ) -> None:
        self.config = config.evaluation
        self.model = model
        self.prompts = prompts
        self.rewards = rewards
        self.sft = sft

    @torch.no_grad()
    def evaluate(self, anchor: ShardedWeights | None = None) -> dict[str, Any]:
        """Metrics of the model's present weights; equal on every rank. Collective.

        Returns:
            ``reward`` and ``reward_stderr``; ``kl_to_sft``, ``kl_to_sft_stderr`` and, with an
            anchor, ``kl_to_anchor``: sampled estimates, sequence sums in nats, and ``..._exact``
            with ``exact_kl``; ``length`` in response tokens; ``entropy``, the mean of -log pi over
            response tokens (nats per token); ``ended_share``; ``samples``, a few texts.

        Raises:
            RewardFailureRateError: on every rank.
        """
        with self.model.inference():
            rollouts = generate(
                self.model,
                self.prompts,
                self.rewards,
                self.config.micro_batch_size,
                seed_parts=(self.config.seed, "evaluation"),
            )
            self.rewards.check(rollouts.failed)
            values = self._rewards(rollouts) | self._divergences(rollouts, anchor)
        values["samples"] = self._samples(rollouts)
        return values

    def _rewards(self, rollouts: Rollouts) -> dict[str, Any]:
        rewards = rollouts.rewards[~rollouts.failed]
        return {
            "reward": rewards.mean().item(),
            "reward_stderr": _standard_error(rewards),
            "length": rollouts.response_lengths.float().mean().item(),
            "ended_share": rollouts.is_end.float().mean().item(),
            "failed_rewards": int(rollouts.failed.sum()),
            "num_prompts": len(self.prompts),
        }

    def _divergences(self, rollouts: Rollouts, anchor: ShardedWeights | None) -> dict[str, Any]:
        rows = local_rows(len(rollouts.tokens))
        tokens, mask = rollouts.tokens[rows], rollouts.mask[rows]
        log_probs = self.model.get_inference_log_probs(tokens)
        values = {"entropy": _token_mean(-log_probs, mask)}
        references = {"kl_to_sft": self.sft}
        if anchor is not None and anchor is not self.sft:
            references["kl_to_anchor"] = anchor
        for name, weights in references.items():
            with weights.gathered() as gathered:
                values |= self._divergence(name, tokens, mask, log_probs, gathered)
        if anchor is self.sft:
            values["kl_to_anchor"] = values["kl_to_sft"]
        return values

    def _divergence(
        self, name: str, tokens: Tensor, mask: Tensor, log_probs: Tensor, weights: GatheredWeights
    ) -> dict[str, float]:
        with weights.in_place():
            reference = self.model.get_inference_log_probs(tokens)
        kl = gather_rows(sequence_kl(log_probs, reference, mask, "log_ratio", "sum"))
        values = {name: kl.mean().item(), f"{name}_stderr": _standard_error(kl)}
        if self.config.exact_kl:
            size = self.config.micro_batch_size
            exact = gather_rows(
                torch.cat(
                    [
                        self.model.get_exact_kl(tokens[i : i + size], mask[i : i + size], weights)
                        for i in range(0, len(tokens), size)
                    ]
                )
            )
            values |= {f"{name}_exact": exact.mean().item()}
            values |= {f"{name}_exact_stderr": _standard_error(exact)}
        return values

    def _samples(self, rollouts: Rollouts) -> list[dict[str, Any]]:
        shown = []
        for i in range(min(self.config.num_samples_shown, len(rollouts.tokens))):
            start, stop = int(rollouts.prompt_lengths[i]), int(rollouts.lengths[i])
            response = self.model.tokenizer.ids_to_text(rollouts.tokens[i, start:stop].tolist())
            reward = None if rollouts.failed[i] else rollouts.rewards[i].item()
            shown.append({"prompt": self.prompts[i].text, "response": response, "reward": reward})
        return shown


def _token_mean(values: Tensor, mask: Tensor) -> float:
    """Mean over the response tokens of all data-parallel ranks."""
    sums = torch.stack([(values * mask).sum(-1), mask.sum(-1)], dim=-1)
    total, count = gather_rows(sums).double().sum(0).tolist()
    return total / count


def _standard_error(values: Tensor) -> float:
    """Standard error of the mean; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return (values.double().std() / len(values) ** 0.5).item()
