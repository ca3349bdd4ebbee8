"""Workers, ranks, refusals, reports and rounding of a merge; no NeMo."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path

import legacy_checkpoints as legacy
import merge_reference as reference
import numpy as np
import pytest
import torch
from ranks import run_ranks
from synthetic_checkpoints import read_torch_dist, tiny_weights, write_nemo, write_torch_dist

from nemo_warp import exit_codes
from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.inspection import diff, hash_weights
from nemo_warp.checkpoints.io import direct, slabs
from nemo_warp.merge import cli, merge
from nemo_warp.merge.compute import writer
from nemo_warp.merge.compute.kernel import rounding_noise
from nemo_warp.records import code_version

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
EMBEDDING = "embedding.word_embeddings.weight"


def save(path: Path, weights, **options) -> Path:
    return write_nemo(path, lambda folder: write_torch_dist(folder, weights, **options))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    init = tiny_weights(0, hidden=40, ffn=56, vocab=1000)
    options = {"hidden": 40, "ffn": 56, "vocab": 1000, "around": init}
    weights = {"init": init, "a": tiny_weights(1, **options), "b": tiny_weights(2, **options)}
    code_version()  # cached before any fork
    layouts = {"init": 2, "a": 1, "b": 4}
    return {n: save(folder / f"{n}.nemo", w, tp=layouts[n]) for n, w in weights.items()}


def run(models, output, **options):
    policies = [models["a"], models["b"]]
    return merge(models["init"], policies, output, **{"eta": [0.3, 1.0], **options})


def test_a_merge_imports_no_torch(tmp_path, models):
    """It would be most of the memory of a small merge, and most of its start."""
    script = (
        "import sys; from nemo_warp.merge.cli import main\n"
        "code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    )
    words = ["--init", models["init"], "--policies", models["a"], models["b"]]
    words += ["--eta", "0.3", "--dtype", "float32", "--output", tmp_path / "out.nemo"]
    words += ["--report", tmp_path / "report"]
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def read(path: Path) -> dict[str, torch.Tensor]:
    with tarfile.open(path) as tar:
        tar.extractall(path.with_suffix(".read"), filter="data")
    return reference.unstack(read_torch_dist(path.with_suffix(".read") / "model_weights"))


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_workers_and_ranks_give_the_same_files(tmp_path, models, granularity):
    options = {"granularity": granularity, "rounding": "stochastic", "seed": 3}
    for workers in (1, 2, 4):
        run(models, tmp_path / f"workers_{workers}" / "{eta}.nemo", workers=workers, **options)
    for size in (2, 3):
        output = tmp_path / f"ranks_{size}" / "{eta}.nemo"
        found = run_ranks(lambda to=output: run(models, to, workers=1, **options) is None, size)
        assert found == [False] + [True] * (size - 1)
    expected = contents(tmp_path / "workers_1")
    assert set(expected) == {"0.3.nemo", "1.nemo"}
    for other in ("workers_2", "workers_4", "ranks_2", "ranks_3"):
        assert contents(tmp_path / other) == expected, other


def test_a_failing_rank_stops_the_merge(tmp_path, models):
    weights = tiny_weights(1, hidden=40, ffn=56, vocab=1000)
    weights["decoder.layers.2.mlp.linear_fc2.weight"][0, 0] = float("nan")
    broken = save(tmp_path / "broken.nemo", weights)

    def attempt():
        try:
            run({**models, "b": broken}, tmp_path / "out" / "{eta}.nemo", workers=1)
        except (CheckpointError, RuntimeError) as error:
            return str(error)
        return "done"

    messages = run_ranks(attempt, 2)
    assert any("linear_fc2" in message and "NaN" in message for message in messages)
    assert "done" not in messages[:1]
    assert contents(tmp_path / "out") == {}


def test_an_input_that_changes_on_the_way_is_refused(tmp_path, models, monkeypatch):
    from nemo_warp.merge.compute.engine import Engine

    policy = shutil.copy(models["b"], tmp_path / "b.nemo")
    honest = Engine.merge

    def meanwhile(self, *args):
        os.utime(policy)
        return honest(self, *args)

    monkeypatch.setattr(Engine, "merge", meanwhile)
    with pytest.raises(CheckpointError, match=r"b\.nemo was changed while it was merged"):
        run({**models, "b": policy}, tmp_path / "out" / "{eta}.nemo")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (slabs, "SLAB", 1 << 14),
        (writer, "PIECE_BYTES", 1 << 14),
        (direct, "_MIN_BYTES", 1),  # all past the page cache
        (direct, "_MIN_BYTES", 1 << 40),  # all through it
    ],
)
def test_how_bytes_are_moved_changes_nothing(
    tmp_path, models, monkeypatch, rounding, where, name, value
):
    run(models, tmp_path / "usual" / "{eta}.nemo", rounding=rounding)
    monkeypatch.setattr(where, name, value)
    run(models, tmp_path / "other" / "{eta}.nemo", rounding=rounding)
    assert contents(tmp_path / "usual") == contents(tmp_path / "other")


def test_random_bits_belong_to_an_elements_place():
    whole = rounding_noise(3, "w", 0.3, 0, 100_000)
    for start, length in [(0, 1), (1, 50), (15, 17), (16, 16), (4097, 95_903)]:
        part = rounding_noise(3, "w", 0.3, start, length)
        assert np.array_equal(part, whole[start : start + length])
    assert abs(whole.mean() - 32_767.5) < 5 * 18_918 / 100_000**0.5
    others = [(4, "w", 0.3), (3, "v", 0.3), (3, "w", 0.5)]
    for other in (rounding_noise(*key, 0, 100_000) for key in others):
        assert (other == whole).mean() < 1e-3


def test_slabs_depend_on_the_shape_alone_and_cover_it():
    for rows, cols in [(1, 1), (7, 1), (1_000_000, 1), (7000, 300), (3, 700_000), (40_000, 16)]:
        found = list(slabs.slabs_of(0, rows, cols))
        assert found[0].first == 0 and found[-1].last == rows
        assert all(one.last == two.first for one, two in pairwise(found))
        assert all(0 < s.rows * cols <= max(slabs.SLAB, cols) for s in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, i: w.pop("decoder.final_layernorm.weight"), "lacks decoder.final_layernorm"),
        (lambda w, i: w.update(new=w["decoder.final_layernorm.weight"]), "has new"),
        (lambda w, i: w[EMBEDDING].fill_(float("inf")), "word_embeddings.weight holds a NaN"),
    ],
)
def test_refused_policies(tmp_path, change, message):
    init = tiny_weights(0)
    policies = [tiny_weights(1, around=init), tiny_weights(2, around=init)]
    change(policies[1], init)
    paths = [save(tmp_path / f"{i}.nemo", w) for i, w in enumerate([init, *policies])]
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        merge(paths[0], paths[1:], tmp_path / "out.nemo")
    assert contents(tmp_path) == before


def test_opposite_layers_are_named(tmp_path):
    init = tiny_weights(0, dtype=torch.float32)
    one = tiny_weights(1, around=init, dtype=torch.float32)
    two = tiny_weights(2, around=init, dtype=torch.float32)
    for name in init:
        if name.startswith("decoder.layers.1."):
            two[name] = 2 * init[name] - one[name]
    paths = [save(tmp_path / f"{i}.nemo", w) for i, w in enumerate([init, one, two])]
    with pytest.raises(ValueError, match=r"decoder\.layers\.1: the angle is 1(79|80)"):
        merge(paths[0], paths[1:], tmp_path / "out.nemo")
    merge(paths[0], paths[1:], tmp_path / "out.nemo", method="lerp")


def test_copies_are_refused_unless_allowed(tmp_path, models):
    same = {**models, "b": models["a"]}
    with pytest.raises(ValueError, match="nearly the same policy"):
        run(same, tmp_path / "{eta}.nemo")
    assert contents(tmp_path) == {}
    run(same, tmp_path / "{eta}.nemo", allow_similar=True)
    merged, policy = open_checkpoint(tmp_path / "1.nemo"), open_checkpoint(models["a"])
    assert hash_weights(merged) == hash_weights(policy)


def test_zero_task_vectors_fall_back_to_lerp(tmp_path):
    init = tiny_weights(0)
    policies = [tiny_weights(m, around=init) for m in (1, 2)]
    for name in init:
        if "layers.0." in name:
            policies[0][name] = init[name].clone()
        if "layers.1." in name:
            policies[0][name] = policies[1][name] = init[name].clone()
    paths = [save(tmp_path / f"{i}.nemo", w) for i, w in enumerate([init, *policies])]
    result = merge(paths[0], paths[1:], tmp_path / "out.nemo", eta=0.5, report=tmp_path / "report")
    expected = reference.merge(init, policies, 0.5)
    for name, tensor in read(tmp_path / "out.nemo").items():
        reference.assert_close(tensor, expected[name], name)
    assert result.units["decoder.layers.1"].realised_etas(0) == [None]
    warnings = json.loads((tmp_path / "report/report.json").read_text())["warnings"]
    assert any("decoder.layers.0, decoder.layers.1" in warning for warning in warnings)


def test_report_is_right_on_vectors(tmp_path, models):
    """Angles, norms, realised eta and changed share, recomputed from the files."""
    folder = tmp_path / "report"
    run(models, tmp_path / "{eta}.nemo", report=folder, verify="full")
    report = json.loads((folder / "report.json").read_text())
    weights = {name: read(path) for name, path in _copies(models, tmp_path).items()}
    weights |= {eta: read(tmp_path / f"{eta}.nemo") for eta in ("0.3", "1")}
    for unit, row in report["units"].items():
        names = [name for name in weights["init"] if reference.group(name).startswith(unit)]
        flat = {
            model: np.concatenate([w[n].double().numpy().ravel() for n in names])
            for model, w in weights.items()
        }
        a, b = flat["a"] - flat["init"], flat["b"] - flat["init"]
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        pair = row["pairs"][0]
        assert pair["task_vectors"]["cosine"] == pytest.approx(cosine, abs=1e-12)
        assert pair["task_vectors"]["norm_ratio"] == pytest.approx(
            np.linalg.norm(b) / np.linalg.norm(a)
        )
        full = flat["a"] @ flat["b"] / np.linalg.norm(flat["a"]) / np.linalg.norm(flat["b"])
        assert pair["weights"]["cosine"] == pytest.approx(full, abs=1e-12)
        exact = reference.slerp(a, b, 0.5)
        for output in row["outputs"]:
            moved = flat[f"{output['eta']:g}"] - flat["init"]
            assert output["realised_eta"] == pytest.approx(moved @ exact / (exact @ exact))
            assert output["changed_share"] == pytest.approx(np.mean(moved != 0))
    assert {p.name for p in folder.iterdir()} == {
        *("report.json", "report.md", "histograms.png", "histograms.svg"),
        *("angle_by_depth.png", "angle_by_depth.svg"),
    }
    assert report["inputs"][0]["weights_digest"] == hash_weights(open_checkpoint(models["init"]))


def _copies(models, folder: Path) -> dict[str, Path]:
    copies = {name: folder / "inputs" / f"{name}.nemo" for name in models}
    (folder / "inputs").mkdir()
    for name, path in copies.items():
        os.link(models[name], path)
    return copies


def test_bf16_distortion_is_reported_and_remedied(tmp_path):
    """Updates of a thousandth of the weights: nearest bf16 swallows eta 0.1, the others do not."""
    options = {"hidden": 96, "ffn": 128, "vocab": 600, "dtype": torch.float32}
    init = {n: t.bfloat16().float() for n, t in tiny_weights(0, **options).items()}
    policies = [tiny_weights(m, around=init, scale=1e-3, **options) for m in (1, 2)]
    paths = [save(tmp_path / f"{i}.nemo", w) for i, w in enumerate([init, *policies])]

    def realised(**how):
        report = tmp_path / "report"
        merge(
            paths[0], paths[1:], tmp_path / "o.nemo", eta=0.1, report=report, overwrite=True, **how
        )
        found = json.loads((report / "report.json").read_text())
        warned = any("--dtype float32" in warning for warning in found["warnings"])
        return found["model"]["outputs"][0]["realised_eta"], warned

    nearest, warned = realised(dtype="bfloat16")
    assert nearest < 0.05 and warned
    value, warned = realised(dtype="bfloat16", rounding="stochastic")
    assert value == pytest.approx(0.1, abs=0.03)
    value, warned = realised(dtype="float32")
    assert value == pytest.approx(0.1, rel=1e-4) and not warned


def test_verify_notices_a_changed_output(tmp_path, models, monkeypatch):
    from nemo_warp.merge.compute.kernel import Kernel

    honest = Kernel.combine

    def careless(self, *place):
        merged = honest(self, *place)
        merged.values[0, 0] ^= 64
        return merged

    monkeypatch.setattr(Kernel, "combine", careless)
    with pytest.raises(CheckpointError, match="differs from its recomputation"):
        run(models, tmp_path / "{eta}.nemo", verify="full")
    assert not list(tmp_path.glob("*.nemo"))


def test_experts_in_rank_files_match_stacked_experts(tmp_path):
    """MoE: one axis over experts in torch_dist, one key per expert in rank files; same layer."""
    generator = torch.Generator().manual_seed(0)
    init = tiny_weights(0)
    fc1 = "decoder.layers.{}.mlp.experts.experts.linear_fc1.weight"

    def with_experts(weights):
        experts = {
            fc1.format(i): torch.randn(4, 12, 16, generator=generator).bfloat16() for i in range(3)
        }
        return {**weights, **experts}

    models = [with_experts(init), *(with_experts(tiny_weights(m, around=init)) for m in (1, 2))]
    paths = [save(tmp_path / f"{i}.nemo", weights) for i, weights in enumerate(models)]
    local = {n: t for n, t in models[2].items() if "experts" not in n}
    for i in range(3):
        for expert, tensor in enumerate(models[2][fc1.format(i)]):
            name = f"decoder.layers.{i}.mlp.experts.local_experts.{expert}.linear_fc1.weight"
            local[name] = tensor
    legacy_path = write_nemo(
        tmp_path / "ranks.nemo",
        lambda folder: legacy.write_rank_files(folder.parent, local, tp=2, gated=True),
    )
    merge(paths[0], paths[1:], tmp_path / "x.nemo", eta=0.5)
    merge(paths[0], [paths[1], legacy_path], tmp_path / "y.nemo", eta=0.5)
    one, other = (read(tmp_path / f"{name}.nemo") for name in "xy")
    assert all(torch.equal(one[name], other[name]) for name in one)
    expected = reference.merge(models[0], models[1:], 0.5)
    for name, tensor in one.items():
        reference.assert_close(tensor, expected[name], name)


def test_outputs_are_inputs_of_the_next_iteration(tmp_path, models):
    """Merged tars and folders merge again; each output has its own provenance, once."""
    run(models, tmp_path / "first_{eta}.nemo")
    again = {**models, "init": tmp_path / "first_0.3.nemo"}
    run(again, tmp_path / "second_{eta}.nemo", report=tmp_path / "report")
    run(again, tmp_path / "second_{eta}")
    with tarfile.open(tmp_path / "second_1.nemo") as tar:
        assert tar.getnames().count("./warp_merge.json") == 1
        assert tar.getnames().count("./card.md") == 1
        found = json.load(tar.extractfile("./warp_merge.json"))
    assert found["eta"] == 1.0 and found["inputs"][0]["name"] == "first_0.3.nemo"
    assert found["inputs"][0]["weights_digest"] == hash_weights(open_checkpoint(again["init"]))
    folder, tar = (open_checkpoint(tmp_path / name) for name in ("second_1", "second_1.nemo"))
    assert hash_weights(folder) == hash_weights(tar)
    bare = {**models, "init": tmp_path / "second_0.3" / "model_weights"}
    run(bare, tmp_path / "third_{eta}")
    assert "model_config.yaml" not in contents(tmp_path / "third_1")
    run({**models, "init": tmp_path / "third_1"}, tmp_path / "fourth_{eta}.nemo")


def test_overwrite_replaces_tars_and_folders(tmp_path, models):
    for name in ("{eta}.nemo", "folder_{eta}"):
        run(models, tmp_path / name)
        with pytest.raises(ValueError, match="exists; pass --overwrite"):
            run(models, tmp_path / name, method="lerp")
        before = contents(tmp_path)
        run(models, tmp_path / name, method="lerp", overwrite=True)
        after = contents(tmp_path)
        assert before.keys() == after.keys() and before != after


def test_diff_per_group(models, tmp_path):
    run(models, tmp_path / "{eta}.nemo", dtype="float32")
    rows = diff(open_checkpoint(models["init"]), open_checkpoint(tmp_path / "0.3.nemo"))
    assert all(0.9 < row["changed_share"] <= 1.0 and row["cosine"] > 0.99 for row in rows.values())
    same = diff(open_checkpoint(models["init"]), open_checkpoint(models["init"]))
    assert all(row["difference"] == row["changed_share"] == 0.0 for row in same.values())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--eta", "2.5"], exit_codes.MISCONFIGURED, "--eta must lie in"),
        (["--eta", "0.1", "0.2"], exit_codes.MISCONFIGURED, "put {eta} into"),
        (["--weight", "0.3", "--dry-run"], exit_codes.DONE, "parameters in 5 groups"),
        (["--output", "a.nemo"], exit_codes.MISCONFIGURED, "both input and output"),
        (["--init", "nothing.nemo"], exit_codes.MISCONFIGURED, "nothing.nemo does not exist"),
        (["--source", "masters"], exit_codes.MISCONFIGURED, "masters"),
    ],
)
def test_command_line(tmp_path, models, monkeypatch, capsys, caplog, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    for name in ("init", "a", "b"):
        os.link(models[name], tmp_path / f"{name}.nemo")
    before = sorted(os.listdir(tmp_path))
    words = ["--init", "init.nemo", "--policies", "a.nemo", "b.nemo", "--output", "out.nemo"]
    with caplog.at_level("INFO"):
        assert cli.main([*words, *arguments]) == code
    assert message in capsys.readouterr().err + caplog.text
    assert sorted(os.listdir(tmp_path)) == before
