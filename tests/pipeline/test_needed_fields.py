"""Fields that rewards need, before anything is started: what `plan` and `run` refuse."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from nemo_warp.pipeline.commands.checks import check_callable
from nemo_warp.pipeline.commands.needed_fields import check_fields, needed_by
from nemo_warp.rewards.fields import FieldsTaken

MODULE = """\
def plain(prompt, response): ...
def one(prompt, response, answer, points=1): ...
async def two(prompt, response, /, answer, *, tests, level=0, **more): ...
def three(prompts, responses, *, answer): ...
class Four:
    def __init__(self, model): ...
    def __call__(self, prompt, response, tests, language="python"): ...
"""


@pytest.mark.parametrize(
    ("name", "options", "needed"),
    [
        ("plain", {}, []),
        ("one", {}, ["answer"]),
        ("one", {"answer": "4"}, []),
        ("two", {}, ["answer", "tests"]),
        ("three", {}, ["answer"]),
        ("Four", {"model": "m"}, ["tests"]),
    ],
)
def test_what_a_callable_needs_is_read_from_its_source(
    tmp_path: Path, monkeypatch, name: str, options: dict, needed: list[str]
) -> None:
    (tmp_path / "needy.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path / "the program's own"))
    source = check_callable("needy:one", "x")
    assert needed_by({"callable": f"needy:{name}", "options": options}, source) == needed
    # The same as the server finds from the callable itself.
    found = getattr(importlib.import_module("needy"), name)
    made = found(**options) if isinstance(found, type) else found
    assert [n for n in FieldsTaken.by(made).needed if n not in options] == needed


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        (":vader_compound", []),
        (".mathematics:Answer", ["answer"]),
        (".programs:PassesTests", ["tests"]),
        (".judge:Rating", []),
        (".classifier:Classifier", []),
    ],
)
def test_the_librarys_own(name: str, needed: list[str]) -> None:
    callable_ = f"nemo_warp.rewards.library{name}"
    assert needed_by({"callable": callable_}, check_callable(callable_, "x")) == needed


def test_servers_and_models(tmp_path: Path) -> None:
    endpoint = tmp_path / "endpoint.json"
    endpoint.write_text(json.dumps({"needs": ["answer"]}))
    assert needed_by({"endpoint": str(endpoint)}, None) == ["answer"]
    endpoint.write_text(json.dumps({"host": "of an earlier version"}))
    assert needed_by({"endpoint": str(endpoint)}, None) == []
    assert needed_by({"model": "rm.nemo"}, None) == []
    template = {"model": "rm.nemo", "arguments": ["--chat-template", "t.jinja"]}
    assert needed_by(template, None) == ["messages"]


def test_a_file_that_lacks_a_field_is_refused_with_its_prompt(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": "a", "answer": "1"}\n{"text": "b"}\n')
    check_fields({"train": str(file)}, "text", [], "rewards.x")
    check_fields({"train": str(tmp_path / "elsewhere")}, "text", ["answer"], "rewards.x")
    with pytest.raises(ValueError, match=r"rewards.x takes .* 'answer' .* prompt 2 of prompts"):
        check_fields({"train": str(file)}, "text", ["answer"], "rewards.x")
