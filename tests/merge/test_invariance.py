"""The same merge gives the same bytes, and the right ones where rounding is hard."""

import json
import os
import subprocess
import sys
from pathlib import Path

import golden_models
import merge_reference as reference
import pytest
import torch
from synthetic_checkpoints import read_torch_dist, tiny_weights, write_nemo, write_torch_dist
from test_merge_golden import read, unpacked, write

from nemo_warp.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROOT = Path(__file__).parents[2]
LARGE = {"layers": 2, "hidden": 264, "ffn": 400, "vocab": 300}
"""Tensors of several blocks whose rows do not divide them; shards end within blocks."""


@pytest.fixture(scope="module")
def large():
    init = tiny_weights(0, **LARGE)
    return init, [tiny_weights(1 + m, around=init, scale=0.02, **LARGE) for m in range(3)]


def test_layouts_of_policies_change_no_byte(tmp_path, large):
    init, policies = large
    write(tmp_path / "init.nemo", init, "stacked", 2)
    layouts = [
        [("stacked", 1), ("stacked", 2), ("stacked", 4)],
        [("layers", 4), ("ranks", 1, 1), ("zarr", 2)],
        [("ranks", 2, 2), ("zarr", 1), ("layers", 1)],
        [("ranks", 4, 1), ("ranks", 1, 2), ("ranks", 2, 1)],
    ]
    seen = set()
    for i, layout in enumerate(layouts):
        pairs = zip(policies, layout, strict=True)
        paths = [write(tmp_path / f"{i}_{m}.nemo", *p) for m, p in enumerate(_flat(pairs))]
        output = tmp_path / f"out_{i}"
        options = {"rounding": "stochastic", "seed": 5, "eta": 0.7}
        merge(tmp_path / "init.nemo", paths, output, workers=1 + i % 2, **options)
        files = {p.name: p.read_bytes() for p in (output / "model_weights").iterdir()}
        seen.add(tuple(sorted(files.items())))
    assert len(seen) == 1


def _flat(pairs):
    return [(weights, *layout) for weights, layout in pairs]


def test_layouts_of_the_init_change_no_tensor(tmp_path, large):
    init, policies = large
    paths = [write(tmp_path / f"{m}.nemo", w, "stacked", 2) for m, w in enumerate(policies)]
    results = []
    for i, layout in enumerate([("stacked", 1), ("stacked", 4), ("layers", 2)]):
        write(tmp_path / f"init_{i}.nemo", init, *layout)
        merge(tmp_path / f"init_{i}.nemo", paths, tmp_path / f"out_{i}.nemo", workers=2)
        results.append(read(tmp_path / f"out_{i}.nemo"))
    expected = reference.merge(init, policies, 0.3)
    for name, tensor in results[0].items():
        reference.assert_close(tensor, expected[name], name)
        assert all(torch.equal(tensor, other[name]) for other in results[1:]), name


def test_archive_or_folder_and_names_change_no_tensor(tmp_path, large):
    init, policies = large
    tar = [write(tmp_path / f"{m}.nemo", w, "stacked") for m, w in enumerate([init, *policies])]
    folders = [
        write(tmp_path / f"folder_{m}", w, "stacked") for m, w in enumerate([init, *policies])
    ]
    merge(tar[0], tar[1:], tmp_path / "from_tars.nemo")
    merge(folders[0], folders[1:], tmp_path / "from_folders")
    merged = [unpacked(tmp_path / n) / "model_weights" for n in ("from_tars.nemo", "from_folders")]
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in merged]
    assert files[0] == files[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 3.0])
def test_small_and_large_updates_round_once(tmp_path, dtype, scale):
    """Updates far below the weights, and above them, in one dtype and into the other."""
    options = {"layers": 2, "hidden": 64, "ffn": 96, "vocab": 100, "dtype": dtype}
    init = tiny_weights(0, **options)
    policies = [tiny_weights(1 + m, around=init, scale=scale, **options) for m in range(2)]
    paths = [write(tmp_path / f"{m}.nemo", w, "stacked") for m, w in enumerate([init, *policies])]
    for out in ("bfloat16", "float32"):
        merge(paths[0], paths[1:], tmp_path / f"{out}.nemo", eta=0.3, dtype=out)
        found, expected = read(tmp_path / f"{out}.nemo"), reference.merge(init, policies, 0.3)
        apart = torch.cat(
            [
                golden_models.ulps_apart(value, expected[name].to(value.dtype)).flatten()
                for name, value in found.items()
            ]
        )
        assert apart.max() <= 1
        assert apart.count_nonzero() <= len(apart) // 1000


def _write_values(path: Path, values: dict[str, torch.Tensor]) -> Path:
    return write_nemo(path, lambda folder: write_torch_dist(folder, values, extra_state=False))


def test_subnormal_numbers_survive(tmp_path):
    """Values below the smallest normal float32 are merged like all others."""
    name = "decoder.final_layernorm.weight"
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(100, generator=generator) * 1e-42 for _ in range(3)]
    paths = [_write_values(tmp_path / f"{i}.nemo", {name: v}) for i, v in enumerate(values)]
    merge(paths[0], paths[1:], tmp_path / "out.nemo", eta=1.0)
    weights = [{name: value} for value in values]
    expected = reference.merge(weights[0], weights[1:], 1.0)[name]
    found = read(tmp_path / "out.nemo")[name]
    assert found.abs().max() > 0
    assert golden_models.ulps_apart(found, expected.float()).max() <= 1


def test_overflow_of_the_output_is_refused(tmp_path):
    """Extrapolation beyond the largest number of the output's dtype must not write infinities."""
    name = "decoder.final_layernorm.weight"
    values = [torch.full((8,), v, dtype=torch.float16) for v in (20000, 60000, 50000)]
    values[2][0] = 65000.0
    paths = [_write_values(tmp_path / f"{i}.nemo", {name: v}) for i, v in enumerate(values)]
    with pytest.raises(ValueError, match=f"{name}.*float16"):
        merge(paths[0], paths[1:], tmp_path / "out.nemo", eta=2.0, allow_similar=True)
    assert not (tmp_path / "out.nemo").exists()


def test_launched_ranks_give_the_files_of_one_process(tmp_path, large):
    """Two processes started by the launcher, through the tool, as a node would."""
    init, policies = large
    paths = [
        str(write(tmp_path / f"{m}.nemo", w, "stacked", 2)) for m, w in enumerate([init, *policies])
    ]
    arguments = ["tools/merge_nemo.py", "--init", paths[0], "--policies", *paths[1:]]
    arguments += ["--eta", "0.3", "1", "--workers", "1", "--output"]
    launcher = ["-m", "nemo_warp.pipeline.ranks", "--nproc-per-node", "2", "--", sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for start, folder in (([], "one"), (launcher, "two")):
        command = [sys.executable, *start, *arguments, str(tmp_path / folder / "eta_{eta}.nemo")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    names = [{p.name for p in (tmp_path / folder).iterdir()} for folder in ("one", "two")]
    assert names == [{"eta_0.3.nemo", "eta_1.nemo"}] * 2
    for name in names[0]:
        one, two = (unpacked(tmp_path / folder / name) for folder in ("one", "two"))
        files = {p.relative_to(one) for p in one.rglob("*") if p.is_file()}
        for file in files - {Path("warp_merge.json")}:  # it names the code's version
            assert (one / file).read_bytes() == (two / file).read_bytes(), file
        told = [json.loads((f / "warp_merge.json").read_text()) for f in (one, two)]
        assert told[0]["inputs"] == told[1]["inputs"]
    assert read_torch_dist(two / "model_weights")
