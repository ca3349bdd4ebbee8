"""The live view on a pseudo-terminal: nothing wraps and nothing scrolls, at any size."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from sandbox import ROOT, Sandbox

from nemo_warp.pipeline.commands.terminal import clip
from nemo_warp.pipeline.commands.view import Live
from nemo_warp.pipeline.disk.state import StageState, Status
from nemo_warp.pipeline.recipe.load import load_recipe

_ESCAPE = re.compile(r"\x1b\[([0-9;]*)([A-Za-z])")


class Screen:
    """As much of a terminal as the live view uses; counts rows it had to scroll or wrap."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.row = self.column = self.scrolled = self.wrapped = 0
        self.lines: dict[int, str] = {}
        self._half = ""

    def feed(self, text: str) -> None:
        text, self._half = self._half + text, ""
        position = 0
        while position < len(text):
            escape = _ESCAPE.match(text, position)
            if escape:
                self._escape(escape[2])
                position = escape.end()
                continue
            if text[position] == "\x1b":
                self._half = text[position:]
                return
            self._character(text[position])
            position += 1

    def _escape(self, command: str) -> None:
        if command == "H":
            self.row = self.column = 0
        elif command in "JK":
            for row in list(self.lines) if command == "J" else []:
                if row > self.row or self.row == self.column == 0:
                    del self.lines[row]
            self.lines[self.row] = self.lines.get(self.row, "")[: self.column]
        else:
            assert command == "m", f"not in the live view's vocabulary: {command}"

    def _character(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row += 1
            if self.row == self.rows:
                self.row, self.scrolled = self.row - 1, self.scrolled + 1
        else:
            if self.column == self.columns:
                self.wrapped += 1
            line = self.lines.get(self.row, "").ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1


class Terminal:
    """A pseudo-terminal, its writing end a text stream."""

    def __init__(self, columns: int, rows: int) -> None:
        self._reader, writer = pty.openpty()
        self.stream = os.fdopen(writer, "w")
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self.stream.fileno(), termios.TIOCSWINSZ, size)
        self.screen = Screen(columns, rows)

    def look(self) -> Screen:
        self.stream.flush()
        os.set_blocking(self._reader, False)
        try:
            while data := os.read(self._reader, 65536):
                self.screen.feed(self._decoder.decode(data))
        except BlockingIOError:
            return self.screen
        return self.screen

    def close(self) -> None:
        self.stream.close()
        os.close(self._reader)


@pytest.mark.parametrize("members", [2, 30])
@pytest.mark.parametrize("size", [(80, 24), (110, 50), (20, 10), (40, 4)])
def test_nothing_scrolls_and_nothing_wraps(
    sandbox: Sandbox, members: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    sandbox.save(members=members)
    recipe = load_recipe(sandbox.recipe)
    states = {s.name: StageState(s, Status.WAITING, f"needs {s.name}\n" * 9) for s in recipe.stages}
    terminal = Terminal(*size)
    live = Live(recipe, terminal.stream)
    for number, stage in enumerate(recipe.stages):
        states[stage.name] = StageState(stage, Status.FAILED, "no \x1b[5mreason\U0001f4a5 " * 20)
        live.show(states)
        states[stage.name] = StageState(stage, Status.DONE if number else Status.FAILED)
        live.ended(stage.name, 1)
        live.tick(states)
        screen = terminal.look()
        assert (screen.scrolled, screen.wrapped) == (0, 0)
    live.show(states)
    shown = terminal.look().lines
    assert "1 FAILED" in " ".join(shown.values()) or size[0] < 80
    assert any("iteration_01/member" in line for line in shown.values()), "the failed one is kept"
    terminal.resize(60, 12)
    live.show(states)
    screen = terminal.look()
    live.close()
    terminal.look()
    terminal.close()
    assert (screen.scrolled, screen.wrapped) == (0, 0)
    assert max(len(line) for line in screen.lines.values()) < 60


def test_a_whole_run_on_a_small_terminal(sandbox: Sandbox) -> None:
    """`run` itself, with an attempt that fails, under 80 x 24."""
    sandbox.save(iterations=1)
    sandbox.fault("iteration_01/member_01", "exit-1@2")
    terminal = Terminal(80, 24)
    process = subprocess.Popen(
        [sys.executable, "-m", "nemo_warp.cli", "run", str(sandbox.recipe)],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=terminal.stream,
        stderr=subprocess.STDOUT,
    )
    while process.poll() is None:
        terminal.look()
    screen = terminal.look()
    terminal.close()
    assert process.returncode == 0
    assert screen.scrolled == 0
    text = "\n".join(screen.lines.values())
    assert "exit code 1" in text, "the failed attempt is told"
    assert "fake is done." in text


def test_lines_are_clipped_by_what_they_show() -> None:
    assert clip("a\tb\x1b[1mc\nd", 80) == "a b [1mc d"
    assert clip("漢字漢字", 5) == "漢字"
    assert clip("e\u0301" * 3, 2) == "e\u0301" * 2
