"""The merge against mergekit's on its own ground: how much faster, with how much memory.

Used by ``bench_merge.py --mergekit``. Both read the same Hugging Face folders and write such ones.
For SLERP mergekit does what a user of it would do for K etas: ``nuslerp`` of task vectors
(flattened, float32), then ``linear`` towards the base for every eta but 1; for LERP, one ``linear``
of the policies. It runs in an environment of its own.
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
import venv
from pathlib import Path

import torch
from _bench_merging import ETAS, MODELS, Cost, make_cold, measure_command
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
print(f"total={time.perf_counter() - begin:.2f}s")
"""
SHARD = 1 << 30
MERGEKIT = "mergekit==0.1.5"


def compare_with_mergekit(folder: Path, shapes, weights, arguments: argparse.Namespace) -> None:
    """Alternate between the two; print times, memory and how many elements differ."""
    python = make_environment(folder, arguments.mergekit)
    for model in MODELS:
        (folder / f"{model}.nemo").unlink()
        write_hugging_face(folder / f"hf_{model}", model, shapes, weights)
    workers = max(arguments.workers)
    outputs = max(arguments.outputs)
    for method, etas in (("slerp", ETAS[-outputs:]), ("lerp", ETAS[-1:])):
        ours: list[Cost] = []
        theirs: list[Cost] = []
        for _ in range(arguments.repeats):
            remove_outputs(folder)
            make_cold(list(folder.glob("hf_*/*.safetensors")), arguments.drop_caches)
            theirs.append(run_mergekit(python, folder, method, etas, workers))
            make_cold(list(folder.glob("hf_*/*.safetensors")), arguments.drop_caches)
            ours.append(run_ours(folder, method, etas, workers))
            for name, cost in ("mergekit", theirs[-1]), ("this merger", ours[-1]):
                print(f"  {method}, {name}: {cost}", file=sys.stderr)
            print(f"  load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
        ratio = statistics.median(
            t.own_seconds / o.own_seconds for t, o in zip(theirs, ours, strict=True)
        )
        print(f"{method}, K = {len(etas)}, {workers} threads: this merger is {ratio:.1f} x faster")
        for name, costs in ("mergekit", theirs), ("this merger", ours):
            own = [round(cost.own_seconds, 1) for cost in costs]
            peak = max(cost.peak_bytes for cost in costs)
            cpu = statistics.median(cost.cpu_seconds for cost in costs)
            print(f"  {name}: {own} s, processor {cpu:.1f} s, peak {peak / 1e9:.2f} GB")
        compare_tensors(folder / "mk_1.0", folder / "out_1")
    remove_outputs(folder)


def remove_outputs(folder: Path) -> None:
    for path in [*folder.glob("mk_*"), *folder.glob("out_*")]:
        shutil.rmtree(path)


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


def run_mergekit(
    python: str, folder: Path, method: str, etas: tuple[float, ...], threads: int
) -> Cost:
    """One process that makes ``mk_<eta>`` for each eta, the last of which is 1."""
    base, merged = folder / "hf_init", folder / "mk_1.0"
    models = [{"model": str(folder / f"hf_{m}"), "parameters": {"weight": 0.5}} for m in ("a", "b")]
    config = {"merge_method": "linear", "models": models}
    if method == "slerp":
        config |= {"merge_method": "nuslerp", "base_model": str(base)}
        config["parameters"] = {"nuslerp_flatten": True}
    configs = [(config, merged)]
    for eta in etas[:-1]:
        models = [
            {"model": str(path), "parameters": {"weight": weight}}
            for path, weight in ((base, 1 - eta), (merged, eta))
        ]
        configs.append(({"merge_method": "linear", "models": models}, folder / f"mk_{eta}"))
    dtypes = {"dtype": "float32", "out_dtype": "bfloat16"}
    steps = [(json.dumps({**config, **dtypes}), str(path)) for config, path in configs]
    command = [python, "-c", SCRIPT, json.dumps(steps), str(threads)]
    return measure_command(
        command, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS=None
    )


def run_ours(folder: Path, method: str, etas: tuple[float, ...], workers: int) -> Cost:
    """``out_<eta>`` for each eta; one angle per tensor, as in mergekit."""
    command = [sys.executable, str(Path(__file__).with_name("merge_nemo.py"))]
    command += ["--init", str(folder / "hf_init"), "--policies"]
    command += [str(folder / f"hf_{model}") for model in ("a", "b")]
    command += ["--method", method, "--granularity", "tensor", "--eta", *map(str, etas)]
    command += ["--workers", str(workers), "--allow-similar", "--output"]
    return measure_command([*command, str(folder / ("out_{eta}" if etas[1:] else "out_1"))])


def compare_tensors(theirs: Path, ours: Path) -> None:
    """Share of equal elements and largest distance over all tensors."""
    from safetensors import safe_open

    elements, different, far, furthest, places = 0, 0, 0, 0.0, {}
    for path in sorted(theirs.glob("*.safetensors")):
        with safe_open(path, "pt") as stream:
            places |= dict.fromkeys(stream.keys(), path)
    for path in sorted(ours.glob("*.safetensors")):
        with safe_open(path, "pt") as stream:
            for key in stream.keys():  # noqa: SIM118 - it is no dictionary
                part = stream.get_tensor(key)
                with safe_open(places.pop(key), "pt") as other_stream:
                    other = other_stream.get_tensor(key)
                apart = (ordered_bits(part) - ordered_bits(other)).abs()
                elements, different = elements + apart.numel(), different + int((apart > 0).sum())
                far += int((apart > 1).sum())
                difference = (part.float() - other.float()).abs().max()
                furthest = max(furthest, float(difference / part.float().square().mean().sqrt()))
    print(
        f"  eta = 1: {different} of {elements} elements differ ({different / elements:.1e}), {far} "
        f"by more than one unit in bfloat16's last place; largest difference {furthest:.1e} of the "
        f"tensor's RMS; {len(places)} tensors are missing"
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
