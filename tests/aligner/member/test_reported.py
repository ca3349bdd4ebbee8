"""What a member tells about itself: speed, clipping, each reward, samples, a profile, W&B's run."""

import json
from types import SimpleNamespace

import member_lab as lab
import pytest
import torch
from ranks import run_ranks
from reward_servers import STRANGE, running

from nemo_warp import exit_codes
from nemo_warp.records import read_completion

pytestmark = pytest.mark.nemo


def run_main(config_path, log):
    """The entry point; its log and its progress go to ``log``."""
    import logging
    import sys

    from nemo_warp.aligner import train

    sys.stderr = log.open("a", buffering=1)
    logger = logging.getLogger("nemo_logger")
    logger.addHandler(logging.FileHandler(log))
    logger.setLevel(logging.INFO)
    return train.main(["--config", str(config_path)])


@pytest.fixture(scope="module")
def told(materials, member_vader, tmp_path_factory):
    """A member of two rewards, one of them of weight 0; its last two steps are profiled."""
    from omegaconf import OmegaConf

    directory = tmp_path_factory.mktemp("told")
    with running(directory, STRANGE, run_id="test") as other:
        config = lab.member_config(
            materials, directory / "member", profile={"first_step": 2, "num_steps": 9},
            prompts={"too_long": "drop", "max_tokens": 7, "add_bos": True},
            also=["trainer.gradient_clip_val=1e-4"],
        )  # fmt: skip
        config.rewards = [
            {"name": "vader", "weight": 1.0, "endpoint": str(member_vader.endpoint_file)},
            {"name": "silent", "weight": 0.0, "endpoint": str(other.endpoint_file)},
        ]
        path = directory / "config.yaml"
        OmegaConf.save(config, path)
        log = directory / "member.txt"
        assert run_ranks(run_main, 1, path, log) == [exit_codes.DONE]
    return directory / "member", log.read_text()


def records(path, kind):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def test_timings_hold_rates(told):
    steps = records(told[0] / "timings.jsonl", "timing")
    train = records(told[0] / "metrics.jsonl", "train")
    assert len(steps) == 4
    for step, trained in zip(steps, train, strict=True):
        generated = step["generated_tokens_per_second"] * step["rollout"]
        assert generated == pytest.approx(8 * trained["length"]), "tokens of 8 responses"
        assert step["trained_tokens_per_second"] * step["train"] > generated, "and their prompts"
        assert step["peak_memory_bytes"] > 50e6
        assert "flops_utilisation" not in step, "nobody knows a CPU's peak"


def test_metrics_hold_each_reward_the_clipping_and_samples(told):
    train = records(told[0] / "metrics.jsonl", "train")
    for record in train:
        assert record["clip_share"] == 1.0, "every norm is above 1e-4"
        assert record["rewards"]["vader"] == pytest.approx(record["reward"])
        assert "silent" in record["rewards"]
    assert [len(r.get("samples", [])) for r in train] == [0, 1, 0, 1], "where it is evaluated"
    sample = train[1]["samples"][0]
    assert set(sample) == {"prompt", "response", "reward"} and sample["prompt"]
    evaluation = records(told[0] / "metrics.jsonl", "eval")[-1]
    assert set(evaluation["rewards"]) == {"vader", "silent"}


def test_a_window_of_steps_is_profiled(told):
    (file,) = (told[0] / "profile").iterdir()
    assert file.name == "step_00000002-rank0.json"
    names = [event.get("name") for event in json.loads(file.read_text())["traceEvents"]]
    assert names.count("rollout") == 2, "the run ends before the window"
    assert {"train", "log_prob", "anchor_log_prob"} <= set(names)


def test_the_log_says_what_a_rank_will_hold_and_has_plain_lines(told):
    log = told[1]
    assert "memory of a rank (an estimate" in log
    assert "held" in log and "optimizer" in log and "at most" in log
    bars = [line for line in log.splitlines() if "4/4" in line]
    assert bars and "\r" not in log and "reward=" in bars[-1]


def test_prompts_that_are_too_long_are_counted_and_one_is_shown(told):
    """Two of the 18 prompts have more than 6 tokens, and BOS is put before all."""
    assert read_completion(told[0]).details["prompts_dropped"] == 2
    assert "train.jsonl: 2 of 18 prompts are too long and left out" in told[1]
    assert "train.jsonl: the first prompt's 4 tokens: <s>=1 " in told[1]
    assert "do not begin with it" not in told[1]


def test_flops_utilisation_by_hand(nemo, monkeypatch):
    """A step of 100 tokens in 2 s on 4 devices of 1e9 operations per second."""
    from nemo_warp.aligner.member import throughput
    from nemo_warp.core.transformer import Sizes

    sizes = Sizes(2, 32, 64, 4, 2, 8, 128, 64)
    monkeypatch.setattr(throughput, "sizes_of", lambda model: sizes)
    counted = throughput.Throughput(None, ranks=4, peak=1e9)
    lengths = torch.tensor([40, 60])
    counted.count(SimpleNamespace(lengths=lengths, response_lengths=torch.tensor([30, 45])))
    found = counted.take({"rollout": 3.0, "train": 2.0})
    layer = 32 * (32 + 32) + 32 * 32 + 3 * 32 * 64 + 2 * 32
    forward = 100 * (2 * (2 * layer + 128 * 32) + 4 * 2 * 32 * 50)
    assert found["flops_utilisation"] == pytest.approx(3 * forward / 2 / 4e9)
    assert found["generated_tokens_per_second"] == 25
    assert found["trained_tokens_per_second"] == 50
    assert "train" in counted.take({"train": 1.0}) and "rollout" in found, "counted once"


def test_wandb_goes_on_with_its_run_after_a_requeue(nemo, tmp_path):
    from nemo_warp.aligner.member.metrics import wandb_settings

    first = wandb_settings(tmp_path, "member", {"project": "warp", "offline": True})
    again = wandb_settings(tmp_path, "member", {"project": "warp", "offline": True})
    assert first == again
    assert first["resume"] == "allow" and len(first["id"]) == 16
    assert first["project"] == "warp" and first["save_dir"] == str(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    assert wandb_settings(other, "member", {})["id"] != first["id"]
    assert wandb_settings(other, "m", {"id": "mine", "name": "n"})["id"] == "mine"
