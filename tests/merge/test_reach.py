"""Folders of iterations with a tracker, negative eta, shares, karcher, reward models (WARM)."""

from pathlib import Path

import pytest
import torch
from merge_reference import unstack
from synthetic_checkpoints import read_torch_dist, tiny_weights, write_torch_dist

from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SIZES = {"hidden": 16, "ffn": 24, "vocab": 64, "dtype": torch.float32}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders as Megatron-LM leaves them: iterations, and which one is the newest."""
    folder = tmp_path_factory.mktemp("reach")
    init = tiny_weights(0, **SIZES)
    for seed, name in enumerate(("init", "a", "b", "c")):
        weights = init if name == "init" else tiny_weights(seed, **SIZES, around=init)
        (folder / name).mkdir()
        write_torch_dist(folder / name / "iter_0000020", weights)
        (folder / name / "latest_checkpointed_iteration.txt").write_text("20\n")
    return folder


def _read(folder: Path) -> dict[str, torch.Tensor]:
    found = unstack(read_torch_dist(folder))
    return {name: tensor.double() for name, tensor in found.items()}


def _merged(models: Path, output: Path, names: str, **options) -> dict[str, torch.Tensor]:
    policies = [models / name for name in names]
    merge(models / "init", policies, str(output), workers=1, vocab_size=64, **options)
    return _read(output)


def test_a_tracker_names_the_iteration(models, tmp_path):
    assert open_checkpoint(models / "a").path.name == "iter_0000020"
    for content, message in (("30", "iter_0000030"), ("../../etc", "neither"), ("", "neither")):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)


def test_averages_with_shares_and_negative_eta(models, tmp_path):
    """WARM's average, unequal shares, and a step away from the policies."""
    init, *policies = (_read(models / name / "iter_0000020") for name in ("init", "a", "b", "c"))
    for eta, weight, shares in ((1.0, None, (1, 1, 1)), (-0.5, (2, 1, 1), (2, 1, 1))):
        options = {"method": "lerp", "eta": eta, "weight": weight}
        found = _merged(models, tmp_path / f"{eta}", "abc", **options)
        for name, start in init.items():
            pairs = zip(shares, policies, strict=True)
            mean = sum(share * policy[name] for share, policy in pairs) / sum(shares)
            expected = (1 - eta) * start + eta * mean
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)


def test_karcher_does_not_depend_on_the_order(models, tmp_path):
    merges = [
        _merged(models, tmp_path / names, names, method="karcher", eta=1.0)
        for names in ("abc", "cab")
    ]
    for name, tensor in merges[0].items():
        torch.testing.assert_close(merges[1][name], tensor, rtol=1e-6, atol=1e-7)
