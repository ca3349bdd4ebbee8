"""Records on disk: atomic writes, hashes, and the completion record that ends every stage.

A stage is done when its directory holds ``completion.json``. It is written last, after the
artifacts it names are on disk, so its presence is the only proof of success (an exit code is
not). Standard library only: login nodes read these records without torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import nemo_warp
from nemo_warp.places import SHIPPED

COMPLETION_FILE = "completion.json"
_CODE = ("nemo_warp", "conf", "slurm", "tools")
_HASH_BLOCK_BYTES = 1 << 22


class RecordError(Exception):
    """A record on disk is missing, malformed or contradicts what it describes."""


@dataclass(frozen=True)
class FileHash:
    """Size in bytes and SHA-256 (hex) of one artifact."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Completion:
    """What made a finished stage.

    Attributes:
        kind: ``member``, ``merge``, ``evaluation`` or ``prepare``.
        config_hash: `config_hash` of the configuration that made it.
        files: artifact path relative to the record's directory -> hash.
        details: per kind; a member's holds ``step``, ``total_steps``, ``seeds``,
            ``prompt_order_hash``; a merge's ``method``, ``etas`` and input hashes.
        code_version: see `code_version`.
        versions: package -> version, of the packages that took part.
    """

    kind: str
    config_hash: str
    files: dict[str, FileHash]
    details: dict[str, Any]
    code_version: str
    versions: dict[str, str] = field(default_factory=dict)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    # allow_nan=False: NaN is no JSON, and NaN != NaN would make a hash that equals nothing.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_object(text: str, option: str) -> dict[str, Any]:
    """What a command-line option says that takes a JSON object.

    Raises:
        ValueError: names the option.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option} is not JSON ({error}): {text!r}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{option} must be a JSON object, got {text!r}")
    return values


def config_hash(config: dict[str, Any]) -> str:
    """SHA-256 (hex) of a plain configuration tree."""
    return hashlib.sha256(canonical_json(config).encode()).hexdigest()


def hash_file(path: Path) -> FileHash:
    """Size and SHA-256 of a file, or of a directory's files in sorted order with their names."""
    digest, size = hashlib.sha256(), 0
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if file is not path:
            # Names as well: two files that changed places are another directory.
            digest.update(f"{file.relative_to(path).as_posix()}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(_HASH_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
    return FileHash(size, digest.hexdigest())


@cache
def code_version() -> str:
    """``0.1.0+g<commit>``, ``.dirty`` if its code was changed; a wheel knows its commit.

    An edited recipe is another recipe, and no other code.
    """
    root = Path(nemo_warp.__file__).parent.parent
    carried = SHIPPED / "commit"  # setup.py writes it into a wheel
    if carried.exists() and (commit := carried.read_text()):
        return f"{nemo_warp.__version__}+g{commit}"
    if not (root / ".git").exists():
        return nemo_warp.__version__
    git = ["git", "-C", str(root)]
    describe, changed = ["describe", "--always", "--abbrev=12"], ["diff", "--quiet", "HEAD", "--"]
    try:
        result = subprocess.run([*git, *describe], capture_output=True, text=True, check=True)
        edited = subprocess.run([*git, *changed, *_CODE], capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):  # no git, or not allowed to look
        return nemo_warp.__version__
    dirty = ".dirty" if edited.returncode else ""
    return f"{nemo_warp.__version__}+g{result.stdout.strip()}{dirty}"


def fsync_directory(path: Path) -> None:
    """Make a rename or a new entry in ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write ``path`` so that a crash leaves the old content or the new, never a part."""
    # In the same folder, since a rename is atomic within one file system only; with the process id,
    # since two processes may write one record.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            # Before the rename: some file systems order them the other way, and leave an empty file
            # under the final name after a power cut.
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:  # a full disk is noticed by a descriptor, which has no name
        error.filename = error.filename or str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_bytes_atomically` of UTF-8, whatever the locale is."""
    write_bytes_atomically(path, text.encode())


def write_json_atomically(path: Path, value: Any) -> None:
    """`write_text_atomically` of indented JSON."""
    write_text_atomically(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_completion(directory: Path, completion: Completion) -> Path:
    """Publish a stage: after this returns, the stage is done. Call it last."""
    path = directory / COMPLETION_FILE
    write_json_atomically(path, asdict(completion))
    return path


def read_completion(directory: Path) -> Completion | None:
    """The stage's completion record, or None while it is not done.

    Raises:
        RecordError: the record is there but cannot be understood.
    """
    path = directory / COMPLETION_FILE
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text())
        raw["files"] = {name: FileHash(**entry) for name, entry in raw["files"].items()}
        return Completion(**raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecordError(
            f"{path} is not a completion record ({error}); delete it to redo the stage"
        ) from error
