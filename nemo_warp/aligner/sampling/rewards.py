"""Rewards on a parallel job: one client per model-parallel group, results on all of its ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_mp
from nemo_aligner.utils.parallel_state import get_model_parallel_src_rank
from torch import Tensor

from nemo_warp.aligner.entry.prompts import Prompt
from nemo_warp.rewards import RewardError, RewardFailureRateError
from nemo_warp.rewards.mixture import RewardMixture
from nemo_warp.rewards.settings import RewardClientSettings


@dataclass(frozen=True)
class LocalScores:
    """Rewards of one micro batch: float32 [b] (NaN where failed) and bool [b]."""

    scores: Tensor
    failed: Tensor


@dataclass(frozen=True)
class PendingRewards:
    """A request under way."""

    wait: Callable[[], LocalScores]
    """Blocks until it is answered. Collective over the model-parallel group."""


class RewardSource:
    """Scores (prompt, response) texts; never raises for a reward that failed, marks it instead.

    Args:
        config: the member's configuration (``rewards``, ``reward_client``).
        run_id: the servers' run identity.
    """

    def __init__(self, config: Any, run_id: str) -> None:
        self._is_source = torch.distributed.get_rank() == get_model_parallel_src_rank()
        self._mixture = None
        if self._is_source:
            self._mixture = RewardMixture.from_config(
                config.rewards, config.reward_client, run_id=run_id
            )
        self._budget = RewardClientSettings.from_config(config.reward_client).failure_budget()
        self._reasons: list[str] = []  # of the failures since the last check

    def connect(self, expected: dict[str, str] | None = None) -> None:
        """Wait until every server is ready and is the expected one, on all ranks or none.

        Args:
            expected: fingerprints of the rewards the run was begun with; None at its start.

        Raises:
            RewardError: on every rank, naming what the first of them found.
        """
        message = None
        if self._mixture is not None:
            try:
                self._mixture.connect()
                _check_same(expected, self._mixture.fingerprints)
            except RewardError as error:  # carried to all ranks, raised below
                message = str(error)
        messages: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(messages, message)
        for text in messages:
            if text is not None:
                raise RewardError(text)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Reward name -> fingerprint of what answers; the same on every rank."""
        found = [self._mixture.fingerprints if self._mixture else None]
        torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def submit(
        self, actor: Any, prompts: list[Prompt], output: dict[str, Tensor]
    ) -> PendingRewards:
        """Send one micro batch off and return at once."""
        if self._mixture is None:
            return PendingRewards(lambda: _share(None))
        future = self._mixture.submit([p.text for p in prompts], response_texts(actor, output))

        def wait() -> LocalScores:
            scores = future.result()
            self._reasons += [reason for reason in scores.reasons if reason]
            return _share(torch.as_tensor(scores.scores, dtype=torch.float32))

        return PendingRewards(wait)

    def check(self, failed: Tensor) -> None:
        """Count the failures of a global batch. Collective.

        Args:
            failed: bool [B], of the requests since the last call, in data-parallel rank order.

        Raises:
            RewardFailureRateError: on every rank: too many failed of late, or all of this batch.
        """
        reasons = self._gather_reasons(failed)
        self._budget.record(failed.tolist(), reasons)
        if failed.all():
            raise RewardFailureRateError(
                f"none of {len(failed)} rewards could be had (the first: {reasons[0]}); mend the "
                "reward server and run again"
            )

    def _gather_reasons(self, failed: Tensor) -> list[str]:
        """Why each sample failed, "" where it did not."""
        if not failed.any():
            return [""] * len(failed)
        parts: list[list[str]] = [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, self._reasons)
        self._reasons = []
        reasons = iter([reason for part in parts for reason in part])
        return [next(reasons) if one else "" for one in failed.tolist()]

    def close(self) -> None:
        """End the connections."""
        if self._mixture is not None:
            self._mixture.close()


def response_texts(actor: Any, output: dict[str, Tensor]) -> list[str]:
    """Decoded responses without prompt and end-of-sequence token."""
    texts = []
    rows = zip(
        output["response_tokens"].tolist(),
        output["prompt_lengths"].tolist(),
        output["response_lengths"].tolist(),
        strict=True,
    )
    for tokens, start, stop in rows:
        response = [t for t in tokens[start:stop] if t != actor.tokenizer.eos_id]
        texts.append(actor.tokenizer.ids_to_text(response))
    return texts


def _check_same(expected: dict[str, str] | None, found: dict[str, str]) -> None:
    changed = [name for name in expected or {} if found.get(name) != expected[name]]
    if changed:
        name = changed[0]
        raise RewardError(
            f"reward '{name}' is not the one the run was begun with (fingerprint "
            f"{found.get(name)}, expected {expected[name]}); serve that one again, or start the "
            "member again in a new directory"
        )


def _share(scores: Tensor | None) -> LocalScores:
    """From the rank that asked to its model-parallel group."""
    if scores is not None:
        scores = scores.to(torch.cuda.current_device()).unsqueeze(0)
    shared = broadcast_2d_tensor_within_mp(scores).squeeze(0)
    return LocalScores(shared, shared.isnan())
