"""A family's whole way, from a Hugging Face folder to one: import, members, merge, front, export.

Also a command, which prints the table of docs/models.md, from the root of the repository:

    PYTHONPATH=. python tests/aligner/family_lab.py [FAMILY ...]
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tests = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(tests), str(tests / "aligner"), str(tests / "rewards")]

import torch
from hf_models import (
    FAMILIES,
    VOCABULARY,
    expressible,
    hf_logits,
    load_hf_model,
    write_hf_model,
)
from member_lab import Layout, write_prompts
from nemo_logits import nemo_logits, restore, sample_tokens
from omegaconf import OmegaConf
from ranks import RankError, run_ranks

from nemo_warp import exit_codes
from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.families.exporting import export_hf
from nemo_warp.checkpoints.families.importing import import_hf
from nemo_warp.checkpoints.inspection import describe
from nemo_warp.config import CONF_DIRECTORY, load_config
from nemo_warp.merge import merge

TEMPERATURE = 0.9
PROMPTS = ["abcd", "Who", "12+3=", "xyz!", "QQ", "hello", "a", "[(x)]"]
CLOSE = 5e-6
"""Allowed differences of logits and log-probabilities, fp32; logits are up to 6."""


def layouts(family: str) -> list[Layout]:
    """TP 2 and PP 2; data parallel instead where the family cannot be built so."""
    return [
        layout if expressible(family, layout.tensor, layout.pipeline) else Layout(data=2)
        for layout in (Layout(tensor=2), Layout(pipeline=2))
    ]


@dataclass(frozen=True)
class Walk:
    """One family's files and the reward server they share."""

    family: str
    folder: Path
    endpoint: Path

    def path(self, name: str) -> Path:
        return self.folder / name


def prepare(walk: Walk) -> None:
    """The Hugging Face model, imported."""
    write_hf_model(walk.path("hf"), walk.family)
    import_hf(walk.path("hf"), walk.path("sft.nemo"))
    write_prompts(walk.path("prompts.jsonl"), PROMPTS)


def member_config(walk: Walk, name: str, layout: Layout, seed: int) -> Path:
    prompts = str(walk.path("prompts.jsonl"))
    config = load_config(
        CONF_DIRECTORY / "member.yaml",
        {
            "run": {"name": "test", "directory": str(walk.path(name)), "seed": seed,
                    "total_steps": 4, "eval_interval": 4, "save_interval": 2},
            "init": str(walk.path("sft.nemo")),
            "prompts": {"train": prompts, "heldout": prompts},
            "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "micro_batch_size": 4,
                        "max_response_tokens": 6, "temperature": TEMPERATURE},
            "evaluation": {"num_prompts": 8, "num_samples_shown": 1},
            "rewards": [{"name": "vader", "weight": 1.0, "endpoint": str(walk.endpoint)}],
            "optim": {"name": "adamw", "lr": 1e-2, "warmup_steps": 1},
            "loggers": {"tensorboard": False},
            **engine(layout),
        },
    )  # fmt: skip
    path = walk.path(f"{name}.yaml")
    OmegaConf.save(config, path)
    return path


def engine(layout: Layout) -> dict[str, Any]:
    """What a machine without a GPU sets."""
    return {
        "trainer": {"devices": layout.ranks, "accelerator": "auto", "precision": "32"},
        "model": {
            "tensor_model_parallel_size": layout.tensor,
            "pipeline_model_parallel_size": layout.pipeline,
            "megatron_amp_O2": False,
            "micro_batch_size": 4,
        },
    }


def train(config: Path, die_in_step: int | None = None) -> int:
    """A rank of a member; keeps what the last evaluation scored beside the run's directory."""
    from nemo_warp.aligner import train
    from nemo_warp.aligner.evaluation.evaluator import Evaluator
    from nemo_warp.aligner.member.trainer import WarpReinforceTrainer

    divergence, generate = Evaluator._divergence, WarpReinforceTrainer.generate_rollouts

    def keep(self: Any, name: str, tokens: Any, mask: Any, log_probs: Any, weights: Any) -> Any:
        if os.environ["RANK"] == "0":
            torch.save((tokens, mask, log_probs), config.with_suffix(".scored"))
        return divergence(self, name, tokens, mask, log_probs, weights)

    def die(trainer: Any) -> Any:
        if trainer.step == die_in_step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(trainer)

    Evaluator._divergence, WarpReinforceTrainer.generate_rollouts = keep, die
    return train.main(["--config", str(config)])


def killed_and_resumed(config: Path, ranks: int) -> None:
    """Four steps; killed in the fourth, on from the checkpoint of the second."""
    try:
        run_ranks(train, ranks, config, 3)
    except RankError as error:
        assert "died" in str(error), error
    else:
        raise AssertionError("no rank died")
    assert not config.with_suffix("").joinpath("completion.json").exists()
    assert run_ranks(train, ranks, config) == [exit_codes.DONE] * ranks


def scored_as_transformers(walk: Walk, name: str) -> float:
    """Largest difference of log-probabilities of what was sampled, from the exported policy's."""
    tokens, mask, log_probs = torch.load(walk.path(f"{name}.scored"))
    export_hf(walk.path(name) / "policy.nemo", walk.path(f"{name}-hf"))
    model = load_hf_model(walk.path(f"{name}-hf"))
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1, :VOCABULARY] / TEMPERATURE
    expected = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert mask.sum() > 8 and (expected[mask.bool()] < -1e-3).any()
    return ((log_probs - expected) * mask).abs().max().item()


def merged(walk: Walk) -> set[str]:
    """SLERP of the members and LITI, as .nemo; returns the report's units."""
    policies = [walk.path(name) / "policy.nemo" for name in ("member_1", "member_2")]
    report = walk.path("report")
    output = str(walk.path("merged.nemo"))
    merge(walk.path("sft.nemo"), policies, output, eta=1.0, workers=1, report=report)
    return set(json.loads((report / "report.json").read_text())["units"])


def front(walk: Walk, layout: Layout) -> list[dict[str, Any]]:
    """Points of the front between SFT and the merge, evaluated at a layout."""
    directory = walk.path(f"front-{layout}")
    config = {
        **{"directory": str(directory), "base": str(walk.path("sft.nemo"))},
        **{"slerp": str(walk.path("merged.nemo")), "sft": str(walk.path("sft.nemo"))},
        **{"etas": [0.0, 1.0], "run_id": "test"},
        "prompts": {"heldout": str(walk.path("prompts.jsonl"))},
        "rollout": {"max_response_tokens": 6, "micro_batch_size": 4},
        "rewards": [{"name": "vader", "weight": 1.0, "endpoint": str(walk.endpoint)}],
        "evaluation": {"num_prompts": 8, "exact_kl": True, "num_samples_shown": 0},
        **engine(layout),
    }
    path = directory.with_suffix(".yaml")
    OmegaConf.save(OmegaConf.create(config), path)
    assert run_ranks(_evaluate, layout.ranks, path) == [exit_codes.DONE] * layout.ranks
    return [json.loads(line) for line in (directory / "points.jsonl").read_text().splitlines()]


def _evaluate(path: Path) -> int:
    from nemo_warp.aligner import evaluate

    return evaluate.main(["--config", str(path)])


def changed_keys(walk: Walk) -> set[str]:
    """Keys of the import's configuration that members' merge or export lost or changed."""
    before, after = (open_checkpoint(walk.path(n)).config for n in ("sft.nemo", "merged.nemo"))
    found = {key for key in before if key not in after or before[key] != after[key]}
    first, last = (
        json.loads((walk.path(n) / "config.json").read_text()) for n in ("hf", "member_1-hf")
    )
    return found | {key for key in first if key not in last or first[key] != last[key]}


def inspected(walk: Walk) -> set[str]:
    """The units that nemo-inspect tells of a policy."""
    found = describe(open_checkpoint(walk.path("member_1") / "policy.nemo"))
    return set(found["groups"])


def stock_against_transformers(walk: Walk, name: str, layout: Layout) -> float:
    """Largest difference of logits: stock NeMo's of ``name``.nemo from those of its export."""
    ranks = run_ranks(_stock_logits, layout.ranks, walk.path(f"{name}.nemo"), layout)
    found = torch.cat([shard for shard in ranks if shard is not None], dim=-1)
    folder = walk.path(f"{name}-hf")
    if not folder.exists():
        export_hf(walk.path(f"{name}.nemo"), folder)
    expected = hf_logits(folder, sample_tokens())
    return (found - expected)[..., :VOCABULARY].abs().max().item()


def _stock_logits(path: Path, layout: Layout) -> torch.Tensor | None:
    return nemo_logits(restore(path, layout.tensor, layout.pipeline))


def import_differences(walk: Walk) -> str:
    """Of the import's logits at TP 1, TP 2 and PP 2; a dash where it cannot be built so."""
    found = []
    for layout in (Layout(), Layout(tensor=2), Layout(pipeline=2)):
        built = expressible(walk.family, layout.tensor, layout.pipeline)
        apart = stock_against_transformers(walk, "sft", layout) if built else None
        found.append("-" if apart is None else f"{apart:.1e}")
    return ", ".join(found)


def generated(folder: Path) -> str:
    """What transformers samples from an exported folder with the folder's own tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(0)
    found = load_hf_model(folder).generate(**inputs, max_new_tokens=4, do_sample=True)
    return tokenizer.decode(found[0])


def units(walk: Walk) -> set[str]:
    """Names that the merge's report must have."""
    tied = open_checkpoint(walk.path("sft.nemo")).config["share_embeddings_and_output_weights"]
    names = {"embedding", "decoder.layers.0", "decoder.layers.1", "decoder.final_layernorm"}
    return names if tied else names | {"output_layer"}


def walk_through(walk: Walk) -> dict[str, str]:
    """Every step, checked; what the table says of each."""
    prepare(walk)
    tensor, pipeline = layouts(walk.family)
    killed_and_resumed(member_config(walk, "member_1", tensor, 1), tensor.ranks)
    second = member_config(walk, "member_2", pipeline, 2)
    assert run_ranks(train, pipeline.ranks, second) == [exit_codes.DONE] * pipeline.ranks
    scored = [scored_as_transformers(walk, name) for name in ("member_1", "member_2")]
    assert max(scored) < CLOSE, scored
    assert merged(walk) == units(walk)
    assert inspected(walk) == units(walk)
    assert not changed_keys(walk)
    points = [front(walk, layout) for layout in (tensor, pipeline)]
    for here, there in zip(*points, strict=True):
        assert abs(here["kl_to_sft_exact"] - there["kl_to_sft_exact"]) < 1e-4, points
    assert points[0][0]["kl_to_sft_exact"] == 0.0 < points[0][1]["kl_to_sft_exact"]
    stock = stock_against_transformers(walk, "merged", Layout())
    assert stock < CLOSE, stock
    assert generated(walk.path("merged-hf"))
    return {
        "family": walk.family,
        "members at": f"{tensor}, {pipeline}",
        "log-probabilities": f"{max(scored):.1e}",
        "merged": f"{len(units(walk))} units",
        "front": f"KL {points[0][1]['kl_to_sft_exact']:.2f} at both",
        "logits of the merge": f"{stock:.1e}",
    }


def main(families: list[str]) -> int:
    """Walk through families one after another and print a table."""
    import logging
    import tempfile
    import warnings

    from reward_servers import VADER, running

    from nemo_warp.aligner.compat import activate

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    activate()
    logging.getLogger("nemo_logger").setLevel(logging.ERROR)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with running(base / "server", VADER, run_id="test") as server:
            for family in families or FAMILIES:
                (base / family).mkdir()
                walk = Walk(family, base / family, server.endpoint_file)
                row = walk_through(walk)
                rows.append(row | {"logits of the import": import_differences(walk)})
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
