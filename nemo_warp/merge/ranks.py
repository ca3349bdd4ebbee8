"""Several processes merging one plan, under torchrun or srun, coordinated through files.

Every process merges its share of the groups into the same outputs (disjoint bytes) and keeps its
own journal. Rank 0 prepares the outputs, waits for the others, then seals and publishes. The only
requirement is the shared file system the outputs lie on. Notes left by an earlier, killed attempt
are recognised by tokens that each process draws anew.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from nemo_warp.records import write_json_atomically

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 1800.0
_VARIABLES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))


class RankFailure(RuntimeError):  # noqa: N818
    """Another process of the same merge failed or fell silent."""


@dataclass(frozen=True)
class World:
    """This process's place: rank 0 of 1 unless a launcher says otherwise."""

    rank: int = 0
    size: int = 1


def world_from_environment() -> World:
    """Rank and size as torchrun or srun set them."""
    for rank, size in _VARIABLES:
        if rank in os.environ and size in os.environ:
            return World(int(os.environ[rank]), int(os.environ[size]))
    return World()


class Meeting:
    """Notes that the processes of one merge leave each other in ``folder``.

    Args:
        folder: on the shared file system; removed by rank 0 at the end.
        world: this process.
        identity: of the plan, so that processes with different arguments notice.
    """

    def __init__(self, folder: Path, world: World, identity: str):
        self.folder, self.world, self.identity = folder, world, identity
        self._token = uuid.uuid4().hex

    def wait_until_prepared(self) -> None:
        """For ranks above 0: say hello, and wait until rank 0 has prepared the outputs.

        Raises:
            RankFailure: rank 0 failed, has other arguments, or stays silent.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(f"hello_{self.world.rank}", {"plan": self.identity})
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            ready = self._read("ready") or {}
            if ready.get("tokens", {}).get(str(self.world.rank)) == self._token:
                if ready["plan"] != self.identity:
                    raise RankFailure(
                        "rank 0 merges something else; pass all ranks the same options, and let "
                        "them have the same code and libraries"
                    )
                return
            self._check_deadline(deadline, "rank 0 to prepare the outputs")

    def admit(self) -> None:
        """For rank 0: let everyone who has said hello start."""
        self.folder.mkdir(parents=True, exist_ok=True)
        others = range(1, self.world.size)
        hellos = {rank: self._read(f"hello_{rank}") for rank in others}
        tokens = {str(rank): note["token"] for rank, note in hellos.items() if note}
        if tokens != (self._read("ready") or {}).get("tokens") or not tokens:
            self._write("ready", {"plan": self.identity, "tokens": tokens})

    def finish(self, error: BaseException | None = None) -> None:
        """For ranks above 0: say that this rank's share is on disk, or why not."""
        self._write(f"finished_{self.world.rank}", {"error": None if error is None else str(error)})

    def wait_for_all(self) -> None:
        """For rank 0: wait until every other rank has finished.

        Raises:
            RankFailure: one of them failed or stays silent.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for rank in range(1, self.world.size):
            while True:
                self.admit()
                hello, done = self._read(f"hello_{rank}"), self._read(f"finished_{rank}")
                if hello and done and hello["token"] == done["token"]:
                    if done["error"]:
                        raise RankFailure(f"rank {rank}: {done['error']}")
                    break
                self._check_deadline(deadline, f"rank {rank}")

    def close(self) -> None:
        """For rank 0: remove all notes."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_deadline(self, deadline: float, what: str) -> None:
        if time.monotonic() > deadline:
            raise RankFailure(f"waited {_PATIENCE_SECONDS:g} s for {what}; is it still running?")
        time.sleep(_POLL_SECONDS)

    def _write(self, name: str, note: dict) -> None:
        write_json_atomically(self.folder / f"{name}.json", {"token": self._token, **note})

    def _read(self, name: str) -> dict | None:
        try:
            return json.loads((self.folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None
