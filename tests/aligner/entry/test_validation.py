"""Bad input is refused before NeMo is imported, in one sentence."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from member_lab import Layout, Materials, member_config, write_prompts

from nemo_warp.aligner.train import check_member

MODEL = {
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "encoder_seq_length": 32,
    "max_position_embeddings": 32,
}


def write_checkpoint(path: Path, **changes) -> Path:
    content = path.with_suffix(".yaml")
    content.write_text(yaml.safe_dump(MODEL | changes))
    with tarfile.open(path, "w:") as archive:
        archive.add(content, "./model_config.yaml")
        archive.addfile(_empty_folder("./model_weights"))
    return path


def _empty_folder(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


@pytest.fixture
def files(tmp_path) -> Materials:
    texts = ["a prompt"] * 8
    return Materials(
        sft=write_checkpoint(tmp_path / "sft.nemo"),
        other=write_checkpoint(tmp_path / "other.nemo"),
        train=write_prompts(tmp_path / "train.jsonl", texts),
        heldout=write_prompts(tmp_path / "heldout.jsonl", texts),
    )


def test_good_member_passes(files, tmp_path):
    texts = check_member(member_config(files, tmp_path))
    assert len(texts["train"]) == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.ema_update_rate=1.5", "ema_update_rate' in .* is 1.5, .*0 to 1"),
        ("algorithm.ema_update_rate=-0.1", "ema_update_rate' in .* is -0.1"),
        ("algorithm.kl_coefficient=-1.0", "kl_coefficient' in .* is -1.0, .*0 to"),
        ("algorithm.anchor=emma", "anchor' in .* is 'emma', expected ema, sft or none"),
        ("algorithm.anchor=none", "without an anchor there is no KL"),
        ("judges=[{name: vader, endpoint: x}]", "judges.0.name is vader, which a reward"),
        ("judges=[{name: a, endpoint: x}, {name: a, endpoint: y}]", "judges.1.name is a, which"),
        ("algorithm.kl_estimator=k1", "kl_estimator' in .* is 'k1', expected log_ratio"),
        ("rollout.prompts_per_step=3", "is 6, expected a multiple of updates_per_rollout"),
        ("rollout.micro_batch_size=3", "expected a multiple of rollout.micro_batch_size"),
        ("rollout.temperature=0.0", "rollout.temperature' in .* is 0.0, .*above 0"),
        ("rollout.max_response_tokens=32", "reads at most 32 tokens: no room for a prompt"),
        ("rollout.trt_llm={enable: true, max_input_len: 28}", "max_input_len is 28, .* at most 26"),
        ("rollout.trt_llm.batch_size=1", "batch_size is 1, but up to \\d+ sequences"),
        ("run.total_steps=0", "run.total_steps' in .* is 0, .*1 or more"),
        ("run.keep_checkpoints=1", "keep_checkpoints' in .* is 1, .*2 or more"),
        ("evaluation.num_prompts=7", "evaluation.num_prompts is 7, expected a multiple"),
        ("evaluation.num_prompts=16", "has 8 prompts, but evaluation.num_prompts is 16"),
        ("model.tensor_model_parallel_size=3", "expected a multiple of tensor \\* pipeline"),
        ("model.extra.peft={peft_scheme: lora}", "adapters .PEFT, LoRA. are not supported"),
        ("export.dtype=float16", "export.dtype' in .* is 'float16', expected same"),
        ("init=nowhere.nemo", "no checkpoint nowhere.nemo"),
        ("prompts.train=nowhere.jsonl", "no prompts file nowhere.jsonl"),
        ("algorithm.kl_coeficient=1", "did you mean 'algorithm.kl_coefficient'"),
    ],
)
def test_refused(files, tmp_path, override, message):
    also = [override, "model.micro_batch_size=4"]
    with pytest.raises(ValueError, match=message):
        check_member(member_config(files, tmp_path, also=also))


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (Layout(tensor=4), {}, r"num_query_groups of .*sft.nemo is 2.*tensor_model_parallel_size"),
        (Layout(pipeline=3), {}, r"num_layers of .*sft.nemo is 4.*pipeline_model_parallel_size"),
        (Layout(), {"peft": {"peft_scheme": "lora"}}, "holds an adapter"),
        (
            Layout(pipeline=2),
            {"mcore_customization_config": {"final_logit_softcapping": 30.0}},
            "looks for the output layer on every stage",
        ),
    ],
)
def test_layout_that_does_not_divide_the_model(files, tmp_path, layout, changes, message):
    write_checkpoint(files.sft, **changes)
    with pytest.raises(ValueError, match=message):
        check_member(member_config(files, tmp_path, layout))


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("config.json", "it is a Hugging Face folder: import it with tools/import_hf.py"),
        ("context/io.json", "it is a NeMo 2 checkpoint: export it to Hugging Face"),
        ("latest_checkpointed_iteration.txt", "it is a checkpoint of Megatron-LM"),
        ("else.txt", "is it a NeMo checkpoint"),
    ],
)
def test_folder_of_another_format(files, tmp_path, inside, message):
    path = tmp_path / "folder" / inside
    path.parent.mkdir(parents=True)
    path.write_text("1")
    with pytest.raises(ValueError, match=message):
        check_member(member_config(files, tmp_path, also=[f"init={tmp_path / 'folder'}"]))


def test_truncated_checkpoint(files, tmp_path):
    with tarfile.open(files.sft, "a") as archive:
        archive.add(files.train, "./model_weights/__0_0.distcp")
    content = files.sft.read_bytes()
    files.sft.write_bytes(content[: content.index(b"__0_0.distcp") + 600])
    with pytest.raises(ValueError, match=r"sft.nemo is truncated or no .nemo file"):
        check_member(member_config(files, tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "heldout.jsonl line 9 is not JSON"),
        ('{"text": "other key"}', "heldout.jsonl line 9 has no text under 'prompt'"),
        ('{"prompt": ""}', "heldout.jsonl line 9 has a blank text"),
        ('["prompt"]', "heldout.jsonl line 9 has no text"),
    ],
)
def test_malformed_prompts(files, tmp_path, line, message):
    with files.heldout.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        check_member(member_config(files, tmp_path))


def test_empty_prompts(files, tmp_path):
    files.train.write_text("\n\n")
    with pytest.raises(ValueError, match=r"train.jsonl holds no prompts"):
        check_member(member_config(files, tmp_path))


def test_entry_point_says_it_in_one_line_without_nemo(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("algorithm: {ema_update_rte: 0.5}\n")
    code = (
        "import sys; from nemo_warp.aligner.train import main; "
        f"code = main(['--config', {str(config)!r}]); "
        "assert 'nemo' not in sys.modules and 'megatron' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown key 'algorithm.ema_update_rte'")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("context_parallel_size", 2, "log-probabilities would be wrong"),
        ("enable_cuda_graph", True, "the KL would be 0 always"),
        ("fp8", True, "not changed when weights are swapped"),
        ("virtual_pipeline_model_parallel_size", 2, "one model chunk"),
        ("ub_tp_comm_overlap", True, "one fixed sequence length"),
        ("rampup_batch_size", [8, 8, 100], "prompts_per_step"),
    ],
)
def test_settings_that_a_checkpoint_brings_along(tmp_path, files, key, value, said):
    """They would run, and give wrong numbers; a recipe can switch them off."""
    inherited = write_checkpoint(tmp_path / "inherited.nemo", **{key: value})
    materials = Materials(inherited, files.other, files.train, files.heldout)
    with pytest.raises(ValueError, match=rf"{key} of .*inherited.nemo.*{said}.*model.extra.{key}"):
        check_member(member_config(materials, tmp_path))
    off = member_config(materials, tmp_path, model={"extra": {key: None}, "megatron_amp_O2": False})
    check_member(off)


def test_optimizer_settings_that_work_against_swapped_weights(tmp_path, files):
    config = member_config(files, tmp_path, also=["optim.extra.overlap_param_sync=true"])
    with pytest.raises(ValueError, match=r"overlap_param_sync of optim\.extra.*put in their place"):
        check_member(config)
