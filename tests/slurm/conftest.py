"""The Slurm cluster of the session, and recipes that run on it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

from cluster import Cluster, missing
from slurm_sandbox import SlurmSandbox


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    # munged wants a directory nobody else can write to, on a short path (a socket is in it)
    directory = Path(tempfile.mkdtemp(prefix="warp-slurm-"))
    started = Cluster(directory, nodes=3)
    os.environ |= started.environment | {"NEMO_WARP_PYTHON": sys.executable}
    try:
        started.start()
        yield started
    finally:
        started.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def make_sandbox(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("sandboxes")  # itself not safe in threads

    def make(name: str, **changes) -> SlurmSandbox:
        return SlurmSandbox(directory / name, cluster, **changes)

    return make
