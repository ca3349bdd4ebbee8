"""Start and stop real reward servers in tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VADER = "nemo_warp.rewards.library:vader_compound"
STRANGE = "strange_rewards:strange"
PICKY = "strange_rewards:picky"


class Server:
    """A `nemo_warp.rewards.serve` process and the files around it."""

    def __init__(self, directory: Path, callable_: str, *extra: str, run_id: str = "run-1"):
        directory.mkdir(parents=True, exist_ok=True)
        self.endpoint_file = directory / "endpoint.json"
        self.mark = directory / "asleep"
        self.log = directory / "log.txt"
        self.temporary = Path(tempfile.mkdtemp(prefix="rewards-"))  # short: Unix sockets inside
        command = [sys.executable, "-m", "nemo_warp.rewards.serve", "--callable", callable_]
        command += ["--run-id", run_id, "--endpoint-file", str(self.endpoint_file), *extra]
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "STRANGE_MARK": str(self.mark),
            "TMPDIR": str(self.temporary),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def wait_for(self, path: Path, deadline_s: float = 60.0) -> None:
        """Until ``path`` exists; fails with the server's log if it died."""
        end = time.monotonic() + deadline_s
        while not path.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"no {path.name}\n{self.log.read_text()}"
            time.sleep(0.05)

    def triton_pid(self) -> int:
        """The process that answers HTTP, a child of the server."""
        pid = self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text().strip() == "tritonserver":
                return int(child)
        raise AssertionError("no tritonserver")

    def kill(self) -> None:
        """As a crash: no clean-up of any kind."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def stop(self, deadline_s: float = 30.0) -> int:
        """As Slurm does: SIGTERM. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(deadline_s)


@contextmanager
def running(
    directory: Path, callable_: str, *extra: str, run_id: str = "run-1"
) -> Iterator[Server]:
    """A server that is ready, killed at the end."""
    with Server(directory, callable_, *extra, run_id=run_id) as server:
        server.wait_for(server.endpoint_file)
        yield server
