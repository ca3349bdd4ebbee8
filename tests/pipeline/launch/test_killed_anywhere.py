"""The driver's own effects on the disk: killed before each of them, it must not matter.

The driver and its tasks run under a hook that counts every operation of theirs which changes the
file system, and kills the process at a given one. Then the run is repeated without the hook.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sandbox import ROOT, Sandbox

from nemo_warp import exit_codes

HOOK = '''
"""Kills this process at its Nth change of the file system below WARP_KILL_ROOT."""
import os, signal, sys

at, root, log = (os.environ[f"WARP_KILL_{key}"] for key in ("AT", "ROOT", "LOG"))

def is_change(event, arguments):
    path = str(arguments[0])
    if not path.startswith(root) or path.endswith((".lock", ".tmp")) and event != "os.rename":
        return False  # a temporary file is nothing until it is renamed
    if event in ("os.rename", "os.rmdir", "os.link"):
        return True
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
    return (event == "os.mkdir" or writes) and not os.path.exists(path)

def watch(event, arguments):
    if event not in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.link"):
        return
    if not is_change(event, arguments):
        return
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{event} {arguments[0]}\\n".encode())
    os.close(file)
    with open(log) as changes:
        if changes.read().count("\\n") == int(at):
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


def _sandbox(directory: Path) -> Sandbox:
    """The smallest plan; fewer stages are no fewer kinds of effects."""
    sandbox = Sandbox(directory)
    sandbox.save(iterations=1, members=1, launcher={"side_by_side": 1})
    return sandbox


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_each_change(tmp_path_factory: pytest.TempPathFactory) -> None:
    undisturbed = _sandbox(tmp_path_factory.mktemp("undisturbed"))
    code, changes = _hooked(undisturbed, at=10**9)
    assert code == exit_codes.DONE
    expected = undisturbed.artifacts()
    # The last of each kind: the run after it is the shortest.
    kinds = {_kind(change): index for index, change in enumerate(changes, start=1)}
    renamed = ("recipe.yaml", "inputs.json", "stage.json", "attempt.json", "completion.json")
    assert all(any(name in kind for kind in kinds) for name in renamed), kinds

    def kill_and_repeat(kind: str, index: int) -> None:
        sandbox = _sandbox(directory / str(index))
        _hooked(sandbox, at=index)
        assert_nothing_half_built(sandbox, expected)
        code, output = sandbox.call()
        assert code == exit_codes.DONE, f"killed at change {index}, {kind}: {output}"
        assert sandbox.artifacts() == expected, f"killed at change {index}, {kind}"

    directory = tmp_path_factory.mktemp("killed")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(kill_and_repeat, kinds.keys(), kinds.values()))


def _kind(change: str) -> str:
    """The same effect on another stage, or under another process id, is the same effect."""
    event, path = change.split(" ", 1)
    name = "".join(c for c in Path(path).name if not c.isdigit())
    stages = ("member_", "merge", "evaluation", "front", "final", "report")
    if event == "os.mkdir" and name in stages:
        name = "a stage"
    return f"{event} {'a task log' if Path(path).parent.name == 'local' else name}"


def assert_nothing_half_built(sandbox: Sandbox, expected: dict[str, bytes]) -> None:
    """What has a completion record is whole, byte for byte."""
    for record in sandbox.run_directory.rglob("completion.json"):
        stage = str(record.parent.relative_to(sandbox.run_directory))
        for name, content in expected.items():
            if str(Path(name).parent) == stage:
                assert (sandbox.run_directory / name).read_bytes() == content
