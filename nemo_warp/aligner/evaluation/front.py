"""Slide eta between two checkpoints in memory and measure each point of the front.

With ``pick.kl`` the front is then searched for the policy at that KL.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nemo_warp import exit_codes
from nemo_warp.aligner.entry.prompts import Rules, encoder, tokenize
from nemo_warp.aligner.entry.validation import max_prompt_tokens
from nemo_warp.aligner.entry.versions import package_versions
from nemo_warp.aligner.evaluation.evaluator import Evaluator
from nemo_warp.aligner.evaluation.line import Line, record
from nemo_warp.aligner.evaluation.points import (
    CHOSEN_FILE,
    POINTS_FILE,
    best_kl,
    measured_points,
    wanted_points,
)
from nemo_warp.aligner.sampling.rewards import RewardSource
from nemo_warp.config import identity_hash, to_plain
from nemo_warp.evidence.fronts import at_budget
from nemo_warp.evidence.responses import responses_file
from nemo_warp.progress import progress
from nemo_warp.prompts import PromptLine
from nemo_warp.records import (
    Completion,
    code_version,
    hash_file,
    write_completion,
    write_json_atomically,
)
from nemo_warp.schema.evaluation import Front


def measure_front(config: Front, texts: list[PromptLine]) -> int:
    """Measure what ``points.jsonl`` lacks, then write the completion record. Collective."""
    front = _Front(config, texts)
    front.measure()
    chosen = front.pick() if config.pick.kl is not None else None
    front.close()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _complete(config, front.path, chosen)
    return exit_codes.DONE


class _Front:
    """Points on record, and the model that measures others; it is loaded when one is missing."""

    def __init__(self, config: Front, texts: list[PromptLine]) -> None:
        self.config, self.texts = config, texts
        self.path = Path(config.directory) / POINTS_FILE
        judges = [judge.name for judge in config.judges]
        known = [Path(config.pick.known)] if config.pick.known else []
        self.points: dict[tuple[str, float], dict[str, Any]] = {}
        # This stage's own last: what it measured itself wins over the front's.
        for path in (*known, self.path):
            self.points |= measured_points(path, judges)
        self._rewards: RewardSource | None = None

    def measure(self) -> None:
        """Every point that is wanted and not on record."""
        missing = [point for point in wanted_points(self.config) if point not in self.points]
        if not missing:
            return
        _ = self._evaluator  # starts torch.distributed
        silent = torch.distributed.get_rank() != 0
        for base, eta in progress(missing, desc="front", unit="point", disable=silent):
            self._measure(base, eta)

    def pick(self) -> dict[str, Any]:
        """Search the line from the base for the KL that is wanted; what was found.

        Raises:
            ValueError: the budget is outside of the front, or not met to the tolerance.
        """
        pick = self.config.pick
        assert pick.kl is not None

        def kl_at(kappa: float) -> float:
            if ("init", kappa) not in self.points:
                self._measure("init", kappa)
            return best_kl(self.points["init", kappa])

        known = [(eta, best_kl(p)) for (base, eta), p in self.points.items() if base == "init"]
        found = at_budget(kl_at, known, pick.kl, pick.tolerance)
        point = self.points["init", found.kappa]
        told = {key: value for key, value in point.items() if key not in ("samples", "base", "eta")}
        return {"budget": pick.kl, "tolerance": pick.tolerance, "kappa": found.kappa,
                "kl": found.kl, "point": told}  # fmt: skip

    def close(self) -> None:
        """End the connections."""
        if self._rewards is not None:
            self._rewards.close()

    def _measure(self, base: str, eta: float) -> None:
        evaluator = self._evaluator
        with self._line.at(base, eta):
            values = evaluator.evaluate(keep=responses_file(self.path.parent, base, eta))
        # The search goes where the numbers lead: all ranks must go there together.
        shared = [{"base": base, "eta": eta, **values}]
        torch.distributed.broadcast_object_list(shared, src=0)
        self.points[base, eta] = shared[0]
        if torch.distributed.get_rank() == 0:
            record(self.path, shared[0])

    @cached_property
    def _line(self) -> Line:
        return Line(self.config)

    @cached_property
    def _evaluator(self) -> Evaluator:
        config, line = self.config, self._line
        self._rewards = RewardSource(config, config.run_id)
        self._rewards.connect(prompts={"heldout": self.texts})
        model = line.policy.model
        rules = Rules.of(config.prompts, max_prompt_tokens(config, config.base))
        encode = encoder(model.prompt_encoder(), model.tokenizer, config.prompts.add_bos)
        file, count = Path(config.prompts.heldout), config.evaluation.num_prompts
        prompts = tokenize(self.texts, encode, rules, file, count)
        return Evaluator(config, model, prompts[:count], self._rewards, line.sft)


def _complete(config: Front, path: Path, chosen: dict[str, Any] | None) -> None:
    """The record names the responses, too; points of an earlier version have none."""
    directory = path.parent
    path.touch()  # a budget that a known point meets measures nothing
    points = measured_points(path)
    files = (responses_file(directory, *point) for point in points)
    kept = sorted(str(file.relative_to(directory)) for file in files if file.exists())
    if chosen is not None:
        write_json_atomically(directory / CHOSEN_FILE, chosen)
        kept.append(CHOSEN_FILE)
    completion = Completion(
        kind="evaluation",
        config_hash=identity_hash(to_plain(config)),
        files={name: hash_file(directory / name) for name in (POINTS_FILE, *kept)},
        details={
            "etas": [float(eta) for eta in config.etas],
            "seed": config.evaluation.seed,
            **({"chosen": chosen} if chosen is not None else {}),
        },
        code_version=code_version(),
        versions=package_versions(),
    )
    write_completion(directory, completion)
