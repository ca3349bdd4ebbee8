"""Two merges to one output, each stopped before any of its filesystem effects, in all orders.

Whatever happens, the name holds what it held before, the first merge's output, or the second's,
whole; and a merge that is run afterwards ends well and leaves nothing else behind.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from every_reference import replace_function
from synthetic_checkpoints import write_torch_dist

from nemo_warp.merge import merge
from nemo_warp.merge.publish import renaming
from nemo_warp.records import code_version

pytestmark = pytest.mark.slow
CONTENT = ("pwrite", "ftruncate", "fdatasync")
"""Of these, which change files in an attempt's own folder, several in a row are one effect."""

EFFECTS = {
    os: (*CONTENT, "open", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir"),
    fcntl: ("flock",),
    renaming: ("_renameat2",),
}
GO, WAITING, DONE, REFUSED = b"g", b".", b"d", b"r"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Models of one tensor: few effects, so that all pairs of them can be tried."""
    folder, generator = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)
    init = torch.randn(8, 4, generator=generator)
    for name in ("init", "a", "b", "c", "d"):
        moved = init if name == "init" else init + torch.randn(8, 4, generator=generator)
        (folder / name).mkdir()
        weights = {"embedding.word_embeddings.weight": moved}
        write_torch_dist(folder / name / "model_weights", weights, extra_state=False)
    code_version()  # cached before any fork
    _merge(folder, folder / "warm", "a", False)
    return folder


def _merge(models: Path, output: Path, first: str, overwrite: bool) -> None:
    init, one, other = (models / name / "model_weights" for name in ("init", first, "d"))
    options = {"workers": 1, "vocab_size": 8, "overwrite": overwrite}
    merge(init, [one, other], str(output), **options)


class Stepped:
    """A merge in a process of its own that waits before every filesystem effect."""

    def __init__(self, *merge_arguments):
        (self._said, say), (go, self._go) = os.pipe(), os.pipe()
        self.process = os.fork()
        if self.process == 0:
            _child(say, go, merge_arguments)
        os.close(say)
        os.close(go)
        self.state = os.read(self._said, 1)

    def steps(self, number: int = 1 << 30) -> bool:
        """Let it have so many effects; whether it waits before a further one."""
        while self.state == WAITING and number > 0:
            os.write(self._go, GO)
            self.state, number = os.read(self._said, 1), number - 1
        return self.state == WAITING

    def end(self, kill: bool = False) -> bytes:
        """Let it come to its end, or kill it where it is; `DONE`, `REFUSED` or nothing."""
        if kill and self.state == WAITING:
            os.kill(self.process, signal.SIGKILL)
            self.state = b""
        self.steps()
        os.close(self._said)
        os.close(self._go)
        os.waitpid(self.process, 0)
        return self.state


def _child(say: int, go: int, merge_arguments) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    turn, before = threading.Lock(), [""]

    def watched(name, real):
        def call(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            with turn:
                if not {name, before[0]} <= {*CONTENT}:
                    os.write(say, WAITING)
                    if os.read(go, 1) != GO:
                        os._exit(1)
                before[0] = name
                return real(*args, **kwargs)

        return call

    for module, names in EFFECTS.items():
        for name in names:
            replace_function(module, name, watched(name, getattr(module, name)))
    try:
        _merge(*merge_arguments)
        os.write(say, DONE)
    except ValueError:
        os.write(say, REFUSED)
    finally:
        os._exit(0)


def _tree(path: Path) -> dict[str, bytes]:
    """A checkpoint's files; one without a name if it is a tar, none if it is not there."""
    if path.is_file():
        return {"": path.read_bytes()}
    files = (found for found in path.rglob("*") if found.is_file())
    return {found.relative_to(path).as_posix(): found.read_bytes() for found in files}


class Name:
    """The output's name: a tar that is new, or a folder that replaces an older one."""

    def __init__(self, models: Path, folder: Path, is_new_tar: bool):
        self.models, self.folder, self.overwrite = models, folder, not is_new_tar
        self.path = folder / ("out.nemo" if is_new_tar else "out")
        self.whole = {}
        for first in ("c", "a", "b"):  # "c" and "a" are the two merges, "b" is older
            self.reset()
            _merge(models, self.path, first, self.overwrite)
            self.whole[first] = _tree(self.path)
        assert len({str(tree) for tree in self.whole.values()}) == 3
        self._old = self.whole.pop("b") if self.overwrite else {}
        self.reset()

    def reset(self) -> None:
        """As before any merge."""
        if self.overwrite and self.path.exists():
            return  # the old and the new are equally good to be replaced
        self.path.unlink(missing_ok=True)

    def start(self, first: str) -> Stepped:
        return Stepped(self.models, self.path, first, self.overwrite)

    def check(self) -> None:
        """Nothing, an older output, or one of the two, whole."""
        assert _tree(self.path) in (self._old, *self.whole.values())

    def check_end(self, *may_be: str) -> None:
        """One of these, whole, and nothing beside it."""
        assert _tree(self.path) in [self.whole[first] for first in may_be]
        assert [path.name for path in self.folder.iterdir()] == [self.path.name]


def _stops(name: Name) -> Iterator[tuple[Stepped, Stepped, bool]]:
    """Pairs of merges, stopped before all pairs of effects; each twice, so that each may go first.

    The two are alike, so the second is never the one that comes further.
    """
    for i in count():
        for j in range(i + 1):
            for swap in (False, True):
                pair = name.start("a"), name.start("c")
                on = pair[0].steps(i), pair[1].steps(j)
                yield *pair, swap
                if not all(on):
                    break  # the other order is the same
            if not on[1]:
                break
        if not on[0]:
            return


def test_two_merges_that_wait_for_each_other(models, tmp_path):
    name, pairs, both = Name(models, tmp_path, is_new_tar=False), 0, 0
    for a, c, swap in _stops(name):
        name.check()
        first, last = ((a, "a"), (c, "c"))[:: -1 if swap else 1]
        ended = {first[1]: first[0].end()}
        name.check()
        ended[last[1]] = last[0].end()
        done = [one for one, state in ended.items() if state == DONE]
        assert done
        assert {*ended.values()} <= {DONE, REFUSED}
        name.check_end(*done)
        pairs, both = pairs + 1, both + (len(done) == 2)
    assert pairs > 100
    assert both > 0


@pytest.mark.parametrize("is_new_tar", [True, False])
def test_two_merges_that_are_killed(models, tmp_path, is_new_tar):
    """One is killed before each of its effects, another at random then; a third comes after."""
    name, rng = Name(models, tmp_path, is_new_tar), random.Random(0)
    for i in count():
        name.reset()
        killed = name.start("a")
        on = killed.steps(i)
        killed.end(kill=True)
        name.check()
        second = name.start("c")
        second.steps(rng.randrange(2 * i + 10))
        second.end(kill=True)
        name.check()
        ended = name.start("a").end()
        if ended == REFUSED:  # the second was done, but for what it leaves behind
            assert is_new_tar
            name.start("c").end()
        name.check_end(*("a" if ended == DONE else "ac"))
        if not on:
            break
    assert i > 15
