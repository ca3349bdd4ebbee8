"""fp32 masters from training checkpoints: whole, or flattened over ranks by the optimizer."""

import io
import json
import math
import pickle
from itertools import pairwise
from pathlib import Path

import merge_reference as reference
import pytest
import synthetic_checkpoints as synthetic
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.formats.torch_dist import boxes_of_range
from nemo_warp.checkpoints.inspection import read_tensor
from nemo_warp.checkpoints.io.reading import FileCache
from nemo_warp.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
PREFIX = "optimizer.state.fp32_param.model."


def add_masters(folder: Path, masters, *, tp: int, flat_parts: int) -> None:
    """Append stacked masters to a torch_dist folder.

    Args:
        flat_parts: 0 stores them like the weights; n > 0 as Megatron-core's distributed optimizer
            does, each tensor-parallel part flattened and cut into n uneven ranges.
    """
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    file = folder / "__9_0.distcp"
    layers = 1 + max(int(n.split(".")[2]) for n in masters if ".layers." in n)
    stream = io.BytesIO()

    def put(key, offset, tensor):
        start = stream.tell()
        torch.save(tensor.clone(), stream)
        index = dcp.MetadataIndex(key, offset)
        metadata.storage_data[index] = _StorageInfo(file.name, start, stream.tell() - start)
        chunk = dcp.ChunkStorageMetadata(torch.Size(offset), tensor.shape)
        metadata.state_dict_metadata[key].chunks.append(chunk)

    for name, tensor in masters.items():
        head, _, rest = name.partition(".layers.")
        number, _, rest = rest.partition(".")
        key = PREFIX + (f"{head}.layers.{rest}" if rest else name)
        lead = (int(number),) if rest else ()
        shape = (*((layers,) if rest else ()), *tensor.shape)
        parts = list(synthetic._pieces(name, tensor, tp, gated=True))
        local = (*(1 for _ in lead), *parts[0][2].shape)
        grid = [whole // part for whole, part in zip(shape, local, strict=True)]
        stored = (*grid, math.prod(local)) if flat_parts else shape
        if key not in metadata.state_dict_metadata:
            properties = dcp.TensorProperties(dtype=torch.float32)
            entry = dcp.TensorStorageMetadata(properties, torch.Size(stored), [])
            metadata.state_dict_metadata[key] = entry
            if flat_parts:
                metadata.mcore_data[key] = {"nd_reformulated_orig_global_shape": shape}
        for _, offsets, part in parts:
            where = (*lead, *offsets)
            if not flat_parts:
                put(key, where, part.reshape(local))
                continue
            place = [o // size for o, size in zip(where, local, strict=True)]
            cuts = [part.numel() * i // flat_parts + (i % 3) for i in range(flat_parts)]
            cuts = [0, *cuts[1:], part.numel()]
            for begin, end in pairwise(cuts):
                flat = part.reshape(-1)[begin:end]
                put(key, (*place, begin), flat.view(*(1 for _ in place), -1))
    file.write_bytes(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def training_checkpoint(path: Path, masters, *, tp: int, flat_parts: int) -> Path:
    weights = {name: tensor.bfloat16() for name, tensor in masters.items()}
    synthetic.write_torch_dist(path, weights, tp=tp)
    add_masters(path, masters, tp=tp, flat_parts=flat_parts)
    return path


@pytest.mark.parametrize(("tp", "flat_parts"), [(1, 0), (2, 0), (1, 1), (2, 3), (4, 2)])
def test_masters_are_read_exactly(tmp_path, tp, flat_parts):
    masters = synthetic.tiny_weights(0, dtype=torch.float32)
    path = training_checkpoint(tmp_path / "step_00000007", masters, tp=tp, flat_parts=flat_parts)
    checkpoint = open_checkpoint(path)
    found = checkpoint.store.masters()
    assert found.keys() == checkpoint.tensors.keys() == masters.keys()
    with FileCache() as files:
        for name, tensor in found.items():
            values = read_tensor(files, tensor).view(tensor.shape)
            assert torch.equal(values, masters[name]), name


def test_merge_of_masters(tmp_path):
    init = synthetic.tiny_weights(0, dtype=torch.float32)
    policies = [synthetic.tiny_weights(m, around=init, dtype=torch.float32) for m in (1, 2)]
    rounded = {name: tensor.bfloat16() for name, tensor in init.items()}
    start = synthetic.write_nemo(
        tmp_path / "init.nemo", lambda folder: synthetic.write_torch_dist(folder, rounded, tp=2)
    )
    paths = [
        training_checkpoint(tmp_path / f"step_{m}", weights, tp=m + 1, flat_parts=2 * m)
        for m, weights in enumerate(policies)
    ]
    merge(start, paths, tmp_path / "out", eta=0.3, dtype="float32", source="masters")
    expected = reference.merge(rounded, policies, 0.3)
    stored = synthetic.read_torch_dist(tmp_path / "out" / "model_weights")
    assert not any(key.startswith("optimizer") for key in stored)
    for name, tensor in reference.unstack(stored).items():
        reference.assert_close(tensor, expected[name], name)


def test_a_training_checkpoint_as_init_loses_its_optimizer(tmp_path):
    init = synthetic.tiny_weights(0, dtype=torch.float32)
    policies = [synthetic.tiny_weights(m, around=init, dtype=torch.float32) for m in (1, 2)]
    paths = [
        training_checkpoint(tmp_path / f"step_{m}", weights, tp=2, flat_parts=m)
        for m, weights in enumerate([init, *policies])
    ]
    merge(paths[0], paths[1:], tmp_path / "out", eta=0.3, dtype="float32", source="masters")
    expected = reference.merge(init, policies, 0.3)
    stored = synthetic.read_torch_dist(tmp_path / "out")
    assert all(key.startswith("model.") for key in stored)
    for name, tensor in reference.unstack(stored).items():
        reference.assert_close(tensor, expected[name], name)
    assert json.loads((tmp_path / "out" / "warp_merge.json").read_text())["eta"] == 0.3


def test_masters_asked_for_in_vain(tmp_path):
    weights = synthetic.tiny_weights(0)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        synthetic.write_torch_dist(path, weights)
    with pytest.raises(ValueError, match="masters"):
        merge(paths[0], paths[1:], tmp_path / "out", source="masters")


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (1, 5, 2)])
def test_boxes_cover_a_range_in_order(shape):
    cells = torch.arange(math.prod(shape)).view(shape)
    for begin in range(cells.numel()):
        for end in range(begin + 1, cells.numel() + 1):
            found = []
            for offsets, sizes in boxes_of_range(shape, begin, end):
                window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
                found += cells[window].reshape(-1).tolist()
            assert found == list(range(begin, end))
