"""Rewards on a parallel job: one client per model-parallel group, results on all of its ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_mp
from nemo_aligner.utils.parallel_state import get_model_parallel_src_rank
from torch import Tensor

from nemo_warp.aligner.entry.prompts import Prompt
from nemo_warp.config import to_plain
from nemo_warp.prompts import PromptLine
from nemo_warp.rewards import RewardError, RewardFailureRateError
from nemo_warp.rewards.mixture import RewardMixture
from nemo_warp.rewards.scores import FailureBudget
from nemo_warp.schema.evaluation import Front
from nemo_warp.schema.member import Member


@dataclass(frozen=True)
class LocalScores:
    """Rewards of one micro batch.

    Attributes:
        scores: float32 [b], the weighted sum; NaN where failed.
        failed: bool [b].
        parts: float32 [b, K], unweighted, in the order of `RewardSource.names`; NaN where failed.
    """

    scores: Tensor
    failed: Tensor
    parts: Tensor


@dataclass(frozen=True)
class PendingRewards:
    """A request under way."""

    wait: Callable[[], LocalScores]
    """Blocks until it is answered. Collective over the model-parallel group."""


class RewardSource:
    """Scores (prompt, response) texts; never raises for a reward that failed, marks it instead.

    Judges are asked by evaluations only; their scores are in no sum and their failures in no
    budget.

    Args:
        config: the member's configuration (``rewards``, ``judges``, ``reward_client``).
        run_id: the servers' run identity.
    """

    def __init__(self, config: Member | Front, run_id: str | None) -> None:
        # All ranks of a model-parallel group hold the same responses: one of them asks, or each
        # reward would be paid for TP x PP times.
        self._is_source = torch.distributed.get_rank() == get_model_parallel_src_rank()
        self._mixture = self._judges = None
        self._weights = {reward.name: float(reward.weight) for reward in config.rewards}
        plain = to_plain(config)
        rewards, client = plain["rewards"], plain["reward_client"]
        self._divided = {r["name"] for r in rewards if r.get("standardize") == "deviation"}
        self._judge_names = [judge.name for judge in config.judges]
        if self._is_source:
            self._mixture = RewardMixture.from_config(rewards, client, run_id=run_id)
        if self._is_source and config.judges:
            # Weight 0, so that a judge's score can never get into the sum.
            judges = [{**judge, "weight": 0.0} for judge in plain["judges"]]
            self._judges = RewardMixture.from_config(judges, client, run_id=run_id)
        limits = config.reward_client
        self._budget = FailureBudget(limits.max_failure_rate, limits.failure_window)
        self._files = plain["prompts"]
        # Texts cannot be in the tensors that are gathered, so they are kept until `check` asks for
        # them.
        self._reasons: list[str] = []  # of the failures since the last check

    def connect(
        self,
        expected: dict[str, str] | None = None,
        prompts: Mapping[str, Sequence[PromptLine]] | None = None,
    ) -> None:
        """Wait until every server is ready and is the expected one, on all ranks or none.

        Args:
            expected: fingerprints of the rewards the run was begun with; None at its start.
            prompts: what will be scored, as ``train`` and ``heldout``; they must have the fields
                that the rewards take, and the latter those of the judges.

        Raises:
            RewardError: on every rank, naming what the first of them found.
            ValueError: likewise, where trying again would not help: another reward than expected,
                a judge that is trained on, prompts that lack a field.
        """
        # A rank that raised here would leave the others in the collective below until its time-out.
        problem: Exception | None = None
        if self._mixture is not None:
            try:
                self._mixture.connect()
                _check_same(expected, self._mixture.fingerprints)
                self._connect_judges()
                self._check_fields(prompts or {})
            except (RewardError, ValueError) as error:  # carried to all ranks, raised below
                problem = error
        problems: list[Exception | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(problems, problem)
        for found in problems:
            if found is not None:
                raise found

    @property
    def fingerprints(self) -> dict[str, str]:
        """Reward name -> fingerprint of what answers; the same on every rank."""
        found: list[Any] = [self._mixture.fingerprints if self._mixture else None]
        # Rank 0 is the source of its model-parallel group, so it has a mixture.
        torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def names(self, judged: bool) -> list[str]:
        """What the columns of ``parts`` are: the rewards and, where asked, the judges."""
        return [*self._weights, *(self._judge_names if judged else ())]

    def means(self, rollouts: Any) -> dict[str, float | None]:
        """Each reward's own mean over what it scored, those of weight 0 included; null for none."""
        if rollouts.parts is None:
            return {}
        columns = zip(self.names(judged=False), rollouts.parts.T, strict=False)
        scored = {name: not column.isnan().all() for name, column in columns}
        # nanmean of a column that is all NaN is NaN, which JSON has no number for: null below.
        means = rollouts.parts.nanmean(0).tolist()
        return {n: mean if scored[n] else None for n, mean in zip(scored, means, strict=False)}

    def deviations(self, rollouts: Any) -> dict[str, float]:
        """Sample deviation of the scores of each reward that is divided by it; 0 for one score."""
        if rollouts.parts is None:
            return {}
        columns = zip(self.names(judged=False), rollouts.parts.T, strict=False)
        # float64, as in the client that divides by it: the record has to show that number.
        scored = {name: c[~c.isnan()].double() for name, c in columns if name in self._divided}
        return {n: s.std().item() if len(s) > 1 else 0.0 for n, s in scored.items()}

    def submit(
        self, actor: Any, prompts: list[Prompt], output: dict[str, Tensor], judged: bool = False
    ) -> PendingRewards:
        """Send one micro batch off and return at once.

        Args:
            judged: ask the judges, too.
        """
        # This rank only takes part in the broadcast of what its source received.
        if self._mixture is None:
            return PendingRewards(lambda: _share(None))
        texts = [p.text for p in prompts], response_texts(actor.response_text, output)
        fields = [p.fields for p in prompts]
        future = self._mixture.submit(*texts, fields)
        judging = None
        if judged and self._judges is not None:
            judging = self._judges.submit(*texts, fields)

        def wait() -> LocalScores:
            scores = future.result()
            self._reasons += [reason for reason in scores.reasons if reason]
            parts = scores.parts | (judging.result().parts if judging is not None else {})
            # One array, so that sum and parts need one broadcast per micro batch.
            rows = np.stack([scores.scores, *(parts[name] for name in self.names(judged))])
            # float32, because upstream's broadcast_2d_tensor_within_mp sends float32 (NeMo-Aligner
            # 0.7, utils/distributed.py); NaN for a failed reward survives it.
            return _share(torch.as_tensor(rows, dtype=torch.float32))

        return PendingRewards(wait)

    def check(self, failed: Tensor) -> None:
        """Count the failures of a global batch. Collective.

        Args:
            failed: bool [B], of the requests since the last call, in data-parallel rank order.

        Raises:
            RewardFailureRateError: on every rank: too many failed of late, or all of this batch.
        """
        reasons = self._gather_reasons(failed)
        # Every rank records the same list and so raises at the same batch.
        self._budget.record(failed.tolist(), reasons)
        if failed.all():
            raise RewardFailureRateError(
                f"none of {len(failed)} rewards could be had (the first: {reasons[0]}); mend the "
                "reward server and run again"
            )

    def _gather_reasons(self, failed: Tensor) -> list[str]:
        """Why each sample failed, "" where it did not."""
        # `failed` is the same on all ranks, so all of them skip the collective or none.
        if not failed.any():
            return [""] * len(failed)
        # Ranks that are no source have no reasons; the others come in data-parallel rank order,
        # which is that of the rows.
        parts: list[list[str]] = [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, self._reasons)
        self._reasons = []
        reasons = iter([reason for part in parts for reason in part])
        return [next(reasons) if one else "" for one in failed.tolist()]

    def close(self) -> None:
        """End the connections."""
        for mixture in (self._mixture, self._judges):
            if mixture is not None:
                mixture.close()

    def _check_fields(self, prompts: Mapping[str, Sequence[PromptLine]]) -> None:
        for name, lines in prompts.items():
            for mixture in (self._mixture, self._judges if name == "heldout" else None):
                if mixture is not None:
                    mixture.check_fields([line.fields for line in lines], self._files[name])

    def _connect_judges(self) -> None:
        """Wait for the judges.

        Raises:
            RewardError: one is not there, or is a reward that is trained on.
        """
        if self._judges is None or self._mixture is None:
            return
        self._judges.connect()
        trained = {
            fingerprint: name
            for name, fingerprint in self._mixture.fingerprints.items()
            if self._weights[name] != 0
        }
        for name, fingerprint in self._judges.fingerprints.items():
            # By fingerprint, not by name or address: the same function under another name is still
            # the one that is trained on. Rewards of weight 0 are only watched, and may judge.
            if fingerprint in trained:
                raise ValueError(
                    f"judge '{name}' computes what reward '{trained[fingerprint]}' does "
                    f"(fingerprint {fingerprint}): a judge is never trained on; remove one of them"
                )


def response_texts(decode: Callable[[list[int]], str], output: dict[str, Tensor]) -> list[str]:
    """Each response without its prompt, by what makes a text of its tokens."""
    texts = []
    rows = zip(
        output["response_tokens"].tolist(),
        output["prompt_lengths"].tolist(),
        output["response_lengths"].tolist(),
        strict=True,
    )
    for tokens, start, stop in rows:
        texts.append(decode(tokens[start:stop]))
    return texts


def _check_same(expected: dict[str, str] | None, found: Mapping[str, str | None]) -> None:
    for name, known in (expected or {}).items():
        if found.get(name) == known:
            continue
        raise ValueError(
            f"reward '{name}' is not the one the run was begun with (fingerprint "
            f"{found.get(name)}, expected {known}); serve that one again, or start the "
            "member again in a new directory"
        )


def _share(rows: Tensor | None) -> LocalScores:
    """From the rank that asked to its model-parallel group: the sum, then each part [1 + K, b]."""
    if rows is not None:
        rows = rows.to(torch.cuda.current_device())
    shared = broadcast_2d_tensor_within_mp(rows)
    return LocalScores(shared[0], shared[0].isnan(), shared[1:].T)
