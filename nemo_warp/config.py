"""Configuration files: defaults in one place, overrides merged in order, every mistake named.

A configuration is a file of defaults (``conf/*.yaml``: it knows every key) and overrides: further
files, plain dictionaries, or ``a.b=c`` arguments. What the defaults do not know is refused with
the closest key they do know. A section whose default is ``{}`` is open: it takes any key. Lists
are replaced whole. Standard library and OmegaConf only.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_warp import yaml_text
from nemo_warp.places import shared
from nemo_warp.records import config_hash
from nemo_warp.schema.check import check, check_at, takes_text, type_at, unknown_key
from nemo_warp.schema.cluster import Cluster
from nemo_warp.schema.evaluation import Benchmarks, Front, Pick
from nemo_warp.schema.member import Member
from nemo_warp.schema.recipe import Recipe
from nemo_warp.schema.reward_model import RewardModel

CONF_DIRECTORY = shared("conf")
"""Where the defaults are: ``conf/`` of the checkout, or the wheel's."""

SCHEMAS: dict[str, type] = {
    "member": Member,
    "evaluation": Front,
    "recipe": Recipe,
    "cluster": Cluster,
    "reward_model": RewardModel,
}
"""What ``nemo-warp keys`` lists, by name."""

_FILES = {
    "member.yaml": Member,
    "evaluation.yaml": Front,
    "recipe.yaml": Recipe,
    "cluster/defaults.yaml": Cluster,
    "reward_model.yaml": RewardModel,
}

NOT_IDENTITY = (
    "run.directory",
    "run.name",
    "run.time_limit",
    "run.max_skipped_updates",
    "run.save_margin",
    "run.keep_checkpoints",
    "run.measure_anchor",
    "alarms",
    "judges",
    "directory",
    "init",
    "sft",
    "base",
    "slerp",
    "prompts.train",
    "prompts.heldout",
    "rewards.*.endpoint",
    "reward_client",
    "loggers",
    "profile",
    "trainer.num_nodes",
    "trainer.devices",
    "trainer.accelerator",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.sequence_parallel",
    "model.micro_batch_size",
    "rollout.forward_micro_batch_size",
    "rollout.forward_tokens",
    "rollout.train_tokens",
    "rollout.trt_llm.max_input_len",
    "rollout.trt_llm.batch_size",
    "rollout.trt_llm.reshard",
    "algorithm.offload_anchor",
    "allow_different_configs",
    "pick.known",
    "benchmarks.include",
    "benchmarks.micro_batch_size",
)
"""Patterns of the keys `identity_hash` leaves out: places, limits, paths of inputs, layout.

Judges are measured and never trained on: a member stays the one it is. What an evaluation measures
is asked of its points and, in a run, of the evaluation's inputs.
"""

_ADDED: dict[str, Any] = {
    "evaluation.generations": 1,
    "algorithm.kl_top_k": 64,
    "algorithm.importance_limit": 2.0,
    "pick": dataclasses.asdict(Pick()),
    "benchmarks": dataclasses.asdict(Benchmarks()),
    "prompts.too_long": "refuse",
    "prompts.template": None,
    "prompts.add_bos": False,
}
"""Keys that came later, with the value under which all is as it was before them.

`identity_hash` leaves them out at that value, so that what earlier versions finished stays done.
"""


def _shards_up_to(most: int, *, _root_: Any) -> int:
    """``${shards_up_to:N}``: the largest divisor of N that divides the ranks of a pipeline stage.

    The default TP is for a node of eight GPUs; who asks for one device asks for no shards.
    """
    ranks = _root_.trainer.num_nodes * _root_.trainer.devices
    return math.gcd(most, max(1, ranks // _root_.model.pipeline_model_parallel_size))


OmegaConf.register_new_resolver("shards_up_to", _shards_up_to, replace=True)


@dataclass(frozen=True)
class Overrides:
    """Values with the words that name them in messages, e.g. ``section member of recipe.yaml``."""

    values: dict[str, Any]
    source: str


def load_config(
    defaults: Path, *overrides: Path | Overrides | Mapping[str, Any] | list[str]
) -> DictConfig:
    """Merge ``overrides`` in order into ``defaults``.

    Values are checked against the schema of ``defaults``; a file of defaults without one
    (``recipes/tiny/pretrain.yaml``) is its own: each value has its default's type.

    Args:
        defaults: YAML file that holds every key.
        overrides: YAML files, mappings (`Overrides` to name them), or lists of ``a.b=c`` arguments
            (``rewards.0.weight=2`` reaches into a list). Later ones win.

    Raises:
        ValueError: a file cannot be read, a key is unknown, or a value has the wrong type.
    """
    known = _read(defaults)
    schema = schema_of(defaults)
    merged = known
    for override in overrides:
        if isinstance(override, list):
            merged = _apply_arguments(merged, override, known, schema, str(defaults))
            continue
        values, source = _values(override)
        if schema is not None:
            values = check(values, schema, source)
        else:
            _check(values, known, source, str(defaults))
        merged = _merge(merged, values)
    return OmegaConf.create(merged)


def schema_of(defaults: Path) -> type | None:
    """The schema of a file of defaults in ``conf/``; None for any other file."""
    try:
        return _FILES.get(defaults.resolve().relative_to(CONF_DIRECTORY).as_posix())
    except ValueError:
        return None


def check_resolved(config: Any, defaults: Path, source: str) -> None:
    """Check what interpolations gave: `load_config` could not know it yet.

    Raises:
        ValueError: an interpolation points at nothing, or gives a value that may not stand there.
    """
    schema = schema_of(defaults)
    if schema is not None:
        check(to_plain(config), schema, source, complete=True)


def require_complete(config: Any) -> None:
    """Raise ValueError that lists the mandatory values (``???``) nobody gave."""
    missing = list(_mandatory(to_plain(config, resolve=False)))
    if missing:
        raise ValueError(f"no value given for {', '.join(missing)}; set it (a.b=value)")


def _mandatory(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _mandatory(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _mandatory(entry, f"{path}.{index}")
    elif value == "???":
        yield path


def overlaid(*mappings: Any) -> DictConfig:
    """One configuration of several mappings; the later ones win, key by key."""
    return cast("DictConfig", OmegaConf.merge(*mappings))


def to_plain(config: Any, resolve: bool = True) -> dict[str, Any]:
    """``config`` as dictionaries and lists, interpolations resolved.

    Raises:
        ValueError: an interpolation such as ``${a.b}`` points at nothing.
    """
    try:
        return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=resolve))
    except OmegaConfBaseException as error:
        raise ValueError(f"cannot resolve the configuration: {error}") from error


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ValueError naming the first of ``given`` that is not ``known``, with a suggestion.

    For tables inside lists, which `load_config` does not look into.
    """
    names = sorted(known)
    for key in given:
        if key not in names:
            raise unknown_key(str(key), where, names)


def identity_hash(config: Mapping[str, Any]) -> str:
    """Hash of what decides a stage's result: what its completion record's ``config_hash`` holds.

    Left out is what may change between attempts (`NOT_IDENTITY`). Paths of inputs are left out
    too: a run directory may move, and the driver pins the inputs' contents by itself.

    Args:
        config: a stage's whole plain configuration (`to_plain`).
    """
    return config_hash(_without(dict(config), ""))


def _without(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        named = ((key, f"{path}.{key}" if path else str(key), v) for key, v in value.items())
        return {key: _without(v, name) for key, name, v in named if not _left_out(name, v)}
    if isinstance(value, list):
        return [_without(entry, f"{path}.{index}") for index, entry in enumerate(value)]
    return value


def _left_out(path: str, value: Any) -> bool:
    if path in _ADDED and value == _ADDED[path]:
        return True
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in NOT_IDENTITY)


def _read(path: Path) -> dict[str, Any]:
    """The file's content, interpolations unresolved; not to be changed in place."""
    try:
        return _parse(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise ValueError(f"no configuration file {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    except (OSError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"cannot read {path} as YAML: {said}") from error


@lru_cache(maxsize=64)
def _parse(path: Path, _modified_ns: int) -> dict[str, Any]:
    """Cached: the defaults are read once per process, not once per member."""
    values = yaml_text.load_file(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, expected a table of keys")
    return values


def _merge(base: Any, changes: Any) -> Any:
    """``base`` with ``changes``, neither changed in place; sections are merged, lists replaced."""
    if not (isinstance(base, Mapping) and isinstance(changes, Mapping)):
        return changes
    merged = {key: _merge(base[key], value) for key, value in changes.items() if key in base}
    return {**base, **changes, **merged}


def _values(override: Path | Overrides | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if isinstance(override, Path):
        return _read(override), str(override)
    if isinstance(override, Overrides):
        return override.values, override.source
    if isinstance(override, DictConfig):
        return to_plain(override, resolve=False), "the given values"
    return dict(override), "the given values"


def _check(values: Any, known: Any, source: str, defaults: str, path: str = "") -> None:
    """Compare an override with the defaults at ``path``, recursively."""
    if not isinstance(known, dict):
        _check_type(values, known, path, source)
        return
    if not isinstance(values, Mapping):
        raise ValueError(f"'{path}' in {source} is {values!r}, but it is a section of {defaults}")
    if not known and path:
        return  # an open section
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise unknown_key(name, source, (f"{path}.{k}" if path else k for k in known))
        _check(value, known[key], source, defaults, name)


def _check_type(value: Any, default: Any, path: str, source: str) -> None:
    """Refuse a value that cannot stand where ``default`` stands."""
    if default is None or value is None:
        return
    if any(isinstance(v, str) and ("${" in v or v == "???") for v in (value, default)):
        return  # known only once resolved
    accepted: tuple[type, ...] = {bool: (bool,), float: (float, int), int: (int,), str: (str,)}.get(
        type(default), (list, tuple)
    )
    wrong_bool = isinstance(value, bool) and bool not in accepted
    if wrong_bool or not isinstance(value, accepted):
        kind = {bool: "true or false", float: "a number", int: "a whole number", str: "text"}
        expected = kind.get(type(default), "a list")
        raise ValueError(f"'{path}' in {source} is {value!r}, expected {expected}")


def _apply_arguments(
    merged: dict[str, Any], arguments: list[str], known: Any, schema: type | None, defaults: str
) -> dict[str, Any]:
    config = OmegaConf.create(merged)
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"'{argument}' is not an override; write key=value, e.g. a.b=3")
        # a[0].b and a.0.b: OmegaConf and shells know both.
        parts = key.strip().replace("[", ".").replace("]", "").split(".")
        if schema is None:
            value = _given(argument, text)
            _check(_nested(parts, value), known, "the command line", defaults)
        else:
            value = _typed(argument, text, parts, schema)
        try:
            OmegaConf.update(config, ".".join(parts), value, merge=True)
        except (IndexError, ValueError, TypeError, OmegaConfBaseException) as error:
            raise ValueError(f"cannot apply '{argument}': {error}") from error
    return to_plain(config, resolve=False)


def _typed(argument: str, text: str, parts: list[str], schema: type) -> Any:
    """The value of an argument, as the schema wants it at its key."""
    kind = type_at(schema, parts)
    if kind is None:
        check(_nested(parts, None), schema, "the command line")  # names the unknown part
        raise ValueError(f"cannot apply '{argument}': there is no such key")
    # A list or table is never meant as a text; `a: b` and `x #3` are, where a text is wanted.
    yaml_form = text[:1] in "[{" or (len(text) > 1 and text[0] == text[-1] and text[0] in "'\"")
    plain = takes_text(kind) and not yaml_form and text not in ("null", "~")
    if plain and not isinstance(_read_as(text), (bool, int, float)):
        return check_at(text, schema, parts, "the command line")
    return check_at(_given(argument, text), schema, parts, "the command line")


def _read_as(text: str) -> Any:
    """What YAML makes of a text; a number in a text's place has to be put in quotes."""
    try:
        return yaml_text.load(text)
    except yaml.YAMLError:
        return text


def _given(argument: str, text: str) -> Any:
    """The value of an argument as YAML.

    Raises:
        ValueError: it is not YAML, or a part of it would be taken for a comment.
    """
    try:
        value = yaml_text.load(text)
        # YAML takes " #" for a comment: name="run #3" would lose its number without a word.
        comment = re.search(r"\s#", text)
        if comment and yaml_text.load(text[: comment.start()]) == value:
            raise ValueError(f"'{argument}' holds ' #', where a comment begins; put it in quotes")
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"cannot read the value of '{argument}': {said}") from error
    return value


def _nested(parts: list[str], value: Any) -> Any:
    """``{a: {b: value}}`` for the parts a, b; a list's value is left out."""
    in_list = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    nested: Any = value if in_list == len(parts) else []
    for part in reversed(parts[:in_list]):
        nested = {part: nested}
    return nested
