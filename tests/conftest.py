"""Shared by all tests: one thread per process, and NeMo imported once where it is asked for."""

import logging
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: OpenMP does not survive a fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

# Many images forbid to write bytecode: hundreds of processes would compile the same packages again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the ``nemo`` fixture, and let upstream's warnings pass there (only)."""
    for item in items:
        if "nemo" in getattr(item, "fixturenames", ()):
            item.add_marker("nemo")
        if item.get_closest_marker("nemo"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
    # The longest first, so that no worker is left alone with them at the end; stable.
    order = ("slurm/", "aligner/", "merge/", "pipeline/")
    paths = {item: item.path.relative_to(_HERE).as_posix() for item in items}
    items.sort(key=lambda i: next((n for n, o in enumerate(order) if paths[i].startswith(o)), 9))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Side by side file by file, for the sake of fixtures; Slurm's tests share one cluster.

    They mostly wait, so two cores carry three workers (Makefile). xdist's own groups do nothing
    here: 3.8 writes them into an attribute that pytest 9.2 no longer has.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "slurm" if "/slurm/" in file else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def nemo():
    """NeMo, made usable on this machine; the report of what was replaced."""
    if find_spec("nemo") is None:
        pytest.skip("NeMo is not installed (make setup)")
    import torch

    from nemo_warp.aligner.compat import activate

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = activate()
    logging.getLogger("nemo_logger").setLevel(logging.ERROR)
    return report
