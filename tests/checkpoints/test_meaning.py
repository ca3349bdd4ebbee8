"""Equal names and shapes, another model: what is compared, and what may differ."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import yaml

from nemo_warp.aligner.entry.validation import check_same_model
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.meaning import check_same_meaning, differences, read_meaning

NEMO = {
    **{"activation": "fast-swiglu", "normalization": "rmsnorm", "layernorm_epsilon": 1e-5},
    **{"num_attention_heads": 4, "hidden_size": 64, "rotary_base": 10000},
    **{"position_embedding_type": "rope", "tensor_model_parallel_size": 1, "micro_batch_size": 2},
    "tokenizer": {"library": "sentencepiece", "model": "nemo:abc_tokenizer.model"},
}
LLAMA = {
    **{"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    **{"num_attention_heads": 4, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
}


class Config(dict):
    __getattr__ = dict.__getitem__


def _nemo(path: Path, changes: dict | None = None, tokenizer: bytes = b"pieces") -> Path:
    config = {key: v for key, v in {**NEMO, **(changes or {})}.items() if v != "absent"}
    files = {"model_config.yaml": yaml.safe_dump(config).encode(), "abc_tokenizer.model": tokenizer}
    with tarfile.open(path, "w:") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _hugging_face(path: Path, changes: dict, vocabulary: dict) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    tokenizer = {"model": {"vocab": vocabulary, "merges": []}, "truncation": None, **changes}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_base": 1000000},
        {"activation": "fast-geglu"},
        {"normalization": "layernorm1p"},
        {"layernorm_epsilon": 1e-6},
        {"num_attention_heads": 8},
        {"num_query_groups": 2},
        {"kv_channels": 32},
        {"share_embeddings_and_output_weights": False},
        {"scale_positional_embedding": True},
        {"seq_len_interpolation_factor": 2.0},
        {"rotary_percentage": 0.5},
        {"position_embedding_type": "absent"},
        {"moe_router_topk": 4},
        {"mcore_customization_config": {"final_logit_softcapping": 30.0}},
        {"tokenizer": {**NEMO["tokenizer"], "library": "huggingface"}},
    ],
)
def test_what_is_another_model(tmp_path, changes):
    one, other = _nemo(tmp_path / "one.nemo"), _nemo(tmp_path / "other.nemo", changes)
    found = differences(read_meaning(one), read_meaning(other))
    name = next(iter(changes))
    assert any(key.startswith(name) for key in found)
    config = Config(init=str(one), sft=str(other), allow_different_configs=False)
    with pytest.raises(ValueError, match=rf"{name}.* is .* in .*one\.nemo and .*allow_different"):
        check_same_model(config, "init", "sft")
    check_same_model(Config({**config, "allow_different_configs": True}), "init", "sft")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tensor_model_parallel_size": 8, "micro_batch_size": 1, "precision": "bf16"},
        {"activation": "swiglu", "normalization": "RMSNorm", "layernorm_epsilon": "1e-05"},
        {"rotary_base": 10000.0, "num_query_groups": 4, "kv_channels": 16},
        {"rotary_percentage": 1.0, "share_embeddings_and_output_weights": True},
        {"mcore_customization_config": {}, "encoder_seq_length": 8192},
        {"num_attention_heads": "absent", "num_query_groups": "absent"},
    ],
)
def test_what_is_the_same_model(tmp_path, changes):
    one, other = _nemo(tmp_path / "one.nemo"), _nemo(tmp_path / "other.nemo", changes)
    assert differences(read_meaning(one), read_meaning(other)) == {}


def test_tokenizers_are_compared_by_what_they_hold(tmp_path):
    one = read_meaning(_nemo(tmp_path / "one.nemo"))
    other = read_meaning(_nemo(tmp_path / "other.nemo", tokenizer=b"other pieces"))
    with pytest.raises(ValueError, match=r"tokenizer\.model is one with SHA-256 [0-9a-f]{12} in a"):
        check_same_meaning({"a": one, "b": other}, "go on")
    renamed = {"tokenizer": {**NEMO["tokenizer"], "model": "/not/in/the/archive"}}
    unknown = read_meaning(_nemo(tmp_path / "unknown.nemo", renamed))
    check_same_meaning({"a": one, "b": unknown}, "go on")


def test_hugging_face_folders(tmp_path):
    words = {"a": 0, "b": 1}
    one = read_meaning(_hugging_face(tmp_path / "one", {}, words))
    same = {"torch_dtype": "float32", "truncation": {"max_length": 8}}
    assert differences(one, read_meaning(_hugging_face(tmp_path / "same", same, words))) == {}
    rope = read_meaning(_hugging_face(tmp_path / "rope", {"rope_theta": 500000.0}, words))
    assert differences(one, rope) == {"rope_theta": (10000.0, 500000.0)}
    other = read_meaning(_hugging_face(tmp_path / "other", {}, {"a": 1, "b": 0}))
    assert list(differences(one, other)) == ["tokenizer.vocabulary"]


@pytest.mark.parametrize(
    ("name", "section"), [("context/model.yaml", "config"), ("run_config.yaml", "model")]
)
def test_configurations_of_nemo_2_and_megatron_bridge(tmp_path, name, section):
    """What the weights mean is compared, where they are cut is not."""

    def folder(place: str, **changes) -> Path:
        table = {"rotary_base": 10000, "num_attention_heads": 4, "layernorm_epsilon": 1e-5}
        table |= {"tensor_model_parallel_size": 1, "activation_func": {"_target_": "silu"}}
        path = tmp_path / place / name
        path.parent.mkdir(parents=True)
        path.write_text(yaml.safe_dump({section: {**table, **changes}, "_target_": "x"}))
        return tmp_path / place

    one = read_meaning(folder("one"))
    assert one["rotary_base"] == 10000.0
    same = read_meaning(folder("same", tensor_model_parallel_size=8, rotary_base=1e4))
    assert differences(one, same) == {}
    other = read_meaning(folder("other", activation_func={"_target_": "gelu"}))
    assert list(differences(one, other)) == ["activation_func"]


@pytest.mark.parametrize(
    "text",
    [
        "a: " + ":".join(["1"] * 100_000),  # base 60: quadratic
        "a: !!float " + ":".join(["1"] * 100_000),
        "a: " + "9" * 5000,
        "a: " + "[" * 100 + "]" * 100,
        "a: &a {b: 1}\nc: {<<: *a}",
        "? [1, 2]\n: 3",
        "- no\n- mapping",
        "a: [",
        "x" * (2 << 20),
    ],
)
def test_configurations_that_are_refused(tmp_path, text):
    (tmp_path / "model_config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"model_config\.yaml"):
        read_meaning(tmp_path)


def test_tables_that_refer_to_themselves_end(tmp_path):
    doubling = "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
    text = (
        "a0: &a0 [x, y]\n" + doubling + "mcore_customization_config: {deep: *a29, own: &o [*o]}\n"
    )
    (tmp_path / "model_config.yaml").write_text(text)
    assert "..." in read_meaning(tmp_path)["mcore_customization_config"]
