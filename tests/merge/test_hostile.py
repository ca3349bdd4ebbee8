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
from legacy_checkpoints import write_rank_files, write_zarr
from synthetic_checkpoints import read_torch_dist, tiny_weights, write_nemo, write_torch_dist

from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SIZES = {"layers": 2, "hidden": 8, "ffn": 12, "vocab": 20}
MEMORY = 1 << 29
SECONDS_PER_CASE = 30


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with init.nemo, a.nemo and b.nemo."""
    folder = tmp_path_factory.mktemp("hostile")
    init = tiny_weights(0, **SIZES)
    for seed, name in enumerate(("init", "a", "b")):
        weights = init if not seed else tiny_weights(seed, **SIZES, around=init)
        write_nemo(folder / f"{name}.nemo", lambda to, w=weights: write_torch_dist(to, w))
    b = weights
    write_nemo(folder / "zarr.nemo", lambda to: write_zarr(to, b))
    write_nemo(folder / "ckpt.nemo", lambda to: write_rank_files(to.parent, b))
    return folder


CASES = {
    "b": (hostile_inputs.all_cases, "b", 1),
    "init": (hostile_inputs.all_cases, "init", 3),
    "ckpt": (hostile_inputs.legacy_cases, "b", 1),
    "zarr": (lambda files, _: hostile_inputs.zarr_cases(files), "b", 1),
}
"""File that is mutated -> (mutations, what it is in the merge, every how many)."""


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


def _attack(folder, source: str, clean, canary: str, pipe) -> None:
    """Run the cases of `CASES` within limited memory, telling the parent each outcome."""
    mutate, victim, step = CASES[source]
    with open("/proc/self/statm") as stream:
        mapped = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        cases = mutate(_files(folder / f"{source}.nemo"), canary)
        for label, content in itertools.islice(cases, 0, None, step):
            pipe.send((label, "began"))
            pipe.send((label, _outcome(folder, victim, content, clean)))
    pipe.send(("end", ""))


@pytest.mark.parametrize(
    ("source", "fewest"), [("b", 500), ("init", 160), ("ckpt", 90), ("zarr", 90)]
)
def test_damaged_and_malicious_inputs(models, source, fewest, tmp_path):
    merge(models / "init.nemo", [models / "a.nemo", models / "b.nemo"], str(tmp_path / "ok.nemo"))
    canary, clean = tmp_path / "executed", _weights(tmp_path / "ok.nemo", tmp_path / "scratch")
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_attack, args=(models, source, clean, str(canary), sender)
    )
    process.start()
    sender.close()
    outcomes, label = {}, "start"
    while label != "end":
        if not receiver.poll(SECONDS_PER_CASE):
            process.kill()
            pytest.fail(f"{label} hangs")
        try:
            label, outcomes[label] = receiver.recv()
        except EOFError:
            pytest.fail(f"the process died in {label}")
    process.join()
    del outcomes["end"]
    wrong = {k: v for k, v in outcomes.items() if v not in ("refused", "same result")}
    assert not wrong
    assert not canary.exists()
    assert len(outcomes) >= fewest
    assert list(outcomes.values()).count("refused") >= fewest // 2
