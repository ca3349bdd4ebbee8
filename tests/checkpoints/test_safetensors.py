"""Hugging Face folders: merged, written as they were, read back by transformers."""

import json
from pathlib import Path

import pytest
import torch
from hf_models import load_hf_model, write_hf_model
from safetensors.torch import load_file

from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.merge import merge

ETA = 0.3


@pytest.fixture(scope="module")
def trio(tmp_path_factory) -> Path:
    """init, a and b of one Llama in three shards each, bfloat16 files of TRL's kind."""
    folder = tmp_path_factory.mktemp("hf")
    write_hf_model(folder / "init", "llama3", max_shard_size="150KB")
    for seed, name in enumerate("ab", 1):
        write_hf_model(folder / name, "llama3", seed, folder / "init", max_shard_size="90KB")
    (folder / "init" / "README.md").write_text("the card of another model")
    (folder / "init" / "pytorch_model.bin").write_bytes(b"other weights")
    return folder


def _merged(trio: Path, output: Path, **options) -> Path:
    policies = [trio / "a", trio / "b"]
    merge(trio / "init", policies, str(output), eta=ETA, workers=1, **options)
    return output


def _group(name: str) -> str:
    return ".".join(name.split(".")[:3]) if ".layers." in name else name


def _expected(trio: Path) -> dict[str, torch.Tensor]:
    """theta_init + eta * slerp per layer in float64, from what transformers reads."""
    states = {}
    for name in ("init", "a", "b"):
        model = load_hf_model(trio / name)
        states[name] = {k: v.double() for k, v in model.named_parameters()}
    expected = {}
    for group in dict.fromkeys(_group(name) for name in states["init"]):
        names = [n for n in states["init"] if _group(n) == group]
        a, b = (
            torch.cat([(states[p][n] - states["init"][n]).flatten() for n in names]) for p in "ab"
        )
        omega = torch.arccos(a @ b / (a.norm() * b.norm()))
        step = torch.sin(omega / 2) / torch.sin(omega) * (a + b)
        sizes = [states["init"][n].numel() for n in names]
        for n, piece in zip(names, step.split(sizes), strict=True):
            init = states["init"][n]
            expected[n] = (init + ETA * piece.view_as(init)).float()
    return expected


def test_a_merge_of_hugging_face_folders_is_one(trio, tmp_path):
    output = _merged(trio, tmp_path / "merged")
    expected = _expected(trio)
    for name, found in load_hf_model(output).named_parameters():
        torch.testing.assert_close(found, expected[name], rtol=3e-7, atol=1e-8)
    names = {path.name for path in output.iterdir()}
    kept = {path.name for path in (trio / "init").iterdir()} - {"README.md", "pytorch_model.bin"}
    assert kept <= names and not names & {"pytorch_model.bin"}
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index == json.loads((trio / "init" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for shard in set(index["weight_map"].values()):
        assert {index["weight_map"][key] for key in load_file(output / shard)} == {shard}


def test_another_dtype_reaches_header_index_and_configuration(trio, tmp_path):
    output = _merged(trio, tmp_path / "merged", dtype="bfloat16")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    shards = [load_file(output / shard) for shard in set(index["weight_map"].values())]
    tensors = {key: value for shard in shards for key, value in shard.items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    config = json.loads((output / "config.json").read_text())
    # transformers renamed it in 4.56
    assert config.get("torch_dtype", config.get("dtype")) == "bfloat16"
    for name, wanted in _expected(trio).items():
        torch.testing.assert_close(tensors[name].float(), wanted, rtol=2**-8, atol=1e-6)


def test_groups_carry_the_names_of_nemo(trio):
    names = set(open_checkpoint(trio / "init").tensors)
    assert {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"} <= names
    assert "decoder.layers.1.self_attn.q_proj.weight" in names


def _cut(folder: Path, shard: Path) -> str:
    shard.write_bytes(shard.read_bytes()[:-4])
    return "truncated"


def _remove(folder: Path, shard: Path) -> str:
    shard.unlink()
    return "missing"


def _quantise(folder: Path, shard: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    return "quantised"


def _claim(folder: Path, shard: Path) -> str:
    shard.write_bytes((1 << 60).to_bytes(8, "little") + shard.read_bytes()[8:])
    return "header"


def _overlap(folder: Path, shard: Path) -> str:
    data = shard.read_bytes()
    size = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + size])
    first, *_, last = [key for key in table if key != "__metadata__"]
    table[last]["data_offsets"] = table[first]["data_offsets"]
    table[last]["shape"], table[last]["dtype"] = table[first]["shape"], table[first]["dtype"]
    text = json.dumps(table).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return "overlap"


@pytest.mark.parametrize("harm", [_cut, _remove, _quantise, _claim, _overlap])
def test_damaged_folders_are_refused(trio, tmp_path, harm):
    folder = write_hf_model(tmp_path / "broken", "llama3", max_shard_size="90KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    message = harm(folder, shard)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_tar_is_no_form_for_a_hugging_face_folder(trio, tmp_path):
    with pytest.raises(ValueError, match="folder"):
        _merged(trio, tmp_path / "merged.nemo")
    assert not list(tmp_path.iterdir())
