"""Progress: a bar on a terminal, plain lines elsewhere."""

import io

import pytest

from nemo_warp import progress as module
from nemo_warp.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(stream: io.StringIO, number: int = 50) -> str:
    with progress(total=number, desc="member", unit="step", stream=stream) as bar:
        for step in range(number):
            bar.set_postfix(reward=f"{step / 100:.2f}")
            bar.update(1)
    return stream.getvalue()


def test_off_a_terminal_there_are_a_few_plain_lines() -> None:
    text = steps(io.StringIO())
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert 1 <= len(lines) <= 3, "now and then, not every step"
    assert "50/50" in lines[-1] and "reward=0.49" in lines[-1] and "member" in lines[-1]
    assert all(lines)


def test_every_line_interval_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_INTERVAL_S", 0.0)
    assert len(steps(io.StringIO(), number=5).splitlines()) >= 5


def test_a_terminal_has_a_bar() -> None:
    assert "\r" in steps(Terminal())


def test_silent_ranks_say_nothing() -> None:
    stream = io.StringIO()
    list(progress(range(3), disable=True, stream=stream))
    assert stream.getvalue() == ""
