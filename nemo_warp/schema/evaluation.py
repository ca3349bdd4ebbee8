"""``conf/evaluation.yaml``: a front between two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_warp.schema.key import REQUIRED, key, section
from nemo_warp.schema.shared import (
    Algorithm,
    Evaluation,
    JudgeEntry,
    Model,
    PromptRules,
    RewardClientSettings,
    RewardEntry,
    Rollout,
    Trainer,
)


@dataclass
class HeldoutPrompts(PromptRules):
    """``prompts`` of an evaluation."""

    heldout: str = key(REQUIRED, "JSON lines", nonempty=True)
    key: str = key("prompt", "the field that holds the text", nonempty=True)  # last: hides `key`


@dataclass
class Pick:
    """``pick``: search the front for the policy at a KL."""

    kl: float | None = key(None, "budget; null searches nothing", unit="nats", above=0)
    tolerance: float = key(0.1, "the policy's KL lies at most this far below it", unit="nats",
                           above=0)  # fmt: skip
    known: str | None = key(None, "points.jsonl of a front that was measured before")


@dataclass
class Benchmarks:
    """``benchmarks``: what lm-evaluation-harness is asked (nemo_warp.aligner.benchmark)."""

    tasks: list[str] = key([], "lm-eval's names; [] asks nothing", paper="table 2")
    include: str | None = key(None, "directory with task files of your own")
    limit: int | None = key(None, "first documents of each task; null is all of them", low=1)
    num_fewshot: int | None = key(None, "examples before a question; null is the task's own",
                                  low=0)  # fmt: skip
    add_bos: bool = key(False, "BOS before every text, as Gemma needs it")
    run_code: bool = key(False, "tasks may run code that the policy writes (humaneval, mbpp)")
    micro_batch_size: int | None = key(None, "sequences at a time; null is the evaluation's", low=1)


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
    reward_client: RewardClientSettings = section(RewardClientSettings)
    evaluation: Evaluation = section(Evaluation)
    pick: Pick = section(Pick)
    benchmarks: Benchmarks = section(Benchmarks)
    trainer: Trainer = section(Trainer)
    model: Model = section(Model)
