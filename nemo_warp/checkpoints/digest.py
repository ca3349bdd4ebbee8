"""A model's hash, which a merge records for its inputs: equal in every format and layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def weights_digest(tensors: Iterable[dict[str, int]]) -> str:
    """SHA-256 of a model's weights from its tensors' CRC-32s: the same in every layout.

    Args:
        tensors: dictionaries of canonical name -> CRC-32 of the tensor's true rows.
    """
    # Sorted by name: files and layouts give tensors in any order.
    lines = sorted(f"{name} {crc:08x}\n" for found in tensors for name, crc in found.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
