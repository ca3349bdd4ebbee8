"""Records of what was made, and by what."""

import re
import subprocess

import nemo_warp
from nemo_warp.records import code_version


def test_the_version_is_known_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version.__wrapped__() == nemo_warp.__version__


def test_an_edited_recipe_is_no_other_code(tmp_path, monkeypatch):
    for name in ("nemo_warp/__init__.py", "recipes/mine/recipe.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(nemo_warp, "__file__", str(tmp_path / "nemo_warp" / "__init__.py"))
    clean = code_version.__wrapped__()
    assert re.fullmatch(rf"{re.escape(nemo_warp.__version__)}\+g[0-9a-f]{{12}}", clean)
    (tmp_path / "recipes/mine/recipe.yaml").write_text("2\n")
    assert code_version.__wrapped__() == clean
    (tmp_path / "nemo_warp/__init__.py").write_text("2\n")
    assert code_version.__wrapped__() == f"{clean}.dirty"
