"""The driver's own effects on the disk: killed before each of them, it must not matter.

The driver and its tasks run under a hook that counts every operation of theirs which changes the
file system, and kills the process at a given one. Then the run is repeated without the hook.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sandbox import ROOT, Sandbox

from nemo_warp import exit_codes

HOOK = '''
"""Kills this process at its Nth change of the file system below WARP_KILL_ROOT."""
import os, signal, sys

at, root, log = (os.environ[f"WARP_KILL_{key}"] for key in ("AT", "ROOT", "LOG"))
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}

def watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
        path = arguments[0]
    elif event in CHANGES:
        path = arguments[0]
    else:
        return
    if not str(path).startswith(root):
        return
    with_number = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(with_number, f"{event} {path}\\n".encode())
    os.close(with_number)
    if open(log).read().count("\\n") == int(at):
        os.kill(os.getpid(), signal.SIGKILL)

if "nemo_warp" in " ".join(sys.orig_argv):
    sys.addaudithook(watch)
'''


def _hooked(sandbox: Sandbox, at: int) -> tuple[int, list[str]]:
    """A run that dies at change number ``at`` (of driver and tasks together)."""
    site = sandbox.directory / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(HOOK)
    log = sandbox.directory / "changes.txt"
    log.unlink(missing_ok=True)
    code, _ = sandbox.call(
        "run",
        PYTHONPATH=os.pathsep.join([str(site), str(ROOT)]),
        WARP_KILL_AT=str(at),
        WARP_KILL_ROOT=str(sandbox.run_directory),
        WARP_KILL_LOG=str(log),
    )
    return code, log.read_text().splitlines()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The artifacts of a run that nothing happened to, and the number of its changes."""
    sandbox = _sandbox(tmp_path_factory.mktemp("undisturbed"))
    code, changes = _hooked(sandbox, at=10**9)
    assert code == exit_codes.DONE
    return sandbox.artifacts(), len(changes)


def _sandbox(directory: Path) -> Sandbox:
    """The smallest plan; fewer stages are no fewer kinds of effects."""
    sandbox = Sandbox(directory)
    sandbox.save(iterations=1, members=1, launcher={"side_by_side": 1})
    return sandbox


@pytest.mark.timeout(900)
def test_killed_at_each_change(undisturbed, tmp_path_factory: pytest.TempPathFactory) -> None:
    expected, number = undisturbed
    kinds: dict[str, int] = {}
    sandbox = _sandbox(tmp_path_factory.mktemp("listing"))
    _, changes = _hooked(sandbox, at=10**9)
    for index, change in enumerate(changes, start=1):
        kinds.setdefault(_kind(change, sandbox), index)
    assert number > 50
    for index in sorted(kinds.values()):
        killed = _sandbox(tmp_path_factory.mktemp("killed"))
        _hooked(killed, at=index)
        assert_nothing_half_built(killed, expected)
        code, output = killed.call()
        assert code == exit_codes.DONE, f"killed at change {index}: {output}"
        assert killed.artifacts() == expected, f"killed at change {index}"


def _kind(change: str, sandbox: Sandbox) -> str:
    """The same effect on another stage, or under another process id, is the same effect."""
    event, path = change.split(" ", 1)
    name = "".join(c for c in Path(path).name if not c.isdigit())
    return f"{event} {name}" if "/" in path else event


def assert_nothing_half_built(sandbox: Sandbox, expected: dict[str, bytes]) -> None:
    """What has a completion record is whole, byte for byte."""
    for record in sandbox.run_directory.rglob("completion.json"):
        stage = str(record.parent.relative_to(sandbox.run_directory))
        for name, content in expected.items():
            if str(Path(name).parent) == stage:
                assert (sandbox.run_directory / name).read_bytes() == content
