"""Readers, read-only and full file systems, no locks, stale handles: one sentence with the path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sandbox import ROOT, Sandbox

from nemo_warp import exit_codes

PROGRAM = """
import contextlib, errno, io, json, os, sys
from nemo_warp.cli import main
from nemo_warp.pipeline.task import main as task
fault, root, results = os.environ.get("FAULT"), sys.argv[1], {}

def suffer(event, arguments):
    if fault == "ENOLCK" and event == "fcntl.flock":
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    if fault == "ESTALE" and event == "open" and str(arguments[0]).startswith(root):
        if str(arguments[0]).endswith("completion.json"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), arguments[0])

sys.addaudithook(suffer)
for words in sys.argv[2:]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        command, *more = words.split()
        code = task([root, *more]) if command == "task" else main([command, *more, root])
    results[words] = [code, said.getvalue()]
print(json.dumps(results))
"""
READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
FULL = 'mount -t tmpfs -o size=16k none "$1" && head -c 16k /dev/zero >"$1/full"; shift; exec "$@"'
READERS = ("status", "status --cost", "logs", "clean --dry-run")
WRITERS = ("run", "stop", "clean")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    sandbox = Sandbox(tmp_path_factory.mktemp("finished"))
    sandbox.save(iterations=1)
    assert sandbox.call()[0] == exit_codes.DONE
    return sandbox


def called(
    words: tuple[str, ...], target: Path, *commands: str, **environment: str
) -> dict[str, tuple[int, str]]:
    """What the commands on ``target`` answer in one process that ``words`` start."""
    line = [*words, sys.executable, "-c", PROGRAM, str(target), *commands]
    result = subprocess.run(
        line, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if words and any(sign in result.stderr for sign in ("unshare:", "setpriv:", "mount:")):
        pytest.skip(result.stderr)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def in_a_mount(script: str, directory: Path) -> tuple[str, ...]:
    return ("unshare", "--mount", "sh", "-c", script, "sh", str(directory))


def assert_one_sentence(answer: tuple[int, str], *expected: str) -> None:
    code, said = answer
    assert code == exit_codes.FAILED, said
    lines = [line for line in said.splitlines() if line]
    assert len(lines) == 1, said
    assert lines[0].startswith("error: ")
    assert all(text in said for text in expected), said


def test_a_read_only_mount(finished: Sandbox) -> None:
    run = finished.run_directory
    answers = called(in_a_mount(READ_ONLY, run), run, *READERS, *WRITERS)
    for command in READERS:
        assert answers[command][0] == exit_codes.DONE, answers[command]
    assert "nothing, it is done" in answers["status"][1]
    for command in WRITERS:
        assert_one_sentence(answers[command], str(run), "Read-only file system: nothing was")


def test_a_reader_without_permission_to_write(finished: Sandbox) -> None:
    """Root without the capability to override permissions, as any other user."""
    run = finished.run_directory
    places = [p for p in (run, *run.rglob("*")) if not p.is_symlink()]
    modes = {place: place.stat().st_mode & 0o777 for place in places}
    try:
        for place in reversed(places):
            place.chmod(modes[place] & 0o555)
        user = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
        answers = called(user if os.geteuid() == 0 else (), run, *READERS, *WRITERS)
    finally:
        for place in places:
            place.chmod(modes[place])
    for command in READERS:
        assert answers[command][0] == exit_codes.DONE, answers[command]
    for command in WRITERS:
        assert_one_sentence(answers[command], str(run), "Permission denied: ask its owner")


def test_a_full_disk(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    run = sandbox.run_directory
    run.mkdir()
    answers = called(in_a_mount(FULL, run), sandbox.recipe, "run")
    assert_one_sentence(answers["run"], str(run), "No space left on device: make room there")


def test_no_locks_and_stale_handles(finished: Sandbox) -> None:
    run = finished.run_directory
    answers = called((), run, "run", "task iteration_01/merge", FAULT="ENOLCK")
    for answer in answers.values():
        assert_one_sentence(answer, f"{run}/locks/", "no locks (flock)", "option flock")
    for answer in called((), run, "status", "run", FAULT="ESTALE").values():
        assert_one_sentence(answer, "completion.json: Stale file handle", "another node")
