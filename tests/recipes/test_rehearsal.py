"""The shipped recipes from Hugging Face weights to the final front, with tiny models on a CPU.

Only sizes, paths, the launcher and what needs a GPU are changed (`CHANGED`): a recipe that needs
more than that would fail on the cluster too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from chat_tokenizers import write_gemma_tokenizer, write_llama3_tokenizer
from hf_models import load_hf_model, write_hf_model
from omegaconf import OmegaConf
from ranks import run_ranks

from nemo_warp import exit_codes
from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.families.exporting import export_hf
from nemo_warp.checkpoints.families.importing import import_hf
from nemo_warp.prompt_sets.command import main as make_prompts

pytestmark = [pytest.mark.nemo, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SIZES = {
    "iterations", "per_iteration", "evaluation.etas", "front.kappas", "member.run.total_steps",
    "member.run.eval_interval", "member.run.save_interval", "member.rollout.prompts_per_step",
    "member.rollout.samples_per_prompt", "member.rollout.max_response_tokens",
    "member.rollout.micro_batch_size", "member.optim.warmup_steps",
    "member.evaluation.num_prompts", "member.trainer.num_nodes", "member.trainer.devices",
    "member.model.tensor_model_parallel_size", "rewards.helpful.nodes",
    "rewards.helpful.processes_per_node", "rewards.helpful.arguments",
    "estimate.parameters", "estimate.model",
}  # fmt: skip
PATHS = {
    "base", "name", "run_directory", "sft", "prompts.train", "prompts.heldout",
    "rewards.helpful.model", "benchmarks.tasks",  # whose data would be downloaded
}  # fmt: skip
MACHINE = {"launcher", "cluster", "member.rollout.trt_llm.enable", "member.trainer.accelerator"}
CHANGED = SIZES | PATHS | MACHINE
"""Every key that a rehearsal changes."""

WORDS = tiny_models._TEXT.replace("\n", " ").split()
TURNS = [" ".join(WORDS[first : first + 4]) for first in range(16)]
FAMILIES = {
    "gemma_7b": ("gemma_7b", write_gemma_tokenizer, 96),
    "llama3_8b": ("llama3", write_llama3_tokenizer, 304),
    "one_gpu": ("qwen2", write_llama3_tokenizer, 304),
}
"""Recipe -> family of `hf_models`, its tokenizer, and rows of the embedding."""
ENDS = {"gemma_7b": ["<end_of_turn>"], "llama3_8b": ["<|eot_id|>"], "one_gpu": []}
"""Recipe -> its end strings; an import's own end tokens need none."""


def _sft(directory: Path, recipe: str) -> Path:
    """The SFT model as tools/import_hf.py makes it."""
    family, write_tokenizer, rows = FAMILIES[recipe]
    folder = directory / "hf"
    changes = {"vocab_size": rows, "max_position_embeddings": 160}
    write_hf_model(folder, family, changes=changes)
    (folder / "tokenizer.json").unlink()
    write_tokenizer(folder, rows)
    import_hf(folder, directory / "sft.nemo")
    return folder


def _train_reward_model(directory: Path) -> None:
    from nemo_warp.aligner import train_reward_model

    places = [f"init={directory / 'sft.nemo'}", f"output={directory / 'reward_model.nemo'}"]
    places += [f"pairs.{part}={directory / 'pairs.jsonl'}" for part in ("train", "validation")]
    sizes = ["steps=2", "global_batch_size=4", "validation_interval=2", "model.micro_batch_size=4"]
    machine = ["trainer.devices=1", "trainer.accelerator=auto", "trainer.precision='32'"]
    machine += ["optim.name=adamw", "model.megatron_amp_O2=false"]
    assert train_reward_model.main([*places, *sizes, *machine]) == exit_codes.DONE


def _prepare(directory: Path, recipe: str) -> None:
    folder = _sft(directory, recipe)
    if recipe != "one_gpu":
        pairs = [{"text": text} for turn in TURNS for text in (turn, turn[::-1])]
        _write_lines(directory / "pairs.jsonl", pairs)
        run_ranks(_train_reward_model, 1, directory)
        sections = [open_checkpoint(directory / n).config["tokenizer"] for n in
                    ("sft.nemo", "reward_model.nemo")]  # fmt: skip
        assert sections[0]["type"] == sections[1]["type"]
    lines = [{"question": turn, "answer": f"so #### {n}"} for n, turn in enumerate(TURNS)]
    _write_lines(directory / "turns.jsonl", lines)
    words = [directory / "turns.jsonl", "--model", folder, "--output", directory / "prompts"]
    words = [*map(str, words), "--heldout", "4", "--answer-after", "####"]
    assert make_prompts(words) == exit_codes.DONE


def _scores(directory: Path, texts: list[str]) -> tuple[list[list[int]], list[float]]:
    from nemo_warp.aligner.reward_model.model import RewardModelSetup, load_reward_model

    model = load_reward_model(RewardModelSetup(directory / "reward_model.nemo"))
    tokens = [model.tokenizer.text_to_ids(text) for text in texts]
    return tokens, model.infer(texts)[:, 0].tolist()


def _check_reward_model_export(directory: Path) -> None:
    """transformers' classifier gives the served rewards, but for the bias that config.json has."""
    import transformers

    export_hf(directory / "reward_model.nemo", directory / "reward")
    ((rows, expected),) = run_ranks(_scores, 1, directory, TURNS[:4])
    model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory / "reward", torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    with torch.no_grad():
        scores = torch.cat([model(torch.tensor([row])).logits[:, 0] for row in rows])
    bias = model.config.nemo_reward["bias"][0]
    torch.testing.assert_close(scores + bias, torch.tensor(expected), rtol=0, atol=5e-6)


def _write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _changes(directory: Path, recipe: str, devices: int) -> dict:
    rollout = {"prompts_per_step": 4, "max_response_tokens": 6, "micro_batch_size": 2}
    reward = {
        "model": str(directory / "reward_model.nemo"),
        "processes_per_node": 1,
        "arguments": ["--tensor", 1, "--micro-batch-size", 4],
    }
    return {
        "base": str(RECIPES / recipe / "recipe.yaml"),
        "name": f"rehearsal-{recipe.replace('_', '-')}",
        "run_directory": str(directory / "run"),
        "sft": str(directory / "sft.nemo"),
        "prompts": {
            "train": str(directory / "prompts_train.jsonl"),
            "heldout": str(directory / "prompts_heldout.jsonl"),
        },
        **({"rewards": {"helpful": reward}} if recipe != "one_gpu" else {}),
        "iterations": 1,
        "per_iteration": [],
        "member": {
            "run": {"total_steps": 2, "eval_interval": 2, "save_interval": 2},
            "rollout": {**rollout, "samples_per_prompt": 1, "trt_llm": {"enable": False}},
            "optim": {"warmup_steps": 1},
            "evaluation": {"num_prompts": 4},
            "trainer": {"num_nodes": 1, "devices": devices, "accelerator": "auto"},
            "model": {"tensor_model_parallel_size": devices},
        },
        "benchmarks": {"tasks": []},
        "evaluation": {"etas": [0.0, 1.0]},
        "front": {"kappas": [1.0]},
        "launcher": {"kind": "local", "side_by_side": 1, "gpus": []},
        "cluster": None,
        "estimate": {"parameters": 100000, "model": None},
    }


def _keys(table: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in table.items():
        path = f"{prefix}{key}"
        nested = isinstance(value, dict) and value and path not in CHANGED
        found |= _keys(value, f"{path}.") if nested else {path}
    return found


def _command(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nemo_warp.cli", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


ASKED = pytest.mark.skipif(
    not os.environ.get("REHEARSE_ALL"), reason="several minutes each: set REHEARSE_ALL=1"
)


@pytest.mark.parametrize(
    ("recipe", "devices"),
    [
        ("one_gpu", 1),
        pytest.param("gemma_7b", 2, marks=ASKED),
        pytest.param("llama3_8b", 1, marks=ASKED),
    ],
)
def test_the_recipe_runs_to_its_end_with_nothing_changed_but_sizes(nemo, tmp_path, recipe, devices):
    _prepare(tmp_path, recipe)
    changes = _changes(tmp_path, recipe, devices)
    assert _keys(changes) <= CHANGED
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changes))
    planned = _command("plan", path)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    ran = _command("run", path)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    run = tmp_path / "run"
    points = [json.loads(line) for line in (run / "front/points.jsonl").read_text().splitlines()]
    assert [point["eta"] for point in points] == [1.0]
    moved = points[0]["kl_to_sft"] != 0.0
    assert moved == (recipe != "one_gpu")  # whose answers a random model never finds: no gradient
    member = OmegaConf.load(next(run.glob("iteration_01/member_01/config.yaml")))
    assert member.rollout.end_strings == ENDS[recipe]
    if recipe != "one_gpu":
        _check_reward_model_export(tmp_path)
    export_hf(run / "final/policy.nemo", tmp_path / "final")
    with torch.no_grad():
        assert load_hf_model(tmp_path / "final")(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
