"""``conf/recipe.yaml``: whole iterations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_warp.core.transformer import KNOWN
from nemo_warp.schema.cluster import Cluster
from nemo_warp.schema.evaluation import Benchmarks, Front
from nemo_warp.schema.key import REQUIRED, key, section
from nemo_warp.schema.member import Member
from nemo_warp.schema.shared import Scaled

SLURM_TIME = r"\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}"
"""Slurm's: minutes, m:s, h:m:s, days-hours, d-h:m, d-h:m:s (man sbatch, --time)."""


@dataclass
class Prompts:
    """``prompts``: files of JSON lines, ``{"prompt": "...", "answer": "..."}``."""

    train: str = key(REQUIRED, "JSON lines to train on", nonempty=True)
    heldout: str = key(REQUIRED, "JSON lines to measure on", nonempty=True)


@dataclass
class Judge:
    """An entry of ``judges``: one of callable, model and endpoint."""

    callable: str | None = key(
        None, "module:function of texts", pattern=r"[\w.]+:[\w.]+",
        pattern_help="such as package.module:function",
    )  # fmt: skip
    options: dict[str, Any] = key({}, "keyword arguments of the callable")
    batch: bool = key(False, "the callable takes lists of texts")
    concurrency: int = key(1, "calls of the callable at a time", low=1)
    model: str | None = key(None, "a NeMo reward model, .nemo", nonempty=True)
    endpoint: str | None = key(None, "endpoint file of a server somebody else runs", nonempty=True)
    fingerprint: str | None = key(None, "refuse any other reward", nonempty=True)
    nodes: int = key(1, "of a model's server", low=1)
    processes_per_node: int = key(1, "of a model's server", low=1)
    arguments: list[str | int | float] = key([], "further arguments of the server")


@dataclass
class Reward(Judge, Scaled):
    """An entry of ``rewards``: weight, and one of callable, model and endpoint."""

    weight: float = key(REQUIRED, "factor in the sum that is optimised; 0 leaves it out")


@dataclass
class RewardWeight:
    """A member's own weight of a reward."""

    weight: float = key(REQUIRED, "for this member; 0 leaves the reward out")


@dataclass
class OneIteration:
    """An entry of ``per_iteration``."""

    member: dict[str, Any] = key({}, "overrides of conf/member.yaml", of=Member)
    eta: float | None = key(None, "LITI update rate", above=0, high=2)


@dataclass
class OneMember:
    """An entry of ``per_member``."""

    member: dict[str, Any] = key({}, "overrides of conf/member.yaml", of=Member)
    rewards: dict[str, RewardWeight] = key({}, "this member's weights, by reward")


@dataclass
class Merge:
    """``merge``: SLERP of task vectors, then LITI."""

    eta: float = key(
        0.3, "LITI update rate: the next init is (1 - eta) * init + eta * slerp", above=0, high=2,
        paper="section 4",
    )  # fmt: skip
    towards: str = key("init", "which end LITI interpolates from", choices=("init", "sft"),
                       paper="section 3.3, appendix D.4")  # fmt: skip
    average_steps: list[int] | None = key(
        None, "merge the members' checkpoints of these steps, not the last", low=1, nonempty=True
    )
    arguments: list[str | int | float] = key([], "further arguments of the merge")


@dataclass
class Evaluations:
    """``evaluation``: after each merge."""

    etas: list[float] = key([0.0, 0.1, 0.3, 0.5, 0.8, 1.0], "points between init and slerp",
                            low=0, high=2, nonempty=True, paper="figure 4")  # fmt: skip
    settings: dict[str, Any] = key({}, "overrides of conf/evaluation.yaml", of=Front)


@dataclass
class FinalFront:
    """``front``: the result."""

    kappas: list[float] = key([0.0, 0.1, 0.3, 0.5, 0.8, 1.0], "points between sft and slerp",
                              low=0, high=2, nonempty=True, paper="section 3.4")  # fmt: skip
    final_kappa: float = key(1.0, "the policy published as final/policy.nemo", above=0, high=2)
    final_kl: float | None = key(
        None, "publish the policy at this KL to SFT instead, searched for", unit="nats", above=0
    )
    kl_tolerance: float = key(0.1, "its KL lies at most this far below", unit="nats", above=0)


@dataclass
class KappaBenchmarks(Benchmarks):
    """``benchmarks``: a stage of its own, where tasks are named."""

    kappas: list[float] = key([0.0, 0.3, 0.5, 0.8, 1.0], "points between sft and slerp", low=0,
                              high=2, nonempty=True, paper="figure 20")  # fmt: skip


@dataclass
class Retries:
    """``retries``."""

    without_progress: int = key(3, "attempts at one step before a stage has failed", low=1)
    stop_grace_s: float = key(600, "from asking a member to stop until it is killed", unit="s",
                              low=1)  # fmt: skip
    ready_deadline_s: float = key(600, "for reward servers to come up", unit="s", low=1)


@dataclass
class Launcher:
    """``launcher``."""

    kind: str = key("local", "where stages run", choices=("local", "slurm"))
    side_by_side: int = key(2, "local: stages at a time", low=1)
    gpus: list[int] = key([], "local: device numbers to share out; [] is no GPU", low=0)
    throttle: int | None = key(None, "slurm: members at a time (--array=...%N)", low=1)


@dataclass
class Resource:
    """What one kind of job asks for; null is the cluster's default."""

    time: str = key("24:00:00", "time limit", pattern=SLURM_TIME,
                    pattern_help="as Slurm writes times: [days-]hours:minutes:seconds")  # fmt: skip
    gpus_per_node: int | None = key(None, "GPUs", low=0)
    cpus_per_node: int | None = key(None, "processors", low=1)
    memory: str | int | None = key(None, "per node")
    options: list[str | int | float] = key([], "further options of sbatch")


def _resource(**values: Any) -> Any:
    return section(lambda: Resource(**values))  # type: ignore[arg-type]


@dataclass
class Resources:
    """``resources``: slurm."""

    member: Resource = _resource(time="24:00:00")
    merge: Resource = _resource(time="04:00:00", gpus_per_node=0)
    evaluation: Resource = _resource(time="12:00:00")
    driver: Resource = _resource(time="00:15:00", gpus_per_node=0, cpus_per_node=1, memory="4G")


@dataclass
class Estimate:
    """``estimate``: what ``plan`` multiplies."""

    seconds_per_step: float | None = key(
        None, "of a member, with its evaluations and saves", unit="s", above=0
    )
    evaluation_seconds_per_point: float | None = key(None, "of an evaluation", unit="s", above=0)
    parameters: float | None = key(None, "of the policy", above=0)
    model: str | None = key(
        None, "the policy's sizes, for the memory of a member's rank", choices=tuple(KNOWN)
    )


@dataclass
class Commands:
    """``commands``: replaced command lines, for tests and experiments."""

    member: list[str | int | float] | None = key(
        None, "words of the member's command", nonempty=True
    )
    merge: list[str | int | float] | None = key(None, "words of the merge's command", nonempty=True)
    evaluation: list[str | int | float] | None = key(
        None, "words of the evaluation's command", nonempty=True
    )
    benchmarks: list[str | int | float] | None = key(
        None, "words of the benchmarks' command", nonempty=True
    )
    report: list[str | int | float] | None = key(
        None, "words of the report's command", nonempty=True
    )


@dataclass
class Recipe:
    """A WARP recipe."""

    base: str | None = key(None, "another recipe file that this one changes, relative to this one")
    name: str = key(
        REQUIRED, "names the run, its jobs and its reward servers",
        pattern=r"[A-Za-z0-9][A-Za-z0-9-]{0,47}",
        pattern_help="of letters, digits and dashes (at most 48)",
    )  # fmt: skip
    run_directory: str | None = key("runs/${name}", "everything is written below it")
    seed: int = key(1234, "every member's seed is derived from it", low=0)
    seeds: list[int] | None = key(None, "or from these, one per member", low=0)
    iterations: int = key(5, "I", low=1, high=999, paper="section 4")
    members: int = key(2, "M, runs per iteration", low=1, high=999, paper="section 4")
    sft: str = key(REQUIRED, "theta_sft, a .nemo", nonempty=True)
    init: str = key("${sft}", "theta_init of iteration 1", nonempty=True)
    prompts: Prompts = section(Prompts)
    rewards: dict[str, Reward] = key({}, "what members are trained on, by name")
    judges: dict[str, Judge] = key({}, "what is measured and never trained on, by name")
    member: dict[str, Any] = key({}, "overrides of conf/member.yaml, for all members", of=Member)
    per_iteration: list[OneIteration | None] = key([], "one table per iteration, or none")
    per_member: list[OneMember | None] = key([], "one table per member, or none")
    merge: Merge = section(Merge)
    evaluation: Evaluations = section(Evaluations)
    front: FinalFront = section(FinalFront)
    benchmarks: KappaBenchmarks = section(KappaBenchmarks)
    retries: Retries = section(Retries)
    launcher: Launcher = section(Launcher)
    cluster: str | None = key(None, "slurm: h100 (of conf/cluster/), or a file of your own")
    cluster_overrides: dict[str, Any] = key({}, "of that file", of=Cluster)
    resources: Resources = section(Resources)
    estimate: Estimate = section(Estimate)
    retention: str = key(
        "all", "evaluated: optimizer checkpoints go once their iteration is merged and evaluated",
        choices=("all", "evaluated"),
    )  # fmt: skip
    notify: str | None = key(
        None, "a command, or a URL to POST to, on failed, stopped and done", nonempty=True
    )
    commands: Commands = section(Commands)
