#!/usr/bin/env python3
"""Remake tests/checkpoints/written: small checkpoints from releases of Megatron-core.

    tools/make_written.py            # write them, and merge and read them back with their writers
    tools/make_written.py --check    # only the second

Every release is installed from PyPI into a folder of its own (`pip install --target`), beside this
environment's torch. About five minutes.
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
        options: of write_with_megatron.py.
    """

    name: str
    release: str
    policy: str
    options: tuple[str, ...] = ()


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
)
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
    folder = scratch / case.name
    run(case, releases, "write", str(folder), "--policy", case.policy, *case.options)
    if case.name == OF_PYTHON_313 and python313:
        # Megatron-core's writer forks, and hangs there with torch's threads: pickled once more
        command = [python313, "-c", _PICKLE_AGAIN, str(folder / ".metadata")]
        subprocess.run(command, check=True)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            info = tarfile.TarInfo(path.name)
            info.size = path.stat().st_size
            tar.addfile(info, io.BytesIO(path.read_bytes()))
    WRITTEN.mkdir(exist_ok=True)
    target = WRITTEN / f"{case.name}.tar.xz"
    target.write_bytes(lzma.compress(packed.getvalue(), preset=9))
    print(f"{target.name}: Megatron-core {case.release}, {target.stat().st_size} bytes")


def check(case: Case, releases: Path, scratch: Path) -> None:
    """Merge with this case as init, and have its writer load the result strictly, twice."""
    sys.path.insert(0, str(TESTS))
    from written_checkpoints import expected_merge, merge_written

    output, expected = scratch / f"{case.name}_merged", scratch / f"{case.name}_expected.pt"
    merge_written(case.name, scratch / f"{case.name}_unpacked", output)
    import torch

    torch.save(expected_merge(case.name), expected)
    layout = [o for o in case.options if o not in ("--optimizer", *_OPTIMIZERS)]
    other = [option for option in layout if option not in _RANKS]
    for options in (layout, other if other != layout else [*layout, *_RANKS]):
        run(case, releases, "read", str(output), "--expected", str(expected), *options)
    print(f"{case.name}: merged, and loaded strictly by Megatron-core {case.release}")


_OPTIMIZERS = ("fully_sharded_model_space", "fully_reshardable")


def run(case: Case, releases: Path, *arguments: str) -> None:
    """write_with_megatron.py with a release of Megatron-core before all else."""
    place = releases / case.release
    if not place.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        subprocess.run([*command, str(place), f"megatron-core=={case.release}"], check=True)
    path = os.pathsep.join(map(str, (place, TESTS, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "write_with_megatron.py"), *arguments]
    with tempfile.TemporaryFile("w+") as said:  # no pipe: what a writer leaves behind may hold it
        done = subprocess.run(command, env=environment, stdout=said, stderr=said, check=False)
        if done.returncode != 0:
            said.seek(0)
            raise SystemExit(f"{case.name}: {' '.join(command)} failed\n{said.read()[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
