"""Hugging Face models into a .nemo and out again, without NeMo; and everything that is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chat_tokenizers import write_gemma_tokenizer, write_llama3_tokenizer
from hf_models import FAMILIES, VOCABULARY, hf_logits, load_hf_model, write_hf_model
from safetensors.torch import load_file

from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.families.exporting import export_hf
from nemo_warp.checkpoints.families.importing import import_hf
from nemo_warp.merge import merge

TOOLS = Path(__file__).parents[2] / "tools"


def _tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    found = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {key: value for shard in found for key, value in shard.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_in_and_out_again_is_the_same_model(tmp_path, family):
    source = write_hf_model(tmp_path / "hf", family)
    import_hf(source, tmp_path / "model.nemo")
    back = tmp_path / "back"
    export_hf(tmp_path / "model.nemo", back)
    theirs, ours = _weights(source), _weights(back)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((source / name).read_text()) == json.loads((back / name).read_text())
    assert (source / "tokenizer.json").read_bytes() == (back / "tokenizer.json").read_bytes()
    prompt = _tokens()[:, :4]
    found = load_hf_model(back).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False
    )
    assert found.shape[1] > 4


def test_a_config_of_newer_transformers_keeps_its_name_of_the_dtype(tmp_path):
    source = write_hf_model(tmp_path / "hf", "llama2")
    config = json.loads((source / "config.json").read_text())
    for name in ("torch_dtype", "dtype"):
        config.pop(name, None)
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    import_hf(source, tmp_path / "model.nemo")
    export_hf(tmp_path / "model.nemo", tmp_path / "back")
    exported = json.loads((tmp_path / "back/config.json").read_text())
    assert exported["dtype"] == "float32" and "torch_dtype" not in exported


def test_a_merge_of_nemo_twins_is_the_merge_of_hugging_face_twins(tmp_path):
    """Gemma: one key-value head, zero-centred norms, tied embedding; weights and angles."""
    write_hf_model(tmp_path / "init", "gemma")
    for seed, name in enumerate("ab", 1):
        write_hf_model(tmp_path / name, "gemma", seed, tmp_path / "init")
    for name in ("init", "a", "b"):
        import_hf(tmp_path / name, tmp_path / f"{name}.nemo")
    angles = {}
    for kind in ("", ".nemo"):
        policies = [tmp_path / f"{p}{kind}" for p in "ab"]
        report, output = tmp_path / f"report{kind}", str(tmp_path / f"merged{kind}")
        merge(tmp_path / f"init{kind}", policies, output, eta=0.7, workers=1, report=report)
        units = json.loads((report / "report.json").read_text())["units"]
        angles[kind] = {u: found["pairs"][0]["task_vectors"]["angle"] for u, found in units.items()}
    export_hf(tmp_path / "merged.nemo", tmp_path / "back", shard_bytes=60000)
    theirs, ours = _weights(tmp_path / "merged"), _weights(tmp_path / "back")
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=2.5e-7, atol=0.0)
    assert angles[""] == pytest.approx(angles[".nemo"], rel=1e-9)
    assert {"embedding", "decoder.layers.0", "decoder.final_layernorm"} <= angles[""].keys()


def _unknown_key(folder: Path) -> str:
    _edit(folder / "config.json", attn_scale_magic=2.0)
    return "attn_scale_magic"


def _unknown_family(folder: Path) -> str:
    _edit(folder / "config.json", model_type="falcon")
    return "falcon"


def _qwen3(folder: Path) -> str:
    _edit(folder / "config.json", model_type="qwen3")
    return "NeMo 2.2.1 cannot express qwen3"


def _yarn(folder: Path) -> str:
    _edit(folder / "config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    return "yarn"


def _other_sizes(folder: Path) -> str:
    _edit(folder / "config.json", intermediate_size=128)
    return "has shape [112, 64], its configuration says [128, 64]"


def _more_layers(folder: Path) -> str:
    _edit(folder / "config.json", num_hidden_layers=3)
    return "lacks model.layers.2"


def _fewer_layers(folder: Path) -> str:
    _edit(folder / "config.json", num_hidden_layers=1)
    return "nobody maps"


def _missing_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "no weights"


def _missing_shard(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    write_hf_model(folder, "llama2", max_shard_size="60kB")
    first = sorted(folder.glob("model-*.safetensors"))[0]
    first.unlink()
    return first.name


def _other_vocabulary(folder: Path) -> str:
    _edit(folder / "config.json", vocab_size=128)
    return "has shape [96, 64], its configuration says [128, 64]"


def _tokenizer_of_another_family(folder: Path) -> str:
    write_llama3_tokenizer(folder, 300)
    return "another model's tokenizer"


def _tokens_that_no_piece_is(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    write_gemma_tokenizer(folder, VOCABULARY)
    (folder / "added_tokens.json").write_text('{"<image>": 96}')
    return "<image> (of added_tokens.json) are not among the 96 pieces"


def _other_tokenizer(folder: Path) -> str:
    table = json.loads((folder / "tokenizer.json").read_text())
    table["added_tokens"].append({**table["added_tokens"][0], "id": 5000, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(table))
    return "another model's tokenizer"


def _no_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "no tokenizer"


def _edit(path: Path, **keys) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


HARMS = (
    *(_unknown_key, _unknown_family, _qwen3, _yarn, _other_sizes, _more_layers, _fewer_layers),
    *(_missing_weights, _missing_shard, _other_vocabulary, _tokenizer_of_another_family),
    *(_tokens_that_no_piece_is, _other_tokenizer, _no_tokenizer),
)


def test_what_cannot_be_imported_is_one_sentence_and_nothing_is_written(tmp_path, capsys):
    sys.path.insert(0, str(TOOLS))
    import import_hf as tool

    for harm in HARMS:
        folder = write_hf_model(tmp_path / harm.__name__ / "hf", "llama2")
        message = harm(folder)
        output = folder.parent / "out" / "model.nemo"
        assert tool.main([str(folder), str(output)]) == 2, harm.__name__
        printed = capsys.readouterr().err.strip().splitlines()[-1]
        assert printed.startswith("error: ") and message in printed, printed
        assert not output.parent.exists()


def test_sentencepiece_goes_along_as_nemo_loads_it(tmp_path):
    """As an artifact; but by tokenizer.json, where a model has tokens that are no pieces."""
    source = write_hf_model(tmp_path / "hf", "gemma_7b")
    own = (source / "tokenizer.json").read_bytes()
    (source / "tokenizer.json").unlink()
    write_gemma_tokenizer(source, VOCABULARY)
    section = import_hf(source, tmp_path / "model.nemo")["tokenizer"]
    assert section["library"] == "sentencepiece" and section["model"].endswith("_tokenizer.model")
    export_hf(tmp_path / "model.nemo", tmp_path / "back")
    pieces = (tmp_path / "back" / "tokenizer.model").read_bytes()
    assert pieces == (source / "tokenizer.model").read_bytes()
    write_gemma_tokenizer(source, 90)
    (source / "tokenizer.json").write_bytes(own)
    (source / "tokenizer_config.json").unlink()  # which knows another BOS
    section = import_hf(source, tmp_path / "more.nemo")["tokenizer"]
    assert section["library"] == "huggingface" and section["model"].endswith("_tokenizer.json")


def test_a_wrong_original_is_exit_2_and_nothing_is_written(tmp_path, capsys):
    sys.path.insert(0, str(TOOLS))
    import export_hf as tool

    import_hf(write_hf_model(tmp_path / "hf", "qwen2"), tmp_path / "model.nemo")
    words = [str(tmp_path / "model.nemo"), str(tmp_path / "out")]
    other = write_hf_model(tmp_path / "other", "llama3")
    for like in (other, tmp_path / "nowhere"):
        assert tool.main([*words, "--like", str(like)]) == 2
        printed = capsys.readouterr().err.strip().splitlines()[-1]
        assert printed.startswith("error: "), printed
        assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_origin_is_exported_like_its_original(tmp_path):
    source = write_hf_model(tmp_path / "hf", "qwen2")
    other = write_hf_model(tmp_path / "other", "llama3")
    config = import_hf(source, tmp_path / "model.nemo")
    assert config["qkv_bias"] and config["override_vocab_size"] == VOCABULARY
    with pytest.raises(ValueError, match="another model"):
        export_hf(tmp_path / "model.nemo", tmp_path / "out", like=other)
    assert not (tmp_path / "out").exists()
    export_hf(tmp_path / "model.nemo", tmp_path / "out", like=source)
    assert torch.equal(hf_logits(tmp_path / "out", _tokens()), hf_logits(source, _tokens()))


def test_conversion_needs_neither_nemo_nor_transformers_and_little_memory(tmp_path):
    """Peak above the imports at two sizes, the larger one far above the limit in weights."""
    script = (
        "import sys, resource; from pathlib import Path\n"
        "from nemo_warp.checkpoints.families.importing import import_hf\n"
        "from nemo_warp.checkpoints.families.exporting import export_hf\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "import_hf(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "export_hf(Path(sys.argv[2]), Path(sys.argv[3]))\n"
        "assert not {'nemo', 'transformers', 'megatron'} & set(sys.modules)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
    )
    for layers in (2, 12):
        folder = tmp_path / f"{layers}"
        _write_large(folder, layers)
        words = [str(tmp_path / f"{layers}{suffix}") for suffix in ("", ".nemo", "-back")]
        run = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True
        )
        layer = 4 * (4 * 1024 * 1024 + 3 * 1024 * 2816) >> 20
        assert int(run.stdout) < 200 + 2 * layer, f"{layers} layers: {run.stdout} MB"
        first, last = folder / "model.safetensors", tmp_path / f"{layers}-back"
        assert (last / "model.safetensors").stat().st_size >= first.stat().st_size * 0.99


def _write_large(folder: Path, layers: int) -> None:
    """A sparse file of zeros: 50 MB a layer and nothing on the disk."""
    from nemo_warp.checkpoints.dtypes import FLOAT32
    from nemo_warp.checkpoints.families.configuration import nemo_keys
    from nemo_warp.checkpoints.families.tensors import megatron_tensors, taken_apart
    from nemo_warp.checkpoints.formats.safetensors import make_header

    write_hf_model(folder, "llama2")
    _edit(
        folder / "config.json",
        **{"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers},
        **{"head_dim": 256},
    )
    config = json.loads((folder / "config.json").read_text())
    tensors = taken_apart(megatron_tensors(nemo_keys(config, "config.json")))
    header = make_header([(t.name, FLOAT32, t.shape) for t in tensors], None)
    size = sum(4 * torch.Size(t.shape).numel() for t in tensors)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + size)
    assert len(open_checkpoint(folder).tensors) == len(tensors)
