"""``conf/member.yaml``: one member."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_warp.schema.key import REQUIRED, key, section
from nemo_warp.schema.shared import (
    Algorithm,
    Evaluation,
    JudgeEntry,
    Model,
    Optim,
    PromptRules,
    RewardClientSettings,
    RewardEntry,
    Rollout,
    Trainer,
)


@dataclass
class Run:
    """``run``: identity, length, saving."""

    name: str = key("member", "identity in logs and of the reward servers", nonempty=True)
    directory: str = key(REQUIRED, "everything the member writes; one run per directory",
                         nonempty=True)  # fmt: skip
    seed: int = key(1, "prompt order and sampling; must differ between members", low=0)
    total_steps: int = key(9000, "T", unit="optimizer steps", low=1, paper="section 4: 9k to 5k")
    eval_interval: int = key(100, "also at step 0 and T", unit="steps", low=1, paper="figure 3")
    measure_anchor: bool = key(
        False, "also evaluate the EMA anchor as a policy of its own", paper="figure 14"
    )
    save_interval: int = key(100, "between training checkpoints", unit="steps", low=1)
    keep_checkpoints: int = key(2, "newest training checkpoints that are kept", low=2)
    max_skipped_updates: int = key(
        3, "updates in a row without a finite gradient, at which the member stops", low=1
    )
    time_limit: float | None = key(
        None, "from the start of the process; null is Slurm's end time, if any", unit="s", above=0,
        restart="counts from the new process's start",
    )  # fmt: skip
    save_margin: float = key(300, "before the limit, when the member saves and stops", unit="s",
                             low=0)  # fmt: skip


@dataclass
class MemberPrompts(PromptRules):
    """``prompts`` of a member."""

    train: str = key(REQUIRED, "JSON lines", nonempty=True)
    heldout: str = key(REQUIRED, "JSON lines; none of them is trained on", nonempty=True)
    key: str = key("prompt", "the field that holds the text", nonempty=True)  # last: hides `key`


@dataclass
class Alarms:
    """``alarms``: trends over a member's evaluations that the log and the records warn of.

    Each compares with the member's first evaluation; null turns it off. An alarm stops nothing.
    """

    entropy_drop: float | None = key(0.5, "share of the entropy that is lost", above=0, high=1)
    length_change: float | None = key(0.5, "share by which responses grow or shrink", above=0)
    judge_gap: float | None = key(
        1.0, "how much more the reward has risen than a judge, each in standard deviations of its "
        "scores at the first evaluation", above=0,
    )  # fmt: skip
    kl_growth: float | None = key(
        3.0, "growth of KL to SFT per step since the last evaluation, over that until then", above=1
    )
    sampler_gap: float | None = key(
        0.05, "mean |difference| between an engine's log-probability of a sampled token and the "
        "model's, at a training step", unit="nats", above=0,
    )  # fmt: skip


@dataclass
class Profile:
    """``profile``: steps under torch's profiler."""

    first_step: int | None = key(None, "number of the first one; null profiles nothing", low=0)
    num_steps: int = key(3, "how many", low=1)


@dataclass
class Export:
    """``export``: the policy of step T."""

    dtype: str = key("same", "float32 is exported from the optimizer's masters",
                     choices=("same", "float32", "bfloat16"))  # fmt: skip


@dataclass
class Loggers:
    """``loggers``: views of metrics.jsonl."""

    tensorboard: bool = key(True, "write TensorBoard's files")
    wandb: dict[str, Any] = key({}, "arguments of Lightning's WandbLogger; empty is off")


@dataclass
class Member:
    """One WARP member."""

    run: Run = section(Run)
    init: str = key(REQUIRED, "theta_init, a .nemo (tar or directory)")
    sft: str = key("${init}", "theta_sft, a .nemo: KL is reported against it")
    allow_different_configs: bool = key(
        False, "go on although the models compute different things with equal weights"
    )
    prompts: MemberPrompts = section(MemberPrompts)
    rollout: Rollout = section(Rollout)
    algorithm: Algorithm = section(Algorithm)
    rewards: list[RewardEntry] = key(REQUIRED, "what is optimised, see docs/rewards.md")
    judges: list[JudgeEntry] = key([], "what is measured beside them and never trained on")
    length_penalty: float = key(
        0.0, "subtracted per response token", low=0, paper="appendix E: 0.0005"
    )
    reward_client: RewardClientSettings = section(RewardClientSettings)
    evaluation: Evaluation = section(Evaluation)
    alarms: Alarms = section(Alarms)
    optim: Optim = section(Optim)
    trainer: Trainer = section(Trainer)
    model: Model = section(Model)
    export: Export = section(Export)
    loggers: Loggers = section(Loggers)
    profile: Profile = section(Profile)
