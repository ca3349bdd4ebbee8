"""Nothing is lost, mixed or published unchecked: what is refused, replaced and left alone."""

import os
import shutil
import signal
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_checkpoints import read_torch_dist, tiny_weights, write_nemo, write_torch_dist

from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.io.open_files import OpenFiles
from nemo_warp.merge import cli, merge, ranks
from nemo_warp.merge.publish import renaming
from nemo_warp.merge.publish.output import Output
from nemo_warp.merge.publish.transaction import Transaction, contents_of, hidden_folder
from nemo_warp.records import code_version

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SIZES = {"layers": 2, "hidden": 16, "ffn": 24, "vocab": 40}
EMBEDDING = "embedding.word_embeddings.weight"


def _save(path: Path, weights, **options) -> Path:
    return write_nemo(path, lambda folder: write_torch_dist(folder, weights, **options))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    init = tiny_weights(0, **SIZES)
    code_version()  # cached before any fork
    weights = {"init": init} | {n: tiny_weights(ord(n), **SIZES, around=init) for n in "abc"}
    return {name: _save(folder / f"{name}.nemo", w, tp=2) for name, w in weights.items()}


def _run(models, policies: str, output: Path, **options):
    return merge(models["init"], [models[name] for name in policies], str(output), **options)


def _files(path: Path) -> dict[str, bytes]:
    found = (p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in found}


def _weights(path: Path) -> dict[str, torch.Tensor]:
    with tarfile.open(path) as tar:
        tar.extractall(path.with_suffix(".read"), filter="data")
    return read_torch_dist(path.with_suffix(".read") / "model_weights")


def _killed(at: str, function) -> None:
    """Call the function in a process that dies when it comes to `renaming` or to a seal."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        place = {"rename": renaming, "seal": Transaction, "finish": Transaction}[at]
        name = "_renameat2" if at == "rename" else at
        setattr(place, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        try:
            function()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("at", ["rename", "seal"])
@pytest.mark.parametrize(
    ("killed", "then", "options"),
    [("cba", "abc", {}), ("ab", "ba", {"weight": 0.2}), ("ab", "ab", {"eta": 0.4})],
)
def test_what_another_merge_left_is_not_used(models, tmp_path, at, killed, then, options):
    _run(models, then, tmp_path / "clean.nemo", **options)
    kept = {key: value for key, value in options.items() if key != "eta"}
    output = tmp_path / "out.nemo"
    _killed(at, lambda: _run(models, killed, output, **kept))
    _run(models, then, output, **options)
    assert output.read_bytes() == (tmp_path / "clean.nemo").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean.nemo", "out.nemo"]


def test_init_and_policy_swapped_after_a_kill(models, tmp_path):
    output, paths = tmp_path / "out.nemo", [models[name] for name in ("init", "a", "b")]
    _killed("rename", lambda: merge(paths[0], paths[1:], str(output)))
    merge(paths[1], [paths[0], paths[2]], str(output))
    merge(paths[1], [paths[0], paths[2]], str(tmp_path / "clean.nemo"))
    assert output.read_bytes() == (tmp_path / "clean.nemo").read_bytes()


def test_a_sealed_merge_gets_its_names_and_its_report(models, tmp_path):
    """Killed after its first name, or after its last: the same command ends it."""
    for at, etas in (("finish", [0.3, 1.0]), ("rename", [0.3])):
        folder = tmp_path / at
        folder.mkdir()
        options = {"eta": etas, "report": folder / "report"}
        _killed(at, lambda o=options, f=folder: _run(models, "ab", f / "{eta}.nemo", **o))
        assert _run(models, "ab", folder / "{eta}.nemo", **options).units
        names = sorted(p.name for p in folder.iterdir())
        assert names == [*(f"{eta:g}.nemo" for eta in etas), "report"]
        with pytest.raises(ValueError, match="exists"):
            _run(models, "ab", folder / "{eta}.nemo", **options)


def test_a_replaced_folder_does_not_come_back(models, tmp_path):
    """Killed between the exchange and the cleaning up: the old one has the new one's place."""
    output = tmp_path / "out"
    _run(models, "ab", output)
    _killed("finish", lambda: _run(models, "bc", output, overwrite=True))
    new = _files(output)
    _run(models, "bc", output, overwrite=True)
    assert _files(output) == new


def test_what_failed_its_verification_is_not_published(models, tmp_path, monkeypatch):
    from nemo_warp.merge.compute.kernel import Kernel

    def careless(self, *place, honest=Kernel.combine):
        merged = honest(self, *place)
        merged.values[0, 0] ^= 64
        return merged

    with monkeypatch.context() as broken:
        broken.setattr(Kernel, "combine", careless)
        with pytest.raises(CheckpointError, match="differs from its recomputation"):
            _run(models, "ab", tmp_path / "out.nemo", verify="full")
    assert list(tmp_path.iterdir()) == []
    _run(models, "ab", tmp_path / "out.nemo")
    _run(models, "ab", tmp_path / "right.nemo", verify="full")
    assert (tmp_path / "out.nemo").read_bytes() == (tmp_path / "right.nemo").read_bytes()


def test_a_seal_without_verification_is_not_enough_for_verify(models, tmp_path, monkeypatch):
    _killed("rename", lambda: _run(models, "ab", tmp_path / "out.nemo"))
    from nemo_warp.merge.publish import verify

    verified, real = [], verify.verify_outputs
    monkeypatch.setattr(verify, "verify_outputs", lambda *a: verified.append(a) or real(*a))
    _run(models, "ab", tmp_path / "out.nemo", verify="full")
    assert len(verified) == 1


@pytest.mark.parametrize(
    "name", ["", "run/policy", "run", "run/init.nemo/new.nemo", "run/init.nemo"]
)
def test_outputs_and_inputs_are_kept_apart(models, tmp_path, name):
    shutil.unpack_archive(models["init"], tmp_path / "run/init.nemo", "tar")
    shutil.unpack_archive(models["a"], tmp_path / "run/policy/a", "tar")
    inputs = [tmp_path / "run/init.nemo", tmp_path / "run/policy/a", models["b"]]
    before = _files(tmp_path)
    with pytest.raises(ValueError, match=r"input|take the place"):
        merge(inputs[0], inputs[1:], str(tmp_path / name), overwrite=True)
    assert _files(tmp_path) == before


def test_only_checkpoints_are_replaced(models, tmp_path, capsys):
    folder, tar, link = tmp_path / "run1", tmp_path / "file.nemo", tmp_path / "link"
    _run(models, "ab", folder)
    (folder / "notes.txt").write_text("three weeks of work")
    tar.write_text("no checkpoint")
    link.symlink_to(folder)
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link.nemo").symlink_to(models["a"])
    words = ["--init", models["init"], "--policies", models["b"], models["c"], "--overwrite"]
    before = _files(tmp_path)
    refused = {folder: "notes.txt", tar: "not a checkpoint", tmp_path / "inside": "not a check"}
    for output, message in refused.items():
        assert cli.main([*map(str, words), "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
        assert _files(tmp_path) == before
    (folder / "notes.txt").unlink()
    assert cli.main([*map(str, words), "--output", str(link)]) == 0  # the link, not its target
    assert link.is_dir() and not link.is_symlink()
    assert _files(folder).keys() == _files(link).keys()
    assert cli.main([*map(str, words), "--output", str(folder)]) == 0
    assert _files(folder) == _files(link)


def test_what_the_init_takes_along_may_be_replaced(models, tmp_path):
    with tarfile.open(models["init"]) as tar:
        tar.extractall(tmp_path / "init", filter="data")
    (tmp_path / "init/LICENSE").write_text("of the model")
    inputs = [tmp_path / "init", models["a"], models["b"]]
    for eta in (0.3, 0.5):
        merge(inputs[0], inputs[1:], str(tmp_path / "out"), eta=eta, overwrite=True)
    assert (tmp_path / "out/LICENSE").read_text() == "of the model"
    (tmp_path / "out/LICENSE.old").write_text("of somebody")
    with pytest.raises(ValueError, match=r"LICENSE\.old"):
        merge(inputs[0], inputs[1:], str(tmp_path / "out"), eta=0.3, overwrite=True)


def test_a_name_that_is_taken_on_the_way_is_not_lost(models, tmp_path, monkeypatch):
    output = tmp_path / "out.nemo"
    real = Transaction.seal

    def meanwhile(self, measures):
        real(self, measures)
        output.write_text("something of somebody else")

    monkeypatch.setattr(Transaction, "seal", meanwhile)
    with pytest.raises(ValueError, match="exists"):
        _run(models, "ab", output)
    assert output.read_text() == "something of somebody else"
    monkeypatch.undo()
    output.rename(tmp_path / "theirs")
    _run(models, "ab", output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.nemo", "theirs"]


@pytest.mark.parametrize("code", renaming._UNSUPPORTED)
def test_file_systems_without_renameat2(models, tmp_path, monkeypatch, code):
    monkeypatch.setattr(renaming, "_renameat2", lambda *_: code)
    _run(models, "ab", tmp_path / "out")
    with pytest.raises(OSError, match=r"cannot replace .*move it away and run the same again"):
        _run(models, "bc", tmp_path / "out", overwrite=True)
    (tmp_path / "out").rename(tmp_path / "old")
    _run(models, "bc", tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old", "out"]


def test_eta_zero_is_the_base_bit_for_bit(models, tmp_path):
    init = tiny_weights(0, **SIZES)
    init[EMBEDDING][:, ::2] = -0.0
    anchor = {name: -tensor for name, tensor in init.items()}
    paths = {n: _save(tmp_path / f"{n}.nemo", w) for n, w in (("init", init), ("anchor", anchor))}
    for name in ("init", "anchor"):
        output = tmp_path / f"out_{name}.nemo"
        towards = paths["anchor"] if name == "anchor" else None
        policies = [models["a"], models["b"]]
        merge(paths["init"], policies, str(output), eta=0.0, liti_towards=towards)
        found, wanted = _weights(output), _weights(paths[name])
        for key, tensor in wanted.items():
            assert np.array_equal(found[key].view(torch.int16), tensor.view(torch.int16)), key


def test_verify_of_an_init_with_nan_in_its_padding(models, tmp_path):
    init = tiny_weights(0, **SIZES)
    init[EMBEDDING][30:] = float("nan")
    path = _save(tmp_path / "init.nemo", init)
    policies = [models["a"], models["b"]]
    for dtype in ("same", "float32"):
        output = tmp_path / f"{dtype}.nemo"
        merge(path, policies, str(output), vocab_size=30, dtype=dtype, verify="full")
        assert _weights(output)["model." + EMBEDDING][30:].isnan().all()


def test_similar_policies_are_refused_after_a_few_layers(tmp_path):
    from nemo_warp.merge.compute.engine import Engine

    sizes = {**SIZES, "layers": 24}
    init = tiny_weights(0, **sizes)
    policy = tiny_weights(1, **sizes, around=init)
    paths = [_save(tmp_path / f"{i}.nemo", w) for i, w in enumerate((init, policy, policy))]
    merged, real = [], Engine.merge
    Engine.merge = lambda self, group, *rest: merged.append(group) or real(self, group, *rest)
    try:
        with pytest.raises(ValueError, match=r"nearly the same policy .* in 4 layers"):
            merge(paths[0], paths[1:], str(tmp_path / "out.nemo"))
    finally:
        Engine.merge = real
    assert len(merged) < 6
    for i in range(0, 24):  # alike in all layers but a few that count: no copies
        if 3 < i < 20:
            name = f"decoder.layers.{i}.mlp.linear_fc2.weight"
            policy[name] = init[name] + torch.randn_like(init[name].float()).bfloat16()
    other = _save(tmp_path / "other.nemo", policy)
    merge(paths[0], [paths[1], other], str(tmp_path / "out.nemo"))
    assert not list(tmp_path.glob(".*"))


def test_merges_that_share_one_of_several_outputs(tmp_path):
    one, shared, other = (tmp_path / name for name in ("one", "shared", "two"))
    with Transaction([one, shared], "first"):
        with pytest.raises(ValueError, match=r"another merge is at work in .*\.shared\.merging"):
            Transaction([other, shared], "second").__enter__()
        assert not hidden_folder(other).exists()
    with Transaction([other, shared], "second"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_rank_of_a_dead_merge_writes_nowhere(models, tmp_path):
    """Its rank 0 is gone, another merge has begun: their files have no name in common."""
    output = tmp_path / "out.nemo"
    image = open_checkpoint(models["init"]).image(lambda dtype: dtype)
    with OpenFiles(os.O_RDWR) as files, Transaction([output], "second") as transaction:
        transaction.begin()
        (dead,) = contents_of([output], "of the first")
        rank = Output(dead, image, True, files)
        with pytest.raises(FileNotFoundError):
            rank.write(next(iter(image.tensors.values())).patches[0].record, 0, np.zeros(4, "u1"))
        assert [path.name for path in hidden_folder(output).iterdir()] != ["of the first"]
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_launcher_are_told(models, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "_SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(ranks, "_PATIENCE_SECONDS", 0.3)
    with pytest.raises(ranks.RankFailure, match="waited 0 s for all 2 processes to start"):
        _run(models, "ab", tmp_path / "out.nemo")
    assert "unset RANK and WORLD_SIZE, which say that there are more" in caplog.text
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RANK", "zero")
    with pytest.raises(ValueError, match="RANK is 'zero' in the environment"):
        _run(models, "ab", tmp_path / "out.nemo")


def test_a_hello_that_rank_0_removes_on_the_way_is_said_again(tmp_path, monkeypatch):
    """Rank 0 begins between this rank's folder and its note in it."""
    first, other = (ranks.Meeting(tmp_path / "notes", ranks.World(n, 2), "plan") for n in (0, 1))
    write, begun = ranks.write_json_atomically, threading.Event()

    def rank_0() -> None:
        begun.wait()
        first.start("attempt", first.gather())

    def removed(path: Path, note: dict) -> None:
        if not begun.is_set():
            shutil.rmtree(path.parent)
        try:
            write(path, note)
        finally:
            begun.set()

    monkeypatch.setattr(ranks, "write_json_atomically", removed)
    thread = threading.Thread(target=rank_0, daemon=True)
    thread.start()
    assert other.join() == "attempt"
    thread.join()


def test_damage_in_what_is_copied_is_told(tmp_path):
    """A record that is not merged does not get a new checksum that would hide its damage."""
    weights = tiny_weights(0, **SIZES)
    policies = [tiny_weights(seed, **SIZES, around=weights) for seed in (1, 2)]
    state = torch.arange(200, dtype=torch.uint8)
    paths = [tmp_path / name / "model_weights.ckpt" for name in ("init", "a", "b")]
    for path, found in zip(paths, [weights, *policies], strict=True):
        path.parent.mkdir()
        torch.save({**{f"model.{n}": t for n, t in found.items()}, "x._extra_state": state}, path)
    data = paths[0].read_bytes()
    place = data.index(bytes(state.tolist()))
    paths[0].write_bytes(data[:place] + b"!" + data[place + 1 :])
    folders = [path.parent for path in paths]
    with pytest.raises(CheckpointError, match=r"model_weights\.ckpt.* do not match their CRC-32"):
        merge(folders[0], folders[1:], str(tmp_path / "out.nemo"))
    assert not (tmp_path / "out.nemo").exists()
