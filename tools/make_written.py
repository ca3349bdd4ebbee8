#!/usr/bin/env python3
"""Remake tests/checkpoints/written: small checkpoints by Megatron-core and -Bridge.

    tools/make_written.py            # write them, and merge and read them back with their writers
    tools/make_written.py --check    # only the second

Every release is installed from PyPI into a folder of its own (`pip install --target`), beside this
environment's torch. About ten minutes.
"""

from __future__ import annotations

import argparse
import io
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "checkpoints"
WRITTEN = TESTS / "written"


@dataclass(frozen=True)
class Case:
    """A checkpoint, and who writes it.

    Attributes:
        name: of the file in tests/checkpoints/written.
        release: of Megatron-core.
        policy: whose weights.
        options: of write_with_megatron.py, or of write_with_bridge.py.
        bridge: release of Megatron-Bridge, if it is the writer.
    """

    name: str
    release: str
    policy: str
    options: tuple[str, ...] = ()
    bridge: str = ""


_PARTS, _RANKS = "--one-key-per-part", ("--ranks", "2")
_MOE = ("--experts", *_RANKS)
CASES = (
    Case("dense_init", "0.13.1", "init", _RANKS),  # two tensor ranks
    Case("dense_a", "0.15.3", "a"),
    Case("dense_b", "0.16.1", "b", (_PARTS, *_RANKS)),
    Case("dense_b_313", "0.16.1", "b"),  # .metadata by Python 3.13, see --python313
    Case("moe_init", "0.16.1", "init", (*_MOE, _PARTS)),  # two expert ranks
    Case("moe_a", "0.15.3", "a", (*_MOE, "--optimizer", "fully_sharded_model_space")),
    Case("moe_b", "0.16.1", "b", (*_MOE, "--optimizer", "fully_reshardable")),
    # As a conversion ends, and as training saves.
    Case("bridge_init", "0.16.1", "init", bridge="0.3.1"),
    Case("bridge_a", "0.16.1", "a", ("--optimizer", "dp_reshardable"), "0.3.1"),
    Case("bridge_b", "0.16.1", "b", ("--optimizer", "fully_reshardable"), "0.3.1"),
)
BESIDE_BRIDGE = (
    *("transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.1", "triton==3.5.1"),
    *("nvidia-modelopt==0.41.0", "pulp==3.3.0", "nvidia-ml-py==13.590.44", "datasets==4.4.1"),
    *("pydantic==2.12.5", "pydantic-core==2.41.5", "annotated-types==0.7.0"),
    *("typing-inspection==0.4.2", "httpx==0.28.1", "httpcore==1.0.9", "h11==0.16.0"),
    *("anyio==4.12.0", "sniffio==1.3.1", "certifi==2025.11.12", "idna==3.11"),
)
"""What Megatron-Bridge imports and this environment lacks or has too old. 1 GB, of which triton
is the most: a module of Megatron-core's that is never used here imports it."""
OF_PYTHON_313 = "dense_b_313"
_PICKLE_AGAIN = """
import pathlib, pickle, sys
file = pathlib.Path(sys.argv[1])
metadata = pickle.loads(file.read_bytes())
metadata.storage_meta.checkpoint_id = file.parent  # as torch notes it, a path
file.write_bytes(pickle.dumps(metadata))
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--check", action="store_true", help="merge what is there and read it back, write nothing")
    add("--only", nargs="+", default=[case.name for case in CASES], help="some of the cases")
    add("--releases", type=Path, help="folder to install Megatron-core into, and to find it in")
    add("--python313", help="a Python 3.13 with torch; without it its case is kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        releases = arguments.releases or Path(scratch) / "releases"
        chosen = [case for case in CASES if case.name in arguments.only]
        for case in () if arguments.check else chosen:
            if case.name != OF_PYTHON_313 or arguments.python313:
                write(case, arguments.python313, releases, Path(scratch))
        for case in chosen:
            check(case, releases, Path(scratch))
    return 0


def write(case: Case, python313: str | None, releases: Path, scratch: Path) -> None:
    """Have a release write a case, and pack it."""
    folder = scratch / "written" / case.name
    folder.parent.mkdir(exist_ok=True)
    what = "write" if not case.bridge else "train" if case.options else "export"
    run(case, releases, what, str(folder), "--policy", case.policy, *case.options)
    if case.name == OF_PYTHON_313 and python313:
        # Megatron-core's writer forks, and hangs there with torch's threads: pickled once more
        command = [python313, "-c", _PICKLE_AGAIN, str(folder / ".metadata")]
        subprocess.run(command, check=True)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            info = tarfile.TarInfo(path.relative_to(folder).as_posix())
            info.size = path.stat().st_size
            tar.addfile(info, io.BytesIO(path.read_bytes()))
    WRITTEN.mkdir(exist_ok=True)
    target = WRITTEN / f"{case.name}.tar.xz"
    target.write_bytes(lzma.compress(packed.getvalue(), preset=9))
    print(f"{target.name}: {_writer(case)}, {target.stat().st_size} bytes")


def check(case: Case, releases: Path, scratch: Path) -> None:
    """Merge with this case as init, and have its writer load the result strictly, twice."""
    sys.path.insert(0, str(TESTS))
    from written_checkpoints import expected_merge, iteration_of, merge_written

    output, expected = scratch / f"{case.name}_merged", scratch / f"{case.name}_expected.pt"
    if case.bridge:
        output = output / "iter_0000007"
    merge_written(case.name, scratch / f"{case.name}_unpacked", output)
    import torch

    torch.save(expected_merge(case.name), expected)
    if case.bridge:
        options = ("--expected", str(expected), "--step", str(iteration_of(case.name)))
        run(case, releases, "load", str(output.parent), *options, *case.options)
    else:
        _read_at_two_layouts(case, releases, output, expected)
    print(f"{case.name}: merged, and loaded strictly by {_writer(case)}")


def _read_at_two_layouts(case: Case, releases: Path, output: Path, expected: Path) -> None:
    layout = [o for o in case.options if o not in ("--optimizer", *_OPTIMIZERS)]
    other = [option for option in layout if option not in _RANKS]
    for options in (layout, other if other != layout else [*layout, *_RANKS]):
        run(case, releases, "read", str(output), "--expected", str(expected), *options)


def _writer(case: Case) -> str:
    bridge = f"Megatron-Bridge {case.bridge} with " if case.bridge else ""
    return f"{bridge}Megatron-core {case.release}"


_OPTIMIZERS = ("fully_sharded_model_space", "fully_reshardable")


def run(case: Case, releases: Path, *arguments: str) -> None:
    """A case's writer with its release of Megatron-core before all else."""
    wanted = [f"megatron-core=={case.release}"]
    if case.bridge:
        wanted += [f"megatron-bridge=={case.bridge}", *BESIDE_BRIDGE]
    place = releases / (f"bridge-{case.bridge}" if case.bridge else case.release)
    if not place.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        subprocess.run([*command, str(place), *wanted], check=True)
    path = os.pathsep.join(map(str, (place, TESTS, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = "write_with_bridge.py" if case.bridge else "write_with_megatron.py"
    command = [sys.executable, str(TESTS / script), *arguments]
    with tempfile.TemporaryFile("w+") as said:  # no pipe: what a writer leaves behind may hold it
        done = subprocess.run(command, env=environment, stdout=said, stderr=said, check=False)
        if done.returncode != 0:
            said.seek(0)
            raise SystemExit(f"{case.name}: {' '.join(command)} failed\n{said.read()[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
