"""What an output may replace, and whether there is room for it."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Collection, Iterable
from pathlib import Path

_WEIGHTS = r"""(\.metadata|metadata\.json|integrity\.json|common\.pt|[^/]*__\d+_\d+\.distcp
                |.+/(\.zarray|\d+([./]\d+)*|shard_[\d._]+\.pt))"""
"""Files of a distributed checkpoint: Megatron-core's ``torch_dist`` and ``zarr``."""

_CHECKPOINT_FILES = re.compile(
    rf"""(model_config\.yaml | warp_merge\.json | README\.md | card\.md | [0-9a-f]{{32}}_[^/]+
      | (iter_\d+/)?((model_weights|weights)/)?{_WEIGHTS}
      | ((mp_rank_\d+|tp_rank_\d+_pp_rank_\d+)/)?model_weights\.ckpt
      | (context|(iter_\d+/)?tokenizer)/.+ | (iter_\d+/)?(run_config\.yaml|train_state\.pt)
      | latest_(checkpointed_iteration\.txt|train_state\.pt)
      | model(-\d+-of-\d+)?\.safetensors | model\.safetensors\.index\.json
      | (generation_|tokenizer_)?config\.json | (special_tokens_map|added_tokens|vocab)\.json
      | merges\.txt | tokenizer\.(json|model) | [^/]*chat_template[^/]*)""",
    re.VERBOSE,
)
"""What NeMo, Megatron, Hugging Face and this merger put into a checkpoint's folder."""

_MARKS = re.compile(
    r"(model_config\.yaml|warp_merge\.json|config\.json|metadata\.json|.*/metadata\.json)"
)
"""Without one of these it is no checkpoint."""


def check_target(final: Path, overwrite: bool, known: Collection[str] = ()) -> None:
    """Refuse a name that is taken, unless by a checkpoint that may be replaced.

    Args:
        final: the name.
        overwrite: whether checkpoints may be replaced.
        known: names of files that such a checkpoint may have, too: those of the new one, which
            takes along what its init has.

    Raises:
        ValueError: says what is there.
    """
    if not os.path.lexists(final):
        return
    if not overwrite:
        raise ValueError(f"{final} exists; pass --overwrite to replace it")
    if final.is_symlink():  # the link is replaced, what it points to stays
        return
    names = _names_in(final)
    # An empty folder may be replaced: nothing is lost.
    if names and not any(map(_MARKS.fullmatch, names)):
        raise ValueError(
            f"{final} is not a checkpoint, and --overwrite replaces nothing else; "
            "remove it yourself, or choose another --output"
        )
    others = [n for n in names if n not in known and not _CHECKPOINT_FILES.fullmatch(n)]
    if final.is_dir() and others:
        raise ValueError(
            f"{final} holds {others[0]!r}, which no checkpoint has ({len(others)} such entries), "
            "and --overwrite would remove it; move it away, or choose another --output"
        )


def _names_in(path: Path) -> list[str]:
    """Names of everything in a folder but its folders, or of a tar's members; [''] otherwise."""
    if path.is_dir():
        found = (p for p in path.rglob("*") if p.is_symlink() or not p.is_dir())
        # links get a name that no checkpoint's file has: what writes checkpoints makes none
        return sorted("link " * p.is_symlink() + p.relative_to(path).as_posix() for p in found)
    try:
        with tarfile.open(path, "r:") as tar:
            return [member.name.removeprefix("./") for member in tar]
    except (tarfile.TarError, OSError, ValueError):
        return [""]


def check_space(sizes: Iterable[tuple[Path, int]]) -> None:
    """Raise before the first write if the outputs do not fit.

    Args:
        sizes: an existing folder and how much will be written below it.

    Raises:
        OSError: says how much is missing where.
    """
    needed: dict[int, int] = {}
    for folder, size in sizes:
        # Outputs on one file system share its space, whatever their folders are called.
        device = folder.stat().st_dev
        needed[device] = needed.get(device, 0) + size
        free = shutil.disk_usage(folder).free
        if needed[device] > free:
            raise OSError(
                f"{folder} has {free / 1e9:.2f} GB free, the outputs need "
                f"{needed[device] / 1e9:.2f} GB; free some space or write elsewhere"
            )
