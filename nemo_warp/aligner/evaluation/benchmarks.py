"""Benchmarks of lm-evaluation-harness on the policy in memory (the paper's Table 2, Figure 20)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from nemo_warp import exit_codes
from nemo_warp.aligner.entry.versions import package_versions
from nemo_warp.aligner.evaluation.language_model import PolicyLM
from nemo_warp.aligner.evaluation.line import Line, record
from nemo_warp.aligner.evaluation.points import POINTS_FILE, measured_points
from nemo_warp.config import identity_hash, to_plain
from nemo_warp.progress import progress
from nemo_warp.records import Completion, code_version, hash_file, write_completion
from nemo_warp.schema.evaluation import Front


def measure_benchmarks(config: Front) -> int:
    """Score what ``points.jsonl`` lacks of the line from base to slerp. Collective."""
    path = Path(config.directory) / POINTS_FILE
    done = measured_points(path)
    missing = [float(eta) for eta in config.etas if ("init", float(eta)) not in done]
    if missing:
        _measure(config, path, missing)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        completion = Completion(
            kind="benchmarks",
            config_hash=identity_hash(to_plain(config)),
            files={POINTS_FILE: hash_file(path)},
            details={"etas": [float(eta) for eta in config.etas]},
            code_version=code_version(),
            versions=package_versions(),
        )
        write_completion(path.parent, completion)
    return exit_codes.DONE


def _measure(config: Front, path: Path, missing: list[float]) -> None:
    wanted = config.benchmarks
    manager = task_manager(None if wanted.include is None else Path(wanted.include))
    line = Line(config)
    model = line.policy.model
    size = wanted.micro_batch_size or config.evaluation.micro_batch_size
    silent = torch.distributed.get_rank() != 0
    for eta in progress(missing, desc="benchmarks", unit="point", disable=silent):
        with line.at("init", eta), model.inference():
            lm = PolicyLM(model, size, wanted.add_bos)
            scores = measure(lm, list(wanted.tasks), manager, wanted.limit, wanted.num_fewshot,
                             wanted.run_code)  # fmt: skip
        if not silent:
            record(path, {"base": "init", "eta": eta, "scores": scores})


def task_manager(include: Path | None) -> Any:
    """lm-eval's tasks, and those in a directory of your own (``.yaml`` files)."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include is None else str(include))


def measure(
    model: PolicyLM,
    tasks: list[str],
    manager: Any,
    limit: int | None = None,
    num_fewshot: int | None = None,
    run_code: bool = False,
) -> dict[str, dict[str, float]]:
    """Scores of ``tasks``: task -> metric -> value, standard errors as ``METRIC_stderr``.

    Collective: every rank calls it and gets the same. lm-eval's own names of metrics, without the
    name of the filter where that is ``none``.

    Args:
        limit: the first so many documents of each task; None for all.
        num_fewshot: examples before each question; None is each task's own number.
        run_code: whether tasks may run the code that the policy writes.

    Raises:
        ValueError: lm-eval does not know a task.
    """
    from lm_eval import simple_evaluate

    if run_code:  # what HumanEval's and MBPP's metric asks for
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"lm-eval knows no task '{unknown[0]}'; `lm-eval ls tasks` lists its own, and "
            "benchmarks.include names a directory with yours"
        )
    found = simple_evaluate(
        model=model, tasks=tasks, limit=limit, task_manager=manager, log_samples=False,
        num_fewshot=num_fewshot, confirm_run_unsafe_code=run_code,
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
