"""Train a reward model on pairs: ``python -m nemo_warp.aligner.train_reward_model --help``.

Model, data set, loss (Bradley-Terry) and loop are NeMo-Aligner's. Meant for small models that are
trained in one go: there is no resume. For larger ones use NeMo-Aligner's own example script; its
``.nemo`` is served just the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from nemo_warp import exit_codes
from nemo_warp.aligner.entry.frame import refuse
from nemo_warp.aligner.entry.validation import (
    check_layout,
    context_length,
    data_parallel_size,
    read_model_config,
)
from nemo_warp.config import CONF_DIRECTORY, check_resolved, load_config, require_complete
from nemo_warp.schema.reward_model import RewardModel

EPILOG = """
examples:
  python -m nemo_warp.rewards.pairs --texts verses.txt --output train.jsonl \\
      --callable nemo_warp.rewards.library:vader_compound
  torchrun --nproc-per-node 2 -m nemo_warp.aligner.train_reward_model init=sft.nemo \\
      output=rm.nemo pairs.train=train.jsonl pairs.validation=validation.jsonl trainer.devices=2

conf/reward_model.yaml lists every key.
"""


def check(config: RewardModel) -> None:
    """Refuse what cannot work, before NeMo is imported.

    Raises:
        ValueError: what is wrong, and where.
    """
    per_step = config.model.micro_batch_size * data_parallel_size(config)
    if config.global_batch_size % per_step:
        raise ValueError(
            f"global_batch_size is {config.global_batch_size}, expected a multiple of "
            f"model.micro_batch_size * data parallel ({per_step})"
        )
    init = Path(config.init)
    model = read_model_config(init)
    check_layout(model, config, init)
    context = context_length(model)
    if config.max_tokens is not None and not 1 <= config.max_tokens <= context:
        raise ValueError(f"max_tokens is {config.max_tokens}, but {init} reads {context} tokens")
    for name in ("train", "validation"):
        path = Path(getattr(config.pairs, name))
        pairs = count_pairs(path)
        if pairs < config.global_batch_size:
            raise ValueError(
                f"{path} has {pairs} pairs, fewer than one batch "
                f"(global_batch_size is {config.global_batch_size})"
            )


def count_pairs(path: Path) -> int:
    """Number of pairs in a file of NeMo-Aligner's format.

    Raises:
        ValueError: the file is missing, or a line of it is not {"text": a text}.
    """
    if not path.is_file():
        raise ValueError(f"no pairs file {path}; make one with python -m nemo_warp.rewards.pairs")
    number = 0
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, KeyError):
                text = None
            if not isinstance(text, str) or not text:
                raise ValueError(f'{path} line {number}: expected {{"text": "..."}}, got {line!r}')
    if number % 2:
        raise ValueError(
            f"{path} has {number} lines; of each two, the first is chosen, the second rejected"
        )
    return number // 2


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns an exit code of `nemo_warp.exit_codes`."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_warp.aligner.train_reward_model",
        description="Train a reward model on pairs of texts through NeMo-Aligner.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML that overrides conf/reward_model.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args(argv)
    files = [parsed.config] if parsed.config else []
    try:
        given = load_config(CONF_DIRECTORY / "reward_model.yaml", *files, parsed.overrides)
        config = cast("RewardModel", given)
        require_complete(config)
        check_resolved(config, CONF_DIRECTORY / "reward_model.yaml", "the configuration")
        check(config)
    except ValueError as error:
        return refuse(error, exit_codes.MISCONFIGURED)
    from nemo_warp.aligner.compat import activate

    activate()
    from nemo_warp.aligner.reward_model.training import train_reward_model

    try:
        train_reward_model(config)
    except ValueError as error:
        return refuse(error, exit_codes.MISCONFIGURED)
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
