"""The REINFORCE estimator of WARP: KL-regularised rewards, baselines, per-token loss weights.

Every function works on the GLOBAL batch of B samples, so its result cannot depend on how the batch
is later split over data-parallel ranks or micro batches. Pure functions of torch tensors on any
one device; nothing is modified in place.

Shapes: B samples, S-1 token positions (log-probabilities of tokens 1..S-1). ``mask`` [B, S-1] is 1
on response tokens, the one that ended the response included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "log_ratio": lambda d: d,  # k1, unbiased and signed: the paper's
    "absolute": lambda d: d.abs(),  # NeMo-Aligner's default; not a KL
    "squared": lambda d: d.square() / 2,  # k2
    "exponential": lambda d: torch.exp(-d) - 1 + d,  # k3, unbiased and never negative
}
"""Per-token estimates of KL(policy || anchor) from d = log pi(y_t) - log pi_anchor(y_t)."""

TOP_K_ESTIMATORS = ("top_k", "exact")
"""See `top_k_kl`; ``exact`` takes the whole vocabulary."""
KL_REDUCTIONS = ("sum", "mean")
BASELINES = ("leave_one_out", "batch_mean", "none")
POLICY_REDUCTIONS = ("sequence_sum", "sequence_mean", "token_mean")


def response_mask(prompt_lengths: Tensor, lengths: Tensor, num_positions: int) -> Tensor:
    """Mask [B, num_positions] (float32) of the response tokens among the predicted positions.

    Args:
        prompt_lengths: int64 [B].
        lengths: int64 [B], prompt plus response, the ending token included.
        num_positions: S-1; position j holds the log-probability of token j+1.
    """
    # The same positions as upstream's create_mask (NeMo-Aligner 0.7, utils/ppo_utils.py l.85),
    # without its loop over samples.
    position = torch.arange(num_positions, device=lengths.device)[None, :]
    inside = (position >= prompt_lengths[:, None] - 1) & (position < lengths[:, None] - 1)
    return inside.float()


def sequence_kl(
    log_probs: Tensor, anchor_log_probs: Tensor, mask: Tensor, estimator: str, reduction: str
) -> Tensor:
    """KL estimate of each response, float32 [B], in nats.

    ``log_ratio`` with ``sum`` is the paper's log(pi(y|x) / pi_anchor(y|x)) (Algorithm 1, line 7).
    """
    # The difference of two bf16 log-probabilities near -10 is good to 0.06 nats only: fp32 first.
    per_token = KL_ESTIMATORS[estimator](log_probs.float() - anchor_log_probs.float())
    return over_response(per_token, mask, reduction)


def over_response(per_token: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """Sum or mean over each response's tokens, float32 [B], of [B, S-1]."""
    # where, not *: an infinite ratio outside the response must not become NaN.
    total = torch.where(mask > 0, per_token, 0.0).sum(-1)
    # Upstream takes the mean (algorithms/reinforce.py l.219), which makes beta about 1/|y| of the
    # paper's. clamp: an empty response has KL 0, not NaN.
    return total if reduction == "sum" else total / mask.sum(-1).clamp(min=1)


def top_k_kl(
    log_probs: Tensor,
    anchor_log_probs: Tensor,
    tokens: Tensor,
    top_tokens: Tensor,
    top: Tensor,
    top_anchor: Tensor,
) -> Tensor:
    """KL(policy || anchor) at each position: the K likeliest tokens summed, the tail sampled.

    sum_k pi_k (log pi_k - log pi_anchor_k), plus the sampled token's log-ratio where that is none
    of the K. Unbiased for any K, from the sampled log-ratio (K = 0) to the exact KL (the whole
    vocabulary), with less variance the larger K is (EMA-PG, arXiv 2602.04417).

    As a penalty in the reward it carries the gradient of what the response leads to, and of the
    tail. What the sum over the K tokens itself adds, sum_k d_k grad pi_k with d = log pi -
    log pi_anchor held fixed, does not depend on the sample and is a loss of its own
    (``kl_weights`` in `token_weights`' units); together they are the gradient of the KL.

    Args:
        log_probs, anchor_log_probs: [B, S-1], of the sampled ``tokens`` int64 [B, S-1].
        top_tokens: int64 [B, S-1, K]; ``top``, ``top_anchor``: log pi of them
            under policy and anchor.

    Returns:
        float32 [B, S-1], in nats.
    """
    # A sampled token that is among the K is in the sum already and would count twice.
    within = (top_tokens == tokens[..., None]).any(-1)
    # where: a token that the policy has unlearned has pi = 0 and a ratio that may be -inf.
    summed = torch.where(top.exp() > 0, top.exp() * (top - top_anchor), 0.0).sum(-1)
    return summed + torch.where(within, 0.0, log_probs.float() - anchor_log_probs.float())


@dataclass(frozen=True)
class Advantages:
    """What each sample contributes to the gradient.

    Attributes:
        values: float32 [B], reward minus baseline; 0 where not used.
        used: bool [B]; False for samples without a gradient: excluded ones, and a sample whose
            leave-one-out baseline has no other sample to rest on.
    """

    values: Tensor
    used: Tensor


def compute_advantages(rewards: Tensor, groups: Tensor, valid: Tensor, baseline: str) -> Advantages:
    """Subtract a baseline that rests on valid samples only.

    Args:
        rewards: float [B], already KL-regularised; anything (NaN too) where not valid. A sample
            whose reward is not finite is taken for not valid: one infinite KL estimate (k3 of a
            token that the policy has unlearned) would make every advantage of its prompt NaN.
        groups: int64 [B], equal for samples of the same prompt.
        valid: bool [B]; False for samples excluded from baseline and gradient.
        baseline: ``leave_one_out`` (mean of the prompt's other valid samples), ``batch_mean``
            (mean of all other valid samples, so that it stays unbiased) or ``none``.
    """
    valid = valid & torch.isfinite(rewards)
    rewards = torch.where(valid, rewards.float(), 0.0)
    if baseline == "none":
        return Advantages(rewards, valid)
    if baseline == "batch_mean":
        # One group of all samples: the code below then leaves out one of the batch.
        groups = torch.zeros_like(groups)
    # By the prompt's number in the global batch. Upstream compares prompt tokens inside the local
    # batch (calculate_rloo_baseline, ppo_utils.py l.117): split over DP ranks, a sample that lost
    # its siblings gets baseline = reward, a zero gradient that nothing reports (l.135).
    others = (groups[:, None] == groups[None, :]) & valid[None, :]
    others = others & ~torch.eye(len(groups), dtype=torch.bool, device=groups.device)
    count = others.sum(-1)
    # Divided by the number of OTHER valid samples. Upstream divides by count - 1 for excluded
    # samples, too, which are not in the count (ppo_utils.py l.139).
    used = valid & (count > 0)
    # float64: the sum runs over the whole batch for batch_mean.
    mean = (others.double() @ rewards.double()) / count.clamp(min=1)
    return Advantages(torch.where(used, rewards - mean.float(), 0.0), used)


def token_weights(advantages: Advantages, mask: Tensor, reduction: str) -> Tensor:
    """Weights w [B, S-1] (float32) with loss = -sum(w * log pi) over the whole batch.

    ``sequence_sum``: (1/B) sum_i A_i sum_t log pi(y_it): the paper's gradient.
    ``sequence_mean``: the same with the mean over each response's tokens (NeMo-Aligner's loss at
    micro batch 1). ``token_mean``: the mean over all used tokens of the batch.
    Samples that are not used weigh 0; they still count in B, so that a failed reward never makes
    the other samples' steps larger.
    """
    # Weights and not a loss, so that micro batches only have to add up. Upstream takes the mean
    # over each micro batch's tokens (megatron_gpt_reinforce_actor.py l.138): the gradient then
    # depends on the micro batch size. It also multiplies [b, S-1] by [b] (l.135).
    weights = advantages.values[:, None] * mask
    if reduction == "token_mean":
        # The divisor is the global batch's, for the same reason.
        return weights / mask[advantages.used].sum().clamp(min=1)
    if reduction == "sequence_mean":
        weights = weights / mask.sum(-1, keepdim=True).clamp(min=1)
    return weights / len(mask)


IMPORTANCE_SUMS = ("importance_mean", "importance_cut", "responses")
"""What `importance` tells, as sums over responses; `responses` is their number."""


@torch.no_grad()
def importance(
    log_probs: Tensor, sampled: Tensor, trained: Tensor, limit: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weight pi(y|x) / pi_sampled(y|x) of each response, at most ``limit``, float32 [B].

    After the first of several updates from one rollout, the policy is not the one that sampled.
    The gradient of its expected reward is then an average over the responses with these weights;
    cut at a limit, they trade a bias for a bounded variance (truncated importance sampling,
    Ionides 2008).

    Args:
        log_probs, sampled: [B, S-1], of the policy that is trained, and of the one that sampled.
        trained: [B, S-1], 0 where a position is not trained on. Responses without any weigh 1 and
            are not counted.

    Returns:
        The weights, and `IMPORTANCE_SUMS` of them: before the cut, cut ones, responses.
    """
    # where, not *: log-probabilities of other positions are not computed, and need not be finite.
    total = torch.where(trained != 0, log_probs.float() - sampled, 0.0).sum(-1)
    ratio, counted = total.exp(), (trained != 0).any(-1)
    sums = (ratio[counted].sum(), (ratio[counted] > limit).float().sum(), counted.float().sum())
    return ratio.clamp(max=limit), dict(zip(IMPORTANCE_SUMS, sums, strict=True))
