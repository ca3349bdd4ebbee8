"""How the outputs of a merge come to their names: first all bytes, then the names, under one lock.

For each output ``NAME`` there is a folder ``.NAME.merging`` beside it, on the same file system:

    lock           held (flock) from before the first byte until after the last name
    <attempt>/     what one attempt writes; no other attempt ever looks into it
      content      the output, a tar or a folder
    sealed.json    in the first output's folder: which attempt is complete, and what it measured

The state of a merge is what of this is on disk:

    free --begin--> building --seal--> sealed --publish, finish--> free
      ^----------------'  an error, or the next merge after a kill

Building: nobody but the attempt itself reads its bytes. If it dies here, it is started again from
the first byte: two policies of 70B take five minutes on one NVMe drive, a resumed merge would have
to reread and check what it finds, and every byte found would have to be proved to be of the same
merge. Sealed: all outputs are complete, durable, and verified if that was asked for. If the merge
dies here, the same command (`MergePlan.identity`) gives the names that are missing.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from nemo_warp.merge.publish.renaming import exchange, rename_to_free_name
from nemo_warp.merge.publish.targets import check_target
from nemo_warp.records import fsync_directory, write_json_atomically

logger = logging.getLogger(__name__)

CONTENT, LOCK, SEAL = "content", "lock", "sealed.json"
CHECKS = (None, "sample", "full")
"""How outputs can be verified, from nothing to everything."""


class Transaction:
    """The outputs of one merge between their first byte and their names; a context manager.

    Args:
        finals: the names.
        identity: of the plan.
        overwrite: whether names may be taken from older checkpoints.
        known: names of the files in an output that is a folder.
        verify: one of `CHECKS`: what has to come before the names.
    """

    def __init__(
        self,
        finals: list[Path],
        identity: str,
        overwrite: bool = False,
        known: Collection[str] = (),
        verify: str | None = None,
    ):
        self.finals, self._identity = finals, identity
        self._overwrite, self._known, self._verify = overwrite, known, verify
        self._attempt = ""
        self._sealed: dict[str, Any] | None = None
        self._locks = ExitStack()

    def __enter__(self) -> Transaction:
        """Lock all outputs, and look whether a killed merge had sealed them.

        Raises:
            ValueError: another merge is at work on one of them.
        """
        with ExitStack() as locks:
            # Sorted: of two merges with the same outputs in another order one gets all locks;
            # otherwise each could get one and refuse the other.
            for final in sorted(self.finals):
                locks.enter_context(_locked(hidden_folder(final)))
            self._sealed = self._read_seal()
            # No seal: whatever is there was left by an attempt that died, as nobody else has the
            # lock. A seal of another plan stays until this merge begins: its user may still want
            # its names.
            if not (hidden_folder(self.finals[0]) / SEAL).exists():
                self._clear()
            self._locks = locks.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        """Give the locks back; of an attempt that was not sealed nothing stays."""
        if self._sealed is None and self._attempt:
            for content in self.contents:
                shutil.rmtree(content.parent, ignore_errors=True)
        self._locks.close()

    @property
    def attempt(self) -> str:
        """Names the folders that this attempt, all its processes together, writes into."""
        return self._attempt

    @property
    def contents(self) -> list[Path]:
        """Where each output is written."""
        return contents_of(self.finals, self._attempt)

    @property
    def sealed_measures(self) -> Any | None:
        """What was measured by the merge that got as far as to its seal; None before it."""
        return None if self._sealed is None else self._sealed["measures"]

    def begin(self) -> None:
        """Make room for a new attempt; what dead ones left is removed.

        Raises:
            ValueError: a name is taken.
        """
        for final in self.finals:
            check_target(final, self._overwrite, self._known)
        # A seal before what it seals: a folder keeps its inode while it is emptied, so a kill in
        # between would leave a seal that vouches for an empty folder.
        seal = hidden_folder(self.finals[0]) / SEAL
        seal.unlink(missing_ok=True)
        fsync_directory(seal.parent)
        self._clear()
        # A name of its own: a process of an older attempt that still runs on another node (a file
        # system without locks) writes into another folder.
        self._attempt = uuid.uuid4().hex
        for content in self.contents:
            content.parent.mkdir()

    def seal(self, measures: Any) -> None:
        """Note that all outputs are complete, durable and verified as wanted.

        Args:
            measures: plain values to keep until the names are given.
        """
        note = {
            **{"plan": self._identity, "attempt": self._attempt, "verified": self._verify},
            **{"inodes": [_inode(content) for content in self.contents], "measures": measures},
        }
        # One file decides for all outputs: there is no moment in which some are sealed and others
        # not.
        write_json_atomically(hidden_folder(self.finals[0]) / SEAL, note)
        self._sealed = note

    def publish(self) -> None:
        """Give every sealed output its name in one step each; what had the name moves here.

        Raises:
            ValueError: a name has been taken in the meantime.
            OSError: the file system cannot replace it.
        """
        for final, content, inode in self._sealed_outputs():
            # The inode tells it from what had the name before, which an exchange has put here.
            if _inode(content) != inode:  # it has its name already
                continue
            check_target(final, self._overwrite, self._known)
            if not os.path.lexists(final):
                rename_to_free_name(content, final)
            # rename(2) replaces a file by a file only; folders are swapped, and the old one is
            # removed later.
            elif final.is_dir() or content.is_dir():
                exchange(content, final)
            else:
                content.replace(final)
            fsync_directory(final.parent)

    def finish(self) -> None:
        """Forget the merge: it is done."""
        self._clear()

    def _clear(self) -> None:
        """Remove everything but the locks; the seal, which is in the first one's folder, last."""
        for folder in map(hidden_folder, reversed(self.finals)):
            # The seal last: if this is killed, the next merge knows that there was nothing left to
            # publish.
            for path in sorted(folder.iterdir(), key=lambda path: path.name == SEAL):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()

    def _sealed_outputs(self) -> Iterator[tuple[Path, Path, int]]:
        assert self._sealed is not None
        contents = contents_of(self.finals, self._sealed["attempt"])
        yield from zip(self.finals, contents, self._sealed["inodes"], strict=True)

    def _read_seal(self) -> dict[str, Any] | None:
        """The seal, if it is this plan's and nothing of what it seals was lost since."""
        try:
            self._sealed = json.loads((hidden_folder(self.finals[0]) / SEAL).read_text())
        except (OSError, ValueError):
            return None
        enough = CHECKS.index(self._sealed["verified"]) >= CHECKS.index(self._verify)
        if self._sealed["plan"] != self._identity or not enough:
            return None
        # Each output has to be where it was sealed, or under its name.
        there = all(inode in map(_inode, of) for *of, inode in self._sealed_outputs())
        return self._sealed if there else None


def hidden_folder(final: Path) -> Path:
    """Where an output is until it has its name."""
    return final.with_name(f".{final.name}.merging")


def contents_of(finals: list[Path], attempt: str) -> list[Path]:
    """Where an attempt writes each output."""
    return [hidden_folder(final) / attempt / CONTENT for final in finals]


def _inode(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.lstat().st_ino
    return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock in ``folder``, which is made and, if nothing else is in it then, removed.

    Raises:
        ValueError: another process holds it.
    """
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link; merges need a folder of their own there, remove it")
    descriptor = _take(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # an attempt or a seal is left
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
        os.close(descriptor)


def _take(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # whoever had it removed the folder just now
            continue
        # The lock may be of a file that its last holder has unlinked: only the one that has the
        # name counts.
        if _flock(descriptor, folder) and os.fstat(descriptor).st_ino == _inode(folder / LOCK):
            return descriptor
        os.close(descriptor)  # of a lock that was removed before it was taken


def _flock(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another merge is at work in {folder}; wait for it or stop it") from None
    except OSError as error:  # attempts do not meet without locks either: the last to publish wins
        logger.warning("%s: the file system has no locks (%s)", folder, error)
    return True
