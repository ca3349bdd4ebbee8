"""Several processes merging one plan, under torchrun or srun, coordinated through files.

Every process merges its share of the groups into the same outputs (disjoint bytes). Rank 0 makes
the outputs, waits for what the others measured, then completes and publishes them. The only
requirement is the shared file system the outputs lie on. Notes left by an earlier, killed attempt
are recognised by tokens that each process draws anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_warp.records import write_json_atomically

logger = logging.getLogger(__name__)

# A stat on the shared file system each; half an hour of patience is longer than any rank's share of
# a 70B merge takes (docs/merge_at_scale.md).
_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 1800.0
_SILENCE_SECONDS = 5.0
_VARIABLES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))


class RankFailure(RuntimeError):  # noqa: N818
    """Another process of the same merge failed or fell silent."""


@dataclass(frozen=True)
class World:
    """This process's place: rank 0 of 1 unless a launcher says otherwise in ``variables``."""

    rank: int = 0
    size: int = 1
    variables: tuple[str, ...] = ()


def world_from_environment() -> World:
    """Rank and size as torchrun or srun set them.

    Raises:
        ValueError: they are no numbers.
    """
    for rank, size in _VARIABLES:
        if rank in os.environ and size in os.environ:
            return World(_number(rank), max(1, _number(size)), (rank, size))
    return World()


def _number(variable: str) -> int:
    text = os.environ[variable]
    if not text.isdecimal():
        raise ValueError(f"{variable} is {text!r} in the environment, expected a number; unset it")
    return int(text)


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
        self._others = [str(rank) for rank in range(1, world.size)]

    def join(self) -> str:
        """For ranks above 0: say hello until rank 0 has made the outputs; returns its attempt.

        Raises:
            RankFailure: rank 0 failed, has other arguments, or stays silent.
        """
        hello = f"hello_{self.world.rank}"

        def started() -> dict | None:
            # Said again: rank 0 removes the folder when it begins, and may do so after this rank's
            # hello, or while it is written.
            if (self._read(hello) or {}).get("token") != self._token:
                with contextlib.suppress(FileNotFoundError, FileExistsError):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self._write(hello, {"plan": self.identity})
            note = self._read("start") or {}
            # A start that an earlier attempt left does not know this token.
            return note if self._token in note.get("tokens", {}).values() else None

        return self._wait(started, "rank 0 to make the outputs")["attempt"]

    def gather(self) -> dict[str, str]:
        """For rank 0: rank -> token of every other process, when all have said hello.

        Raises:
            RankFailure: one stays silent or has other arguments.
        """
        # What a killed attempt left; its notes would be taken for answers otherwise.
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self._others:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)  # another rank may have been quicker
        hellos: dict[str, dict] = {}

        def all_here() -> bool:
            for rank in [rank for rank in self._others if rank not in hellos]:
                if note := self._read(f"hello_{rank}"):
                    self._check_plan(note["plan"], rank)
                    hellos[rank] = note
            return len(hellos) == len(self._others)

        self._wait(all_here, f"all {self.world.size} processes to start")
        return {rank: note["token"] for rank, note in hellos.items()}

    def start(self, attempt: str, tokens: dict[str, str]) -> None:
        """For rank 0: let everyone begin who has said hello."""
        if tokens:
            self._write("start", {"attempt": attempt, "tokens": tokens})

    def finish(self, result: Any = None, error: BaseException | None = None) -> None:
        """For ranks above 0: say that this rank's share is on disk, or why not."""
        note = {"error": None if error is None else str(error), "result": result}
        self._write(f"finished_{self.world.rank}", note)

    def results(self, tokens: dict[str, str]) -> list[Any]:
        """For rank 0: what every other rank finished with.

        Raises:
            RankFailure: one of them failed or stays silent.
        """
        return [self._result(rank, token) for rank, token in tokens.items()]

    def _result(self, rank: str, token: str) -> Any:
        def finished() -> dict | None:
            note = self._read(f"finished_{rank}") or {}
            return note if note.get("token") == token else None

        note = self._wait(finished, f"rank {rank}")
        if note["error"]:
            raise RankFailure(f"rank {rank}: {note['error']}")
        return note["result"]

    def close(self) -> None:
        """For rank 0: remove all notes."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_plan(self, identity: str, rank: str) -> None:
        if identity != self.identity:
            raise RankFailure(
                f"rank {rank} merges something else than rank 0; pass all ranks the same options, "
                "and let them have the same code and libraries"
            )

    def _wait(self, found: Callable[[], Any], what: str) -> Any:
        """What ``found`` returns when it is true; whoever waits for long says for what."""
        began, silent = time.monotonic(), _SILENCE_SECONDS
        while not (result := found()):
            waited = time.monotonic() - began
            if waited > _PATIENCE_SECONDS:
                raise RankFailure(f"waited {waited:.0f} s for {what}; is it still running?")
            if waited > silent:
                # At 5 s, 20 s, 80 s ...: said often enough to be seen, and not a log full of it.
                silent *= 4
                logger.warning("%s: waiting for %s%s", self._here(), what, self._advice())
            time.sleep(_POLL_SECONDS)
        return result

    def _here(self) -> str:
        return f"rank {self.world.rank} of {self.world.size}"

    def _advice(self) -> str:
        if not self.world.variables:
            return ""
        names = " and ".join(self.world.variables)
        return f"; if this is the only process, unset {names}, which say that there are more"

    def _write(self, name: str, note: dict) -> None:
        write_json_atomically(self.folder / f"{name}.json", {"token": self._token, **note})

    def _read(self, name: str) -> dict | None:
        try:
            return json.loads((self.folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None
