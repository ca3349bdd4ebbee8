"""What a recipe must satisfy before anything is started or submitted."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import Any

from nemo_warp.config import check_keys

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,47}")
_REWARD_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TIME = re.compile(r"(\d+-)?\d{1,2}(:\d{2}){1,2}|\d+")
_SIGNAL_MAY_BE_EARLY_S = 60
"""``sbatch --signal``: "may be sent up to 60 seconds earlier than specified"."""
_REWARD_KEYS = (
    "weight",
    "callable",
    "options",
    "batch",
    "model",
    "endpoint",
    "fingerprint",
    "nodes",
    "processes_per_node",
    "arguments",
)
_RESOURCE_KEYS = ("time", "gpus_per_node", "cpus_per_node", "memory", "options")


def check_recipe(values: dict[str, Any], source: str, files_here: bool = True) -> None:
    """Raise ValueError for the first thing wrong with a resolved recipe.

    Args:
        values: all keys of conf/recipe.yaml, paths absolute.
        source: the recipe's file, for the message.
        files_here: whether the inputs must exist on this machine.
    """
    try:
        _check_sizes(values)
        _check_seeds(values)
        _check_rewards(values)
        _check_tables(values)
        _check_rates(values)
        _check_launcher(values)
        _check_member(values["member"])
        _check_one_machine(values)
        _check_average(values)
        if files_here:
            check_files(values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_sizes(values: dict[str, Any]) -> None:
    _require(bool(_NAME.fullmatch(values["name"])), f"name is {values['name']!r}; use letters, "
             "digits and dashes, at most 48")  # fmt: skip
    for key in ("iterations", "members"):
        _require(1 <= values[key] <= 999, f"{key} is {values[key]}, expected 1 to 999")


def _check_seeds(values: dict[str, Any]) -> None:
    _require(values["seed"] >= 0, f"seed is {values['seed']}, expected 0 or more")
    seeds, members = values["seeds"], values["members"]
    if seeds is None:
        return
    _require(isinstance(seeds, list) and all(type(s) is int and s >= 0 for s in seeds),
             f"seeds is {seeds!r}, expected a list of whole numbers, 0 or more")  # fmt: skip
    _require(len(seeds) == members, f"{len(seeds)} seeds for {members} members; give one each")
    equal = sorted({s for s in seeds if seeds.count(s) > 1})
    _require(not equal, f"seeds holds {equal} more than once: those members would be identical, "
             "and the merge of identical policies is no merge")  # fmt: skip


def _check_rewards(values: dict[str, Any]) -> None:
    _require(bool(values["rewards"]), "rewards is empty; name at least one")
    for name, reward in values["rewards"].items():
        where = f"rewards.{name}"
        _require(bool(_REWARD_NAME.fullmatch(str(name))), f"{where}: use letters, digits, . _ -")
        _require(isinstance(reward, dict), f"{where} is {reward!r}, expected a table")
        check_keys(reward, _REWARD_KEYS, where)
        sources = [key for key in ("callable", "model", "endpoint") if reward.get(key)]
        _require(len(sources) == 1, f"{where} needs exactly one of callable, model and endpoint, "
                 f"found {', '.join(sources) or 'none'}")  # fmt: skip
        _check_weight(reward.get("weight"), where)
        if "callable" in sources:
            _require(reward["callable"].count(":") == 1, f"{where}.callable is "
                     f"{reward['callable']!r}, expected module:function")  # fmt: skip
        for key in ("nodes", "processes_per_node"):
            count = reward.get(key, 1)
            _require(type(count) is int and count >= 1, f"{where}.{key} is {count!r}, expected 1+")


def _check_weight(weight: Any, where: str) -> None:
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    _require(number and math.isfinite(weight), f"{where}.weight is {weight!r}, expected a number")


def _check_tables(values: dict[str, Any]) -> None:
    """`per_iteration` and `per_member`: the right number, only known keys."""
    for key, count, known in (
        ("per_iteration", values["iterations"], ("member", "eta")),
        ("per_member", values["members"], ("member", "rewards")),
    ):
        tables = values[key]
        _require(len(tables) in (0, count), f"{key} has {len(tables)} entries, expected {count} "
                 "(one each) or none")  # fmt: skip
        for number, table in enumerate(tables, start=1):
            where = f"{key}[{number}]"
            _require(isinstance(table or {}, dict), f"{where} is {table!r}, expected a table")
            check_keys(table or {}, known, where)
            for name, change in (table or {}).get("rewards", {}).items():
                check_keys([name], values["rewards"], f"{where}.rewards")
                check_keys(change, ("weight",), f"{where}.rewards.{name}")
                _check_weight(change.get("weight"), f"{where}.rewards.{name}")
    for number, table in enumerate(values["per_member"] or [{}], start=1):
        changes = (table or {}).get("rewards", {})
        weights = [changes.get(n, r)["weight"] for n, r in values["rewards"].items()]
        _require(any(weights), f"per_member[{number}]: every reward has weight 0")


def _check_rates(values: dict[str, Any]) -> None:
    etas = [e["eta"] for e in values["per_iteration"] if e and "eta" in e]
    _check_all([*etas, values["merge"]["eta"]], "merge.eta", lambda x: 0 < x <= 2, "0 < eta <= 2")
    _check_all(values["evaluation"]["etas"], "evaluation.etas", lambda x: 0 <= x <= 2, "0 to 2")
    _check_all(values["front"]["kappas"], "front.kappas", lambda x: 0 <= x <= 2, "0 to 2")
    kappa = [values["front"]["final_kappa"]]
    _check_all(kappa, "front.final_kappa", lambda x: 0 < x <= 2, "0 < kappa <= 2")
    towards = values["merge"]["towards"]
    _require(towards in ("init", "sft"), f"merge.towards is {towards!r}, expected init or sft")


def _check_all(
    numbers: list[Any], key: str, accept: Callable[[float], bool], expected: str
) -> None:
    for number in numbers:
        good = isinstance(number, int | float) and not isinstance(number, bool) and accept(number)
        _require(good, f"{key} holds {number!r}, expected {expected}")
    _require(len(set(numbers)) == len(numbers) or key == "merge.eta", f"{key} repeats a value")
    _require(bool(numbers), f"{key} is empty")


def _check_launcher(values: dict[str, Any]) -> None:
    launcher, retries = values["launcher"], values["retries"]
    kind = launcher["kind"]
    _require(kind in ("local", "slurm"), f"launcher.kind is {kind!r}, expected local or slurm")
    at_a_time = launcher["side_by_side"]
    _require(at_a_time >= 1, f"launcher.side_by_side is {at_a_time}, expected 1 or more")
    throttle = launcher["throttle"]
    _require(throttle is None or (type(throttle) is int and throttle >= 1),
             f"launcher.throttle is {throttle!r}, expected a whole number or null")  # fmt: skip
    for key, value in retries.items():
        _require(value >= 1, f"retries.{key} is {value}, expected 1 or more")
    for kind, resources in values["resources"].items():
        check_keys(resources, _RESOURCE_KEYS, f"resources.{kind}")
        time = str(resources["time"])
        _require(bool(_TIME.fullmatch(time)), f"resources.{kind}.time is {time!r}; use Slurm's "
                 "[days-]hours:minutes:seconds")  # fmt: skip
    for kind, command in values["commands"].items():
        _require(command is None or (isinstance(command, list) and bool(command)),
                 f"commands.{kind} is {command!r}, expected a list of words")  # fmt: skip


def check_cluster(cluster: dict[str, Any], member_time: str) -> None:
    """Raise ValueError for the first thing wrong with a cluster file.

    Args:
        cluster: all keys of conf/cluster/defaults.yaml.
        member_time: ``resources.member.time``, already checked.
    """
    for key in ("account", "partition"):
        _require(bool(cluster[key]), f"{key} is empty; name one")
    for key, value in cluster["environment"].items():
        _require("," not in str(value), f"environment.{key} holds a comma, which sbatch --export "
                 "cannot pass on; set it in the container or in your shell")  # fmt: skip
    margin, limit = cluster["signal_margin_s"], _seconds(member_time)
    _require(margin >= 0, f"signal_margin_s is {margin}, expected 0 or more")
    _require(limit > margin + _SIGNAL_MAY_BE_EARLY_S, f"signal_margin_s is {margin}, and Slurm may "
             f"send the signal {_SIGNAL_MAY_BE_EARLY_S} s earlier still, but resources.member.time "
             f"is only {limit:.0f} s: members would be told to stop as they start; allow them more "
             "time or a smaller margin")  # fmt: skip


def _seconds(time: str) -> float:
    """Slurm's time formats that `_TIME` accepts: m, m:s, h:m:s, d-h:m, d-h:m:s; 0 is no limit."""
    days, dash, clock = time.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    if not dash and len(numbers) < 3:  # begins with minutes
        numbers = [0, *numbers]
    hours, minutes, seconds = [*numbers, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or math.inf


def _check_member(member: dict[str, Any]) -> None:
    """What would otherwise only be noticed on the nodes."""
    steps = member["run"]["total_steps"]
    _require(steps >= 1, f"member.run.total_steps is {steps}, expected 1 or more")
    rate = member["optim"]["lr"]
    _require(0 < rate < 1, f"member.optim.lr is {rate}, expected 0 < lr < 1")
    penalty = member["length_penalty"]
    _require(penalty >= 0, f"member.length_penalty is {penalty}, expected 0 or more")
    algorithm = member["algorithm"]
    mu, beta = algorithm["ema_update_rate"], algorithm["kl_coefficient"]
    _require(0 <= mu <= 1, f"member.algorithm.ema_update_rate is {mu}, expected 0 to 1")
    _require(beta >= 0, f"member.algorithm.kl_coefficient is {beta}, expected 0 or more")
    trainer, model = member["trainer"], member["model"]
    ranks = trainer["num_nodes"] * trainer["devices"]
    shards = model["tensor_model_parallel_size"] * model["pipeline_model_parallel_size"]
    _require(ranks >= 1 and ranks % shards == 0, f"member.trainer has {trainer['num_nodes']} x "
             f"{trainer['devices']} ranks, which TP x PP = {shards} does not divide")  # fmt: skip


def _check_average(values: dict[str, Any]) -> None:
    """Checkpoints to average must be ones that are saved and kept."""
    steps, run = values["merge"]["average_steps"], values["member"]["run"]
    if steps is None:
        return
    interval, keep, last = run["save_interval"], run["keep_checkpoints"], run["total_steps"]
    kept = list(range(interval, last + 1, interval))[-keep:]
    _require(bool(steps) and set(steps) <= set(kept), f"merge.average_steps is {steps}, but with "
             f"save_interval {interval} and keep_checkpoints {keep} a member ends with the "
             f"checkpoints of steps {kept}")  # fmt: skip


def _check_one_machine(values: dict[str, Any]) -> None:
    if values["launcher"]["kind"] == "slurm":
        return
    nodes = values["member"]["trainer"]["num_nodes"]
    _require(nodes == 1, f"member.trainer.num_nodes is {nodes}, but launcher.kind local is one "
             "machine; use launcher.kind=slurm")  # fmt: skip


def check_files(values: dict[str, Any]) -> None:
    """Raise ValueError for the first input that is missing, unreadable or empty."""
    files = {"sft": values["sft"], "init": values["init"]}
    files |= {f"prompts.{key}": path for key, path in values["prompts"].items()}
    for name, reward in values["rewards"].items():
        if reward.get("model"):
            files[f"rewards.{name}.model"] = reward["model"]
    for key, path in files.items():
        _require(os.path.exists(path), f"{key}: no such file: {path}")
        _require(os.access(path, os.R_OK), f"{key}: {path} is not readable")
    for key, path in values["prompts"].items():
        _require(os.path.getsize(path) > 0, f"prompts.{key}: {path} is empty")
