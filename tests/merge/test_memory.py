"""Memory that threads share: never above its limit, never a wait without end."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nemo_warp.merge.compute.memory import Memory


def test_the_limit_holds_whatever_is_taken_and_given():
    memory, held, lock, peak = Memory(100_000), [0], threading.Lock(), [0]

    def use(seed: int) -> None:
        for size in np.random.default_rng(seed).integers(1, 50_000, 50):
            buffer = memory.take(int(size))
            with lock:
                held[0] += len(buffer)
                peak[0] = max(peak[0], held[0])
            buffer[:] = seed
            assert (buffer == seed).all()  # nobody else writes here
            with lock:
                held[0] -= len(buffer)
            memory.give(buffer)

    whole = [memory.take(50_000) for _ in range(2)]  # all of it, whatever the threads come to
    peak[0] = sum(map(len, whole))
    for buffer in whole:
        memory.give(buffer)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert 50_000 < peak[0] <= 100_000


def test_buffers_are_used_again_or_make_room_for_others():
    memory = Memory(10_000)
    first = memory.take(6000)
    first[:] = 7
    memory.give(first)
    assert memory.take(6000) is first
    memory.give(first)
    other = memory.take(5000)  # only without the first
    assert len(other) == 5000
    assert not first.any()  # its pages went back, although it is still known here


def test_waiting_ends_when_memory_is_given_or_closed():
    memory = Memory(1000)
    held = memory.take(1000)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(memory.take, 1000)
        memory.give(held)
        assert len(waiting.result(timeout=60)) == 1000
        stopped = pool.submit(memory.take, 1)
        memory.close()
        with pytest.raises(RuntimeError, match="stopped"):
            stopped.result(timeout=60)


def test_earlier_tickets_are_served_first():
    memory = Memory(1000)
    held, early, late = memory.take(1000), memory.ticket(), memory.ticket()
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(memory.take, 10, late)  # there would be room for this one sooner
        memory.give(held)
        assert not second.done()
        first = memory.take(600, early)
        assert len(second.result(timeout=60)) == 10
        assert len(first) == 600


def test_a_buffer_above_the_limit_is_served_alone():
    memory = Memory(1000)
    small = memory.take(1)
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(memory.take, 5000)
        memory.give(small)
        assert len(large.result(timeout=60)) == 5000
