"""Families through members, merge, front and export: `family_lab` does it and checks each step."""

import pytest
from family_lab import Walk, walk_through
from reward_servers import VADER, running

pytestmark = pytest.mark.nemo

OTHERS = ["qwen2_5", "gemma2"]
"""Beside the paper's own; the rest by family_lab's command (CI has no minute for each)."""


@pytest.fixture(scope="module")
def endpoint(nemo, tmp_path_factory):
    with running(tmp_path_factory.mktemp("vader"), VADER, run_id="test") as server:
        yield server.endpoint_file


def test_the_papers_family_from_hugging_face_to_hugging_face(endpoint, tmp_path):
    row = walk_through(Walk("gemma_7b", tmp_path, endpoint))
    assert row["members at"] == "tp2-pp1-dp1, tp1-pp2-dp1"


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_other_families(endpoint, tmp_path, family):
    """Padded vocabulary, untied output layer and biases; double norms and soft-capping."""
    walk_through(Walk(family, tmp_path, endpoint))
