"""Rollouts: generate responses on each data-parallel rank, then hold the same global batch on all.

Upstream's `ReinforceRolloutBatch.chunk` (algorithms/reinforce.py l.102) keeps the whole batch on
every rank; here each rank generates, scores and trains on its own rows only, and everything that
must be global (rewards, KL, baselines) is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_warp.aligner.entry.prompts import Prompt
from nemo_warp.aligner.policy.actor import WarpActorModel
from nemo_warp.aligner.sampling.rewards import PendingRewards, RewardSource
from nemo_warp.core.reinforce import response_mask
from nemo_warp.core.seeds import derive_seed


@dataclass(frozen=True)
class Responses:
    """The whole batch of B samples, equal on every rank.

    Attributes:
        tokens: int64 [B, S], prompt, response, then end-of-sequence padding.
        prompt_lengths, lengths: int64 [B]; ``lengths`` counts prompt and response.
        is_end: bool [B], the response ended by itself.
        sampler: float32 [B, S-1], an engine's own log pi of the response tokens; None without one.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    is_end: Tensor
    sampler: Tensor | None = field(default=None, kw_only=True)

    @property
    def mask(self) -> Tensor:
        """Response positions, float32 [B, S-1]."""
        return response_mask(self.prompt_lengths, self.lengths, self.tokens.size(1) - 1)

    @property
    def response_lengths(self) -> Tensor:
        """Response tokens, int64 [B]."""
        return self.lengths - self.prompt_lengths


@dataclass(frozen=True)
class Rollouts(Responses):
    """Responses and their rewards.

    Attributes:
        rewards: float32 [B], NaN where failed.
        failed: bool [B], no reward could be had.
        parts: float32 [B, K], each reward (and judge) by itself, NaN where failed; None for
            rollouts that nobody scored.
    """

    rewards: Tensor
    failed: Tensor
    parts: Tensor | None = None


@dataclass(frozen=True)
class Sampled:
    """Responses whose rewards are under way: there is time to do something else."""

    responses: Responses
    pending: list[PendingRewards]

    def scored(self) -> Rollouts:
        """Wait for the rewards. Collective."""
        scores = [p.wait() for p in self.pending]
        return Rollouts(
            **vars(self.responses),
            rewards=gather_rows(torch.cat([s.scores for s in scores])),
            # bool travels as bytes: NCCL and gloo have no collective for it.
            failed=gather_rows(torch.cat([s.failed.byte() for s in scores])).bool(),
            parts=gather_rows(torch.cat([s.parts for s in scores])),
        )


def response_of(rollouts: Rollouts, row: int, actor: WarpActorModel) -> str:
    """A response as its rewards saw it, without its end."""
    start, stop = int(rollouts.prompt_lengths[row]), int(rollouts.lengths[row])
    return actor.response_text(rollouts.tokens[row, start:stop].tolist())


def shown(rollouts: Rollouts, number: int, actor: WarpActorModel) -> list[dict[str, Any]]:
    """The first ``number`` samples, for people: ``prompt``, ``response`` and ``reward``."""
    found = []
    for row in range(min(number, len(rollouts.tokens))):
        prompt = rollouts.tokens[row, : int(rollouts.prompt_lengths[row])].tolist()
        reward = None if rollouts.failed[row] else rollouts.rewards[row].item()
        response = response_of(rollouts, row, actor)
        found.append(
            {"prompt": actor.tokenizer.ids_to_text(prompt), "response": response, "reward": reward}
        )
    return found


def local_rows(num_rows: int) -> slice:
    """This data-parallel rank's contiguous share of a global batch."""
    # Contiguous, so that gather_rows (rank order) gives back the order of the whole batch; the
    # sizes divide, see entry/validation.py.
    size = num_rows // parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    return slice(rank * size, (rank + 1) * size)


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate equally many rows of every data-parallel rank, in rank order."""
    group = parallel_state.get_data_parallel_group()
    rows = rows.contiguous()
    # all_gather takes tensors of equal shape only, hence the padding to the longest sequence below.
    parts = [torch.empty_like(rows) for _ in range(group.size())]
    torch.distributed.all_gather(parts, rows, group=group)
    return torch.cat(parts)


def generate(
    actor: WarpActorModel,
    prompts: list[Prompt],
    rewards: RewardSource,
    micro_batch_size: int,
    seed_parts: tuple[int | str, ...],
    pad_multiple: int = 1,
    judged: bool = False,
) -> Sampled:
    """Sample one response per entry of ``prompts`` and have them scored.

    Scoring overlaps with generation: a micro batch is sent off as soon as it is complete.

    Args:
        prompts: B entries (a prompt repeated k times for k samples); B is a multiple of
            ``micro_batch_size`` times the data-parallel size.
        seed_parts: with the number of the micro batch in the GLOBAL batch they give its sampling
            seed, so that the responses do not depend on the data-parallel size.
        pad_multiple: S is rounded up to it (sequence parallelism needs a multiple of TP).
        judged: ask the judges, too.
    """
    local = local_rows(len(prompts))
    outputs: list[dict[str, Tensor]] = []
    pending: list[PendingRewards] = []
    # `start` counts in the global batch: its number is in the seed, which makes responses
    # independent of the number of data-parallel ranks. NeMo-Aligner seeds each rank alike from
    # model.seed, and anew after a resume (utils/trt_llm.py l.97-99).
    for start in range(local.start, local.stop, micro_batch_size):
        batch = prompts[start : start + micro_batch_size]
        actor.seed_sampling(derive_seed(*seed_parts, start // micro_batch_size))
        output = within_limit(
            actor.infer(_collate(actor, batch)),
            actor.cfg.reinforce.length_params.max_length,
            actor.tokenizer.eos_id,
        )
        outputs.append(output)
        # Not waited for here: the server scores this micro batch while the next one is generated.
        pending.append(rewards.submit(actor, batch, output, judged))
    tokens = gather_rows(_pad_to_longest(outputs, actor.tokenizer.eos_id, pad_multiple))
    responses = Responses(
        tokens=tokens,
        prompt_lengths=gather_rows(torch.cat([o["prompt_lengths"] for o in outputs])),
        lengths=gather_rows(torch.cat([o["response_lengths"] for o in outputs])),
        # As bytes: what collectives do with bool differs between backends and versions of torch.
        is_end=gather_rows(torch.cat([o["is_end"].byte() for o in outputs])).bool(),
        sampler=_sampler_log_probs(outputs, tokens.size(1) - 1),
    )
    return Sampled(responses, pending)


def within_limit(output: dict[str, Tensor], limit: int, eos_id: int) -> dict[str, Tensor]:
    """Cut every response at the limit, counted from its own prompt's end.

    NeMo goes on until the longest prompt of a micro batch has ``limit`` tokens after it
    (text_generation_utils.py, sample_sequence_batch), so a response beside a longer prompt may be
    longer than the limit, and would depend on its neighbours.

    Args:
        output: of `infer`: ``response_tokens`` [b, S], ``response_lengths`` (prompt and response),
            ``prompt_lengths`` and ``is_end`` [b]. Not changed.

    Returns:
        The same, cut; what was cut has not ended by itself.
    """
    # `lengths` count from the start of the prompt, as NeMo's do.
    last = output["prompt_lengths"] + limit
    tokens = output["response_tokens"].clone()
    position = torch.arange(tokens.size(1), device=tokens.device)
    lengths = torch.minimum(output["response_lengths"], last)
    tokens[position >= lengths[:, None]] = eos_id
    cut = output["response_lengths"] > last
    return {
        **output,
        "response_tokens": tokens,
        "response_lengths": lengths,
        # NeMo reports an end that may lie behind the cut.
        "is_end": output["is_end"].bool() & ~cut,
    }


def _collate(actor: WarpActorModel, prompts: list[Prompt]) -> dict[str, Tensor]:
    """NeMo-Aligner's inference batch: ``text`` [b, longest prompt + response], ``length`` [b]."""
    lengths = torch.tensor([len(p.tokens) for p in prompts])
    width = int(lengths.max()) + actor.cfg.reinforce.length_params.max_length
    # NeMo writes the generated tokens into the same tensor, so it has to be wide enough for them.
    text = torch.full((len(prompts), width), actor.tokenizer.eos_id)
    for row, prompt in zip(text, prompts, strict=True):
        row[: len(prompt.tokens)] = torch.tensor(prompt.tokens)
    return {"text": text, "length": lengths}


def _sampler_log_probs(outputs: list[dict[str, Tensor]], width: int) -> Tensor | None:
    """The whole batch's [B, width], where the actor's `infer` has them."""
    if "sampler" not in outputs[0]:
        return None
    rows = [o["sampler"][:, :width] for o in outputs]
    padded = [torch.nn.functional.pad(r, (0, width - r.size(1))) for r in rows]
    return gather_rows(torch.cat(padded))


def _pad_to_longest(outputs: list[dict[str, Tensor]], eos_id: int, multiple: int) -> Tensor:
    """Local tokens [rows, S], S the longest sequence on any data-parallel rank."""
    longest = torch.stack([o["response_lengths"].max() for o in outputs]).max()
    group = parallel_state.get_data_parallel_group()
    # Ranks have to agree on S before they gather.
    torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX, group=group)
    width = -(-int(longest) // multiple) * multiple
    rows = [o["response_tokens"][:, :width] for o in outputs]
    padded = [torch.nn.functional.pad(r, (0, width - r.size(1)), value=eos_id) for r in rows]
    return torch.cat(padded)
