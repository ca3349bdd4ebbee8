"""The frame of the entry points: check, lock the directory, import NeMo, work, report errors."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from nemo_warp import exit_codes
from nemo_warp.config import identity_hash, to_plain
from nemo_warp.records import RecordError, read_completion, write_text_atomically
from nemo_warp.rewards import RewardError

_OWNER_FILE = "config.sha256"
Texts = TypeVar("Texts")


def run_once(
    check: Callable[[], tuple[Any, Path, Texts]], work: Callable[[Any, Texts], int]
) -> int:
    """Do a configuration's work in its directory, unless it is done already.

    Args:
        check: refuses what cannot work (ValueError, RecordError), without NeMo; returns the
            configuration, the directory and the prompts' texts.
        work: called with configuration and texts when NeMo is ready; returns an exit code.

    Returns:
        An exit code of `nemo_warp.exit_codes`.
    """
    try:
        # Everything that can be refused is refused here, before NeMo's import (12 s on every rank).
        config, directory, texts = check()
        # Before the lock: asking again for a finished result needs no lock.
        if already_complete(directory, config):
            return exit_codes.DONE
        lock = lock_directory(directory, config)
    except (ValueError, RecordError) as error:
        return refuse(error, exit_codes.MISCONFIGURED)
    from nemo_warp.aligner.compat import activate

    activate()
    # A second run of one directory is refused at once: it does not wait for the lock.
    with lock:
        try:
            return work(config, texts)
        except ValueError as error:
            return refuse(error, exit_codes.MISCONFIGURED)
        # Another attempt may succeed after these, so the driver starts one; after a ValueError it
        # would meet the same again. Anything else is a bug and keeps its traceback.
        except (RecordError, RewardError, FloatingPointError) as error:
            return refuse(error, exit_codes.FAILED)


def is_first_rank() -> bool:
    """Whether this process is rank 0 of its job (or its only process)."""
    # torchrun sets RANK, srun SLURM_PROCID. torch.distributed, which would know the rank, is not
    # initialised yet.
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def already_complete(directory: Path, config: Any) -> bool:
    """Whether ``directory`` holds the finished result of this very configuration.

    Raises:
        ValueError: the directory belongs to another configuration.
        RecordError: its completion record is unreadable.
    """
    wanted = identity_hash(to_plain(config))
    completion = read_completion(directory)
    owner = directory / _OWNER_FILE
    found = owner.read_text().strip() if owner.is_file() else None
    # The record is the stronger witness: the owner file is written when a run begins.
    found = completion.config_hash if completion else found
    if found not in (None, wanted):
        raise ValueError(
            f"{directory} belongs to another configuration (hash {found[:12]}, this one is "
            f"{wanted[:12]}); choose another directory, or remove it to start again"
        )
    if completion and is_first_rank():
        print(f"{directory} is complete")
    return completion is not None


def lock_directory(directory: Path, config: Any) -> IO[str]:
    """Take ``directory`` for this run until the returned file is closed; rank 0 holds it for all.

    Raises:
        ValueError: another run holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = (directory / ".lock").open("w")
    if not is_first_rank():
        return lock
    try:
        # POSIX locks die with their process; flock would live on in children it left behind
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        raise ValueError(
            f"another run is using {directory}; wait for it, or choose another directory"
        ) from None
    # Under the lock, so that two runs cannot each take the directory for theirs.
    write_text_atomically(directory / _OWNER_FILE, identity_hash(to_plain(config)) + "\n")
    return lock


def refuse(error: Exception, code: int) -> int:
    """Tell the user, once for all ranks; returns ``code``."""
    if is_first_rank():
        print(f"error: {error}", file=sys.stderr)
    return code
