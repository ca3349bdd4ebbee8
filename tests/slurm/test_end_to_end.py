"""The whole recipe with real NeMo members on a real Slurm, from SFT to the final front."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import yaml
from ranks import run_ranks
from slurm_sandbox import SlurmSandbox

from nemo_warp.records import read_completion


def _save(path: Path, tokenizer: Path) -> None:
    tiny_models.save_tiny_nemo(
        path,
        tokenizer,
        share_embeddings_and_output_weights=True,
        encoder_seq_length=32,
        max_position_embeddings=32,
    )


def _tiny(directory: Path) -> dict:
    """recipes/tiny, even smaller, on a model made here."""
    run_ranks(_save, 1, directory / "sft.nemo", tiny_models.write_tokenizer(directory))
    words = tiny_models._TEXT.split()
    lines = [json.dumps({"prompt": " ".join(words[i : i + 2])}) for i in range(30)]
    for name, chosen in (("train", lines[:18]), ("heldout", lines[18:])):
        (directory / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in chosen))
    (directory / "texts.jsonl").write_text(json.dumps({"text": " ".join(words[:20])}) + "\n")
    (directory / "benchmarks").mkdir()
    (directory / "benchmarks/texts.yaml").write_text(
        "task: texts\noutput_type: loglikelihood_rolling\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {directory}/texts.jsonl}}}}\ntest_split: test\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list: [{metric: bits_per_byte}]\n"
    )
    root = Path(__file__).resolve().parents[2]
    return {
        "base": str(root / "recipes" / "tiny" / "recipe.yaml"),
        "name": "tiny-e2e",
        "member": {
            "run": {"total_steps": 4, "eval_interval": 2, "save_interval": 2},
            "rollout": {
                "prompts_per_step": 4,
                "samples_per_prompt": 2,
                "max_response_tokens": 6,
                "micro_batch_size": 4,
            },
            "evaluation": {"num_prompts": 8, "micro_batch_size": 8},
            "model": {"micro_batch_size": 4},
        },
        "evaluation": {
            "etas": [0.0, 0.5, 1.0],
            "settings": {"evaluation": {"num_prompts": 8}, "towards_sft": False},
        },
        "front": {"kappas": [0.0, 1.0]},
        "benchmarks": {
            "tasks": ["texts"],
            "include": str(directory / "benchmarks"),
            "kappas": [0.0, 1.0],
        },
        "retries": {"without_progress": 3, "stop_grace_s": 120, "ready_deadline_s": 600},
        "commands": {},
    }


@pytest.mark.timeout(1200)
def test_from_sft_to_the_final_front(nemo, make_sandbox) -> None:
    sandbox: SlurmSandbox = make_sandbox("e2e", patience_s=1000.0)
    values = _tiny(sandbox.directory)
    kept = {key: sandbox.values[key] for key in ("cluster", "launcher", "resources")}
    places = {key: sandbox.values[key] for key in ("run_directory", "sft", "prompts")}
    sandbox.recipe.write_text(yaml.safe_dump({**kept, **places, **values, "iterations": 2}))
    sandbox.submit()
    sandbox.wait_until_done()
    sandbox.wait_until_queue_is_empty()
    state = sandbox.state()
    assert state["exit_code"] == 0, sandbox.history()
    run = sandbox.run_directory
    assert all(sandbox.attempts(stage["name"]) == 1 for stage in state["stages"])
    for iteration in (1, 2):
        members = [read_completion(run / f"iteration_0{iteration}/member_0{m}") for m in (1, 2)]
        assert all(m is not None and m.details["step"] == 4 for m in members)
        assert len({m.details["prompt_order_hash"] for m in members if m}) == 2
        assert len({m.files["policy.nemo"].sha256 for m in members if m}) == 2
    points = [json.loads(x) for x in (run / "front/points.jsonl").read_text().splitlines()]
    assert [p["eta"] for p in points] == [0.0, 1.0]
    assert points[0]["kl_to_sft"] == pytest.approx(0.0, abs=1e-6), "kappa = 0 is SFT"
    assert points[1]["kl_to_sft"] != points[0]["kl_to_sft"]
    lines = (run / "benchmarks/points.jsonl").read_text().splitlines()
    bits = [json.loads(x)["scores"]["texts"]["bits_per_byte"] for x in lines]
    assert len(set(bits)) == 2, "SFT's and the last policy's"
    assert (run / "final/policy.nemo").stat().st_size > 10_000
    assert (run / "report/curves.png").read_bytes().startswith(b"\x89PNG")
