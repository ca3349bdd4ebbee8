"""What a member reports: ``metrics.jsonl`` (the record), TensorBoard and W&B (the views).

Timings go to ``timings.jsonl``, so that ``metrics.jsonl`` of a resumed run equals that of an
uninterrupted one byte for byte.
"""

from __future__ import annotations

import json
import math
import uuid
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from nemo.utils import logging
from nemo_aligner.utils.train_script_utils import CustomLoggerWrapper

from nemo_warp.evidence.trends import Thresholds, alarms, sampler_alarm
from nemo_warp.records import canonical_json, write_text_atomically

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"


class MetricsLog:
    """Writes metrics on rank 0; does nothing elsewhere.

    Args:
        directory: the member's.
        step: records of later steps (of an attempt that died after its last checkpoint) are
            dropped; they will be made again.
    """

    def __init__(self, directory: Path, loggers: Any, config: dict[str, Any], step: int, name: str):
        self._directory = directory
        self._limits = Thresholds(**config["alarms"])
        for file in (METRICS_FILE, TIMINGS_FILE):
            # Before the views are opened: both files are then the ones of the checkpoint that is
            # resumed.
            _keep_until(directory / file, step)
        views: list[Logger] = []
        if loggers.tensorboard:
            views.append(TensorBoardLogger(directory, name="tensorboard", version=""))
        if loggers.wandb:
            views.append(WandbLogger(**wandb_settings(directory, name, dict(loggers.wandb))))
        self._views = CustomLoggerWrapper(views)
        self._views.log_hyperparams(config)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One record: ``kind`` is ``train``, ``eval``, ``anchor`` or ``timing``; NaN becomes null.

        A record of an evaluation also holds its ``alarms``, and one of training if it has any;
        they are warned of.
        """
        record = {"step": step, "kind": kind, **{k: _finite(v) for k, v in values.items()}}
        if kind == "eval":
            record["alarms"] = self._alarms(record)
        elif kind == "train" and (found := sampler_alarm(values, self._limits)):
            record["alarms"] = self._warned(found, step)
        file = TIMINGS_FILE if kind == "timing" else METRICS_FILE
        # One write per line, and closed again: a reader sees whole lines, except perhaps the last,
        # while the member trains.
        with (self._directory / file).open("a") as stream:
            stream.write(canonical_json(record) + "\n")
        # TensorBoard and W&B take scalars; tables and texts stay in the record.
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        judges = (values.get("judges") or {}).items()
        numbers |= {f"judge_{name}": value for name, value in judges if value is not None}
        rewards = (values.get("rewards") or {}).items()
        numbers |= {f"reward_{name}": value for name, value in rewards if value is not None}
        self._views.log_metrics(numbers, step=step, prefix=f"{kind}/")

    def _alarms(self, record: dict[str, Any]) -> dict[str, str]:
        """What the evaluations until this one are alarming for."""
        # From the file and not from memory: the first evaluation may have been an attempt before.
        lines = _lines(self._directory / METRICS_FILE)
        before = [r for r in map(json.loads, lines) if r["kind"] == "eval"]
        before = [r for r in before if r["step"] < record["step"]]
        found = alarms([*before, record], self._limits)
        return self._warned(found, record["step"])

    def _warned(self, found: dict[str, str], step: int) -> dict[str, str]:
        for text in found.values():
            logging.warning(f"step {step}: {text}")
        return found

    def close(self) -> None:
        """Flush the views."""
        self._views.finalize()


def wandb_settings(directory: Path, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of Lightning's WandbLogger, under which a requeued member goes on with its run.

    A run's id is made once and kept in the member's directory; W&B would make a new run for every
    attempt otherwise. ``resume="allow"`` continues a run of that id or starts it; offline, W&B
    writes a part per attempt, and ``wandb sync`` puts those of one id into one run.

    Args:
        given: the section ``loggers.wandb``, which wins.
    """
    file = directory / "wandb_id"
    if "id" not in given and not file.exists():
        write_text_atomically(file, f"{uuid.uuid4().hex[:16]}\n")
    own = {"name": name, "save_dir": str(directory), "resume": "allow"}
    own |= {"id": file.read_text().strip()} if "id" not in given else {}
    return own | given


class SilentLog:
    """The log of every rank but the first."""

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Nothing: rank 0 writes."""

    def close(self) -> None:
        """Nothing to flush."""


def _finite(value: Any) -> Any:
    # JSON has no NaN: readers in other languages refuse a file that holds one.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in _lines(path):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # the line the last attempt died in
    write_text_atomically(path, "".join(f"{line}\n" for line in kept))
