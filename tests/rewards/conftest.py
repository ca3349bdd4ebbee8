from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from reward_servers import STRANGE, VADER, Server, running


@pytest.fixture(scope="session")
def pytriton() -> None:
    if find_spec("pytriton") is None:
        pytest.skip("PyTriton is not installed (make setup)")


@pytest.fixture(scope="session")
def vader(pytriton, tmp_path_factory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("vader"), VADER) as server:
        yield server


@pytest.fixture(scope="session")
def strange(pytriton, tmp_path_factory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("strange"), STRANGE) as server:
        yield server
