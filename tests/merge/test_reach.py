"""Folders of iterations with a tracker, shares, karcher, eta by layer, orders, model cards."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from merge_reference import slerpm, unstack
from synthetic_checkpoints import read_torch_dist, tiny_weights, write_torch_dist

from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.core.merging import order_spread
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


TRACKER = "latest_checkpointed_iteration.txt"


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


def _tracked(models: Path, output: Path) -> str:
    _merged(models, output, "ab")
    return (output.parent / TRACKER).read_text()


def test_the_tracker_goes_forward_to_a_merged_iteration(models, tmp_path, caplog):
    """Not back, not away from a release, and never beside inputs: a run would go on from there."""
    caplog.set_level("INFO")
    assert _tracked(models, tmp_path / "iter_0000020") == "20\n"
    flags = "--ckpt-format torch_dist --no-load-optim --no-load-rng"
    assert f"Megatron-LM loads it with --load {tmp_path} {flags}" in caplog.text
    assert open_checkpoint(tmp_path).path == tmp_path / "iter_0000020"
    assert _tracked(models, tmp_path / "iter_0000030") == "30\n"
    assert "left as it is" not in caplog.text
    assert _tracked(models, tmp_path / "iter_0000025") == "30\n"
    assert "names 30 and was left as it is, not set to 25" in caplog.text
    (tmp_path / TRACKER).write_text("release\n")
    assert _tracked(models, tmp_path / "iter_0000040") == "release\n"
    run = models / "init"
    policies = [models / name for name in "ab"]
    merge(run / "iter_0000020", policies, str(run / "iter_0000021"), vocab_size=64)
    assert (run / TRACKER).read_text() == "20\n"


def test_a_merge_that_was_killed_before_its_tracker_gets_it(models, tmp_path, monkeypatch):
    from nemo_warp.merge import execute

    with monkeypatch.context() as patched:
        patched.setattr(execute, "track", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _merged(models, tmp_path / "iter_0000020", "ab")
    assert not (tmp_path / TRACKER).exists()
    assert _tracked(models, tmp_path / "iter_0000020") == "20\n"
    assert {path.name for path in tmp_path.iterdir()} == {"iter_0000020", TRACKER}


@pytest.mark.parametrize("kind", ["ends", "table", "file"])
def test_eta_by_layer(models, tmp_path, kind):
    """Two ends over the depth, or a table; what is outside the layers goes with its end."""
    if kind == "ends":
        scale, factors = (0.0, 1.0), {"embedding": 0.0, "0": 0.0, "1": 0.5, "2": 1.0, "final": 1.0}
    else:
        scale = {1: 0.5, "decoder.layers.2": -1, "default": 2.0}
        factors = {"embedding": 2.0, "0": 2.0, "1": 0.5, "2": -1.0, "final": 2.0}
    if kind == "file":
        file = tmp_path / "scale.yaml"
        file.write_text("1: 0.5\ndecoder.layers.2: -1\ndefault: 2.0\n")
        scale = [str(file)]
    output = tmp_path / "out"
    options = {"method": "lerp", "eta": 0.4, "eta_scale": scale, "report": tmp_path / "report"}
    found = _merged(models, output, "ab", **options)
    init, a, b = (_read(models / name / "iter_0000020") for name in ("init", "a", "b"))
    for name, start in init.items():
        part = name.split(".")[2] if ".layers." in name else name.split(".")[0]
        eta = 0.4 * factors["final" if part == "decoder" else part]
        expected = (1 - eta) * start + eta * (a[name] + b[name]) / 2
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    for unit, row in report["units"].items():
        assert row["outputs"][0]["realised_eta"] == pytest.approx(
            row["outputs"][0]["eta"], abs=1e-5
        ), unit
    assert not report["warnings"]
    recorded = json.loads((output / "warp_merge.json").read_text())["options"]["eta_scale"]
    assert recorded == (
        [0.0, 1.0]
        if kind == "ends"
        else {str(k): v for k, v in ({1: 0.5, "decoder.layers.2": -1.0, "default": 2.0}).items()}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta_scale": (1.0,)}, "two factors"),
        ({"eta_scale": ("1", "nan")}, "needs numbers, found 'nan'"),
        ({"eta_scale": {"9": 1.0}}, "'9', which is no layer of the model"),
        ({"eta_scale": (1.0, 8.0)}, r"lie in \[-2, 2\], found 2.4"),
        ({"eta_scale": (1.0, 2.0), "granularity": "model"}, "--eta-scale is per layer"),
        ({"eta_scale": "no/such.yaml"}, "cannot be read as YAML"),
    ],
)
def test_scales_that_make_no_sense(models, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _merged(models, tmp_path / "out", "ab", **options)
    assert not list(tmp_path.iterdir())


def test_the_spread_over_orders_is_that_of_all_merges(models, tmp_path):
    """Against slerpm of the vectors themselves in all six orders."""
    policies = [_read(models / name / "iter_0000020") for name in ("a", "b", "c")]
    init = _read(models / "init" / "iter_0000020")
    report = tmp_path / "report"
    _merged(models, tmp_path / "out", "abc", report=report)
    found = json.loads((report / "report.json").read_text())
    for unit, row in found["units"].items():
        names = [name for name in init if name.startswith(f"{unit}.")]
        deltas = [
            np.concatenate([(p[n] - init[n]).numpy().ravel() for n in names]) for p in policies
        ]
        merges = [slerpm(list(order), None) for order in itertools.permutations(deltas)]
        mean = sum(merges) / len(merges)
        spread = max(np.linalg.norm(one - mean) for one in merges) / np.linalg.norm(mean)
        assert row["order_spread"] == pytest.approx(spread, rel=1e-9), unit
        assert spread > 1e-3
    assert "spread over orders" in (report / "report.md").read_text()
    for options in ({"method": "karcher"}, {"method": "lerp"}):
        _merged(models, tmp_path / "other", "abc", report=report, overwrite=True, **options)
        assert json.loads((report / "report.json").read_text())["model"]["order_spread"] is None


def test_the_spread_of_many_vectors_takes_their_rotations():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(7, 50)) + 1.0
    gram = vectors @ vectors.T
    shares = generator.uniform(0.5, 1.5, 7)
    assert order_spread(gram[:2, :2]) is None
    assert 0.0 < order_spread(gram, shares) < 0.2
    turned = np.roll(np.arange(7), 3)
    assert order_spread(gram[np.ix_(turned, turned)], shares[turned]) == pytest.approx(
        order_spread(gram, shares), rel=1e-9
    )
    assert order_spread(np.ones((6, 6))) == pytest.approx(0.0, abs=1e-7)  # all the same


def test_a_card_says_what_was_merged(models, tmp_path):
    """The same for the same merge, and never the init's."""
    _merged(models, tmp_path / "one", "ab", report=tmp_path / "report")
    text = (tmp_path / "one" / "README.md").read_text()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert text.startswith("---\ntags:\n- merge")
    assert "eta = 0.3" in text and "slerp(theta_m - theta_init)" in text
    for role in ("init", "policy_1", "policy_2"):
        assert f"- {role}: iter_0000020 (weights " in text
    for unit, row in report["units"].items():
        assert f"| {unit} | {row['pairs'][0]['task_vectors']['angle']:.4g} |" in text
    _merged(models, tmp_path / "two", "ab")
    assert (tmp_path / "two" / "README.md").read_text() == text
    merge(tmp_path / "one", [models / n for n in "bc"], str(tmp_path / "next"), vocab_size=64)
    assert "policy_2" in (tmp_path / "next" / "README.md").read_text()
    assert (tmp_path / "next" / "README.md").read_text() != text
