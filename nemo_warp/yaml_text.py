"""The one way in which this project reads and writes YAML.

PyYAML follows YAML 1.1 and OmegaConf almost, but not quite: ``695e0514`` is a text to the one and
infinity to the other; ``on`` is true, ``010`` is 8, ``12:30:45`` is 45045. Here

* numbers and true, false, null are read as YAML 1.2 has them, and OmegaConf's ``1e-6`` too;
* what YAML 1.1 would read as something else than a text (``yes``, ``010``, ``12:30``) stays the
  text that was written, marked as `Ambiguous`, so that the schema can decide;
* every text that is written and that any reader could take for something else is quoted.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class Ambiguous(str):
    """A text without quotes that YAML 1.1 reads as something else."""

    @property
    def is_bool(self) -> bool:
        """Whether YAML 1.1 reads it as true or false."""
        return self.lower() in ("yes", "no", "on", "off")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema; duplicate keys refused."""


class _Dumper(yaml.SafeDumper):
    """Quotes what is not plainly a text."""


_AMBIGUOUS = "tag:nemo-warp,ambiguous"
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
    ("tag:yaml.org,2002:int", r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    (
        _AMBIGUOUS,
        r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF"
        r"|[-+]?0[0-9_]+|[-+]?0b[01_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"
        r"|[-+]?[0-9]+_[0-9_]*(\.[0-9_]*)?|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*",
        "yYnNoO-+0123456789",
    ),
):
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))
# Zeros in front are ambiguous before they are a float without a point.
for _resolvers in _Loader.yaml_implicit_resolvers.values():
    _resolvers.sort(key=lambda entry: entry[0] != _AMBIGUOUS)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    # A billion digits take quadratic time; no key of ours has more than 20.
    if len(text) > 40:
        raise yaml.MarkedYAMLError(
            problem="a number too long to be one", problem_mark=node.start_mark
        )
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(
        loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan")
    )


def _ambiguous(loader: _Loader, node: yaml.ScalarNode) -> Ambiguous:
    return Ambiguous(loader.construct_scalar(node))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    given = set()
    for key_node, _ in node.value:
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if name is None or name in given:
            problem = "a key that is no text" if name is None else f"the key '{name}' twice"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        given.add(name)
    loader.flatten_mapping(node)  # `<<: *shared` brings further keys, which those above override
    values: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        # A key is a name: `on:` and `010:` are what they look like.
        key = str(key) if isinstance(key, Ambiguous) else key
        values[key] = loader.construct_object(value_node, deep=True)
    return values


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor(_AMBIGUOUS, _ambiguous)

_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null", "nan", "inf"}


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _text)
_Dumper.add_representer(Ambiguous, _text)


def load(text: str) -> Any:
    """Plain values of a YAML text.

    Raises:
        yaml.YAMLError: not YAML, a key twice, or a tag of a language's own.
    """
    return yaml.load(text, Loader=_Loader)


def load_file(path: Path) -> Any:
    """`load` of a file in UTF-8, with or without a byte order mark.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is in another encoding.
        yaml.YAMLError: see `load`.
    """
    return load(path.read_bytes().decode("utf-8-sig"))


def dump(values: Any) -> str:
    """YAML that `load`, PyYAML and OmegaConf all read back as ``values``; keys keep their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=100)
