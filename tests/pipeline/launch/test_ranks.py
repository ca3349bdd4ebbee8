"""The rank starter: torchrun's environment, honest exit codes, signals to every rank."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sandbox import ROOT


def start(code: str, ranks: int = 2) -> subprocess.Popen:
    words = [sys.executable, "-m", "nemo_warp.pipeline.ranks", f"--nproc-per-node={ranks}", "--"]
    return subprocess.Popen(
        [*words, sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def run(code: str, ranks: int = 2) -> tuple[int, str]:
    process = start(code, ranks)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_ranks_see_what_torchrun_would_set() -> None:
    keys = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR"
    words = f"' '.join(os.environ[k] for k in '{keys}'.split())"
    code = f"import os; os.write(1, ({words} + chr(10)).encode())"
    status, output = run(code)
    assert status == 0
    assert sorted(output.splitlines()) == ["0 0 2 2 0 127.0.0.1", "1 1 2 2 0 127.0.0.1"]


@pytest.mark.parametrize("code", [85, 86, 1, 2])
def test_the_exit_code_is_the_ranks_own(code: int) -> None:
    assert run(f"import sys; sys.exit({code})")[0] == code


def test_a_rank_that_dies_ends_the_others() -> None:
    code = (
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)"
    )
    began = time.monotonic()
    assert run(code)[0] == 128 + signal.SIGKILL
    assert time.monotonic() - began < 30


def test_signals_reach_every_rank(tmp_path: Path) -> None:
    handle = "import signal, sys\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(85))\n"
    process = start(handle + _appear(tmp_path, 60))
    _wait_for(2, tmp_path)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 85
    process.communicate()


def test_a_signal_before_a_rank_listens_does_not_kill_it(tmp_path: Path) -> None:
    process = start(_appear(tmp_path, 3))
    _wait_for(2, tmp_path)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 0
    process.communicate()


def test_ranks_die_with_their_starter(tmp_path: Path) -> None:
    process = start(_appear(tmp_path, 60))
    pids = _wait_for(2, tmp_path)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _appear(directory: Path, seconds: int) -> str:
    """What a rank runs: leave a file with its process id, then sleep."""
    return (
        "import os, pathlib, time\n"
        f"pathlib.Path('{directory}', str(os.getpid())).touch()\n"
        f"time.sleep({seconds})"
    )


def _wait_for(number: int, directory: Path) -> list[str]:
    deadline = time.monotonic() + 30
    while len(names := [p.name for p in directory.iterdir()]) < number:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return names


def _alive(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
