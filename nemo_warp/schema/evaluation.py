"""``conf/evaluation.yaml``: a front between two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_warp.schema.key import REQUIRED, key, section
from nemo_warp.schema.shared import (
    Algorithm,
    Evaluation,
    JudgeEntry,
    Model,
    RewardClient,
    RewardEntry,
    Rollout,
    Trainer,
)


@dataclass
class HeldoutPrompts:
    """``prompts`` of an evaluation."""

    heldout: str = key(REQUIRED, "JSON lines", nonempty=True)
    max_tokens: int | None = key(None, "longer prompts are refused", unit="tokens", low=1)
    key: str = key("prompt", "the field that holds the text", nonempty=True)  # last: hides `key`


@dataclass
class Front:
    """The KL-reward front between two checkpoints."""

    directory: str = key(REQUIRED, "points.jsonl and completion.json", nonempty=True)
    base: str = key(REQUIRED, ".nemo at eta 0: the iteration's init, or the SFT policy")
    slerp: str = key(REQUIRED, ".nemo at eta 1")
    sft: str = key(REQUIRED, ".nemo that KL is measured to")
    allow_different_configs: bool = key(
        False, "go on although the models compute different things with equal weights"
    )
    etas: list[float] = key(
        [0.0, 0.1, 0.3, 0.5, 0.8, 1.0], "points; above 1 extrapolates", low=0, high=2,
        nonempty=True, paper="figure 4",
    )  # fmt: skip
    towards_sft: bool = key(True, "also the line from sft to slerp, where base is another")
    run_id: str | None = key(None, "of the reward servers; null is their endpoint files'")
    prompts: HeldoutPrompts = section(HeldoutPrompts)
    rollout: Rollout = section(Rollout)
    algorithm: Algorithm = section(Algorithm)
    rewards: list[RewardEntry] = key(REQUIRED, "what is measured")
    judges: list[JudgeEntry] = key([], "what is measured beside them")
    reward_client: RewardClient = section(RewardClient)
    evaluation: Evaluation = section(Evaluation)
    trainer: Trainer = section(Trainer)
    model: Model = section(Model)
