"""A run that an earlier version began is ended by this one, with real members and merges.

``earlier_run.tar.xz`` was made by commit 8b9a841, the last before packages got rooms and the
configuration its schema: a recipe of one iteration, its first member done, its second one stopped
after step 8 of 12. Places in it begin with ``/earlier``.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from sandbox import FAKE, Sandbox

from nemo_warp import exit_codes
from nemo_warp.records import read_completion

pytest.importorskip("nemo")

ARCHIVE = Path(__file__).with_name("earlier_run.tar.xz")
GRAD_NORMS = {9: 1.8531194925308228, 10: 1.1036044359207153}
"""Of the second member's next steps when the earlier version went on itself."""


@pytest.fixture
def earlier(tmp_path: Path) -> Sandbox:
    """The run in a place of its own; what is measured at the end is the fault-injection program."""
    sandbox = Sandbox(tmp_path / "earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(sandbox.directory, filter="data")
    text = sandbox.recipe.read_text().replace("/earlier", str(sandbox.directory))
    sandbox.values = yaml.safe_load(text)
    fake = [sys.executable, str(FAKE)]
    sandbox.save(commands={k: [*fake, k, "{directory}", "{run}"] for k in ("evaluation", "report")})
    return sandbox


@pytest.mark.timeout(900)
def test_is_continued(earlier: Sandbox) -> None:
    member = earlier.run_directory / "iteration_01/member_01"
    finished = {f: f.read_bytes() for f in member.rglob("*") if f.is_file()}
    path = str(earlier.directory)  # where the reward's module is
    code, output = earlier.call("run", PYTHONPATH=path)
    assert code == exit_codes.MISCONFIGURED
    assert "was made by nemo_warp 0.1.0+g8b9a84153ef7" in output

    code, output = earlier.call("run", "--other-code", PYTHONPATH=path)
    assert code == exit_codes.DONE, output
    assert all(f.read_bytes() == content for f, content in finished.items()), "not made again"
    second = earlier.run_directory / "iteration_01/member_02"
    assert _steps(second) == list(range(1, 13))
    norms = {r["step"]: r["grad_norm"] for r in _records(second) if r["step"] in GRAD_NORMS}
    # Optimizer, anchor, random streams and prompts go on where they were (to fp32's rounding).
    assert norms == pytest.approx(GRAD_NORMS, rel=1e-4)
    for stage in ("member_01", "member_02", "merge"):
        completion = read_completion(earlier.run_directory / "iteration_01" / stage)
        assert completion is not None
        earlier_code = completion.code_version == "0.1.0+g8b9a84153ef7"
        assert earlier_code == (stage == "member_01")


def _records(member: Path) -> list[dict]:
    lines = (member / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "train"]


def _steps(member: Path) -> list[int]:
    return [record["step"] for record in _records(member)]
