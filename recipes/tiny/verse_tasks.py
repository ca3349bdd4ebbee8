"""Benchmarks of the tiny recipe: task files of lm-evaluation-harness from held-out verses.

``verses``: bits per byte of whole verses, what the policy has forgotten of the text. ``endings``:
which of four endings is the verse's own; the others are other verses' endings, so that all four are
good text by themselves.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from nemo_warp.records import write_text_atomically

DIRECTORY = "benchmarks"
NUM_VERSES, NUM_ENDINGS, NUM_CHOICES = 500, 500, 4
_BEGINNING, _ENDING = 8, 8
"""Words. Both together fit into the context of the tiny model (about 1.6 tokens a word)."""

_COMMON = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
_VERSES = """\
task: verses
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
_ENDINGS = """\
task: endings
output_type: multiple_choice
doc_to_text: "{{beginning}}"
doc_to_target: own
doc_to_choice: endings
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def write_tasks(verses: list[str], output: Path, seed: int) -> Path:
    """Write the task files and their documents; the same verses give the same documents.

    Args:
        verses: held out from all training, in the order of the split.
        output: the prepared directory; the files go to ``benchmarks/`` in it.
        seed: of the choice among other verses' endings.

    Returns:
        The directory: ``benchmarks.include`` of the recipe.
    """
    directory = (output / DIRECTORY).resolve()
    directory.mkdir(exist_ok=True)
    documents = {
        "verses": [{"text": verse} for verse in verses[:NUM_VERSES]],
        "endings": _endings(verses, random.Random(seed)),
    }
    for name, task in (("verses", _VERSES), ("endings", _ENDINGS)):
        file = directory / f"{name}.jsonl"
        _write(file, "".join(json.dumps(d) + "\n" for d in documents[name]))
        _write(directory / f"{name}.yaml", task + _COMMON.format(file=json.dumps(str(file))))
    return directory


def _write(file: Path, text: str) -> None:
    if not file.exists() or file.read_text() != text:
        write_text_atomically(file, text)


def _endings(verses: list[str], generator: random.Random) -> list[dict[str, object]]:
    words = [verse.split() for verse in verses]
    long = [w for w in words if len(w) >= _BEGINNING + _ENDING]
    parts = [
        (" ".join(w[:_BEGINNING]), " ".join(w[_BEGINNING : _BEGINNING + _ENDING])) for w in long
    ]
    documents = []
    for number, (beginning, ending) in enumerate(parts[:NUM_ENDINGS]):
        others = generator.sample([e for _, e in parts if e != ending], NUM_CHOICES - 1)
        own = number % NUM_CHOICES
        documents.append(
            {"beginning": beginning, "endings": [*others[:own], ending, *others[own:]], "own": own}
        )
    return documents
