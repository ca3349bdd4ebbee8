"""Outputs equal a float64 reference, whatever the formats and layouts."""

import pickle
import tarfile
from pathlib import Path

import legacy_checkpoints as legacy
import merge_reference as reference
import pytest
import synthetic_checkpoints as synthetic
import torch

from nemo_warp.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def unpacked(path: Path) -> Path:
    """The output as a folder."""
    if path.is_dir():
        return path
    folder = path.with_suffix(".read")
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    return folder


def read(path: Path) -> dict[str, torch.Tensor]:
    return reference.unstack(synthetic.read_torch_dist(unpacked(path) / "model_weights"))


def offsets(path: Path) -> dict:
    """Where each item begins in its file."""
    metadata = pickle.loads((unpacked(path) / "model_weights" / ".metadata").read_bytes())
    return {index: info.offset for index, info in metadata.storage_data.items()}


def family(num_policies=2, **options):
    init = synthetic.tiny_weights(0, **options)
    policies = [synthetic.tiny_weights(1 + m, around=init, **options) for m in range(num_policies)]
    return init, policies


def write(path: Path, weights, kind: str, tp=1, pp=1, tied=True, gated=True) -> Path:
    config = "activation: fast-swiglu\n" if gated else "activation: gelu\n"
    config += f"share_embeddings_and_output_weights: {tied}\n"

    def fill(folder):
        if kind in ("stacked", "layers"):
            stacked = kind == "stacked"
            synthetic.write_torch_dist(folder, weights, tp=tp, homogeneous=stacked, gated=gated)
        elif kind == "zarr":
            legacy.write_zarr(folder, weights, tp=tp, gated=gated)
        else:
            legacy.write_rank_files(folder.parent, weights, tp=tp, pp=pp, gated=gated, tied=tied)

    return synthetic.write_nemo(path, fill, config)


LAYOUTS = [
    (["stacked", 1, 1], ["stacked", 2, 1], ["layers", 4, 1]),
    (["layers", 2, 1], ["zarr", 2, 1], ["stacked", 1, 1]),
    (["stacked", 4, 1], ["ranks", 2, 2], ["ranks", 1, 2]),
    (["stacked", 2, 1], ["ranks", 1, 1], ["ranks", 4, 1]),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("layouts", LAYOUTS)
def test_any_layout_gives_the_reference(tmp_path, layouts, gated, tied):
    init, policies = family(gated=gated, tied=tied, layers=4)
    paths = [
        write(tmp_path / f"{i}.nemo", weights, *layout, tied=tied, gated=gated)
        for i, (weights, layout) in enumerate(zip([init, *policies], layouts, strict=True))
    ]
    merge(paths[0], paths[1:], tmp_path / "out.nemo", eta=0.3, workers=2)
    found, expected = read(tmp_path / "out.nemo"), reference.merge(init, policies, 0.3)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        reference.assert_close(tensor, expected[name], name)


@pytest.mark.parametrize("output", ["out.nemo", "out_folder"])
def test_items_of_an_output_begin_at_a_multiple_of_64(tmp_path, output):
    init, policies = family(num_policies=1)
    paths = [write(tmp_path / f"{i}.nemo", w, "layers", 2) for i, w in enumerate([init, *policies])]
    merge(paths[0], paths[1:], tmp_path / output, eta=0.3)
    before, after = offsets(paths[0]), offsets(tmp_path / output)
    assert before.keys() == after.keys()
    assert any(offset % 64 for offset in before.values())
    assert not any(offset % 64 for offset in after.values())


@pytest.mark.parametrize("output", ["out.nemo", "out_folder"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_rank_files_come_out_as_rank_files(tmp_path, tp, pp, output):
    init, policies = family(layers=4)
    paths = [write(tmp_path / "init.nemo", init, "ranks", tp, pp)]
    paths += [write(tmp_path / f"{m}.nemo", w, "stacked", 2) for m, w in enumerate(policies)]
    merge(paths[0], paths[1:], tmp_path / output, eta=0.5, workers=2)
    rounded = {n: t.bfloat16() for n, t in reference.merge(init, policies, 0.5).items()}
    expected = legacy.rank_weights(rounded, tp, pp, gated=True, tied=True)
    found = legacy.read_rank_files(unpacked(tmp_path / output))
    assert len(found) == tp * pp
    for (_, state), (_, wanted) in zip(
        sorted(found.items()), sorted(expected.items()), strict=True
    ):
        assert state.keys() == wanted.keys()
        for name, tensor in state.items():
            if tensor is not None:
                assert (tensor != wanted[name]).sum() <= 1, name


def test_zarr_comes_out_as_zarr(tmp_path):
    init, policies = family()
    paths = [write(tmp_path / f"{i}.nemo", w, "zarr", 2) for i, w in enumerate([init, *policies])]
    merge(paths[0], paths[1:], tmp_path / "out.nemo", eta=0.3, dtype="float32")
    folder = unpacked(tmp_path / "out.nemo") / "model_weights"
    found, expected = (
        reference.unstack(legacy.read_zarr(folder)),
        reference.merge(init, policies, 0.3),
    )
    for name, tensor in expected.items():
        reference.assert_close(found[name], tensor, name)
    state = "model.decoder.layers.self_attention.core_attention._extra_state/shard_0_3.pt"
    assert (folder / state).read_bytes() == (
        tmp_path / "0.unpacked" / "model_weights" / state
    ).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["stacked", "ranks"])
def test_output_dtype(tmp_path, dtype, stored, kind):
    init, policies = family(dtype=stored)
    paths = [write(tmp_path / f"{i}.nemo", w, kind) for i, w in enumerate([init, *policies])]
    merge(paths[0], paths[1:], tmp_path / "out.nemo", eta=[0.3], dtype=dtype)
    folder = unpacked(tmp_path / "out.nemo")
    if kind == "ranks":
        state = legacy.read_rank_files(folder)["model_weights.ckpt"]
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        found = {
            name.removeprefix("model.").replace(legacy.LOCAL, legacy.FUSED): tensor
            for name, tensor in state.items()
        }
    else:
        found = read(tmp_path / "out.nemo")
    expected = reference.merge(init, policies, 0.3)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == getattr(torch, dtype)
        reference.assert_close(tensor, expected[name], name)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lerp"},
        {"method": "slerp-full"},
        {"method": "slerp", "weight": 0.2},
        {"granularity": "tensor"},
        {"granularity": "model"},
    ],
    ids=str,
)
def test_methods_and_granularities(tmp_path, options):
    init, policies = family()
    paths = [write(tmp_path / f"{i}.nemo", w, "stacked") for i, w in enumerate([init, *policies])]
    merge(paths[0], paths[1:], tmp_path / "out.nemo", eta=0.8, dtype="float32", **options)
    units = {"tensor": str, "model": lambda name: "model"}
    unit = units.get(options.get("granularity"), reference.group)
    rest = {key: value for key, value in options.items() if key != "granularity"}
    expected = reference.merge(init, policies, 0.8, unit=unit, **rest)
    for name, tensor in read(tmp_path / "out.nemo").items():
        reference.assert_close(tensor, expected[name], name)


@pytest.mark.parametrize("num_policies", [1, 2, 3, 5])
def test_all_etas_in_one_pass(tmp_path, num_policies):
    init, policies = family(num_policies)
    paths = [write(tmp_path / f"{i}.nemo", w, "stacked") for i, w in enumerate([init, *policies])]
    etas = [0, 0.3, 1, 1.7]
    merge(paths[0], paths[1:], tmp_path / "front/eta_{eta}.nemo", eta=etas, dtype="float32")
    for eta in etas:
        expected = reference.merge(init, policies, eta)
        for name, tensor in read(tmp_path / f"front/eta_{eta:g}.nemo").items():
            reference.assert_close(tensor, expected[name], name)


def test_liti_towards_another_checkpoint(tmp_path):
    init, policies = family(3)
    *policies, sft = policies
    weights = {"init": init, "a": policies[0], "b": policies[1], "sft": sft}
    paths = {name: write(tmp_path / f"{name}.nemo", w, "stacked") for name, w in weights.items()}
    output = tmp_path / "out.nemo"
    merge(paths["init"], [paths["a"], paths["b"]], output, eta=0.4, liti_towards=paths["sft"])
    expected = reference.merge(init, policies, 0.4, anchor=sft)
    for name, tensor in read(output).items():
        reference.assert_close(tensor, expected[name], name)


def test_padded_rows_never_count_and_come_from_the_init(tmp_path):
    init, policies = family(tied=False)
    true = 40
    paths, padded = [], []
    for i, (weights, rows) in enumerate(zip([init, *policies], (48, 40, 64), strict=True)):
        padding = torch.randn(rows - true, 16, generator=torch.Generator().manual_seed(i)) * 9
        full = dict(weights)
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            full[name] = torch.cat([weights[name], padding.bfloat16()])
        padded.append(full)
        paths.append(write(tmp_path / f"{i}.nemo", full, "stacked", 2))
    merge(paths[0], paths[1:], tmp_path / "out.nemo", eta=0.5, vocab_size=true)
    expected = reference.merge(init, policies, 0.5)
    for name, tensor in read(tmp_path / "out.nemo").items():
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert torch.equal(tensor[true:], padded[0][name][true:])
            tensor = tensor[:true]
        reference.assert_close(tensor, expected[name], name)
