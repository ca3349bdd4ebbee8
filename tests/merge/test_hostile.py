"""Hundreds of damaged and malicious inputs: a message for each, or the right result."""

import contextlib
import itertools
import multiprocessing
import os
import resource
import shutil
import tarfile
import traceback

import hostile_inputs
import pytest
import torch
from synthetic_checkpoints import read_torch_dist, tiny_weights, write_nemo, write_torch_dist

from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SIZES = {"layers": 2, "hidden": 8, "ffn": 12, "vocab": 20}
MEMORY = 1 << 29
SECONDS_PER_CASE = 20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with init.nemo, a.nemo and b.nemo."""
    folder = tmp_path_factory.mktemp("hostile")
    init = tiny_weights(0, **SIZES)
    for seed, name in enumerate(("init", "a", "b")):
        weights = init if not seed else tiny_weights(seed, **SIZES, around=init)
        write_nemo(folder / f"{name}.nemo", lambda to, w=weights: write_torch_dist(to, w))
    return folder


def _files(path) -> dict[str, bytes]:
    """Members of a tar; the weights last, as NeMo orders them."""
    with tarfile.open(path) as tar:
        found = {m.name[2:]: tar.extractfile(m).read() for m in tar if m.isfile()}
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("model_weights")))


def _weights(path, scratch) -> dict[str, bytes]:
    """A merged file's tensors, as torch reads them."""
    with tarfile.open(path) as tar:
        tar.extractall(scratch, filter="data")
    stored = read_torch_dist(scratch / "model_weights")
    shutil.rmtree(scratch)
    return {key: value.view(torch.int16).numpy().tobytes() for key, value in stored.items()}


def _outcome(folder, victim: str, content, clean) -> str:
    """'refused', 'same result', or what is wrong."""
    bad, output = folder / "bad.nemo", folder / "out.nemo"
    bad.write_bytes(content if isinstance(content, bytes) else hostile_inputs.pack(content))
    paths = {name: folder / f"{name}.nemo" for name in ("init", "a", "b")} | {victim: bad}
    before = sorted(os.listdir(folder))
    try:
        merge(paths["init"], [paths["a"], paths["b"]], str(output), workers=1, vocab_size=20)
    except (CheckpointError, ValueError) as error:
        left = sorted(os.listdir(folder))
        if left != before:
            return f"left {set(left) - set(before)} behind"
        if "bad.nemo" not in str(error) or len(str(error)) > 1000:
            return f"unclear message: {str(error)[:300]!r}"
        return "refused"
    except BaseException:
        return traceback.format_exc()
    same = _weights(output, folder / "scratch") == clean
    output.unlink()
    return "same result" if same else "another result"


def _attack(folder, victim: str, step: int, clean, canary: str, pipe) -> None:
    """Run every ``step``-th case, telling the parent each outcome; limits memory and silences progress."""
    with open("/proc/self/statm") as stream:
        mapped = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        cases = hostile_inputs.all_cases(_files(folder / f"{victim}.nemo"), canary)
        for label, content in itertools.islice(cases, 0, None, step):
            pipe.send((label, "began"))
            pipe.send((label, _outcome(folder, victim, content, clean)))
    pipe.send(("end", str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)))


@pytest.mark.parametrize(("victim", "step"), [("b", 1), ("init", 3)])
def test_damaged_and_malicious_inputs(models, victim, step, tmp_path):
    merge(models / "init.nemo", [models / "a.nemo", models / "b.nemo"], str(tmp_path / "ok.nemo"))
    canary, clean = tmp_path / "executed", _weights(tmp_path / "ok.nemo", tmp_path / "scratch")
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_attack, args=(models, victim, step, clean, str(canary), sender)
    )
    process.start()
    sender.close()
    outcomes, label = {}, "start"
    while label != "end":
        assert receiver.poll(SECONDS_PER_CASE), f"{label} hangs"
        try:
            label, outcomes[label] = receiver.recv()
        except EOFError:
            pytest.fail(f"the process died in {label}")
    process.join()
    del outcomes["end"]
    wrong = {k: v for k, v in outcomes.items() if v not in ("refused", "same result")}
    assert not wrong
    assert not canary.exists()
    assert len(outcomes) >= 500 // step
    assert list(outcomes.values()).count("refused") >= 300 // step
