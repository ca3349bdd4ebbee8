"""Merges that are killed, run out of space or may not write: old state or complete output."""

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from every_reference import replace_function
from synthetic_checkpoints import tiny_weights, write_nemo, write_torch_dist

from nemo_warp import exit_codes
from nemo_warp.checkpoints.io.direct import reserve
from nemo_warp.merge import cli, merge
from nemo_warp.records import code_version

ETAS = (0.3, 1.0)
CALLS = (
    *("pwrite", "write", "fsync", "fdatasync", "ftruncate", "open"),
    *("rename", "replace", "unlink", "rmdir", "mkdir"),
)
"""Functions of `os` before any of which the process may die or the disk be full."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    init = tiny_weights(0, layers=4)
    for seed, name in enumerate(("init", "a", "b")):
        weights = init if not seed else tiny_weights(seed, layers=4, around=init)
        write_nemo(folder / f"{name}.nemo", lambda to, w=weights: write_torch_dist(to, w, tp=2))
    code_version()  # cached, so that all forks agree on it even if a commit comes in between
    return folder


def _merge(models: Path, output: Path, **options) -> None:
    template = str(output / "eta_{eta}.nemo") if options.pop("tar") else str(output / "eta_{eta}")
    policies = [models / "a.nemo", models / "b.nemo"]
    merge(models / "init.nemo", policies, template, eta=ETAS, workers=2, **options)


def _in_child(function, *args, kill_after: float | None = None, **options) -> int:
    """Exit code of a forked process that calls the function; -9 if it was killed."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            function(*args, **options)
            os._exit(0)
        except BaseException:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _interrupt(number: int, action) -> list[int]:
    """Call ``action`` before the ``number``-th of `CALLS`; the list counts the calls so far."""
    counted = [0]

    def watched(real):
        def call(*args, **kwargs):
            counted[0] += 1
            if counted[0] == number:
                action()
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        replace_function(os, name, watched(getattr(os, name)))
    return counted


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _merge_and_die(models: Path, output: Path, number: int, **options) -> None:
    _interrupt(number, _die)
    _merge(models, output, **options)


def _merge_and_count(models: Path, output: Path, note: Path, **options) -> None:
    counted = _interrupt(-1, _die)
    _merge(models, output, **options)
    note.write_text(str(counted[0]))


def _tree(folder: Path) -> dict[str, bytes]:
    """Every visible file below the folder."""
    found = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    return {str(n): p.read_bytes() for n, p in found.items() if not n.parts[0].startswith(".")}


def _complete_or_old(folder: Path, wanted: dict[str, bytes], old: dict[str, bytes]) -> bool:
    """Whether each output is as before the merge or complete, with no file in between."""
    found = _tree(folder)
    for eta in ETAS:
        of_eta = [n for n in {*wanted, *old, *found} if n.split("/")[0].startswith(f"eta_{eta:g}")]
        states = [{n: tree[n] for n in of_eta if n in tree} for tree in (found, wanted, old)]
        if states[0] not in states[1:]:
            return False
    return True


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory):
    """Tar or not -> (files, seconds, number of `CALLS`) of a merge that nobody kills."""
    results = {}
    for tar in (True, False):
        folder = tmp_path_factory.mktemp("undisturbed")
        note = folder.with_suffix(".count")
        _in_child(_merge, models, folder, tar=tar)  # warm
        shutil.rmtree(folder)
        folder.mkdir()
        begin = time.monotonic()
        assert _in_child(_merge_and_count, models, folder, note, tar=tar) == 0
        results[tar] = _tree(folder), time.monotonic() - begin, int(note.read_text())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(30))
def test_kill_at_a_random_moment(models, undisturbed, tmp_path, trial):
    rng = random.Random(trial)
    tar, replace = trial % 3 != 0, trial % 2 == 0
    wanted, seconds, calls = undisturbed[tar]
    old = _old_outputs(models, tmp_path, tar) if replace else {}
    options = {"tar": tar, "overwrite": replace}
    for _ in range(rng.choice((1, 1, 2, 3))):
        if trial < 10:
            _in_child(_merge, models, tmp_path, kill_after=rng.uniform(0, seconds), **options)
        else:  # every call is as likely as any other, however short the time around it
            number = rng.randrange(1, calls + 1)
            _in_child(_merge_and_die, models, tmp_path, number, **options)
        assert _complete_or_old(tmp_path, wanted, old)
    if (code := _in_child(_merge, models, tmp_path, **options)) != 0:  # it was done already
        assert not replace
        assert code == 1
    assert _tree(tmp_path) == wanted
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def _old_outputs(models: Path, folder: Path, tar: bool) -> dict[str, bytes]:
    """Older checkpoints under the outputs' names."""
    for eta in ETAS:
        if tar:
            shutil.copy(models / "a.nemo", folder / f"eta_{eta:g}.nemo")
        else:
            shutil.unpack_archive(models / "a.nemo", folder / f"eta_{eta:g}", "tar")
    return _tree(folder)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_disk_that_fills_up_on_the_way(models, undisturbed, tmp_path, monkeypatch, share):
    number, counted = int(share * undisturbed[True][2]), [0]

    def pwrite(*args, real=os.pwrite):
        counted[0] += 1
        if counted[0] > number // 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left on device"):
        _merge(models, tmp_path, tar=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def _run_tool(models: Path, output: Path) -> int:
    inputs = [f"{models}/{name}.nemo" for name in ("init", "a", "b")]
    arguments = ["--init", inputs[0], "--policies", *inputs[1:], "--output", str(output)]
    return cli.main(arguments)


def test_reserving_tells_a_full_disk_beforehand(small_disk):
    full = pytest.raises(OSError, match="No space left on device")
    with (small_disk / "file").open("wb") as stream, full:
        reserve(stream.fileno(), 1 << 20)


def test_disk_that_is_too_small(models, small_disk, capfd):
    assert _run_tool(models, small_disk / "merged.nemo") == exit_codes.FAILED
    assert "the outputs need" in capfd.readouterr().err.splitlines()[-1]
    assert list(small_disk.iterdir()) == []


def test_disk_that_is_read_only(models, small_disk, capfd):
    subprocess.run(["mount", "-o", "remount,ro,size=64m", str(small_disk)], check=True)
    assert _run_tool(models, small_disk / "merged.nemo") == exit_codes.FAILED
    assert "Read-only file system" in capfd.readouterr().err.splitlines()[-1]
    assert list(small_disk.iterdir()) == []
