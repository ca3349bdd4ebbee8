"""Measure a front: ``python -m nemo_warp.aligner.evaluate --config FILE``, once per rank.

Loads base and slerp once and slides eta in memory. Each point is recorded as soon as it is
measured; a restart continues with the next one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import cast

from nemo_warp.aligner.entry.engine import engine_batch_size
from nemo_warp.aligner.entry.frame import run_once
from nemo_warp.aligner.entry.validation import (
    check_evaluation_sizes,
    check_judges,
    check_layout,
    check_same_model,
    data_parallel_size,
    max_prompt_tokens,
    read_model_config,
)
from nemo_warp.config import (
    CONF_DIRECTORY,
    check_resolved,
    load_config,
    overlaid,
    require_complete,
    to_plain,
)
from nemo_warp.prompts import PromptLine, read_prompts
from nemo_warp.schema.evaluation import Front

_MEMBER_SECTIONS = ("rollout", "algorithm", "reward_client", "evaluation", "trainer", "model")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns an exit code of `nemo_warp.exit_codes`."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_warp.aligner.evaluate",
        description="Measure reward, judges, KL to SFT and length along the line from "
        "base to slerp: (1 - eta) * base + eta * slerp.",
        epilog="example: torchrun --nproc-per-node 8 -m nemo_warp.aligner.evaluate --config "
        "evaluation.yaml\n    'etas=[0,0.3,1]' evaluation.num_prompts=1024\n"
        "A restart measures only what points.jsonl does not hold yet. With pick.kl=10 the front is "
        "then searched\nfor the policy at that KL (chosen.json).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="see conf/evaluation.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args(arguments)

    def check() -> tuple[Front, Path, list[PromptLine]]:
        config = load_evaluation(parsed.config, parsed.overrides)
        texts = check_evaluation(config)
        return config, Path(config.directory), texts

    def work(config: Front, texts: list[PromptLine]) -> int:
        from nemo_warp.aligner.evaluation.front import measure_front

        return measure_front(config, texts)

    return run_once(check, work)


def load_evaluation(path: Path, overrides: list[str]) -> Front:
    """The evaluation's configuration, its open sections filled from conf/member.yaml."""
    config = load_config(CONF_DIRECTORY / "evaluation.yaml", path, overrides)
    given = {name: to_plain(config)[name] for name in _MEMBER_SECTIONS}
    member = load_config(CONF_DIRECTORY / "member.yaml", given)
    filled = to_plain(member, resolve=False)
    config = overlaid(config, {name: filled[name] for name in _MEMBER_SECTIONS})
    require_complete(config)
    check_resolved(config, CONF_DIRECTORY / "evaluation.yaml", "the configuration")
    return cast("Front", config)


def check_models(config: Front) -> None:
    """Raise ValueError unless base, slerp and SFT are one model that this layout can hold."""
    for name in ("base", "slerp", "sft"):
        path = Path(getattr(config, name))
        check_layout(read_model_config(path), config, path)
    check_same_model(config, "base", "slerp", "sft")


def check_evaluation(config: Front) -> list[PromptLine]:
    """Refuse what cannot work; returns the held-out prompts to take from.

    Raises:
        ValueError: with one clear sentence.
    """
    check_models(config)
    check_judges(config)
    max_prompt_tokens(config, config.base)
    check_evaluation_sizes(
        config.evaluation, config.rollout.forward_micro_batch_size, data_parallel_size(config)
    )
    engine_batch_size(config.rollout, config.evaluation)
    texts = read_prompts(Path(config.prompts.heldout), config.prompts.key)
    count = config.evaluation.num_prompts
    if len(texts) < count:
        raise ValueError(
            f"{config.prompts.heldout} has {len(texts)} prompts, but evaluation.num_prompts is "
            f"{count}"
        )
    return texts if config.prompts.too_long == "drop" else texts[:count]


if __name__ == "__main__":
    sys.exit(main())
