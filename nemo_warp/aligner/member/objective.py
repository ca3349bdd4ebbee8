"""What a rollout batch asks of the optimizer: KL-regularised rewards, advantages, token weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_warp.aligner.policy import engine_law
from nemo_warp.aligner.sampling.rollouts import Responses, Rollouts, gather_rows, local_rows
from nemo_warp.aligner.sampling.timings import Timings
from nemo_warp.aligner.weights.sharded import ShardedWeights
from nemo_warp.config import to_plain
from nemo_warp.core.reinforce import (
    TOP_K_ESTIMATORS,
    Advantages,
    compute_advantages,
    over_response,
    sequence_kl,
    token_weights,
    top_k_kl,
)
from nemo_warp.rewards.scale import Scale, optimised
from nemo_warp.schema.member import Member

_MOST_BYTES = 4 * 2**30
"""Of a batch, with the estimators that hold several tokens of each position."""
_BYTES_PER_TOKEN = 8 + 4
"""Its number, int64, and the anchor's log-probability."""


@dataclass(frozen=True)
class Batch:
    """What one rollout gives the optimizer, and what there is to report about it.

    Attributes:
        data: ``response_tokens`` int64 [B, S] and ``weights`` float32 [B, S-1], the global batch;
            with the estimators ``top_k`` and ``exact`` what else `get_loss_and_metrics` takes.
        kl: float32 [B], KL estimate to the anchor of each response (0 without an anchor).
        metrics: numbers for the log.
    """

    data: dict[str, Tensor]
    kl: Tensor
    metrics: dict[str, float]


@dataclass(frozen=True)
class Scores:
    """What the policy and the reference say to the responses of a global batch.

    Attributes:
        kl: float32 [B], KL estimate to the reference of each response (0 without one).
        direct: what a loss of the KL's own needs, see `ForwardPasses.get_loss_and_metrics`.
        log_probs: float32 [B, S-1], of the policy that sampled; where they are needed.
        told: numbers for the log.
    """

    kl: Tensor
    direct: dict[str, Tensor]
    log_probs: Tensor | None
    told: dict[str, float]


class Objective:
    """WARP, Algorithm 1, lines 7 and 8, on the global batch; equal on every rank.

    Args:
        config: the member's configuration (``algorithm``, ``rollout``, ``length_penalty``).
        reference: weights of the KL reference: the anchor's, the SFT policy's, or None.
        timings: where the time of the log-probabilities goes.
    """

    def __init__(
        self, config: Member, model: Any, reference: ShardedWeights | None, timings: Timings
    ) -> None:
        self.config = config
        self.model = model
        self.reference = reference
        self.timings = timings
        rewards = to_plain(config)["rewards"]
        self._scales = [Scale.of(reward) for reward in rewards]
        self._reward_weights = [float(reward.get("weight", 1.0)) for reward in rewards]

    @property
    def baseline(self) -> str:
        """The baseline in use: leave-one-out needs more than one sample per prompt."""
        algorithm, rollout = self.config.algorithm, self.config.rollout
        alone = algorithm.baseline == "leave_one_out" and rollout.samples_per_prompt == 1
        return "batch_mean" if alone else algorithm.baseline

    @torch.no_grad()
    def batch(self, rollouts: Rollouts, scores: Scores | None = None) -> Batch:
        """Loss weights of every token, for the present policy and reference. Collective.

        Args:
            scores: of `score`, if that was done.
        """
        algorithm = self.config.algorithm
        valid = ~rollouts.failed
        if algorithm.exclude_truncated:
            valid = valid & rollouts.is_end
        scores = scores or self.score(rollouts)
        kl, direct = scores.kl, scores.direct
        penalty = self.config.length_penalty * rollouts.response_lengths
        regularised = self._rewards(rollouts) - penalty - algorithm.kl_coefficient * kl
        finite = torch.isfinite(regularised)
        unusable = int((valid & ~finite).sum())
        # One infinite KL (k3 of a token that the policy has unlearned) would spoil its prompt's
        # baseline.
        valid = valid & finite
        advantages = compute_advantages(regularised, self._groups(), valid, self.baseline)
        data = {
            "response_tokens": rollouts.tokens,
            "weights": token_weights(advantages, rollouts.mask, algorithm.policy_reduction),
        }
        if scores.log_probs is not None:
            data["sampled_log_probs"] = scores.log_probs
        if direct:
            data |= {**direct, "kl_weights": self._kl_weights(rollouts.mask, advantages.used)}
        # Means over the global batch, which every rank has: nothing needs to be reduced.
        metrics = {
            "reward": _mean(rollouts.rewards, ~rollouts.failed),
            "regularised_reward": _mean(regularised, valid),
            "advantage_std": _mean(advantages.values.square(), advantages.used) ** 0.5,
            "length": rollouts.response_lengths.float().mean().item(),
            "ended_share": rollouts.is_end.float().mean().item(),
            "failed_rewards": int(rollouts.failed.sum()),
            "samples_used": int(advantages.used.sum()),
        }
        if unusable:  # only where there are any: metrics stay as they were
            metrics["not_finite"] = unusable
        if self.reference is not None:
            metrics["kl_to_anchor"] = _mean(kl, torch.isfinite(kl))
        return Batch(data, kl, metrics | scores.told)

    def _rewards(self, rollouts: Rollouts) -> Tensor:
        """What is maximised, float32 [B]: the rewards, standardised over the batch where asked."""
        scales, weights = self._scales, self._reward_weights
        if all(scale.standardize == "none" for scale in scales) or rollouts.parts is None:
            return rollouts.rewards
        # float64 on the host, by the function that the reward client uses: one definition of a
        # mixture.
        total = optimised(rollouts.parts.double().cpu().numpy(), scales, weights)
        return torch.as_tensor(total).to(rollouts.rewards)

    def _groups(self) -> Tensor:
        """Which prompt of the step each sample answers, int64 [B]."""
        rollout = self.config.rollout
        # By position and not by tokens: two equal prompts of one step are two prompts.
        slots = torch.arange(rollout.prompts_per_step, device=torch.cuda.current_device())
        return slots.repeat_interleave(rollout.samples_per_prompt)

    def _kl_weights(self, mask: Tensor, used: Tensor) -> Tensor:
        """What a token's KL counts in the loss, float32 [B, S-1]: as a unit of advantage would."""
        algorithm = self.config.algorithm
        unit = Advantages(used.float(), used)
        weights = algorithm.kl_coefficient * token_weights(unit, mask, algorithm.policy_reduction)
        sums = algorithm.kl_reduction == "sum"
        return weights if sums else weights / mask.sum(-1, keepdim=True).clamp(min=1)

    @torch.no_grad()
    def score(self, responses: Responses) -> Scores:
        """Log-probabilities, which need no rewards. Each rank computes its own rows. Collective."""
        rows = local_rows(len(responses.tokens))
        tokens, mask = responses.tokens[rows], responses.mask[rows]
        # Updates after the first one train a policy that has not sampled these responses.
        weighted = self.config.rollout.updates_per_rollout > 1
        none = torch.zeros(len(responses.tokens), device=tokens.device)
        sampler = responses.sampler
        if self.reference is None and not weighted and sampler is None:
            return Scores(none, {}, None, {})
        with self.timings.measure("log_prob"):
            log_probs = self.model.get_inference_log_probs(tokens, mask)
        kept = gather_rows(log_probs) if weighted else None
        told = {} if sampler is None else sampler_gap(sampler[rows], log_probs, mask)
        if self.reference is None:
            return Scores(none, {}, kept, told)
        kl, direct = self._kl(tokens, mask, log_probs, self.reference)
        return Scores(kl, direct, kept, told)

    def _kl(
        self, tokens: Tensor, mask: Tensor, log_probs: Tensor, reference: ShardedWeights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """KL estimate of each response, float32 [B], and what a loss of its own needs."""
        # Two passes of one model: the reference is never a second model on the device.
        with self.timings.measure("anchor_log_prob"), reference.in_place():
            anchor_log_probs = self.model.get_inference_log_probs(tokens, mask)
        algorithm = self.config.algorithm
        if algorithm.kl_estimator not in TOP_K_ESTIMATORS:
            kl = sequence_kl(
                log_probs, anchor_log_probs, mask, algorithm.kl_estimator, algorithm.kl_reduction
            )
            return gather_rows(kl), {}
        with self.timings.measure("anchor_log_prob"):
            likeliest, top, top_anchor = self._likeliest(
                tokens, mask, reference, _tokens_held(algorithm, self.model, mask)
            )
        per_token = top_k_kl(log_probs, anchor_log_probs, tokens[:, 1:], likeliest, top, top_anchor)
        kl = over_response(per_token, mask, algorithm.kl_reduction)
        direct = {"kl_tokens": gather_rows(likeliest), "kl_anchor": gather_rows(top_anchor)}
        return gather_rows(kl), direct

    def _likeliest(
        self, tokens: Tensor, mask: Tensor, reference: ShardedWeights, count: int
    ) -> tuple[Tensor, ...]:
        """See `ForwardPasses.get_likeliest`; some rows at a time."""
        size = self.config.rollout.forward_micro_batch_size
        with reference.gathered() as gathered:
            parts = [
                self.model.get_likeliest(tokens[i : i + size], mask[i : i + size], count, gathered)
                for i in range(0, len(tokens), size)
            ]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def sampler_gap(sampler: Tensor, scorer: Tensor, mask: Tensor) -> dict[str, float]:
    """Mean and largest |log pi of the engine - log pi of the model| over all ranks. Collective."""
    parts = gather_rows(engine_law.gap(sampler, scorer, mask)[None])
    total, count, _ = parts.double().sum(0).tolist()
    return {
        "sampler_gap_mean": total / max(count, 1.0),
        "sampler_gap_max": parts[:, 2].max().item(),
    }


def _tokens_held(algorithm: Any, model: Any, mask: Tensor) -> int:
    """Tokens at each position that the KL is summed over.

    Args:
        mask: [B/DP, S-1]; every rank holds the whole batch's.

    Raises:
        ValueError: with their log-probabilities they would not fit beside the model.
    """
    vocabulary = model.tokenizer.vocab_size
    whole = algorithm.kl_estimator == "exact"
    count = vocabulary if whole else min(algorithm.kl_top_k, vocabulary)
    positions = mask.numel() * parallel_state.get_data_parallel_world_size()
    held = _BYTES_PER_TOKEN * count * positions
    if held > _MOST_BYTES:
        raise ValueError(
            f"algorithm.kl_estimator would hold {count} tokens for each of {positions} "
            f"positions ({held / 2**30:.0f} GiB, at most {_MOST_BYTES / 2**30:.0f}); use top_k, "
            "with a smaller algorithm.kl_top_k"
        )
    return count


def _mean(values: Tensor, where: Tensor) -> float:
    """Mean over the samples that count; NaN if there are none."""
    return values[where].mean().item()
