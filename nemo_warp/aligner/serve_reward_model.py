"""Serve a NeMo reward model: ``python -m nemo_warp.aligner.serve_reward_model --help``."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from omegaconf import OmegaConf

from nemo_warp.aligner.entry.job import job_size
from nemo_warp.aligner.entry.validation import (
    check_layout,
    data_parallel_size,
    read_model_config,
)
from nemo_warp.aligner.reward_model.template import template_source
from nemo_warp.records import config_hash, hash_file
from nemo_warp.rewards.scoring import Desk, Scoring
from nemo_warp.rewards.serve import add_serving_arguments, exit_code_of, text_infer
from nemo_warp.rewards.triton import Serving, log, serve

if TYPE_CHECKING:  # imports NeMo, for which a refusal does not wait
    from nemo_warp.aligner.reward_model.model import RewardModelScorer

EPILOG = """
One process per device under torchrun or srun; the first one answers requests. Its fingerprint is
the SHA-256 of the .nemo file. Texts that are empty or longer than the model's context come back as
NaN, with the reason.

example:
  torchrun --nproc-per-node 4 -m nemo_warp.aligner.serve_reward_model --model rm.nemo --tensor 4 \\
      --run-id helpful-member_01 --endpoint-file run/endpoint_helpful.json

The endpoint file appears when the server is ready and goes when it stops (SIGTERM or Ctrl-C).
"""

_TOGETHER = 32  # texts, a client's usual request


def run(arguments: argparse.Namespace) -> None:
    """Load the model on all ranks; serve on the first until told to stop."""
    _check(arguments)
    if arguments.chat_template:
        template_source(arguments.chat_template)
    Serving(arguments.run_id, "", arguments.endpoint_file, arguments.host, arguments.port)
    from nemo_warp.aligner.compat import activate

    activate()
    import torch

    from nemo_warp.aligner.reward_model.model import (
        RewardModelScorer,
        RewardModelSetup,
        load_reward_model,
    )

    setup = RewardModelSetup(
        path=arguments.model,
        tensor=arguments.tensor,
        pipeline=arguments.pipeline,
        micro_batch_size=arguments.micro_batch_size,
        precision=arguments.precision or _default_precision(),
    )
    template = arguments.chat_template and template_source(arguments.chat_template)
    scorer = RewardModelScorer(load_reward_model(setup), template)
    if torch.distributed.get_rank() == 0:
        _lead(scorer, arguments)
    else:
        # The launcher signals every rank; the first one tells the others when it is done.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        scorer.follow()


def _lead(scorer: RewardModelScorer, arguments: argparse.Namespace) -> None:
    log.info("hashing %s", arguments.model)
    scoring = Scoring(scorer.score, together=max(_TOGETHER, scorer.at_a_time))
    serving = Serving(
        run_id=arguments.run_id,
        fingerprint=_fingerprint(arguments),
        endpoint_file=arguments.endpoint_file,
        host=arguments.host,
        port=arguments.port,
        token_inputs=True,
        keyed=True,
        needs=scoring.taken.needed,
        takes=scoring.taken.names,
    )
    desk = Desk(scoring)
    texts = text_infer(desk)

    def infer(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        if "sentences" in inputs:
            return texts(**inputs)
        return scorer.infer(inputs["tokens"], inputs["sequence_lengths"])

    try:
        serve(infer, serving, broken=scorer.broken, on_stop=desk.stop)
    finally:
        scorer.stop()


def _fingerprint(arguments: argparse.Namespace) -> str:
    """SHA-256 of the model; with a template of both."""
    # The whole file: two reward models of one architecture differ in their weights only.
    model = hash_file(arguments.model).sha256
    if arguments.chat_template is None:
        return model
    return config_hash({"model": model, "template": template_source(arguments.chat_template)})


def _check(arguments: argparse.Namespace) -> None:
    """Refuse a model or a layout that cannot work, before NeMo is imported."""
    ranks, nodes = job_size()
    layout = OmegaConf.create(
        {
            "trainer": {"num_nodes": nodes, "devices": ranks // nodes},
            "model": {
                "tensor_model_parallel_size": arguments.tensor,
                "pipeline_model_parallel_size": arguments.pipeline,
            },
        }
    )
    for name in ("tensor", "pipeline", "micro_batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    model = read_model_config(arguments.model)
    check_layout(model, layout, arguments.model)
    data_parallel_size(layout)
    if "RewardModel" not in str(model.get("target", "")):
        raise ValueError(
            f"{arguments.model} is a {model.get('target')}, not a NeMo-Aligner reward model: "
            "train one with python -m nemo_warp.aligner.train_reward_model"
        )


def _default_precision() -> str:
    import torch

    return "bf16" if torch.cuda.is_available() else "32"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_warp.aligner.serve_reward_model",
        description="Serve a NeMo-Aligner reward model (.nemo) over PyTriton.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, type=Path, help="the .nemo, a tar or a directory")
    add_serving_arguments(parser)
    parser.add_argument("--tensor", type=int, default=1, help="tensor parallel size")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline parallel size")
    parser.add_argument(
        "--micro-batch-size", type=int, default=8, help="sequences per forward pass"
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja, or a tokenizer_config.json: texts are made anew with it, from the prompt's "
        "field 'messages' and the response; for policies of another family",
    )
    parser.add_argument(
        "--precision", choices=("32", "bf16"), help="default: bf16 on a GPU, 32 without"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns an exit code of `nemo_warp.exit_codes`."""
    arguments = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s reward: %(message)s")
    return exit_code_of(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
