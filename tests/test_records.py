"""Records of what was made, and by what."""

import nemo_warp
from nemo_warp.records import code_version


def test_the_version_is_known_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version.__wrapped__() == nemo_warp.__version__
