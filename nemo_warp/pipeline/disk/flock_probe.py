"""Try whether a lock keeps another node out: ``srun ... python -m ... flock_probe DIRECTORY``.

Two tasks. The first takes a lock and makes a file; the second then tries the lock, must be refused,
makes a file of its own, and must get the lock once the first has released it. This also shows that
each node sees the other's files. Exit code 0: all of this happened; 1: it did not, and standard
error says why.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from nemo_warp.disk_errors import in_a_sentence
from nemo_warp.pipeline.disk import locks

_PATIENCE_S = 60.0
"""Attribute caches of network file systems hold for seconds, by default up to 60 (man nfs)."""


class ProbeError(Exception):
    """What the file system does is not what the driver needs."""


def main() -> int:
    """One of the two tasks; an exit code."""
    directory, rank = Path(sys.argv[1]), int(os.environ.get("SLURM_PROCID", "0"))
    try:
        (_first if rank == 0 else _second)(directory)
    except OSError as error:
        return _say(in_a_sentence(error) or str(error))
    except locks.LockHeldError:
        return _say(f"{directory}: a lock that was let go is still held for another node")
    except ProbeError as error:
        return _say(str(error))
    return 0


def _first(directory: Path) -> None:
    with locks.hold(directory / "lock"):
        # Held until the other one has seen it, so both steps happen while the lock is taken.
        (directory / "held").touch()
        _await(directory / "refused")


def _second(directory: Path) -> None:
    _await(directory / "held")
    try:
        with locks.hold(directory / "lock"):
            pass
    except locks.LockHeldError:
        (directory / "refused").touch()
        # The lock must be free again after its holder has let go, which stale NFS locks are not.
        with locks.hold(directory / "lock", _PATIENCE_S):
            return
    raise ProbeError(f"{directory}: two nodes held one lock (flock) at once")


def _await(file: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise ProbeError(f"{file} was not seen by another node within {_PATIENCE_S:.0f} s")
        time.sleep(0.1)


def _say(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
