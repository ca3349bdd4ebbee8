"""Ports that are still free when a rank, some seconds later, listens on them."""

import random
import socket
from pathlib import Path

import pytest

from nemo_warp import ports

_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.skipif(not _OUTGOING.exists(), reason="no /proc")
def test_no_outgoing_connection_is_given_the_port():
    first = int(_OUTGOING.read_text().split()[0])
    assert all(ports.free_port("127.0.0.1") < first for _ in range(50))


def test_another_is_drawn_while_one_is_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free = ports.free_port("127.0.0.1")
        draws = [taken.getsockname()[1], free]
        monkeypatch.setattr(random.SystemRandom, "randrange", lambda *_: draws.pop(0))
        assert ports.free_port("127.0.0.1") == free
    assert draws == []


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(OSError, match="assign"):
        ports.free_port("192.0.2.1")  # of RFC 5737: nobody's
