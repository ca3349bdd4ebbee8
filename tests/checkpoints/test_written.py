"""What Megatron-core 0.13 to 0.16, and Megatron-Bridge with it, wrote.

Read exactly, merged, and loaded back by other readers.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import written_checkpoints as written
import written_weights as known
from synthetic_checkpoints import read_torch_dist

from nemo_warp.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_warp.checkpoints.inspection import hash_weights, read_tensor
from nemo_warp.checkpoints.io.reading import FileCache
from nemo_warp.checkpoints.logical import LogicalTensor
from nemo_warp.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CASES = sorted(path.name.removesuffix(".tar.xz") for path in written.WRITTEN.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("written")


@pytest.fixture(scope="module")
def merged(folder) -> dict[str, Path]:
    """Every case as the init of a merge with the two others, as Megatron-LM names its folders."""
    outputs = {case: folder / "out" / case / "iter_0000001" for case in CASES}
    for case, output in outputs.items():
        written.merge_written(case, folder, output)
    return outputs


def _values(tensors: dict[str, LogicalTensor]) -> dict[str, torch.Tensor]:
    with FileCache() as files:
        return {n: read_tensor(files, tensor).view(tensor.shape) for n, tensor in tensors.items()}


def _opened(case: str, folder: Path) -> Checkpoint:
    return open_checkpoint(written.unpack(case, folder).parent)


def test_there_are_cases_of_every_kind():
    assert len(CASES) == 10


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_read_exactly(folder, case):
    checkpoint, policy = _opened(case, folder), written.policy_of(case)
    shapes = known.shapes(written.model_of(case) == "moe")
    assert checkpoint.tensors.keys() == shapes.keys()
    for name, value in _values(checkpoint.tensors).items():
        exact = torch.from_numpy(known.weight(policy, name, shapes[name]))
        assert torch.equal(value, exact.to(written.stored_dtype(case))), name


def test_masters_of_chained_optimizers_are_unrounded(folder):
    """Flattened over ranks (0.15) and whole (0.16); the experts' optimizer is the second one."""
    for case in ("moe_a", "moe_b"):
        masters = _values(_opened(case, folder).store.masters())
        assert any("experts" in name for name in masters)
        assert masters.keys() == known.shapes(True).keys()
        for name, value in masters.items():
            exact = known.weight(written.policy_of(case), name, tuple(value.shape))
            assert torch.equal(value, torch.from_numpy(exact)), name


def test_a_spelling_is_no_other_model(folder):
    one, other = (_opened(case, folder) for case in ("dense_b", "dense_b_313"))
    assert hash_weights(one) == hash_weights(other)
    assert one.store.names.keys() != other.store.names.keys()


@pytest.mark.parametrize("case", CASES)
def test_torch_reads_the_merge(merged, case):
    """Its own reader, key by key; parts are put together here by hand."""
    expected, found = written.expected_merge(case), read_torch_dist(merged[case])
    assert not any(key.startswith(("optimizer", "chained")) for key in found)
    for name, exact in expected.items():
        torch.testing.assert_close(_by_hand(found, name), exact, rtol=2e-7, atol=1e-8)


def _by_hand(found: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    layer, rest = name.split(".")[2:3], ".".join(name.split(".")[3:])
    local = rest.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    for spelling in (name, f"decoder.layers.{layer[0]}.{local}" if layer else name):
        if spelling in found:
            return found[spelling]
        if f"{spelling}_w" in found:
            return torch.cat([found[f"{spelling}_w"], found[f"{spelling}_v"]])
    for spelling in (f"decoder.layers.{rest}", f"decoder.layers.{local}"):
        if spelling in found:
            return found[spelling][int(layer[0])]
    head, _, tail = name.partition(".experts.experts.")
    experts = (f"{head}.experts.experts.{i}.{tail}" for i in range(known.EXPERTS))
    return torch.stack([_by_hand(found, expert) for expert in experts])


def test_a_tracker_names_the_merge(merged):
    for output in merged.values():
        assert (output.parent / "latest_checkpointed_iteration.txt").read_text() == "1\n"
        assert open_checkpoint(output.parent).path == output


def test_masters_can_be_merged(folder, tmp_path):
    places = [written.unpack(case, folder).parent for case in ("moe_init", "moe_a", "moe_b")]
    options = {"source": "masters", "dtype": "float32", "vocab_size": known.VOCABULARY}
    merge(places[0], places[1:], str(tmp_path / "out"), method="lerp", eta=1.0, **options)
    found = read_torch_dist(tmp_path / "out")
    for name, shape in known.shapes(True).items():
        exact = sum(torch.from_numpy(known.weight(p, name, shape)).double() for p in "ab") / 2
        torch.testing.assert_close(_by_hand(found, name).double(), exact, rtol=1e-7, atol=1e-8)


@pytest.mark.slow
@pytest.mark.nemo
def test_the_installed_megatron_core_loads_merges_strictly(merged, tmp_path):
    """0.11, at one tensor rank and at two; the writers' own releases: tools/make_written.py."""
    pytest.importorskip("megatron.core")
    child = Path(written.__file__).with_name("write_with_megatron.py")
    layouts = {"dense_init": [], "dense_a": ["--ranks", "2"], "bridge_a": []}
    running = {}
    for case, options in layouts.items():
        expected = tmp_path / f"{case}.pt"
        torch.save(written.expected_merge(case), expected)
        command = [sys.executable, child, "read", merged[case], "--expected", expected, *options]
        with (tmp_path / case).open("w") as said:
            running[case] = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said)
    for case, process in running.items():
        assert process.wait() == 0, (tmp_path / case).read_text()[-2000:]
