"""A merge's memory across kills: which groups are on disk, and what was measured on the way.

Lines of JSON, each appended and fsynced after the bytes it speaks of are. A torn last line is
ignored. The journal lies in the outputs' hidden folder and goes with it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from nemo_warp.merge.results import GroupResult


class Journal:
    """One process's journal in ``folder``; reading looks at those of all processes.

    Args:
        folder: hidden folder of the first output.
        identity: of the plan; lines of other plans are ignored.
        rank: number of the writing process.
    """

    def __init__(self, folder: Path, identity: str, rank: int = 0):
        self.folder, self.identity = folder, identity
        self._path = folder / f"journal_{rank}.jsonl"

    def groups(self) -> dict[str, GroupResult]:
        """Groups that were finished, by name."""
        lines = [line for line in self._lines() if "group" in line]
        return {line["group"]: GroupResult.from_json(line) for line in lines}

    def is_sealed(self) -> bool:
        """Whether the outputs are complete and only need their names."""
        return any("sealed" in line for line in self._lines())

    def belongs(self) -> bool:
        """Whether any line is of this plan."""
        return any(True for _ in self._lines())

    def start(self) -> None:
        """Say which plan the folder belongs to, before anything else is in it."""
        self._append({"started": True})

    def add(self, group: GroupResult) -> None:
        """Remember a group whose bytes are durable."""
        self._append(group.to_json())

    def seal(self) -> None:
        """Remember that all outputs are complete and durable."""
        self._append({"sealed": True})

    def _append(self, line: dict) -> None:
        text = json.dumps({"plan": self.identity, **line}) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, b"\n" + text.encode())  # a torn line before stays on its own
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _lines(self):
        for path in sorted(self.folder.glob("journal_*.jsonl")):
            for text in path.read_text(errors="replace").splitlines():
                try:
                    line = json.loads(text) if text else {}
                except ValueError:
                    continue
                if isinstance(line, dict) and line.get("plan") == self.identity:
                    yield line
