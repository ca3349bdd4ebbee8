"""Benchmarks along a front: ``python -m nemo_warp.aligner.benchmark --config FILE``, once per rank.

Loads base and slerp once and slides kappa in memory, as `nemo_warp.aligner.evaluate` does, and asks
lm-evaluation-harness for the section ``benchmarks`` at each of them. A restart continues with the
next one.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from nemo_warp.aligner.entry.frame import run_once
from nemo_warp.aligner.evaluate import check_models, load_evaluation
from nemo_warp.schema.evaluation import Front


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns an exit code of `nemo_warp.exit_codes`."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_warp.aligner.benchmark",
        description="Score lm-evaluation-harness's tasks along (1 - eta) * base + eta * slerp.",
        epilog="example: torchrun --nproc-per-node 8 -m nemo_warp.aligner.benchmark --config "
        "evaluation.yaml\n    'etas=[0,0.3,1]' 'benchmarks.tasks=[mmlu,gsm8k]'\n"
        "A restart scores only what points.jsonl does not hold yet.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="see conf/evaluation.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args(arguments)

    def check() -> tuple[Front, Path, None]:
        config = load_evaluation(parsed.config, parsed.overrides)
        check_benchmarks(config)
        return config, Path(config.directory), None

    def work(config: Front, _texts: None) -> int:
        from nemo_warp.aligner.evaluation.benchmarks import measure_benchmarks

        return measure_benchmarks(config)

    return run_once(check, work)


def check_benchmarks(config: Front) -> None:
    """Refuse what cannot work.

    Raises:
        ValueError: with one clear sentence.
    """
    check_models(config)
    if not config.benchmarks.tasks:
        raise ValueError("benchmarks.tasks is empty; name tasks of lm-evaluation-harness")
    include = config.benchmarks.include
    if include is not None and not Path(include).is_dir():
        raise ValueError(f"benchmarks.include: no such directory: {include}")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("benchmarks need lm-evaluation-harness: pip install 'lm-eval>=0.4.9'")


if __name__ == "__main__":
    sys.exit(main())
