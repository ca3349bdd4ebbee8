"""Benchmarks of lm-evaluation-harness on the policy in memory (the paper's Table 2, Figure 20)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_warp.aligner.evaluation.language_model import PolicyLM


def task_manager(include: Path | None) -> Any:
    """lm-eval's tasks, and those in a directory of your own (``.yaml`` files)."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include is None else str(include))


def measure(
    model: PolicyLM, tasks: list[str], manager: Any, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Scores of ``tasks``: task -> metric -> value, standard errors as ``METRIC_stderr``.

    Collective: every rank calls it and gets the same. lm-eval's own names of metrics, without the
    name of the filter where that is ``none``.

    Args:
        limit: the first so many documents of each task; None for all.

    Raises:
        ValueError: lm-eval does not know a task.
    """
    from lm_eval import simple_evaluate

    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"lm-eval knows no task '{unknown[0]}'; `lm-eval ls tasks` lists its own, and "
            "benchmarks.include names a directory with yours"
        )
    found = simple_evaluate(
        model=model, tasks=tasks, limit=limit, task_manager=manager, log_samples=False,
        verbosity="ERROR", bootstrap_iters=1000, random_seed=0, numpy_random_seed=0,
        torch_random_seed=0, fewshot_random_seed=0,
    )  # fmt: skip
    # lm-eval keeps what it found to the process whose LOCAL_RANK is 0.
    scores = [found and {task: _numbers(values) for task, values in found["results"].items()}]
    torch.distributed.broadcast_object_list(scores, src=0)
    return scores[0]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    named = {}
    for key, value in values.items():
        metric, _, form = key.partition(",")
        if isinstance(value, (int, float)) and form:
            named[metric if form == "none" else f"{metric}.{form}"] = float(value)
    return named
