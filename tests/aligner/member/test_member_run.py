"""Whole members: real generation, a real reward server, killed, stopped and resumed."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import member_lab as lab
import numpy as np
import pytest
from member_lab import Layout
from omegaconf import OmegaConf
from ranks import RankError, run_ranks
from reward_servers import STRANGE, VADER, running

from nemo_warp import exit_codes
from nemo_warp.evidence.responses import read_responses, responses_file
from nemo_warp.records import RecordError, hash_file, read_completion

pytestmark = pytest.mark.nemo


def run_main(config_path, *overrides):
    """The entry point, as every rank runs it."""
    from nemo_warp.aligner import train

    return train.main(["--config", str(config_path), *overrides])


SINGLE = Layout()


def write_config(materials, server, directory, layout=SINGLE, **changes) -> Path:
    config = lab.member_config(materials, directory / "member", layout, **changes)
    config.rewards = [{"name": "vader", "weight": 1.0, "endpoint": str(server.endpoint_file)}]
    config.run.measure_anchor = True
    path = directory / f"config-{layout}.yaml"
    directory.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, path)
    return path


def metrics_of(directory: Path) -> list[dict]:
    lines = (directory / "member/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def final_state(config_path, checkpoint):
    """Weights, anchor, optimizer moments and scheduler of a training checkpoint, of one rank."""
    from nemo_warp.aligner.weights import training_checkpoint
    from nemo_warp.config import CONF_DIRECTORY, load_config

    config = load_config(CONF_DIRECTORY / "member.yaml", config_path)
    trainer = lab.build_trainer(config)
    training_checkpoint.load(checkpoint, trainer.model, trainer.anchor)
    weights = lab.local_tensors(trainer.model)
    with trainer.anchor.weights.in_place():
        anchor = lab.local_tensors(trainer.model)
    adam = [
        (state["exp_avg"].numpy(), state["exp_avg_sq"].numpy(), float(state["step"]))
        for state in trainer.updater.optimizer.state.values()
    ]
    return weights, anchor, adam, trainer.updater.scheduler.state_dict()["last_epoch"]


@pytest.fixture(scope="module")
def uninterrupted(materials, member_vader, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    config = write_config(materials, member_vader, directory)
    assert run_ranks(run_main, 1, config) == [exit_codes.DONE]
    return directory


def test_answers_stay_with_their_prompts(materials, tmp_path, capfd):
    """Through a data-parallel member's rollouts, its evaluations and the reward's server.

    The reward fails where the answer is not the prompt's own. Without answers nothing is trained.
    """
    files = {}
    for name in ("train", "heldout"):
        files[name] = tmp_path / f"{name}.jsonl"
        lines = [json.loads(line) for line in getattr(materials, name).read_text().splitlines()]
        answered = [line | {"answer": line["prompt"][::-1]} for line in lines]
        files[name].write_text("".join(json.dumps(line) + "\n" for line in answered))
    layout = Layout(1, 1, 2)
    with running(tmp_path / "server", "strange_rewards:mirrored", run_id="test") as server:
        config = write_config(materials, server, tmp_path, layout)
        without = run_ranks(run_main, 2, config, "run.total_steps=2", "run.eval_interval=2")
        assert without == [exit_codes.MISCONFIGURED] * 2
        told = capfd.readouterr().err
        assert "reward 'vader' takes the field 'answer' of every prompt" in told
        assert str(materials.train) in told and "Traceback" not in told
        config = write_config(materials, server, tmp_path / "answered", layout)
        given = [f"prompts.{name}={file}" for name, file in files.items()]
        given += [f"rewards.0.{key}" for key in ("shift=1", "scale=2", "standardize=deviation")]
        ran = run_ranks(run_main, 2, config, *given, "run.total_steps=2", "run.eval_interval=2")
        assert ran == [exit_codes.DONE] * 2
    records = metrics_of(tmp_path / "answered")
    counted = [r["failed_rewards"] for r in records if r["kind"] in ("train", "eval")]
    assert counted == [0, 0, 0, 0]
    assert all(r["reward"] == 4.0 for r in records if "reward" in r), "(1 + 1) * 2"
    trained = [r for r in records if r["kind"] == "train"]
    assert all(r["rewards"] == {"vader": 1.0} for r in trained), "as they were given"
    assert all(r["rewards_deviation"] == {"vader": 0.0} for r in trained)
    assert all(abs(r["regularised_reward"]) < 1.0 for r in trained), "their mean is taken off"


def assert_same_state(left: Path, right: Path, step: int, config: str = "config-tp1-pp1-dp1.yaml"):
    name = f"member/checkpoints/step_{step:08d}"
    one = run_ranks(final_state, 1, left / config, left / name)[0]
    other = run_ranks(final_state, 1, right / config, right / name)[0]
    for mine, theirs in zip(one[0] + one[1], other[0] + other[1], strict=True):
        assert np.array_equal(mine[3], theirs[3]), mine[0]
    for mine, theirs in zip(one[2], other[2], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert one[3] == other[3]


def test_member_is_complete(uninterrupted):
    member = uninterrupted / "member"
    record = read_completion(member)
    assert record.kind == "member"
    assert record.details["step"] == record.details["total_steps"] == 4
    assert record.files["policy.nemo"] == hash_file(member / "policy.nemo")
    records = metrics_of(uninterrupted)
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4]
    evaluations = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in evaluations] == [0, 2, 4]
    assert evaluations[0]["kl_to_sft"] == evaluations[0]["kl_to_anchor"] == 0.0
    assert evaluations[-1]["kl_to_sft"] != 0.0
    for key in ("reward", "length", "entropy", "ended_share", "samples", "alarms"):
        assert key in evaluations[-1]


def test_responses_and_the_anchor_are_kept(uninterrupted):
    """At step 0 the anchor is the policy; later it lies between the policy and SFT."""
    member = uninterrupted / "member"
    anchors = [r for r in metrics_of(uninterrupted) if r["kind"] == "anchor"]
    assert [r["step"] for r in anchors] == [0, 2, 4]
    for step in (0, 2, 4):
        policy, anchor = (
            read_responses(responses_file(member, n, step)) for n in ("step", "anchor")
        )
        assert (policy.texts == anchor.texts) or step
        record = next(r for r in anchors if r["step"] == step)
        assert record["kl_to_sft"] == pytest.approx(anchor.number("log_ratio").mean(), abs=1e-5)
    policy = [r for r in metrics_of(uninterrupted) if r["kind"] == "eval"][-1]
    assert 0 < abs(anchors[-1]["kl_to_sft"]) < abs(policy["kl_to_sft"])


def restored_by_stock_nemo(path):
    """Weights of the exported file as unmodified MegatronGPTModel restores it."""
    import tiny_models

    return lab.local_tensors(tiny_models.load_tiny_nemo(path))


def test_stock_nemo_restores_the_policy_of_step_t(uninterrupted):
    member = uninterrupted / "member"
    config = uninterrupted / "config-tp1-pp1-dp1.yaml"
    checkpoint = member / "checkpoints/step_00000004"
    expected = run_ranks(final_state, 1, config, checkpoint)[0][0]
    found = run_ranks(restored_by_stock_nemo, 1, member / "policy.nemo")[0]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[0] == theirs[0]
        assert np.array_equal(mine[3], theirs[3]), mine[0]


def test_finished_member_is_left_alone(uninterrupted):
    before = hash_file(uninterrupted / "member")
    config = uninterrupted / "config-tp1-pp1-dp1.yaml"
    assert run_ranks(run_main, 1, config) == [exit_codes.DONE]
    assert hash_file(uninterrupted / "member") == before


def test_directory_of_another_configuration_is_refused(uninterrupted, capfd):
    config = uninterrupted / "config-tp1-pp1-dp1.yaml"
    assert run_ranks(run_main, 1, config, "optim.lr=0.5") == [exit_codes.MISCONFIGURED]
    assert "belongs to another configuration" in capfd.readouterr().err


def killed_in_step(config_path, step, rank):
    """Fault injection: this rank is killed when it has generated its rollouts of ``step``."""
    from nemo_warp.aligner.member.trainer import WarpReinforceTrainer

    generate = WarpReinforceTrainer.generate_rollouts

    def generate_and_die(trainer):
        rollouts = generate(trainer)
        if trainer.step == step and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return rollouts

    WarpReinforceTrainer.generate_rollouts = generate_and_die
    return run_main(config_path)


def test_killed_and_resumed_equals_uninterrupted(uninterrupted, materials, member_vader, tmp_path):
    config = write_config(materials, member_vader, tmp_path)
    with pytest.raises(RankError, match="died"):
        run_ranks(killed_in_step, 1, config, 3, 0)
    assert not (tmp_path / "member/completion.json").exists()
    assert metrics_of(tmp_path)[-1]["step"] == 3
    assert run_ranks(run_main, 1, config) == [exit_codes.DONE]
    ours, theirs = (d / "member/metrics.jsonl" for d in (tmp_path, uninterrupted))
    assert ours.read_bytes() == theirs.read_bytes()
    assert_same_state(tmp_path, uninterrupted, 4)


def test_resumes_at_another_layout(uninterrupted, materials, member_vader, tmp_path):
    """Killed at TP2 x DP2, finished at PP2: the uninterrupted TP1 run to fp32 accuracy."""
    first = write_config(materials, member_vader, tmp_path, Layout(2, 1, 2))
    with pytest.raises(RankError, match="died"):
        run_ranks(killed_in_step, 4, first, 2, 3)
    second = write_config(materials, member_vader, tmp_path, Layout(1, 2))
    hashed = run_ranks(run_main, 2, second)
    assert hashed == [exit_codes.DONE] * 2
    name = "member/checkpoints/step_00000004"
    config = uninterrupted / "config-tp1-pp1-dp1.yaml"
    found = run_ranks(final_state, 1, config, tmp_path / name)[0]
    expected = run_ranks(final_state, 1, config, uninterrupted / name)[0]
    for mine, theirs in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert lab.relative_error(mine[3], theirs[3]) < 1e-5, mine[0]
    for mine, theirs in zip(metrics_of(tmp_path), metrics_of(uninterrupted), strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["reward"] == pytest.approx(theirs["reward"], abs=1e-6)


def signalled_in_step(config_path, step, number):
    """Fault injection: the last rank alone gets the signal in the middle of ``step``."""
    from nemo_warp.aligner.member.trainer import WarpReinforceTrainer

    generate = WarpReinforceTrainer.generate_rollouts

    def generate_and_signal(trainer):
        if trainer.step == step and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), number)
        return generate(trainer)

    WarpReinforceTrainer.generate_rollouts = generate_and_signal
    return run_main(config_path)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_saves_at_the_next_boundary(
    number, uninterrupted, materials, member_vader, tmp_path
):
    """Traps 9 and 10. One rank of two is signalled; both stop after the step, with code 85."""
    config = write_config(materials, member_vader, tmp_path, Layout(1, 2))
    results = run_ranks(signalled_in_step, 2, config, 2, number)
    assert results == [exit_codes.STOPPED_RESUMABLE] * 2
    checkpoints = sorted(p.name for p in (tmp_path / "member/checkpoints").iterdir())
    assert checkpoints == ["step_00000002", "step_00000003"]
    assert not (tmp_path / "member/completion.json").exists()
    assert run_ranks(run_main, 2, config) == [exit_codes.DONE] * 2
    rewards = [r["reward"] for r in metrics_of(tmp_path)]
    assert rewards == pytest.approx([r["reward"] for r in metrics_of(uninterrupted)], abs=1e-6)


def test_time_limit_is_not_success(materials, member_vader, tmp_path):
    config = write_config(
        materials, member_vader, tmp_path, also=["run.time_limit=1", "run.save_margin=0"]
    )
    assert run_ranks(run_main, 1, config) == [exit_codes.STOPPED_RESUMABLE]
    assert not (tmp_path / "member/completion.json").exists()
    assert run_ranks(run_main, 1, config, "run.time_limit=null") == [exit_codes.DONE]


def test_slurm_end_time_is_the_limit(monkeypatch, materials, member_vader, tmp_path):
    from nemo_warp.aligner.member.stopping import StopRequest

    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    assert StopRequest(None, 300.0, started=0.0)._deadline == 1000.0
    assert StopRequest(50.0, 300.0, started=10.0)._deadline == 60.0


def without_anchor(config_path):
    from nemo_warp.aligner.member.trainer import WarpReinforceTrainer

    def forget(trainer):
        trainer.anchor, anchor = None, trainer.anchor
        save(trainer)
        trainer.anchor = anchor

    save = WarpReinforceTrainer.save
    WarpReinforceTrainer.save = forget
    return signalled_in_step(config_path, 1, signal.SIGUSR1)


def test_resume_without_the_anchor_is_refused(materials, member_vader, tmp_path, capfd):
    """Trap 13: upstream would take the initialisation for the anchor."""
    config = write_config(materials, member_vader, tmp_path)
    assert run_ranks(without_anchor, 1, config) == [exit_codes.STOPPED_RESUMABLE]
    before = hash_file(tmp_path / "member/checkpoints")
    assert run_ranks(run_main, 1, config) == [exit_codes.FAILED]
    assert "holds no complete anchor" in capfd.readouterr().err
    assert hash_file(tmp_path / "member/checkpoints") == before


def test_renamed_checkpoint_is_refused(uninterrupted, tmp_path, capfd):
    """Upstream reads its counters from the name."""
    shutil.copytree(uninterrupted, tmp_path / "copy")
    member = tmp_path / "copy/member"
    (member / "completion.json").unlink()
    (member / "checkpoints/step_00000004").rename(member / "checkpoints/step_00000009")
    config = uninterrupted / "config-tp1-pp1-dp1.yaml"
    code = run_ranks(run_main, 1, config, f"run.directory={member}")
    assert code == [exit_codes.FAILED]
    assert "is of step 4, but lies in step_00000009" in capfd.readouterr().err


def _damage(checkpoint: Path) -> None:
    """Six bytes change in the middle of the largest file, as on a failing disk."""
    file = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        found = stream.read(6)
        stream.seek(-6, os.SEEK_CUR)
        stream.write(bytes(byte ^ 0xFF for byte in found))


def test_a_damaged_newest_checkpoint(uninterrupted, tmp_path, capfd):
    """The older intact one is gone on from; with none, all stay and the message names them."""
    shutil.copytree(uninterrupted, tmp_path / "copy")
    member = tmp_path / "copy/member"
    checkpoints = member / "checkpoints"
    (member / "completion.json").unlink()
    config = uninterrupted / "config-tp1-pp1-dp1.yaml"
    for step in (2, 4):
        _damage(checkpoints / f"step_{step:08d}")
    before = hash_file(checkpoints)
    assert run_ranks(run_main, 1, config, f"run.directory={member}") == [exit_codes.FAILED]
    said = capfd.readouterr().err
    assert f"no older one that is intact; remove {checkpoints} to start the member again" in said
    assert "anchor" not in said.partition("error: ")[2]
    assert hash_file(checkpoints) == before
    shutil.rmtree(checkpoints / "step_00000002")
    kept = uninterrupted / "member/checkpoints/step_00000002"
    shutil.copytree(kept, checkpoints / "step_00000002")
    assert run_ranks(run_main, 1, config, f"run.directory={member}") == [exit_codes.DONE]
    assert (checkpoints / "damaged_step_00000004").is_dir()
    ours, theirs = (read_completion(d / "member") for d in (tmp_path / "copy", uninterrupted))
    assert ours.files["policy.nemo"] == theirs.files["policy.nemo"]


def test_full_disks_are_named_whatever_the_writer_says(nemo, tmp_path, monkeypatch):
    """torch and Megatron's writers wrap the error, or do not know it themselves."""
    from nemo_warp.aligner.weights import training_checkpoint

    def write() -> None:
        try:
            with open("/dev/full", "wb", buffering=0) as stream:
                stream.write(b"0")
        except OSError as error:
            raise RuntimeError("file write failed") from error

    telling = training_checkpoint.telling_full_disks
    said = f"no space left on the disk of {tmp_path} .*make room"
    with pytest.raises(RecordError, match=said), telling(tmp_path):
        write()
    with pytest.raises(RuntimeError, match="another"), telling(tmp_path):
        raise RuntimeError("another")
    full = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(training_checkpoint.shutil, "disk_usage", lambda _: full)
    with pytest.raises(RecordError, match=r"\(0 MB free\)"), telling(tmp_path):
        raise RuntimeError("unexpected pos 704 vs 598")


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(nemo, tmp_path, monkeypatch):
    from nemo_warp.aligner.weights import training_checkpoint

    told = []

    def busy(path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(training_checkpoint.shutil, "rmtree", busy)
    monkeypatch.setattr(training_checkpoint.logging, "warning", told.append)
    training_checkpoint._remove(tmp_path / "step_00000002")
    assert len(told) == 1
    assert f"cannot remove the old checkpoint {tmp_path}/step_00000002" in told[0]
    assert "Device or resource busy" in told[0]


def test_two_runs_in_one_directory(materials, member_vader, tmp_path, capfd):
    import fcntl

    config = write_config(materials, member_vader, tmp_path)
    (tmp_path / "member").mkdir()
    with (tmp_path / "member/.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert run_ranks(run_main, 1, config) == [exit_codes.MISCONFIGURED]
    assert "another run is using" in capfd.readouterr().err


def server_killed_in_step(config_path, step, pid):
    from nemo_warp.aligner.member.trainer import WarpReinforceTrainer

    generate = WarpReinforceTrainer.generate_rollouts

    def kill_and_generate(trainer):
        if trainer.step == step:
            os.kill(pid, signal.SIGKILL)
        return generate(trainer)

    WarpReinforceTrainer.generate_rollouts = kill_and_generate
    return run_main(config_path)


IMPATIENT = [
    "reward_client.retries=1",
    "reward_client.backoff_s=0.1",
    "reward_client.request_timeout_s=3",
    "reward_client.ready_deadline_s=5",
]


def test_reward_server_killed(uninterrupted, materials, member_vader, tmp_path):
    """The step without rewards is not taken; with a server again the run is the same run."""
    with running(tmp_path / "server", VADER, run_id="test") as server:
        config = write_config(materials, server, tmp_path, also=IMPATIENT)
        codes = run_ranks(server_killed_in_step, 1, config, 3, server.process.pid)
        assert codes == [exit_codes.REWARDS_FAILED]
    checkpoints = sorted(p.name for p in (tmp_path / "member/checkpoints").iterdir())
    assert checkpoints[-1] == "step_00000003"
    endpoint = f"rewards.0.endpoint={member_vader.endpoint_file}"
    assert run_ranks(run_main, 1, config, endpoint) == [exit_codes.DONE]
    ours, theirs = (d / "member/metrics.jsonl" for d in (tmp_path, uninterrupted))
    assert ours.read_bytes() == theirs.read_bytes()


def test_reward_of_another_run_is_refused(materials, tmp_path, capfd):
    with running(tmp_path / "server", VADER, run_id="other-run") as server:
        config = write_config(materials, server, tmp_path, also=IMPATIENT)
        assert run_ranks(run_main, 1, config) == [exit_codes.FAILED]
    assert "other-run" in capfd.readouterr().err
    assert not (tmp_path / "member/metrics.jsonl").exists()


def test_kl_limit_ends_the_run(materials, member_vader, tmp_path):
    config = write_config(
        materials, member_vader, tmp_path, also=["evaluation.kl_limit=-1.0", "optim.lr=0.1"]
    )
    assert run_ranks(run_main, 1, config) == [exit_codes.KL_LIMIT]
    assert not (tmp_path / "member/completion.json").exists()


def test_reward_that_changed_is_refused(materials, member_vader, tmp_path, capfd):
    """Stopped with VADER, resumed with another reward under the same name."""
    config = write_config(materials, member_vader, tmp_path)
    assert run_ranks(signalled_in_step, 1, config, 0, signal.SIGUSR1) == [
        exit_codes.STOPPED_RESUMABLE
    ]
    with running(tmp_path / "server", STRANGE, run_id="test") as server:
        endpoint = f"rewards.0.endpoint={server.endpoint_file}"
        assert run_ranks(run_main, 1, config, endpoint) == [exit_codes.MISCONFIGURED]
    assert "is not the one the run was begun with" in capfd.readouterr().err
