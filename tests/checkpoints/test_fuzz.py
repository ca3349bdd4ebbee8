"""A thousand checkpoints drawn from the formats' grammars: a clear refusal, or weights; cheap."""

from __future__ import annotations

import io
import os
import random
import resource
import tarfile
import time
import traceback
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import pytest
from grammars import draw
from synthetic_checkpoints import tiny_weights, write_torch_dist

from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.inspection import hash_weights
from nemo_warp.checkpoints.meaning import read_meaning

pytestmark = pytest.mark.slow
NUMBER, SECONDS, BYTES = 1000, 5, 200 << 20
SIZES = {"layers": 2, "hidden": 8, "ffn": 12, "vocab": 20}


def _honest(folder: Path) -> dict[str, bytes]:
    write_torch_dist(folder / "model_weights", tiny_weights(0, **SIZES))
    (folder / "model_config.yaml").write_text("activation: gelu\nnum_attention_heads: 2\n")
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _pack(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _outcome(path: Path) -> str:
    """'refused', 'read', or what is wrong."""
    begin = time.process_time()
    try:
        read_meaning(path)
        hash_weights(open_checkpoint(path))
        outcome = "read"
    except CheckpointError as error:
        clear = path.name in str(error) and len(str(error)) < 2000
        outcome = "refused" if clear else f"unclear: {str(error)[:300]!r}"
    except BaseException:
        outcome = traceback.format_exc()[-1500:]
    spent = time.process_time() - begin
    return outcome if spent < SECONDS else f"{outcome} after {spent:.1f} s"


def _run(files: dict[str, bytes], folder: Path, pipe) -> None:
    path, canary = folder / "bad.nemo", set(os.listdir(folder.parent))
    with open("/proc/self/statm") as stream:
        mapped = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, mapped + BYTES))
    for seed in range(NUMBER):
        pipe.send((seed, "began"))
        content = draw(files, random.Random(seed))
        path.write_bytes(content if isinstance(content, bytes) else _pack(content))
        pipe.send((seed, _outcome(path)))
    pipe.send((NUMBER, "read" if set(os.listdir(folder.parent)) == canary else "wrote files"))


def test_checkpoints_drawn_from_the_grammars(tmp_path):
    files = _honest(tmp_path / "honest")
    (tmp_path / "fuzz").mkdir()
    (tmp_path / "fuzz" / "good.nemo").write_bytes(_pack(files))
    assert _outcome(tmp_path / "fuzz" / "good.nemo") == "read"
    receiver, sender = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=_run, args=(files, tmp_path / "fuzz", sender))
    process.start()
    sender.close()
    outcomes, seed = {}, 0
    while seed != NUMBER:
        assert receiver.poll(30), f"{seed} hangs"
        try:
            seed, outcomes[seed] = receiver.recv()
        except EOFError:
            pytest.fail(f"the process died in {seed}")
    process.join()
    wrong = {seed: found for seed, found in outcomes.items() if found not in ("refused", "read")}
    assert not wrong
    counts = Counter(outcomes.values())
    assert counts["refused"] > NUMBER // 2
    assert counts["read"] > NUMBER // 50
