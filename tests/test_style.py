"""The rules of the house, as tests: linters, import directions, shell scripts, no patching."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nemo_warp"
COMPAT = PACKAGE / "aligner" / "compat"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("recipes/*/README.md")),
]
BASES = (ROOT, PACKAGE, PACKAGE / "aligner")
"""Paths in the pages begin at one of these."""


def _run(*command: str) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff_lint():
    _run(sys.executable, "-m", "ruff", "check", ".")


def test_ruff_format():
    _run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_types():
    _run(sys.executable, "-m", "mypy")


def test_import_directions():
    _run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")


def test_shell_scripts():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    scripts = [*ROOT.glob("slurm/*.sh"), *ROOT.glob("tools/*.sh"), ROOT / ".ci" / "run"]
    _run("shellcheck", *map(str, scripts))


def _foreign_names(tree: ast.Module) -> set[str]:
    """Names that imports anywhere in a module bind to other packages or parts of them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if not alias.name.startswith("nemo_warp"):
                    names.add(alias.asname or alias.name.partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("nemo_warp"):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def _root_name(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _patches(source: str) -> Iterator[int]:
    """Lines that assign to an attribute of something imported from another package."""
    tree = ast.parse(source)
    foreign = _foreign_names(tree)
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = [target for target in node.targets if isinstance(target, ast.Attribute)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            targets = node.args[:1]
        if any(_root_name(target) in foreign for target in targets):
            yield node.lineno


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import torch\ntorch.cuda.synchronize = print", [2]),
        ("from nemo.core import ModelPT as M\nsetattr(M, 'cuda', None)", [2]),
        ("def f():\n    import nemo.core\n    nemo.core.x = 1", [3]),
        ("import torch\nclass A:\n    def f(self):\n        self.x = torch.cuda.x", []),
        ("from nemo_warp import records\nrecords.x = 1\nimport os\nos.environ['A'] = 'b'", []),
    ],
)
def test_the_search_for_patches_finds_them(source, lines):
    assert list(_patches(source)) == lines


def test_nothing_is_patched_outside_compat():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if COMPAT not in path.parents
        for line in _patches(path.read_text())
    ]
    assert not found, "assignments to other packages belong into nemo_warp.aligner.compat"


_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
_CODE_PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|sh|md|ipynb))(?:::(\w+))?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_name_files_and_tests_that_exist(page):
    text = page.read_text()
    for target in _LINK.findall(text):
        assert (page.parent / target).exists(), target
    for name, test in _CODE_PATH.findall(text):
        if name.startswith(("report/", "runs/", "front/", "iteration_")):  # of a run directory
            continue
        found = [file for base in BASES if (file := base / name).exists()]
        assert found, name
        assert not test or f"def {test}(" in found[0].read_text(), f"{name}::{test}"
