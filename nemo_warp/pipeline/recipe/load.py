"""A recipe: loaded, checked and made independent of where the command was started."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_warp.config import (
    CONF_DIRECTORY,
    Overrides,
    check_resolved,
    load_config,
    require_complete,
    to_plain,
)
from nemo_warp.pipeline.recipe import inputs
from nemo_warp.pipeline.recipe.paths import RunPaths
from nemo_warp.pipeline.recipe.plan import Stage, build_plan
from nemo_warp.pipeline.recipe.relative import make_absolute
from nemo_warp.pipeline.recipe.validate import (
    check_cluster,
    check_member,
    check_recipe,
    refuse_replaced,
)
from nemo_warp.places import named
from nemo_warp.records import RecordError
from nemo_warp.schema import recipe as schema
from nemo_warp.schema.check import check
from nemo_warp.schema.shared import Scaled

_SHARED_SECTIONS = ("rollout", "algorithm", "reward_client", "evaluation", "trainer", "model")
"""Sections of a member's configuration that an evaluation has too."""


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        values: every key of conf/recipe.yaml, plain, paths absolute. ``values["member"]`` holds
            every key of conf/member.yaml, interpolations unresolved.
        paths: the run directory's files.
        arguments: how the recipe was named on the command line; the next driver is told the same.
    """

    values: dict[str, Any]
    paths: RunPaths
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.values["name"]

    @functools.cached_property
    def stages(self) -> list[Stage]:
        """The plan."""
        values = self.values
        pick, tasks = values["front"]["final_kl"] is not None, values["benchmarks"]["tasks"]
        return build_plan(values["iterations"], values["members"], pick, bool(tasks))

    @functools.cached_property
    def cluster(self) -> dict[str, Any]:
        """The cluster file, complete.

        Raises:
            ValueError: there is none, or something in it is missing or wrong.
        """
        return _load_cluster(self.values)

    def eta(self, iteration: int) -> float:
        """LITI update rate of ``iteration``."""
        entry = _entry(self.values["per_iteration"], iteration)
        return float(entry.get("eta", self.values["merge"]["eta"]))

    def rewards(self, member: int = 0) -> dict[str, dict[str, Any]]:
        """Rewards of ``member`` (0: of the evaluations) by name; those of weight 0 are left out."""
        changes = _entry(self.values["per_member"], member).get("rewards", {}) if member else {}
        merged = {n: {**r, **changes.get(n, {})} for n, r in self.values["rewards"].items()}
        return {name: reward for name, reward in merged.items() if reward["weight"] != 0}

    @property
    def judges(self) -> dict[str, dict[str, Any]]:
        """What is measured and never trained on, by name."""
        return self.values["judges"]

    def member_config(self, iteration: int, member: int) -> dict[str, Any]:
        """The member's whole configuration but for its init and its rewards' endpoints."""
        # A copy: the resolved one is cached, and shared by all members that are alike.
        config = copy.deepcopy(self._resolved_member(iteration, member))
        name = f"{self.name}-i{iteration:02d}-m{member:02d}"
        config["run"]["name"] = name
        config["run"]["seed"] = self.seed(iteration, member)
        config["rewards"] = self.reward_entries(member)
        config["judges"] = self.judge_entries()
        return config

    def different_members(self) -> Iterator[tuple[int, int]]:
        """Iteration and member of one of each kind that the tables make: the others are like it."""
        tables = (self.values[key] or [None] for key in ("per_iteration", "per_member"))
        yield from itertools.product(*(range(1, len(table) + 1) for table in tables))

    def evaluation_config(self) -> dict[str, Any]:
        """A copy of the evaluations' configuration; places and checkpoints are still missing."""
        return copy.deepcopy(self._evaluation_config)

    @functools.cached_property
    def _evaluation_config(self) -> dict[str, Any]:
        """conf/evaluation.yaml with the recipe's settings; sections a member has are its."""
        member = self._resolved_member(1, 1)
        prompts = {key: value for key, value in member["prompts"].items() if key != "train"}
        shared = {key: member[key] for key in _SHARED_SECTIONS} | {
            "prompts": prompts,
            "sft": self.values["sft"],
            "run_id": self.name,
            "rewards": self.reward_entries(),
            "judges": self.judge_entries(),
        }
        settings = Overrides(self.values["evaluation"]["settings"], "section evaluation.settings")
        config = load_config(CONF_DIRECTORY / "evaluation.yaml", shared, settings)
        return to_plain(config, resolve=False)

    def reward_entries(self, member: int = 0) -> list[dict[str, Any]]:
        """`rewards` as the section ``rewards`` of a member or an evaluation."""
        usual = vars(Scaled())
        return [
            {
                "name": name,
                "weight": float(reward["weight"]),
                "endpoint": reward.get("endpoint"),
                "fingerprint": reward.get("fingerprint"),
                # Only where it is so: a key more would make finished members another's.
                **({"shared": True} if reward.get("endpoint") else {}),
                **{k: reward[k] for k, value in usual.items() if reward.get(k, value) != value},
            }
            for name, reward in self.rewards(member).items()
        ]

    def judge_entries(self) -> list[dict[str, Any]]:
        """`judges` as the section ``judges`` of a member or an evaluation."""
        return [
            {
                "name": name,
                "endpoint": judge.get("endpoint"),
                "fingerprint": judge.get("fingerprint"),
                "shared": bool(judge.get("endpoint")),
            }
            for name, judge in self.judges.items()
        ]

    def seed(self, iteration: int, member: int) -> int:
        """The member's seed, a function of the recipe's, below 2**31."""
        seeds = self.values["seeds"]
        if seeds is not None:
            return inputs.derive_seed(seeds[member - 1], iteration)
        return inputs.derive_seed(self.values["seed"], iteration, member)

    def total_steps(self, iteration: int, member: int = 1) -> int:
        """T of a member of ``iteration``."""
        return self._resolved_member(iteration, member)["run"]["total_steps"]

    def num_points(self, iteration: int) -> int:
        """Points of an iteration's evaluation: from its init, and from SFT if that is another."""
        only_sft = iteration == 1 and self.values["init"] == self.values["sft"]
        lines = 2 if self._evaluation_config["towards_sft"] and not only_sft else 1
        return lines * len(self.values["evaluation"]["etas"])

    def _resolved_member(self, iteration: int, member: int) -> dict[str, Any]:
        return _resolve_member(
            json.dumps(self.values["member"]),
            json.dumps(_entry(self.values["per_iteration"], iteration).get("member", {})),
            json.dumps(_entry(self.values["per_member"], member).get("member", {})),
            self.values["sft"],
            json.dumps(self.values["prompts"]),
        )

    @functools.cached_property
    def pinned(self) -> dict[str, str]:
        """Fingerprints of the inputs as they were when the run directory was made.

        Raises:
            RecordError: the file is gone or was damaged.
        """
        try:
            return json.loads(self.paths.inputs.read_text())
        except (OSError, ValueError) as error:
            raise RecordError(
                f"{self.paths.inputs} cannot be read ({error}): nobody knows what the stages were "
                "made from; restore it, or start in another run_directory"
            ) from error


def load_recipe(source: Path, overrides: Sequence[str] = (), files_here: bool = True) -> Recipe:
    """Load and check a recipe file, a directory with a ``recipe.yaml``, or a run directory.

    Args:
        source: the file or directory.
        overrides: ``a.b=c`` arguments.
        files_here: whether the inputs must exist on this machine.

    Raises:
        ValueError: anything about it is wrong; nothing was written.
    """
    source = named(source, "recipes")
    file = source / "recipe.yaml" if source.is_dir() else source
    if not file.exists():
        raise ValueError(f"no recipe {file}; give a recipe file or a directory with a recipe.yaml")
    layers = _layers(file)
    config = load_config(CONF_DIRECTORY / "recipe.yaml", *layers, list(overrides))
    require_complete(config)
    values = _resolve(config) | {"base": None}
    values = check(values, schema.Recipe, str(file), complete=True)
    refuse_replaced(values)
    values["member"] = _member_section(values["member"], f"section member of {file}")
    make_absolute(values, layers[::-1], overrides)
    if values["run_directory"] is None:  # a run directory's own recipe: it may have been moved
        values["run_directory"] = str(file.parent.resolve())
    check_recipe(values, str(file), files_here)
    recipe = Recipe(values, RunPaths(Path(values["run_directory"])), (str(source), *overrides))
    for iteration, member in recipe.different_members():
        resolved = recipe._resolved_member(iteration, member)  # names unknown keys
        try:
            check_member(resolved, values)
        except ValueError as error:
            differ = values["per_iteration"] or values["per_member"]
            where = f"{file}: iteration {iteration}, member {member}" if differ else str(file)
            raise ValueError(f"{where}: {error}") from None
    recipe.evaluation_config()
    if values["launcher"]["kind"] == "slurm":
        _ = recipe.cluster
    return recipe


def _layers(file: Path, seen: tuple[Path, ...] = ()) -> list[Path]:
    """The recipe files that ``file`` builds on, and itself."""
    if file in seen:
        raise ValueError(f"{file} is its own base")
    content = load_config(CONF_DIRECTORY / "recipe.yaml", file)
    if content["base"] is None:
        return [file]
    # normpath and not resolve: a recipe behind a link builds on what lies beside the link.
    base = Path(os.path.normpath(file.parent / content["base"]))
    return [*_layers(base, (*seen, file)), file]


def _resolve(config: DictConfig) -> dict[str, Any]:
    """Plain values; interpolations in the members' sections are left for the members' own keys."""
    kept = ("member", "per_iteration", "per_member")
    unresolved = to_plain(config, resolve=False)
    for key in kept:
        # Taken out before resolving: ${run.total_steps} in a member's section means the member's
        # key.
        config[key] = {} if key == "member" else []
    return {**to_plain(config), **{key: unresolved[key] for key in kept}}


def _member_section(values: dict[str, Any], source: str) -> dict[str, Any]:
    file = CONF_DIRECTORY / "member.yaml"
    return _without_mandatory(to_plain(load_config(file, Overrides(values, source)), resolve=False))


def _without_mandatory(section: dict[str, Any]) -> dict[str, Any]:
    """Without the ``???`` that are filled in for each member."""
    nested = {k: _without_mandatory(v) if isinstance(v, dict) else v for k, v in section.items()}
    return {key: value for key, value in nested.items() if value != "???"}


@functools.cache
def _resolve_member(base: str, iteration: str, member: str, sft: str, prompts: str) -> dict:
    """The member's configuration, resolved; cached, since most members share it."""
    config = load_config(
        CONF_DIRECTORY / "member.yaml",
        Overrides(json.loads(base), "section member"),
        Overrides(json.loads(iteration), "section per_iteration"),
        Overrides(json.loads(member), "section per_member"),
        {"init": "", "sft": sft, "prompts": json.loads(prompts), "rewards": []},
        {"run": {"directory": "."}},  # each member's own is filled in by its request
    )
    require_complete(config)
    check_resolved(config, CONF_DIRECTORY / "member.yaml", "section member")
    return to_plain(config)


def _entry(tables: list[dict[str, Any]], number: int) -> dict[str, Any]:
    return (tables[number - 1] or {}) if tables else {}


def _load_cluster(values: dict[str, Any]) -> dict[str, Any]:
    if values["cluster"] is None:
        raise ValueError("launcher.kind is slurm, but no cluster is given, e.g. cluster=h100")
    file = Path(values["cluster"])
    changes = Overrides(values["cluster_overrides"], "cluster_overrides")
    config = load_config(CONF_DIRECTORY / "cluster" / "defaults.yaml", file, changes)
    try:
        require_complete(config)
        check_resolved(config, CONF_DIRECTORY / "cluster" / "defaults.yaml", str(file))
        cluster = to_plain(config)
        cluster["python"] = cluster["python"] or sys.executable
        cluster["step_python"] = cluster["step_python"] or cluster["python"]
        check_cluster(cluster, str(values["resources"]["member"]["time"]))
    except ValueError as error:
        raise ValueError(f"cluster file {file}: {error}") from None
    return cluster
