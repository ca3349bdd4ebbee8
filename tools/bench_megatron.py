"""The merge against Megatron-LM's own (pull request 5114, tools/checkpoint/weighted_merge.py).

Used by ``bench_merge.py --megatron CHECKOUT``, a checkout of Megatron-LM that has this tool. Both
make the same weighted average of three ``iter_...`` folders of equal layout, in bfloat16. Whole
commands are measured, and the seconds that each says itself, which leave the imports out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from _bench_merging import MODELS, Cost, make_cold, measure_command
from bench_mergekit import ordered_bits, read_torch_dist

TOOL = Path("tools/checkpoint/weighted_merge.py")
SHARES = {"init": 0.5, "a": 0.25, "b": 0.25}
"""theta_init + eta * (average - theta_init) at eta = 0.5; the tool is told the shares."""

NEEDED = ("triton==3.5.0",)
"""What Megatron-core imports at that commit and `make setup` does not install."""

FASTER, SMALLER = 3.0, 0.5
"""Goals: at least so many times as fast, at most so much of the memory."""


def compare_with_megatron(folder: Path, arguments: argparse.Namespace) -> None:
    """Alternate between the two; print medians, ratios and whether the outputs are equal."""
    for model in MODELS:
        _unpack(folder / f"{model}.nemo", folder / model / "iter_0000001")
    data = [path for model in MODELS for path in (folder / model).rglob("*") if path.is_file()]
    path = _path(folder, Path(arguments.megatron))
    found: dict[str, list[Cost]] = {"Megatron-LM": [], "nemo_warp": []}
    for number in range(arguments.repeats):
        commands = _commands(folder, arguments, number)
        for name, command in commands.items():
            make_cold(data, arguments.drop_caches)
            variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            if name == "Megatron-LM":
                variables["PYTHONPATH"] = path
            found[name].append(measure_command([sys.executable, *command], **variables))
            print(f"  {name}: {found[name][-1]}", file=sys.stderr)
        print(f"  load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
    for name, costs in found.items():
        own = [round(cost.own_seconds, 1) for cost in costs]
        cpu = statistics.median(cost.cpu_seconds for cost in costs)
        peak = max(cost.peak_bytes for cost in costs)
        whole = statistics.median(cost.seconds for cost in costs)
        print(
            f"{name}: {own} s, from start to end {whole:.1f} s, processor {cpu:.1f} s, "
            f"peak {peak / 1e9:.2f} GB"
        )
    theirs, ours = found.values()
    faster = statistics.median(
        t.own_seconds / o.own_seconds for t, o in zip(theirs, ours, strict=True)
    )
    smaller = max(o.peak_bytes for o in ours) / max(t.peak_bytes for t in theirs)
    print(f"{faster:.1f} times as fast (paired median; goal {FASTER:g}), with {smaller:.2f} of")
    print(f"  the memory (goal {SMALLER:g})")
    _compare(folder / "theirs_0", folder / "ours_0" / "iter_0000001")


def _commands(folder: Path, arguments: argparse.Namespace, number: int) -> dict[str, list[str]]:
    inputs = {name: folder / name / "iter_0000001" for name in MODELS}
    tool = [str(Path(arguments.megatron).resolve() / TOOL), "--merge-inputs"]
    tool += [f"{inputs[name]}:{share}" for name, share in SHARES.items()]
    merger = [str(Path(__file__).with_name("merge_nemo.py")), "--init", str(inputs["init"])]
    merger += ["--policies", str(inputs["a"]), str(inputs["b"]), "--method", "lerp"]
    merger += ["--eta", "0.5", "--workers", str(max(arguments.workers)), "--allow-similar"]
    return {
        "Megatron-LM": [*tool, "--merge-output", str(folder / f"theirs_{number}")],
        "nemo_warp": [*merger, "--output", str(folder / f"ours_{number}" / "iter_0000001")],
    }


def _path(folder: Path, checkout: Path) -> str:
    """Where their tool finds its imports: the checkout, and triton beside this environment."""
    beside = folder / "needed"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(beside)]
    subprocess.run([*command, *NEEDED], check=True)
    return os.pathsep.join([str(checkout.resolve()), str(beside)])


def _unpack(nemo: Path, folder: Path) -> None:
    """The weights of a .nemo as the folder that Megatron-LM writes."""
    with tarfile.open(nemo) as tar:
        for member in tar:
            name = Path(member.name)
            if member.isfile() and name.parent.name == "model_weights":
                member.name = name.name
                tar.extract(member, folder, filter="data")
    torch.save({"iteration": 1, "checkpoint_version": 3.0}, folder / "common.pt")


def _compare(theirs: Path, ours: Path) -> None:
    """How many elements differ, and by how many units in the last place at most."""
    different, elements, furthest = 0, 0, 0
    expected = dict(read_torch_dist(theirs))
    for name, value in read_torch_dist(ours):
        apart = (ordered_bits(value) - ordered_bits(expected.pop(name))).abs()
        elements, different = elements + apart.numel(), different + int((apart > 0).sum())
        furthest = max(furthest, int(apart.max()))
    print(
        f"{different} of {elements} elements differ, by {furthest} units in the last place; "
        f"{len(expected)} tensors are missing"
    )
