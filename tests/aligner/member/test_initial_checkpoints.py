"""Initial checkpoints as they are found: what they ask for works, or is refused by its name."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from family_lab import Walk, member_config, prepare
from member_lab import Layout
from ranks import run_ranks

from nemo_warp.aligner.train import check_member
from nemo_warp.config import CONF_DIRECTORY, load_config

pytestmark = pytest.mark.nemo

WORKS = {
    "precision": {"precision": "bf16-mixed"},
    "O2": {"megatron_amp_O2": True, "precision": "bf16"},
    "sequence parallel": {"sequence_parallel": True},
    "layout": {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4},
    "fusions": {
        **{"apply_rope_fusion": True, "masked_softmax_fusion": True, "persist_layer_norm": True},
        **{"bias_activation_fusion": True, "bias_dropout_add_fusion": True},
        **{"gradient_accumulation_fusion": True, "cross_entropy_loss_fusion": True},
    },
    "flash attention": {"use_flash_attention": True},
    "Transformer Engine": {"transformer_engine": True, "name": "te_gpt", "fp8": False},
    "checkpointing": {
        **{"activations_checkpoint_granularity": "full", "fsdp": False},
        **{"activations_checkpoint_method": "uniform", "activations_checkpoint_num_layers": 1},
    },
    "selective checkpointing": {"activations_checkpoint_granularity": "selective"},
    "keys that are not there": {"activations_checkpoint_granularity": ...},
    "data": {"data": {"data_prefix": [1.0, "/lustre/corpus"], "reset_attention_mask": True}},
    "peft": {"peft": {"peft_scheme": "none", "restore_from_path": None}},
    "optim": {"optim": {"name": "distributed_fused_adam", "lr": 1, "sched": {"name": "nobody"}}},
    "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "batches": {"micro_batch_size": 3, "global_batch_size": 1024},
}
"""What the configuration has beside the import's (``...``: lacks); nothing comes out otherwise."""

REFUSED = {
    "encoder_seq_length": ({"encoder_seq_length": 5}, "reads at most 5 tokens"),
    "peft_scheme": ({"peft": {"peft_scheme": "lora"}}, "holds an adapter"),
    "context_parallel_size": ({"context_parallel_size": 2}, "context_parallel_size"),
    "virtual pipeline": ({"virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline"),
    "fp8": ({"fp8": True}, "fp8 of"),
    "fsdp": ({"fsdp": True}, "fsdp of"),
    "rampup": ({"rampup_batch_size": [1, 1, 1]}, "rampup_batch_size of"),
    "soft-capped stages": (
        {"mcore_customization_config": {"final_logit_softcapping": 30.0}},
        "soft-capped",
    ),
}


def changed(source: Path, target: Path, changes: dict) -> Path:
    """A copy of a .nemo with another configuration."""
    with tarfile.open(source) as old, tarfile.open(target, "w:") as new:
        for member in old:
            content = old.extractfile(member)
            data = content.read() if content else b""
            if member.name.removeprefix("./") == "model_config.yaml":
                config = {**yaml.safe_load(data), **changes}
                kept = {key: value for key, value in config.items() if value is not ...}
                data = yaml.safe_dump(kept).encode()
                member.size = len(data)
            new.addfile(member, io.BytesIO(data) if content else None)
    return target


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    found = Walk("llama3", tmp_path_factory.mktemp("found"), Path("nowhere"))
    prepare(found)
    return found


def _config(walk, name, layout, changes):
    path = member_config(walk, name, layout, 1)
    init = changed(walk.path("sft.nemo"), walk.path(f"{name}.nemo"), changes)
    config = load_config(CONF_DIRECTORY / "member.yaml", path, [f"init='{init}'"])
    check_member(config)
    return config


def log_probs(configs):
    """Of the same tokens by each member's policy, in one process; "folder" is the first's again.

    It is a folder that holds an optimizer's state beside the weights.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from nemo.utils.callbacks.dist_ckpt_io import DistributedCheckpointIO

    from nemo_warp.aligner.policy.build import build_policy

    tokens = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(3))
    found = {}
    for name, config in configs.items():
        policy = build_policy(config, 8, 4)[0]
        with policy.model.inference():
            found[name] = policy.model.get_inference_log_probs(tokens)
        if name == "as imported":
            state = policy.model.sharded_state_dict()
            parts = policy.model.sharded_state_dict().items()
            moments = {key: part for key, part in parts if isinstance(part, ShardedTensor)}
            for tensor in moments.values():
                tensor.key = f"optimizer.state.exp_avg.{tensor.key}"
            writer = DistributedCheckpointIO.from_config(policy.model.cfg)
            folder = Path(configs["folder"].init)
            writer.save_checkpoint({**state, "optimizer": moments}, str(folder / "model_weights"))
    return found


def test_what_works_gives_the_same_log_probabilities(nemo, walk):
    configs = {"as imported": _config(walk, "plain", Layout(tensor=2), {})}
    for number, (name, changes) in enumerate(WORKS.items()):
        configs[name] = _config(walk, f"works-{number}", Layout(tensor=2), changes)
    folder = walk.path("folder")
    (folder / "model_weights").mkdir(parents=True)
    with tarfile.open(configs["as imported"].init) as archive:
        for member in archive.getmembers():
            if "/" not in member.name.removeprefix("./") and member.isfile():
                archive.extract(member, folder, filter="data")
    configs["folder"] = load_config(
        CONF_DIRECTORY / "member.yaml", walk.path("plain.yaml"), [f"init={folder}"]
    )
    (found, _) = run_ranks(log_probs, 2, configs)
    assert found.keys() == configs.keys()
    for name, values in found.items():
        assert torch.equal(values, found["as imported"]), name


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_work_is_refused_by_name(walk, name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        _config(walk, f"refused-{list(REFUSED).index(name)}", Layout(pipeline=2), changes)
