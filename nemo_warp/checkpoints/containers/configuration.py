"""Read a checkpoint's YAML with limits on size and depth, since it is untrusted. No torch."""

from __future__ import annotations

import re
from typing import Any

import yaml

from nemo_warp.checkpoints.containers.archive import Archive
from nemo_warp.checkpoints.errors import CheckpointError

CONFIG = "model_config.yaml"
_MAX_BYTES = 1 << 20  # NeMo writes about 20 kB
_MAX_DEPTH = 64
_MAX_NUMBER = 256
_NUMBER = re.compile(r"[-+0-9._:eExXoObBA-Fa-f]+")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_configuration(archive: Archive, name: str = CONFIG) -> dict[str, Any]:
    """A YAML mapping in an archive; {} if the file is not there.

    Raises:
        CheckpointError: it is no YAML mapping, or one that is made to take time or memory.
    """
    if name not in archive.members:
        return {}
    text = archive.read(name, limit=_MAX_BYTES)
    try:
        # In a pass over the events, which builds nothing: anchors that are expanded ten times over
        # in each line cost nothing here.
        _refuse_bombs(text)
        found = yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML's constructors raise whatever a value makes them meet
        raise CheckpointError(
            f"{archive.path}: {name} is not readable YAML ({str(error)[:300]})"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{archive.path}: {name} is not a mapping")
    return found


def _refuse_bombs(text: bytes) -> None:
    """Raise on YAML whose loading could take for ever.

    These are deep nesting, ``<<`` merge keys, and numbers of many digits: YAML 1.1 has base 60,
    1:1:1:1, whose conversion takes the square of their length.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        value = getattr(event, "value", None) or ""
        if depth > _MAX_DEPTH or value == "<<":
            raise yaml.YAMLError("nested too deeply, or with merge keys, for a NeMo configuration")
        if len(value) > _MAX_NUMBER and _NUMBER.fullmatch(value):
            raise yaml.YAMLError(f"a number of {len(value)} characters")
