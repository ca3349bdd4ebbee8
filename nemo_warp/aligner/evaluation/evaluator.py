"""Reward, KL to SFT and KL to the anchor of the present policy on held-out prompts.

Sampling seeds depend on the evaluation's own seed only (common random numbers), so two policies, or
two steps of one, differ by their weights only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_warp.aligner.entry.prompts import Prompt
from nemo_warp.aligner.sampling.rewards import RewardSource
from nemo_warp.aligner.sampling.rollouts import (
    Responses,
    Rollouts,
    gather_rows,
    generate,
    local_rows,
    response_of,
)
from nemo_warp.aligner.weights.sharded import GatheredWeights, ShardedWeights
from nemo_warp.core.reinforce import sequence_kl
from nemo_warp.evidence.responses import write_responses
from nemo_warp.schema.evaluation import Front
from nemo_warp.schema.member import Member


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
        config: Member | Front,
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
    def evaluate(
        self, anchor: ShardedWeights | None = None, keep: Path | None = None
    ) -> dict[str, Any]:
        """Metrics of the model's present weights; equal on every rank. Collective.

        Args:
            keep: file that the responses are written to (`nemo_warp.evidence.responses`).

        Returns:
            ``reward`` and ``reward_stderr``; ``rewards``, each one's own mean by name;
            ``kl_to_sft``, ``kl_to_sft_stderr`` and, with an anchor, ``kl_to_anchor``: sampled
            estimates, sequence sums in nats, and ``..._exact`` with ``exact_kl``; ``length`` in
            response tokens; ``entropy``, the mean of -log pi over response tokens (nats per token);
            ``ended_share``; ``samples``, a few texts; with judges ``judges``, ``judges_stderr`` and
            ``failed_judges``, each by name.

        Raises:
            RewardFailureRateError: on every rank.
        """
        with self.model.inference():
            sampled = generate(
                self.model,
                # Generation by generation: the first ones are those that a single generation would
                # have been.
                self.prompts * self.config.generations,
                self.rewards,
                self.config.micro_batch_size,
                seed_parts=(self.config.seed, "evaluation"),
                judged=True,
            )
            divergences, entropy = self._divergences(sampled.responses, anchor)
            rollouts = sampled.scored()
            self.rewards.check(rollouts.failed)
        if keep is not None and torch.distributed.get_rank() == 0:
            write_responses(keep, self._records(rollouts, divergences["kl_to_sft"]))
        values = self._rewards(rollouts) | {"entropy": entropy}
        for name, rows in divergences.items():
            values |= {name: rows.mean().item(), f"{name}_stderr": self._standard_error(rows)}
        return values | self._judges(rollouts) | {"samples": self._samples(rollouts)}

    def _rewards(self, rollouts: Rollouts) -> dict[str, Any]:
        return {
            "reward": rollouts.rewards[~rollouts.failed].mean().item(),
            "reward_stderr": self._standard_error(rollouts.rewards),
            "rewards": self.rewards.means(rollouts),
            "length": rollouts.response_lengths.float().mean().item(),
            "ended_share": rollouts.is_end.float().mean().item(),
            "failed_rewards": int(rollouts.failed.sum()),
            "num_prompts": len(self.prompts),
        }

    def _judges(self, rollouts: Rollouts) -> dict[str, Any]:
        """Means over what each judge scored, null where it scored nothing; its failures counted."""
        rewards, names = self.rewards.names(judged=False), self.rewards.names(judged=True)
        judges = names[len(rewards) :]
        if not judges or rollouts.parts is None:
            return {}
        columns = dict(zip(judges, rollouts.parts.T[len(rewards) :], strict=True))
        failed = {name: int(column.isnan().sum()) for name, column in columns.items()}
        scored = {name: not column.isnan().all() for name, column in columns.items()}
        return {
            "judges": {
                n: c.nanmean().item() if scored[n] else None for n, c in columns.items()
            },
            "judges_stderr": {
                n: self._standard_error(c) if scored[n] else None for n, c in columns.items()
            },
            "failed_judges": failed,
        }  # fmt: skip

    def _divergences(
        self, rollouts: Responses, anchor: ShardedWeights | None
    ) -> tuple[dict[str, Tensor], float]:
        """Each response's divergences by name, float32 [B], and the mean entropy of its tokens."""
        rows = local_rows(len(rollouts.tokens))
        tokens, mask = rollouts.tokens[rows], rollouts.mask[rows]
        log_probs = self.model.get_inference_log_probs(tokens, mask)
        found: dict[str, Tensor] = {}
        references = {"kl_to_sft": self.sft}
        if anchor is not None and anchor is not self.sft:
            references["kl_to_anchor"] = anchor
        for name, weights in references.items():
            with weights.gathered() as gathered:
                found |= self._divergence(name, tokens, mask, log_probs, gathered)
        # A static anchor is SFT: one pass serves both numbers.
        if anchor is self.sft:
            found["kl_to_anchor"] = found["kl_to_sft"]
        return found, _token_mean(-log_probs, mask)

    def _divergence(
        self, name: str, tokens: Tensor, mask: Tensor, log_probs: Tensor, weights: GatheredWeights
    ) -> dict[str, Tensor]:
        with weights.in_place():
            reference = self.model.get_inference_log_probs(tokens, mask)
        found = {name: gather_rows(sequence_kl(log_probs, reference, mask, "log_ratio", "sum"))}
        if self.config.exact_kl:
            size = self.config.micro_batch_size
            exact = [
                self.model.get_exact_kl(tokens[i : i + size], mask[i : i + size], weights)
                for i in range(0, len(tokens), size)
            ]
            found[f"{name}_exact"] = gather_rows(torch.cat(exact))
        return found

    def _standard_error(self, rows: Tensor) -> float:
        """Of the mean over prompts, whose generations [B = generations * prompts] are averaged.

        Responses to one prompt are no independent observations. NaN rows are left out; 0 for a
        single prompt.
        """
        # float64: rewards near 1 with an error of 1e-3 are differences of equal digits.
        means = rows.double().view(self.config.generations, -1).nanmean(0)
        means = means[~means.isnan()]
        return (means.std() / len(means) ** 0.5).item() if len(means) > 1 else 0.0

    def _samples(self, rollouts: Rollouts) -> list[dict[str, Any]]:
        shown = []
        for i in range(min(self.config.num_samples_shown, len(self.prompts))):
            reward = None if rollouts.failed[i] else rollouts.rewards[i].item()
            text = self._text(rollouts, i)
            shown.append({"prompt": self.prompts[i].text, "response": text, "reward": reward})
        return shown

    def _records(self, rollouts: Rollouts, log_ratios: Tensor) -> list[dict[str, Any]]:
        """What is kept of each response; only rank 0 needs it."""
        rewards, names = self.rewards.names(judged=False), self.rewards.names(judged=True)
        parts = [[_plain(v) for v in row] for row in _rows(rollouts.parts, len(log_ratios))]
        records = []
        for i, scores in enumerate(parts):
            prompt = i % len(self.prompts)
            by_name = dict(zip(names, scores, strict=False))
            records.append(
                {
                    "prompt": self.prompts[prompt].text,
                    "prompt_index": prompt,
                    "generation": i // len(self.prompts),
                    "response": self._text(rollouts, i),
                    "reward": _plain(rollouts.rewards[i].item()),
                    "scores": {n: s for n, s in by_name.items() if n in rewards},
                    "judges": {n: s for n, s in by_name.items() if n not in rewards},
                    "tokens": int(rollouts.response_lengths[i]),
                    "log_ratio": _plain(log_ratios[i].item()),
                    "ended": bool(rollouts.is_end[i]),
                }
            )
        return records

    def _text(self, rollouts: Rollouts, row: int) -> str:
        return response_of(rollouts, row, self.model)


def _rows(parts: Tensor | None, count: int) -> list[list[float]]:
    return [[] for _ in range(count)] if parts is None else parts.tolist()


def _plain(value: float) -> float | None:
    """A float32 in the digits it has; null where it is none."""
    return float(f"{value:.7g}") if value == value else None


def _token_mean(values: Tensor, mask: Tensor) -> float:
    """Mean over the response tokens of all data-parallel ranks."""
    sums = torch.stack([(values * mask).sum(-1), mask.sum(-1)], dim=-1)
    total, count = gather_rows(sums).double().sum(0).tolist()
    return total / count
