"""Seeds derived from the recipe's, and fingerprints of the files a run starts from."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCK_BYTES = 1 << 20
_MAX_BLOCKS = 64


def derive_seed(*parts: int) -> int:
    """A seed below 2**31 from the parts; changing any part gives an unrelated seed."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**31


def fingerprint(path: Path) -> str:
    """SHA-256 (hex) that tells whether a file or a directory tree has changed.

    Names, sizes and up to 64 blocks of 1 MiB spread evenly over each of up to 64 files: all of a
    small file, a sample of a large checkpoint. It notices replaced and truncated files in
    milliseconds; the merge records full hashes.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    every = max(1, len(files) // _MAX_BLOCKS)
    for index, file in enumerate(files):
        size = file.stat().st_size
        name = "" if file is path else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{size}\0".encode())
        if index % every == 0:
            _add_sample(digest, file, size, _MAX_BLOCKS if len(files) == 1 else 4)
    return digest.hexdigest()


def _add_sample(digest: hashlib._Hash, file: Path, size: int, max_blocks: int) -> None:
    blocks = -(-size // _BLOCK_BYTES)
    count = min(blocks, max_blocks)
    with file.open("rb") as stream:
        for index in range(count):
            # The first and the last block always: headers are at the one end, tar's and zip's
            # directories at the other.
            block = index * (blocks - 1) // max(1, count - 1)
            stream.seek(block * _BLOCK_BYTES)
            digest.update(stream.read(_BLOCK_BYTES))
