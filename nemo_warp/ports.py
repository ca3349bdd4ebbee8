"""Free TCP ports for servers that start later."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000
_ATTEMPTS = 100


def free_port(host: str = "") -> int:
    """A port that was free a moment ago, and that no outgoing connection will take.

    A rank listens on its port some 15 s after it was chosen (it imports NeMo first). A port that
    the kernel picks (bind to 0) comes from the range that it also gives to outgoing connections,
    so on a busy node somebody has it by then. This one lies below that range, and is drawn at
    random, so that stages that start at once do not meet.

    Args:
        host: the address to listen on; empty: all of this machine's.

    Raises:
        OSError: ``host`` is not this machine's, or 100 ports were all in use.
    """
    below = _first_ephemeral()
    draw = random.SystemRandom()  # members with equal seeds need different ports
    for attempt in range(1, _ATTEMPTS + 1):
        port = draw.randrange(_LOWEST, below)
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or attempt == _ATTEMPTS:
                    raise
            else:
                return port
    raise AssertionError("unreachable")


def _first_ephemeral() -> int:
    """Where the range of outgoing connections begins, if that leaves enough below it."""
    try:
        first = int(_RANGE.read_text().split()[0])
    except (OSError, ValueError):  # not Linux, or no /proc
        return 32_768
    return first if first > _LOWEST + 1000 else 32_768
