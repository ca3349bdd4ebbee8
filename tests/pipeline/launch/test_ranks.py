"""The rank starter: torchrun's environment, honest exit codes, signals to every rank."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sandbox import ROOT

from nemo_warp.pipeline.launch import environment
from nemo_warp.pipeline.launch.steps import Allocation, Step
from nemo_warp.pipeline.ranks import threads
from nemo_warp.ports import free_port


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


def start_mpi(code: str, directory: Path, *words: str) -> subprocess.Popen:
    """Two ranks under mpirun, as the local launcher starts a step with TensorRT-LLM."""
    step = Step("member", (sys.executable, "-c", code), (), 2, mpi=True,
                exit_file=directory / "member.exit")  # fmt: skip
    command = step.command(Allocation(sys.executable), free_port())
    at = command.index("--mpi")
    return subprocess.Popen(
        [*command[:at], *words, *command[at:]],
        cwd=ROOT,
        env=step.environment(Allocation()),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="apt-get install openmpi-bin")
def test_mpi_starts_the_ranks_where_it_has_to_know_them(tmp_path: Path) -> None:
    """Real mpirun: equal ranks, the first to save does not end the others, true exit codes."""
    code = (
        "import os, signal, sys, time\nstopped = []\n"
        "signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))\n"
        "rank = os.environ['RANK']\n"
        "assert rank == os.environ['OMPI_COMM_WORLD_RANK'] == os.environ['PMIX_RANK']\n"
        f"open({str(tmp_path)!r} + '/started.' + rank, 'w').close()\n"
        "while not stopped: time.sleep(0.05)\n"
        "time.sleep(2 * int(rank))\n"
        f"open({str(tmp_path)!r} + '/saved.' + rank, 'w').close()\n"
        "sys.exit(85)"
    )
    process = start_mpi(code, tmp_path)
    _wait_for(2, tmp_path)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert len(list(tmp_path.glob("saved.*"))) == 2, output
    assert (tmp_path / "member.exit").read_text() == "85", output
    # Ranks that disagree are refused by each of them, before anything else starts.
    (tmp_path / "wrong").mkdir()
    process = start_mpi("raise SystemExit(0)", tmp_path / "wrong", "--node-rank=1")
    output, _ = process.communicate(timeout=60)
    assert (tmp_path / "wrong" / "member.exit").read_text() == "2"
    assert "MPI's rank is 1, torch's would be 3 (node 1, local rank 1 of 2)" in output


def test_without_mpi_a_rank_of_it_is_refused(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "nemo_warp.pipeline.ranks", "--mpi", "--master-port=1", "--"]
    result = subprocess.run([*words, "true"], cwd=ROOT, capture_output=True, text=True,
                            env=environment.for_steps())  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: no MPI rank: TensorRT-LLM needs a process started by")


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun does, but for the stages side by side and the step's share of a node, too."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: range(16))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    assert [threads(n) for n in (1, 4, 16, 64)] == [16, 4, 1, 1]
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8")
    assert threads(2) == 4
    code = "import os; os.write(1, (os.environ['OMP_NUM_THREADS'] + chr(10)).encode())"
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    assert run(code, 2)[1].split() == ["1", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run(code, 2)[1].split() == ["7", "7"], "unless it is set"
