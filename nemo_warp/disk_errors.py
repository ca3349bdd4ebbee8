"""What a file system can refuse, as one sentence with the path and what to do about it."""

from __future__ import annotations

import errno

_NO_LOCKS = (
    "this file system has no locks (flock) that hold between nodes, and two drivers would act at "
    "once; mount it with them (Lustre: option flock; NFS: version 4), or give a run_directory "
    "elsewhere; nemo-warp doctor --run-directory tries it"
)
_ADVICE = {
    errno.EROFS: "nothing was written; run this where the file system is mounted for writing",
    errno.EACCES: "ask its owner for the permission, or run this as its owner",
    errno.EPERM: "ask its owner for the permission, or run this as its owner",
    errno.ENOSPC: "make room there (nemo-warp clean RUN --dry-run says what may go), then repeat",
    errno.EDQUOT: "make room in your quota (nemo-warp clean RUN --dry-run), then repeat",
    errno.ESTALE: "somebody replaced it on the file server; repeat this, or run it on another node",
    errno.EIO: "repeat this; if it stays so, ask who runs the file system",
    errno.ENOTCONN: "the file system has gone away; mount it again, then repeat",
    errno.EHOSTDOWN: "the file server has gone away; repeat this when it is back",
    errno.ETIMEDOUT: "the file server does not answer; repeat this when it does",
    errno.ENOLCK: _NO_LOCKS,
    errno.ENOSYS: _NO_LOCKS,
    errno.EOPNOTSUPP: _NO_LOCKS,
}


def in_a_sentence(error: OSError) -> str | None:
    """What to tell a person; None for an error that is a bug and keeps its stack trace."""
    advice = _ADVICE.get(error.errno or 0)
    if advice is None or error.filename is None:
        return None
    path = error.filename.decode() if isinstance(error.filename, bytes) else error.filename
    return f"{path}: {error.strerror}: {advice}"
