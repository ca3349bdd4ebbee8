"""What stands for torch's classes is what torch says it is."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import metadata as torchs
from torch.distributed.checkpoint.filesystem import _StorageInfo

from nemo_warp.checkpoints import dtypes
from nemo_warp.checkpoints.containers import dcp_metadata as ours
from nemo_warp.checkpoints.containers.unpickling import load_metadata_pickle
from nemo_warp.merge.compute.kernel import converted, numbers


@pytest.mark.parametrize("dtype", dtypes.DTYPES.values(), ids=str)
def test_dtypes_are_torchs(dtype):
    if not hasattr(torch, dtype.name):
        pytest.skip("this torch does not have it")
    theirs = dtype.of_torch()
    assert str(dtype) == str(theirs)
    assert dtype.itemsize == theirs.itemsize
    assert dtype.is_floating_point == theirs.is_floating_point


def _metadata(module, size, dtype, place):
    shards = {f"layer.{n}": ((n, 0), (1, 4)) for n in range(300)}
    described = {
        key: module.TensorStorageMetadata(
            module.TensorProperties(dtype=dtype),
            size((300, 4)),
            [module.ChunkStorageMetadata(*map(size, shard))],
        )
        for key, shard in shards.items()
    }
    described["state"] = module.BytesStorageMetadata()
    places = {
        module.MetadataIndex(key, size(offset)): place("__0_0.distcp", 100 * n, 100)
        for n, (key, (offset, _)) in enumerate(shards.items())
    }
    places[module.MetadataIndex("state")] = place("__0_1.distcp", 0, 7)
    paths = {key: (key,) for key in described}
    return module.Metadata(described, planner_data=paths, storage_data=places)


def test_metadata_is_what_torch_would_write():
    mine = _metadata(ours, ours.Size, dtypes.BFLOAT16, ours.StorageInfo)
    theirs = _metadata(torchs, torch.Size, torch.bfloat16, _StorageInfo)
    mine.mcore_data = theirs.mcore_data = {}
    if "version" in vars(theirs):  # since torch 2.7; an older one does not mind it
        assert ours.dump(mine) == pickle.dumps(theirs, protocol=4)
    theirs, read = pickle.loads(pickle.dumps(theirs, protocol=4)), pickle.loads(ours.dump(mine))
    assert type(read) is torchs.Metadata and vars(read) == {"version": None, **vars(theirs)}
    # what torch compares leaves these out
    one, other = (
        (found.state_dict_metadata["layer.7"], *list(found.storage_data.items())[7])
        for found in (read, theirs)
    )
    assert [vars(part) for part in one] == [vars(part) for part in other]
    assert vars(one[0].properties) == vars(other[0].properties)
    assert isinstance(one[0].size, torch.Size)
    assert load_metadata_pickle(pickle.dumps(theirs, protocol=4), "theirs") == mine


@pytest.mark.parametrize(
    "stored", [dtypes.BFLOAT16, dtypes.FLOAT16, dtypes.FLOAT32, dtypes.FLOAT64]
)
@pytest.mark.parametrize("wanted", [None, dtypes.FLOAT32, dtypes.BFLOAT16])
def test_padding_is_converted_as_torch_does_it(stored, wanted):
    wanted = wanted or stored
    bits = np.arange(1 << 16, dtype=np.uint16)
    half = torch.from_numpy(bits.astype(np.int16)).view(torch.float16)
    wide = torch.from_numpy((bits.astype(np.uint32) * 65537).view(np.int32)).view(torch.float32)
    values = half if stored == dtypes.FLOAT16 else wide
    values = values.to(stored.of_torch())[None]
    raw = values.view(torch.uint8).numpy()
    found = torch.from_numpy(converted(raw, stored, wanted)).view(wanted.of_torch())
    torch.testing.assert_close(found, values.to(wanted.of_torch()), rtol=0, atol=0, equal_nan=True)
    exact = torch.from_numpy(numbers(raw, stored)).double()
    torch.testing.assert_close(exact, values.double(), rtol=0, atol=0, equal_nan=True)
