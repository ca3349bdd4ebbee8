"""Shared by all tests: one thread per process, and NeMo imported once where it is asked for."""

import logging
import os
import warnings
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: OpenMP does not survive a fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the ``nemo`` fixture, and let upstream's warnings pass there (only)."""
    for item in items:
        if "nemo" in getattr(item, "fixturenames", ()):
            item.add_marker("nemo")
        if item.get_closest_marker("nemo"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))


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
