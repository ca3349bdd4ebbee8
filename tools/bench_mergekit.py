"""The merge against mergekit's: equal where both hold a tensor whole, and how much faster.

Used by ``bench_merge.py --mergekit``. mergekit gets the same tensors as Hugging Face files and does
what a user of it would do for K etas: ``nuslerp`` of task vectors (flattened, float32), then
``linear`` towards the base for every eta but 1. It runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import torch
from _bench_merging import ETAS, MODELS, make_cold, measure_merge
from torch.distributed.checkpoint import FileSystemReader, load

SCRIPT = """
import json, sys, time, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
options = MergeOptions(quiet=True, num_threads=int(sys.argv[2]), async_write=True,
    copy_tokenizer=False, write_model_card=False)
begin = time.perf_counter()
for text, out in json.loads(sys.argv[1]):
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), out, options=options)
print(json.dumps({"seconds": time.perf_counter() - begin}))
"""
WHOLE = ("o_proj", "down_proj", "norm", "embed_tokens", "lm_head")
"""Tensors that are one tensor in both formats, so that one angle means the same in both."""
SHARD = 1 << 30
MERGEKIT = "mergekit==0.1.5"


def compare_with_mergekit(folder: Path, shapes, weights, arguments: argparse.Namespace) -> None:
    """Alternate between the two for one read-all, write-K merge; then compare the tensors."""
    python = make_environment(folder, arguments.mergekit)
    for model in MODELS:
        write_hugging_face(folder / f"hf_{model}", model, shapes, weights)
    outputs, workers = max(arguments.outputs), max(arguments.workers)
    ours, theirs = [], []
    for repeat in range(arguments.repeats):
        make_cold(list(folder.glob("hf_*/*.safetensors")), arguments.drop_caches)
        theirs.append(run_mergekit(python, folder, outputs, workers))
        make_cold(list(folder.glob("*.nemo")), arguments.drop_caches)
        ours.append(measure_merge(folder, outputs, workers, "tensor")["seconds"])
        print(f"  load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
        if repeat + 1 < arguments.repeats:
            remove_outputs(folder)
    ratio = statistics.median(t / o for t, o in zip(theirs, ours, strict=True))
    print(f"K = {outputs}, {workers} threads: mergekit {[round(t, 1) for t in theirs]} s,")
    print(f"  this merger {[round(o, 1) for o in ours]} s, {ratio:.1f} x faster (paired median)")
    compare_tensors(folder)
    remove_outputs(folder)


def remove_outputs(folder: Path) -> None:
    for path in [*folder.glob("mk_*"), *folder.glob("out_*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_environment(folder: Path, python: str) -> str:
    """Python of an environment with mergekit and this environment's torch.

    Args:
        python: ``install``, or the Python of an environment that has mergekit.
    """
    if python != "install":
        return python
    place = folder / "environment"
    venv.create(place, with_pip=True)
    site = f"python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    # torch is found here; whatever mergekit wants newer goes into its own environment
    (place / "lib" / site / "host.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = str(place / "bin" / "python")
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", MERGEKIT]
    subprocess.run(command, check=True)
    return python


def hugging_face(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Llama's names for a tensor; fused ones are cut by rows, in any order: only bytes count."""
    name = name.replace("decoder.", "model.")
    plain = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "model.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
    }
    if name in plain:
        return {plain[name]: value}
    head, rest = re.match(r"(model\.layers\.\d+\.)(.*)", name).groups()
    if rest == "self_attention.linear_qkv.weight":
        hidden = value.shape[1]
        parts = value.split([hidden, hidden // 4, hidden // 4])
        return {
            f"{head}self_attn.{p}_proj.weight": part for p, part in zip("qkv", parts, strict=True)
        }
    if rest == "mlp.linear_fc1.weight":
        gate, up = value.chunk(2)
        return {f"{head}mlp.gate_proj.weight": gate, f"{head}mlp.up_proj.weight": up}
    names = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    return {head + names[rest]: value}


def write_hugging_face(path: Path, model: str, shapes, weights) -> None:
    """Sharded safetensors with an index, and a Llama configuration."""
    from safetensors.torch import save_file

    path.mkdir()
    index, shard, size = {}, {}, 0
    files = 0
    names = list(shapes)
    for name in names:
        for key, value in hugging_face(name, weights.get(model, name)).items():
            shard[key] = value.contiguous()
            size += value.nbytes
        if size > SHARD or name == names[-1]:
            files += 1
            file = f"model-{files:05d}.safetensors"
            save_file(shard, path / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    text = {"metadata": {"total_size": total}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(text))
    vocab, hidden = shapes["embedding.word_embeddings.weight"]
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        **{"hidden_size": hidden, "vocab_size": vocab, "torch_dtype": "bfloat16"},
        **{"num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 512},
        "intermediate_size": shapes["decoder.layers.0.mlp.linear_fc2.weight"][1],
        "num_hidden_layers": sum("linear_fc2" in name for name in shapes),
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))


def run_mergekit(python: str, folder: Path, outputs: int, threads: int) -> float:
    """Seconds of nuslerp and the linear merges in one process, imports not counted."""
    base, slerp = folder / "hf_init", folder / "mk_1.0"
    config = {
        **{"merge_method": "nuslerp", "base_model": str(base)},
        "models": [
            {"model": str(folder / f"hf_{m}"), "parameters": {"weight": 0.5}} for m in ("a", "b")
        ],
        "parameters": {"nuslerp_flatten": True},
        **{"dtype": "float32", "out_dtype": "bfloat16"},
    }
    steps = [(json.dumps(config), str(slerp))]
    for eta in ETAS[-outputs:-1]:
        models = [
            {"model": str(path), "parameters": {"weight": weight}}
            for path, weight in ((base, 1 - eta), (slerp, eta))
        ]
        config = {
            **{"merge_method": "linear", "models": models},
            **{"dtype": "float32", "out_dtype": "bfloat16"},
        }
        steps.append((json.dumps(config), str(folder / f"mk_{eta}")))
    command = [python, "-c", SCRIPT, json.dumps(steps), str(threads)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"mergekit failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


def compare_tensors(folder: Path) -> None:
    """Share of equal elements and largest distance, for eta = 1 and the tensors in `WHOLE`."""
    from safetensors import safe_open

    with tarfile.open(folder / "out_1.nemo") as tar:
        tar.extractall(folder / "out_read", filter="data")
    ours = read_torch_dist(folder / "out_read" / "model_weights")
    elements, different, far, furthest, tensors, theirs = 0, 0, 0, 0.0, 0, {}
    for path in sorted((folder / "mk_1.0").glob("*.safetensors")):
        with safe_open(path, "pt") as stream:
            theirs |= dict.fromkeys(stream.keys(), path)
    for name, value in ours:
        for key, part in hugging_face(name, value).items():
            if not any(word in key for word in WHOLE):
                continue
            with safe_open(theirs[key], "pt") as stream:
                other = stream.get_tensor(key)
            apart = (ordered_bits(part) - ordered_bits(other)).abs()
            elements, tensors = elements + apart.numel(), tensors + 1
            different, far = different + int((apart > 0).sum()), far + int((apart > 1).sum())
            difference = (part.float() - other.float()).abs().max()
            furthest = max(furthest, float(difference / part.float().square().mean().sqrt()))
    print(
        f"eta = 1 at --granularity tensor, {tensors} tensors that both hold whole: {different} of "
        f"{elements} elements differ ({different / elements:.1e}), {far} by more than one unit in "
        f"bfloat16's last place; largest difference {furthest:.1e} of the tensor's RMS"
    )


def read_torch_dist(folder: Path):
    """(name, tensor) of each logical tensor, read by torch's own reader."""
    metadata = FileSystemReader(folder).read_metadata()
    for key, entry in metadata.state_dict_metadata.items():
        state = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        load(state, storage_reader=FileSystemReader(folder), no_dist=True)
        name = key.removeprefix("model.")
        if ".layers." not in name:
            yield name, state[key]
            continue
        for number, value in enumerate(state[key]):
            yield name.replace(".layers.", f".layers.{number}."), value


def ordered_bits(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 as whole numbers in the same order, one per representable value."""
    bits = values.contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(1 << 15) - bits, bits)
