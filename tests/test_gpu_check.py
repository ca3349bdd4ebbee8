"""`make gpu-check`: every part of it on a CPU, through its own code; on GPUs where there are."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import RankError, run_ranks

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
GPUS = torch.cuda.device_count()


@pytest.fixture(scope="module")
def gpu_check():
    sys.path.insert(0, str(TOOLS))
    import gpu_check

    yield gpu_check
    sys.path.remove(str(TOOLS))


def forked(step, log, environment):
    """Takes the place of processes that would import NeMo first."""
    import _gpu_check_ranks

    try:
        run_ranks(_gpu_check_ranks.main, step.processes_per_node, Path(step.words[-1]))
    except RankError as error:
        log.write_text(str(error))
        return 1
    return 0


@pytest.mark.nemo
@pytest.mark.slow
def test_all_of_it_on_a_cpu(nemo, gpu_check, tmp_path):
    """One rank, and two with sequence parallelism; saves, resumes, a merge and a front."""
    layouts = [gpu_check.Layout(1), gpu_check.Layout(2, tensor=2)]
    optimizers = ["mcore_distributed_optim", "adam"]
    check = gpu_check.Check(tmp_path, "cpu", gpu_check.SIZES["cpu"], optimizers, forked)
    try:
        rows = check.run(layouts)
    finally:
        check.stop()
    assert all(row.right for row in rows), gpu_check.table(rows)
    said = {(row.where, row.what) for row in rows}
    for optimizer in optimizers:
        where = f"tp2-sp-pp1-dp1 {optimizer}"
        assert (where, "difference from one rank") in said
        assert (where, "gradient after a resume, and without") in said
        assert (where, "anchor: as the policy at first, as saved after") in said
    assert ("merge", "SLERP of two members") in said
    assert ("tp2-sp-pp1-dp1", "front: reward, KL") in said
    members = [m for found in check.found.values() for m in found["members"].values()]
    assert len(members) == 4
    for member in members:
        assert member["resumed_norms"] == member["norms"][-1:], "on a CPU bit for bit"
        assert member["estimated_bytes"] > 0 and len(member["member_norms"]) == 4
    front = check.found["tp2-sp-pp1-dp1"]["front"]
    assert front[0]["kl_to_sft"] == 0 and front[1]["kl_to_sft"] != 0
    rows = list(gpu_check.rows_of("x", _broken(check.found["tp2-sp-pp1-dp1"]), None))
    assert sum(not row.right for row in rows) == 3, "what is wrong is said to be wrong"


def _broken(found):
    """The same with a gradient of 0, an anchor that was lost, and a sum that is not right."""
    good, other = found["members"].values()
    lost = {**other, "anchor_survives": False}
    silent = {**good, "member_norms": [1.0, 0.0]}
    exchange = {**found["exchange"], "right": False}
    return {**found, "members": {"adam": lost, "mcore": silent}, "exchange": exchange}


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
