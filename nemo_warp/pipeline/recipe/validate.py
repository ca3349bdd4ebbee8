"""What a recipe must satisfy before anything is started or submitted."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nemo_warp.config import check_keys
from nemo_warp.merge_arguments import check_recipe_arguments
from nemo_warp.prompts import read_prompts
from nemo_warp.schema.key import REQUIRED
from nemo_warp.schema.member import Member
from nemo_warp.schema.rules import check_clip, check_signal

_SIGNAL_MAY_BE_EARLY_S = 60
"""``sbatch --signal``: "may be sent up to 60 seconds earlier than specified"."""
_REWARD_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_REPLACED = {
    "run": ("name", "directory", "seed"),
    "prompts": ("train", "heldout"),
    "": ("init", "sft", "rewards", "judges"),
}
"""Keys of a member that the driver gives each member itself, with the recipe's key that counts."""
_INSTEAD = {"seed": "seed or seeds", "directory": "run_directory"}
_REPLACED_IN_SETTINGS = (
    "directory", "base", "slerp", "sft", "etas", "rewards", "judges", "run_id", "pick", "benchmarks"
)  # fmt: skip


def refuse_replaced(values: dict[str, Any]) -> None:
    """Refuse keys that would be accepted and then replaced for every member.

    A stored recipe holds them with their defaults, which is no wish of anybody's.

    Raises:
        ValueError: names the key, and the one to use.
    """
    tables = {"member": values["member"]}
    for key in ("per_iteration", "per_member"):
        for number, table in enumerate(values[key], start=1):
            tables[f"{key}[{number}].member"] = (table or {}).get("member") or {}
    defaults = dataclasses.asdict(Member())
    for where, member in tables.items():
        for section, names in _REPLACED.items():
            given = member.get(section) or {} if section else member
            usual = defaults[section] if section else defaults
            for name in names:
                if name in given and given[name] not in (usual[name], REQUIRED):
                    key = f"{where}.{section}.{name}" if section else f"{where}.{name}"
                    instead = _INSTEAD.get(name, f"{section}.{name}" if section else name)
                    raise ValueError(
                        f"{key} is given, but the driver gives each member its own; use the "
                        f"recipe's {instead} instead"
                    )
    for name in _REPLACED_IN_SETTINGS:
        if name in values["evaluation"]["settings"]:
            raise ValueError(
                f"evaluation.settings.{name} is given, but the driver gives each evaluation its "
                "own; leave it out"
            )


def check_recipe(values: dict[str, Any], source: str, files_here: bool = True) -> None:
    """Raise ValueError for the first thing wrong with a resolved recipe.

    Args:
        values: all keys of conf/recipe.yaml, paths absolute.
        source: the recipe's file, for the message.
        files_here: whether the inputs must exist on this machine.
    """
    try:
        _check_seeds(values)
        _check_rewards(values)
        _check_judges(values)
        _check_tables(values)
        _check_rates(values)
        _check_gpus(values["launcher"])
        check_recipe_arguments(values["merge"]["arguments"], values["members"])
        if files_here:
            check_files(values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_seeds(values: dict[str, Any]) -> None:
    seeds, members = values["seeds"], values["members"]
    if seeds is None:
        return
    _require(len(seeds) == members, f"{len(seeds)} seeds for {members} members; give one each")
    equal = sorted({s for s in seeds if seeds.count(s) > 1})
    _require(not equal, f"seeds holds {equal} more than once: those members would be identical, "
             "and the merge of identical policies is no merge")  # fmt: skip


def _check_rewards(values: dict[str, Any]) -> None:
    _require(bool(values["rewards"]), "rewards is empty; name at least one")
    for name, reward in values["rewards"].items():
        _check_served(f"rewards.{name}", name, reward)
        check_clip(reward, f"rewards.{name}")


def _check_served(where: str, name: str, reward: dict[str, Any]) -> None:
    _require(bool(_REWARD_NAME.fullmatch(name)), f"{where}: use letters, digits, . _ -")
    sources = [key for key in ("callable", "model", "endpoint") if reward.get(key)]
    _require(len(sources) == 1, f"{where} needs exactly one of callable, model and endpoint, "
             f"found {', '.join(sources) or 'none'}")  # fmt: skip
    _require(sources == ["callable"] or reward.get("concurrency", 1) == 1,
             f"{where}.concurrency is of a callable; leave it out")  # fmt: skip


def _check_judges(values: dict[str, Any]) -> None:
    """A judge is measured and never trained on."""
    computed = ("callable", "options", "model", "endpoint")
    trained = {name: reward for name, reward in values["rewards"].items() if reward["weight"] != 0}
    for table in filter(None, values["per_member"]):
        weights = table.get("rewards") or {}
        trained |= {n: values["rewards"][n] for n, r in weights.items()
                    if n in values["rewards"] and r["weight"] != 0}  # fmt: skip
    for name, judge in values["judges"].items():
        _check_served(f"judges.{name}", name, judge)
        same = [
            other
            for other, reward in trained.items()
            if other == name or all(reward.get(k) == judge.get(k) for k in computed)
        ]
        _require(not same, f"judges.{name} is rewards.{same and same[0]}, which has a weight: a "
                 "judge is never trained on; remove one of them")  # fmt: skip


def _check_tables(values: dict[str, Any]) -> None:
    """`per_iteration` and `per_member`: the right number, only known rewards."""
    for key, count in (("per_iteration", values["iterations"]), ("per_member", values["members"])):
        found = len(values[key])
        _require(found in (0, count), f"{key} has {found} entries, expected {count} "
                 "(one each) or none")  # fmt: skip
    for number, table in enumerate(values["per_member"] or [{}], start=1):
        changes = (table or {}).get("rewards") or {}
        check_keys(changes, values["rewards"], f"per_member[{number}].rewards")
        weights = [changes.get(n, r)["weight"] for n, r in values["rewards"].items()]
        _require(any(weights), f"per_member[{number}]: every reward has weight 0")


def _check_rates(values: dict[str, Any]) -> None:
    for key, numbers in (
        ("evaluation.etas", values["evaluation"]["etas"]),
        ("front.kappas", values["front"]["kappas"]),
        ("benchmarks.kappas", values["benchmarks"]["kappas"]),
        ("benchmarks.tasks", values["benchmarks"]["tasks"]),
    ):
        _require(len(set(numbers)) == len(numbers), f"{key} repeats a value")


def check_cluster(cluster: dict[str, Any], member_time: str) -> None:
    """Raise ValueError for the first thing wrong with a cluster file.

    Args:
        cluster: all keys of conf/cluster/defaults.yaml.
        member_time: ``resources.member.time``, already checked.
    """
    for key, value in cluster["environment"].items():
        _require("," not in value, f"environment.{key} holds a comma, which sbatch --export "
                 "cannot pass on; set it in the container or in your shell")  # fmt: skip
    margin, limit = cluster["signal_margin_s"], _seconds(member_time)
    _require(limit > margin + _SIGNAL_MAY_BE_EARLY_S, f"signal_margin_s is {margin}, and Slurm may "
             f"send the signal {_SIGNAL_MAY_BE_EARLY_S} s earlier still, but resources.member.time "
             f"is only {limit:.0f} s: members would be told to stop as they start; allow them more "
             "time or a smaller margin")  # fmt: skip


def _seconds(time: str) -> float:
    """Seconds of one of Slurm's time formats (`schema.recipe.SLURM_TIME`); 0 is no limit."""
    days, dash, clock = time.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    if not dash and len(numbers) < 3:  # m and m:s begin with minutes; d-h and d-h:m with hours
        numbers = [0, *numbers]
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or math.inf


def check_member(member: dict[str, Any], values: dict[str, Any]) -> None:
    """Raise ValueError for what would otherwise only be noticed on the nodes.

    Args:
        member: a member's configuration; those of other iterations and members may differ.
        values: the recipe's.
    """
    trainer, model = member["trainer"], member["model"]
    ranks = trainer["num_nodes"] * trainer["devices"]
    shards = model["tensor_model_parallel_size"] * model["pipeline_model_parallel_size"]
    _require(ranks % shards == 0, f"member.trainer has {trainer['num_nodes']} x "
             f"{trainer['devices']} ranks, which TP x PP = {shards} does not divide; set "
             "member.model.tensor_model_parallel_size")  # fmt: skip
    check_signal(member["rollout"], member["algorithm"], "member.")
    _check_one_machine(trainer, values["launcher"])
    _check_average(values["merge"]["average_steps"], member["run"])


def _check_average(steps: list[int] | None, run: dict[str, Any]) -> None:
    """Checkpoints to average must be ones that are saved and kept."""
    if steps is None:
        return
    interval, keep, last = run["save_interval"], run["keep_checkpoints"], run["total_steps"]
    kept = list(range(interval, last + 1, interval))[-keep:]
    _require(bool(steps) and set(steps) <= set(kept), f"merge.average_steps is {steps}, but with "
             f"save_interval {interval} and keep_checkpoints {keep} a member ends with the "
             f"checkpoints of steps {kept}")  # fmt: skip


def _check_gpus(launcher: dict[str, Any]) -> None:
    gpus, stages = launcher["gpus"], launcher["side_by_side"]
    _require(len(set(gpus)) == len(gpus), f"launcher.gpus is {gpus}, which repeats a device")
    _require(not gpus or len(gpus) >= stages, f"launcher.gpus has {len(gpus)} devices for "
             f"launcher.side_by_side = {stages} stages at a time: some would run without a GPU; "
             f"use launcher.side_by_side={len(gpus)}")  # fmt: skip


def _check_one_machine(trainer: dict[str, Any], launcher: dict[str, Any]) -> None:
    if launcher["kind"] == "slurm":
        return
    nodes = trainer["num_nodes"]
    _require(nodes == 1, f"member.trainer.num_nodes is {nodes}, but launcher.kind local is one "
             "machine; use launcher.kind=slurm")  # fmt: skip
    gpus, stages = launcher["gpus"], launcher["side_by_side"]
    share = len(gpus) // stages
    _require(not gpus or trainer["accelerator"] == "cpu" or trainer["devices"] <= share,
             f"member.trainer.devices is {trainer['devices']}, but of launcher.gpus = {gpus} each "
             f"of {stages} stages at a time gets {share}")  # fmt: skip


def check_files(values: dict[str, Any]) -> None:
    """Raise ValueError for the first input that is missing, unreadable or empty."""
    files = {"sft": values["sft"], "init": values["init"]}
    files |= {f"prompts.{key}": path for key, path in values["prompts"].items()}
    for table in ("rewards", "judges"):
        for name, served in values[table].items():
            if served.get("model"):
                files[f"{table}.{name}.model"] = served["model"]
    include = values["benchmarks"]["include"]
    if values["benchmarks"]["tasks"] and include is not None:
        _require(os.path.isdir(include), f"benchmarks.include: no such directory: {include}")
    for key, path in files.items():
        _require(os.path.exists(path), f"{key}: no such file: {path}")
        _require(os.access(path, os.R_OK), f"{key}: {path} is not readable")
    for key, path in values["prompts"].items():
        _require(os.path.getsize(path) > 0, f"prompts.{key}: {path} is empty")


def check_prompts(values: dict[str, Any], members: Iterable[dict[str, Any]]) -> None:
    """Read the prompt files that are here whole.

    Args:
        values: the recipe's.
        members: the members' configurations.

    Raises:
        ValueError: names the file and the line that is broken.
    """
    for key in sorted({member["prompts"]["key"] for member in members}):
        for path in values["prompts"].values():
            if os.path.exists(path):
                read_prompts(Path(path), key)


def check_counts(values: dict[str, Any], members: Sequence[dict[str, Any]]) -> None:
    """Refuse evaluations that want more held-out prompts than there are.

    Raises:
        ValueError: names the key and the file.
    """
    file = values["prompts"]["heldout"]
    settings = values["evaluation"]["settings"].get("evaluation") or {}
    wanted = {
        "member.evaluation.num_prompts": max(m["evaluation"]["num_prompts"] for m in members),
        "evaluation.settings.evaluation.num_prompts": settings.get("num_prompts", 0),
    }
    if values["commands"]["member"]:  # another program may need fewer
        return
    found = len(read_prompts(Path(file), members[0]["prompts"]["key"]))
    for key, number in wanted.items():
        _require(found >= number, f"{key} is {number}, but {file} has {found} prompts")
