"""`make gpu-check`: every part of it on a CPU, through its own code; on GPUs where there are."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
GPUS = torch.cuda.device_count()


@pytest.fixture(scope="module")
def gpu_check():
    sys.path.insert(0, str(TOOLS))
    import gpu_check

    yield gpu_check
    sys.path.remove(str(TOOLS))


def test_memory_beyond_the_estimate_is_wrong_on_a_gpu(gpu_check):
    member = {"peak_memory_bytes": 9e9, "estimated_bytes": 5e9, "flops_utilisation": 0.3}
    assert not gpu_check._memory("x", member).right
    assert gpu_check._memory("x", {**member, "peak_memory_bytes": 5e9}).right
    assert gpu_check._memory("x", {**member, "flops_utilisation": None}).right


def test_layouts_that_fit(gpu_check):
    for ranks in (1, 2, 4, 8):
        found = gpu_check.layouts(ranks)
        assert str(found[0]) == "tp1-pp1-dp1", "the others are compared with it"
        assert {layout.ranks for layout in found[1:]} <= {ranks}
        heads, groups = 16, 8
        assert all(heads % x.tensor == groups % x.tensor == 0 for x in found)
    assert replace(gpu_check.Layout(8, tensor=4), pipeline=2).ranks == 8


def test_more_ranks_than_gpus_are_refused():
    words = [sys.executable, TOOLS / "gpu_check.py", "--device", "gpu", "--ranks", "8"]
    done = subprocess.run(words, text=True, capture_output=True, check=False)
    if GPUS >= 8:
        pytest.skip("there are eight")
    assert done.returncode == 2
    assert f"8 ranks on {GPUS} GPUs; use --device cpu or fewer" in done.stderr


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(GPUS == 0, reason="no CUDA device")
@pytest.mark.parametrize("number", range(4))
def test_on_gpus(gpu_check, tmp_path, number):
    """A layout, beside one rank; which layouts there are depends on the number of GPUs."""
    ranks = max(n for n in (1, 2, 4, 8) if n <= GPUS)
    found = gpu_check.layouts(ranks)
    if number >= len(found):
        pytest.skip(f"{len(found)} layouts on {ranks} GPUs")
    names = list(dict.fromkeys([str(found[0]), str(found[number])]))
    output = tmp_path / "gpu-check.json"
    words = [sys.executable, TOOLS / "gpu_check.py", "--device", "gpu", "--ranks", str(ranks)]
    done = subprocess.run(
        [*words, "--layouts", *names, "--output", output], text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(row["right"] for row in json.loads(output.read_text())["rows"])
