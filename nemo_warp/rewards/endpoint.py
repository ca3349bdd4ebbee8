"""Endpoint files: where a reward server listens, and proof of whose it is.

A server writes its file once it is ready and removes it when it stops. The name it serves under
holds the run's identity and the reward's fingerprint, so a request that reaches another run's
server, or another reward, is refused by that server: it has no model of this name.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nemo_warp.records import write_json_atomically
from nemo_warp.rewards.errors import RewardError

_RUN_DIGITS, _REWARD_DIGITS = 12, 16


def served_name(run_id: str, fingerprint: str) -> str:
    """The Triton model name of ``run_id``'s reward, e.g. ``reward-5f0c1e8a9b3d-056d028ba0c25843``.

    The run's identity enters as a hash: the name is part of a Unix socket's path, which may have
    107 bytes at most.

    Raises:
        ValueError: the run id is empty.
    """
    if not run_id:
        raise ValueError("the run id of a reward server must not be empty")
    # 12 and 16 hex digits are 48 and 64 bits: enough to tell runs and rewards apart by chance.
    run = hashlib.sha256(run_id.encode()).hexdigest()[:_RUN_DIGITS]
    return f"reward-{run}-{fingerprint[:_REWARD_DIGITS]}"


@dataclass(frozen=True)
class Endpoint:
    """One running reward server.

    Attributes:
        host, port: where it answers HTTP.
        model_name: see `served_name`.
        fingerprint: SHA-256 (hex) of what decides its scores.
        run_id: the run it was started for.
        pid, node: the process to look for when it misbehaves.
        inputs: names of what it takes, see `nemo_warp.rewards.triton`; servers of earlier versions
            do not say.
        needs: fields that every prompt must have.
        takes: fields that it does something with; None is all.
    """

    host: str
    port: int
    model_name: str
    fingerprint: str
    run_id: str
    pid: int
    node: str
    inputs: tuple[str, ...] = ("sentences", "prompt_lengths")
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] | None = ()

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"{self.host}:{self.port}"

    @classmethod
    def of_this_process(
        cls, host: str, port: int, run_id: str, fingerprint: str, **more: Any
    ) -> Endpoint:
        """The endpoint of a server inside the calling process."""
        name = served_name(run_id, fingerprint)
        return cls(host, port, name, fingerprint, run_id, os.getpid(), socket.gethostname(), **more)

    @classmethod
    def read(cls, path: Path) -> Endpoint | None:
        """The endpoint in ``path``; None while there is no such file.

        Raises:
            RewardError: the file is there but is not an endpoint file.
        """
        try:
            raw = json.loads(path.read_text())
            # Unknown keys are left out: a file of a later version is read by an earlier client.
            known = [field.name for field in fields(cls) if field.name in raw]
            values: dict[str, Any] = {
                name: tuple(raw[name]) if isinstance(raw[name], list) else raw[name]
                for name in known
            }
            return cls(**values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RewardError(
                f"{path} is not a reward server's endpoint file ({error!r}); "
                "delete it and start the server again"
            ) from error

    def write(self, path: Path) -> None:
        """Announce the server; readers see the whole file or none."""
        write_json_atomically(path, asdict(self))

    def withdraw(self, path: Path) -> None:
        """Remove ``path`` if it is still this server's (another may have taken over)."""
        try:
            if Endpoint.read(path) == self:
                path.unlink(missing_ok=True)
        except RewardError:
            pass

    def check_identity(self, run_id: str | None, fingerprint: str | None) -> None:
        """Refuse a server of another run or of another reward.

        Args:
            run_id: the run it must belong to; None accepts any.
            fingerprint: its reward must have this one (or a prefix); None accepts any.

        Raises:
            RewardError: it is not the one expected.
        """
        who = f"the reward server at {self.address} (process {self.pid} on {self.node})"
        if run_id is not None and self.run_id != run_id:
            raise RewardError(
                f"{who} belongs to run {self.run_id!r}, not to {run_id!r}: "
                "point the endpoint at this run's own server"
            )
        if fingerprint is not None and not self.fingerprint.startswith(fingerprint):
            raise RewardError(
                f"{who} serves the reward {self.fingerprint}, but {fingerprint} is expected: "
                "its code, model or options are not those this run started with"
            )
        if self.model_name != served_name(self.run_id, self.fingerprint):
            raise RewardError(
                f"{who} calls itself {self.model_name!r}, which is not what run {self.run_id!r} "
                f"and reward {self.fingerprint} make: its endpoint file was edited"
            )
