"""Train a small GPT from scratch through NeMo and save it as a distributed ``.nemo``.

For recipes that must run where no pretrained model is at hand. Model, optimizer, schedule, trainer
and checkpoint are NeMo's (`MegatronGPTModel` under its Lightning trainer); only the data set is
ours: each document (one line of text) is a sequence that starts at position 0 and ends with EOS, so
the model meets documents the way it will meet prompts in reinforcement learning.

Run as ``python -m nemo_warp.aligner.pretrain --config FILE [key=value ...]``, once per rank.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_warp import exit_codes
from nemo_warp.config import load_config, require_complete
from nemo_warp.records import write_json_atomically


def pretrain(config: DictConfig, documents: dict[str, list[str]]) -> dict[str, object]:
    """Train, save ``config.output``, write ``config.metrics`` and return what it holds.

    Args:
        config: ``output``, ``metrics``, ``num_threads``, and NeMo's ``trainer`` and ``model``.
        documents: texts to learn from under ``train``, to measure the loss on under ``validation``.
    """
    import torch

    from nemo_warp.aligner.compat import activate

    # Before the first operation: later torch ignores it for pools that it has started.
    torch.set_num_threads(config.num_threads)
    activate()
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
    from nemo.utils import logging

    from nemo_warp.aligner.policy.document_gpt import DocumentGPTModel

    logging.setLevel(logging.ERROR)  # NeMo warns of each configuration key left at its default
    torch.manual_seed(config.model.seed)
    trainer = MegatronTrainerBuilder(config).create_trainer()
    model = DocumentGPTModel(config.model, trainer, documents)
    start = time.perf_counter()
    trainer.fit(model)
    seconds = time.perf_counter() - start
    model.save_to(str(config.output))
    metrics = _metrics(trainer, model)
    if trainer.is_global_zero:
        write_json_atomically(Path(config.metrics), metrics)
        print(
            f"trained {metrics['parameters']} parameters for {metrics['steps']} steps in "
            f"{seconds:.0f} s: validation loss {metrics['validation_loss']:.3f} nats per token"
        )
    return metrics


def read_documents(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file."""
    if not path.is_file():
        raise ValueError(f"no text file {path} to learn from; give one document a line")
    documents = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not documents:
        raise ValueError(f"{path} is empty; give one document a line")
    return documents


def _metrics(trainer: Any, model: Any) -> dict[str, object]:
    from importlib.metadata import version

    logged = trainer.callback_metrics
    return {
        "steps": trainer.global_step,
        "validation_loss": round(float(logged["val_loss"]), 6),
        "train_loss": round(float(logged["reduced_train_loss"]), 6),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {name: version(name) for name in ("torch", "nemo-toolkit", "megatron-core")},
    }


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns an exit code of `nemo_warp.exit_codes`."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_warp.aligner.pretrain",
        description="Train a small GPT from scratch through NeMo and save it as a .nemo.",
        epilog="example: python -m nemo_warp.aligner.pretrain --config recipes/tiny/pretrain.yaml\n"
        "    data.train=a.txt data.validation=b.txt model.tokenizer.model=tokenizer.model\n"
        "    output=sft.nemo metrics=sft.json trainer.max_steps=100",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML with every key")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parsed = parser.parse_args(arguments)
    try:
        config = load_config(parsed.config, parsed.overrides)
        require_complete(config)
        documents = {name: read_documents(Path(path)) for name, path in config.data.items()}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISCONFIGURED
    pretrain(config, documents)
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
