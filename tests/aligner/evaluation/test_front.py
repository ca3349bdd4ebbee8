"""The evaluation stage, the exact KL, the anchor's alarm, and exports in other dtypes."""

import json

import member_lab as lab
import numpy as np
import pytest
import torch
from member_lab import Layout
from omegaconf import OmegaConf
from ranks import run_ranks
from reward_servers import PICKY, running

from nemo_warp import exit_codes
from nemo_warp.evidence.responses import read_responses, responses_file
from nemo_warp.records import hash_file, read_completion

pytestmark = pytest.mark.nemo


def evaluate(config_path, *overrides):
    from nemo_warp.aligner import evaluate

    return evaluate.main(["--config", str(config_path), *overrides])


@pytest.fixture(scope="module")
def picky(tmp_path_factory):
    """A judge that fails for some responses."""
    with running(tmp_path_factory.mktemp("picky"), PICKY, run_id="test") as server:
        yield server


@pytest.fixture(scope="module")
def front_config(materials, member_vader, picky, tmp_path_factory):
    directory = tmp_path_factory.mktemp("front")
    config = {
        "directory": str(directory / "evaluation"),
        "base": str(materials.sft),
        "slerp": str(materials.other),
        "sft": str(materials.sft),
        "etas": [0.0, 0.5, 1.0, 1.5],
        "run_id": "test",
        "prompts": {"heldout": str(materials.heldout)},
        "rollout": {"max_response_tokens": 6, "micro_batch_size": 2},
        "rewards": [{"name": "vader", "weight": 1.0, "endpoint": str(member_vader.endpoint_file)}],
        "judges": [{"name": "picky", "endpoint": str(picky.endpoint_file)}],
        "evaluation": {
            "num_prompts": 8,
            "generations": 2,
            "exact_kl": True,
            "num_samples_shown": 0,
        },
        "trainer": {"devices": 1, "accelerator": "auto", "precision": "32"},
        "model": {
            "tensor_model_parallel_size": 1,
            "sequence_parallel": False,
            "megatron_amp_O2": False,
        },
    }
    path = directory / "config.yaml"
    OmegaConf.save(OmegaConf.create(config), path)
    return path


def points_of(directory):
    return [json.loads(line) for line in (directory / "points.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def front(front_config):
    assert run_ranks(evaluate, 1, front_config) == [exit_codes.DONE]
    return front_config.parent / "evaluation"


def test_front_is_measured(front):
    points = points_of(front)
    assert [point["eta"] for point in points] == [0.0, 0.5, 1.0, 1.5]
    assert points[0]["kl_to_sft"] == points[0]["kl_to_sft_exact"] == 0.0
    assert all(point["kl_to_sft_exact"] > 0 for point in points[1:])
    files = read_completion(front).files
    assert files["points.jsonl"] == hash_file(front / "points.jsonl")
    assert len(files) == 5


def test_responses_are_kept(front):
    """What the points say is what the responses give, computed without any model."""
    for point in points_of(front):
        kept = read_responses(responses_file(front, "init", point["eta"]))
        assert (len(kept.prompts), len(kept.texts[0])) == (8, 2)
        reward, judged = kept.number("reward"), kept.number("judge:picky")
        assert np.array_equal(reward, kept.number("score:vader"))
        characters = kept.number("characters")
        assert np.array_equal(np.isnan(judged), characters % 3 == 0)
        assert np.array_equal(judged[~np.isnan(judged)], characters[~np.isnan(judged)])
        for name, values in (("reward", reward), ("kl_to_sft", kept.number("log_ratio"))):
            assert point[name] == pytest.approx(values.mean(), abs=1e-5), name
            by_prompt = values.mean(1).std(ddof=1) / 8**0.5
            assert point[f"{name}_stderr"] == pytest.approx(by_prompt, abs=1e-5), name
        assert point["judges"]["picky"] == pytest.approx(np.nanmean(judged), rel=1e-5)
        assert point["failed_judges"] == {"picky": int(np.isnan(judged).sum())}
        assert point["length"] == pytest.approx(kept.number("tokens").mean())
    assert any(p["failed_judges"]["picky"] for p in points_of(front))
    gaps = [k.texts for k in (read_responses(f) for f in (front / "responses").iterdir())]
    assert any(first != second for texts in gaps for first, second in texts)


def test_one_generation_is_the_first_of_several(front, front_config, tmp_path):
    overrides = [f"directory={tmp_path}", "evaluation.generations=1", "etas=[1.5]", "judges=[]"]
    assert run_ranks(evaluate, 1, front_config, *overrides) == [exit_codes.DONE]
    one, two = (read_responses(responses_file(d, "init", 1.5)) for d in (tmp_path, front))
    assert one.texts == [texts[:1] for texts in two.texts]
    assert np.array_equal(one.number("log_ratio"), two.number("log_ratio")[:, :1])


def test_a_judge_that_is_a_reward_is_refused(front_config, member_vader, tmp_path, capfd):
    judge = f"judges=[{{name: other, endpoint: {member_vader.endpoint_file}}}]"
    found = run_ranks(evaluate, 1, front_config, f"directory={tmp_path}", judge)
    assert found == [exit_codes.MISCONFIGURED]
    assert "judge 'other' computes what reward 'vader' does" in capfd.readouterr().err


def test_interrupted_front_continues(front, front_config, tmp_path):
    """Two points and half a line are on record: only the rest is measured, with equal numbers."""
    lines = (front / "points.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/points.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    override = f"directory={tmp_path / 'evaluation'}"
    assert run_ranks(evaluate, 1, front_config, override) == [exit_codes.DONE]
    assert (tmp_path / "evaluation/points.jsonl").read_text() == "".join(lines)


def test_front_at_another_layout(front, front_config, tmp_path):
    overrides = [
        f"directory={tmp_path / 'evaluation'}",
        "trainer.devices=4",
        "model.tensor_model_parallel_size=2",
        "etas=[0.5,1.5]",
    ]
    assert run_ranks(evaluate, 4, front_config, *overrides) == [exit_codes.DONE] * 4
    expected = [point for point in points_of(front) if point["eta"] in (0.5, 1.5)]
    for found, wanted in zip(points_of(tmp_path / "evaluation"), expected, strict=True):
        for key in ("reward", "kl_to_sft", "kl_to_sft_exact", "length", "entropy"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-6), key
        assert found["judges"] == wanted["judges"]
        here, there = (
            read_responses(responses_file(d, "init", found["eta"]))
            for d in (front, tmp_path / "evaluation")
        )
        assert here.texts == there.texts


def test_the_policy_at_a_kl_is_searched_for(front, front_config, tmp_path, capfd):
    """From the points of the front, on the same prompts, to the tolerance; twice the same."""
    points = {p["eta"]: p["kl_to_sft_exact"] for p in points_of(front)}
    budget = (points[0.5] + points[1.0]) / 2
    overrides = [f"pick.kl={budget}", "pick.tolerance=0.002", f"pick.known={front}/points.jsonl"]
    for name in ("a", "b"):
        directory = f"directory={tmp_path / name}"
        assert run_ranks(evaluate, 1, front_config, directory, *overrides) == [exit_codes.DONE]
    chosen = json.loads((tmp_path / "a/chosen.json").read_text())
    assert (tmp_path / "b/chosen.json").read_text() == (tmp_path / "a/chosen.json").read_text()
    assert 0.5 < chosen["kappa"] < 1.0 and budget - 0.002 <= chosen["kl"] <= budget
    measured = points_of(tmp_path / "a")
    assert all(p["eta"] not in points for p in measured), "known points are not measured again"
    (point,) = [p for p in measured if p["eta"] == chosen["kappa"]]
    assert chosen["point"]["reward"] == point["reward"]
    assert chosen["point"]["judges"] == point["judges"]
    record = read_completion(tmp_path / "a")
    assert record.details["chosen"] == chosen
    assert f"responses/init_{chosen['kappa']:.8g}.jsonl.gz" in record.files
    beyond = [f"directory={tmp_path / 'c'}", "pick.kl=99", *overrides[1:]]
    assert run_ranks(evaluate, 1, front_config, *beyond) == [exit_codes.MISCONFIGURED]
    assert "a budget of 99 nats is outside of the front" in capfd.readouterr().err


def test_eta_out_of_range(front_config, capfd):
    assert run_ranks(evaluate, 1, front_config, "etas=[0,3]") == [exit_codes.MISCONFIGURED]
    assert "is 3, expected a number (0 to 2)" in capfd.readouterr().err


def exact_kl(materials, directory, layout):
    """From the model, vocabulary-parallel, and (one rank) from whole logits in float64."""
    config = lab.member_config(
        materials, directory, layout, algorithm={"ema_update_rate": 0.5}, also=["optim.lr=0.05"]
    )
    trainer = lab.build_trainer(config)
    batch = trainer.objective.batch(lab.given_rollouts(0))
    trainer.run_training(trainer.optimizer_batches(batch.data))
    rollouts = lab.given_rollouts(1)
    model = trainer.model
    model.prepare_for_inference()
    with trainer.objective.reference.gathered() as reference:
        found = model.get_exact_kl(rollouts.tokens, rollouts.mask, reference)
        if layout.ranks > 1:
            return found, None
        mask, _, positions = model.get_ltor_masks_and_position_ids(rollouts.tokens)

        def log_probs():
            with torch.no_grad():
                logits = model.model(rollouts.tokens, positions, mask, labels=None)
            return (logits.double() / 0.9).log_softmax(-1)[:, :-1]

        policy = log_probs()
        with reference.in_place():
            other = log_probs()
    expected = ((policy.exp() * (policy - other)).sum(-1) * rollouts.mask).sum(-1)
    return found, expected


def test_exact_kl(materials, tmp_path):
    found, expected = run_ranks(exact_kl, 1, materials, tmp_path, Layout())[0]
    assert (expected > 1e-3).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    for other, _ in run_ranks(exact_kl, 4, materials, tmp_path, Layout(2, 2)):
        torch.testing.assert_close(other, found, rtol=1e-3, atol=1e-5)


def raise_inside_the_reference(materials, directory):
    trainer = lab.build_trainer(lab.member_config(materials, directory))
    batch = trainer.objective.batch(lab.given_rollouts(0))
    trainer.run_training(trainer.optimizer_batches(batch.data))
    before = lab.local_tensors(trainer.model)
    storage = [p.data_ptr() for p in trainer.model.parameters()]
    with pytest.raises(ZeroDivisionError), trainer.objective.reference.in_place():
        assert not np.array_equal(lab.local_tensors(trainer.model)[0][3], before[0][3])
        raise ZeroDivisionError
    same = all(
        np.array_equal(left[3], right[3])
        for left, right in zip(lab.local_tensors(trainer.model), before, strict=True)
    )
    return same and storage == [p.data_ptr() for p in trainer.model.parameters()]


def test_policy_comes_back_even_if_the_forward_raises(materials, tmp_path):
    assert run_ranks(raise_inside_the_reference, 1, materials, tmp_path) == [True]


def alarm(materials, directory, updates_are_lost):
    """Run 1/mu = 20 steps; as a fault, all updates but the last are undone."""
    config = lab.member_config(materials, directory, algorithm={"ema_update_rate": 0.05})
    trainer = lab.build_trainer(config)
    batch = trainer.objective.batch(lab.given_rollouts(0))
    shard = trainer.anchor.weights.shard
    for step in range(20):
        before = shard.clone()
        trainer.run_training(trainer.optimizer_batches(batch.data))
        if updates_are_lost and step < 19:
            shard.copy_(before)
    return trainer.anchor.flat


def test_flat_anchor_raises_an_alarm(materials, tmp_path):
    assert run_ranks(alarm, 1, materials, tmp_path, False) == [False]
    assert run_ranks(alarm, 1, materials, tmp_path, True) == [True]


def export_with_masters(materials, directory, monkeypatch):
    """The masters of a checkpoint (there are none on a CPU: written by hand), and the export."""
    from nemo.utils.callbacks.dist_ckpt_io import DistributedCheckpointIO

    from nemo_warp.aligner.weights import export
    from nemo_warp.aligner.weights.sharded import ShardedWeights

    trainer = lab.build_trainer(lab.member_config(materials, directory))
    model = trainer.model
    masters = ShardedWeights(model)
    masters.shard.add_(1e-3)
    state = masters.sharded_state_dict("")
    state = {k: v for k, v in state.items() if not k.endswith("_extra_state")}
    for tensor in state.values():
        tensor.key = f"optimizer.state.fp32_param.{tensor.key}"
    writer = DistributedCheckpointIO.from_config(model.cfg)
    writer.save_checkpoint({"optimizer": state}, str(directory / "checkpoint"))
    monkeypatch.setattr(export, "has_masters", lambda _: True)
    for dtype in ("same", "float32", "bfloat16"):
        output = directory / f"{dtype}.nemo"
        export.export_policy(model, materials.sft, output, dtype, directory / "checkpoint")
    with masters.in_place():
        return lab.local_tensors(model)


def test_export_dtypes(materials, tmp_path, monkeypatch):
    masters = run_ranks(export_with_masters, 1, materials, tmp_path, monkeypatch)[0]
    own = run_ranks(restored, 1, materials.sft)[0]
    exported = {
        dtype: run_ranks(restored, 1, tmp_path / f"{dtype}.nemo")[0]
        for dtype in ("same", "float32", "bfloat16")
    }
    for i, (key, _, _, values) in enumerate(own):
        assert np.array_equal(exported["same"][i][3], values), key
        assert np.array_equal(exported["float32"][i][3], masters[i][3]), key
        rounded = torch.from_numpy(values).bfloat16().float().numpy()
        assert np.array_equal(exported["bfloat16"][i][3], rounded), key


def export_twice(materials, directory):
    from nemo_warp.aligner.weights import export

    model = lab.build_trainer(lab.member_config(materials, directory)).model
    for name in ("here", "there"):
        (directory / name).mkdir()
        output = directory / name / "policy.nemo"
        export.export_policy(model, materials.sft, output, "same", directory / "checkpoint")


def test_equal_weights_give_equal_bytes_wherever_they_are_written(materials, tmp_path):
    run_ranks(export_twice, 1, materials, tmp_path)
    here, there = ((tmp_path / name / "policy.nemo").read_bytes() for name in ("here", "there"))
    assert here == there
    assert str(tmp_path).encode() not in here


def restored(path):
    import tiny_models

    return lab.local_tensors(tiny_models.load_tiny_nemo(path))
