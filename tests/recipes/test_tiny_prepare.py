"""Preparation of the tiny recipe: text, tokenizer, prompts, and what a rerun does."""

import importlib.util
import json
import pydoc_data.topics
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from nemo_warp import exit_codes

RECIPE = Path(__file__).resolve().parents[2] / "recipes/tiny"


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


kjv = _load("kjv")
_load("verse_tasks")
prepare = _load("prepare")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Some thousand sentences of English that every Python brings along."""
    text = " ".join("\n".join(pydoc_data.topics.topics.values()).split())
    found = list(dict.fromkeys(text.split(". ")))
    return [line for line in found if line.isascii() and len(line) > 20][:2000]


@pytest.fixture(scope="module")
def tokenizer(lines, tmp_path_factory):
    return prepare.train_tokenizer(lines, tmp_path_factory.mktemp("tiny") / "tokenizer.model")


def test_split_is_a_seeded_partition(lines):
    parts = prepare.split(lines)
    assert [len(part) for part in parts] == [1600, 240, 160]
    assert sorted(line for part in parts for line in part) == sorted(lines)
    assert parts[0][:5] != lines[:5]
    assert parts == prepare.split(lines)


def test_tokenizer_has_its_special_tokens_and_the_same_bytes_each_time(lines, tokenizer, tmp_path):
    assert tokenizer.get_piece_size() == 512
    special = (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id())
    assert special == (0, 1, 2, 3)
    prepare.train_tokenizer(lines, tmp_path / "again.model")
    prepare.train_tokenizer(lines, tmp_path / "twice.model")
    assert (tmp_path / "again.model").read_bytes() == (tmp_path / "twice.model").read_bytes()
    assert tokenizer.decode(tokenizer.encode(lines[7])) == lines[7]


def test_prompts_tokenize_to_the_first_tokens_of_their_line(lines, tokenizer):
    prompts = prepare.prompts_of(lines, tokenizer)
    assert len(prompts) > 500
    assert len(set(prompts)) == len(prompts)
    beginnings = {tuple(ids[:11]) for ids in tokenizer.encode(lines)}
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        assert len(ids) == 11
        assert tuple(ids) in beginnings
        # The line goes on with a new word: the prompt does not end inside one.
        assert any(line.startswith(prompt + " ") for line in lines)


def test_excluded_prompts_are_left_out(lines, tokenizer):
    prompts = prepare.prompts_of(lines, tokenizer)
    rest = prepare.prompts_of(lines, tokenizer, exclude=set(prompts[:10]))
    assert rest == prompts[10:]


@pytest.fixture
def prepared(lines, tmp_path, monkeypatch):
    """A directory prepared from ``lines``; the training writes two small files instead."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines))
    trainings = []

    def train(output: Path) -> int:
        trainings.append(output)
        (output / "sft.nemo").write_bytes(b"weights")
        (output / "sft_metrics.json").write_text('{"validation_loss": 3.0, "versions": {}}')
        return exit_codes.DONE

    monkeypatch.setattr(prepare, "_pretrain", train)
    assert prepare.prepare(tmp_path / "out", text, force=False) == exit_codes.DONE
    return tmp_path / "out", text, trainings


def test_a_rerun_does_nothing_and_force_does_everything(prepared, capsys):
    output, text, trainings = prepared
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert prepare.prepare(output, text, force=False) == exit_codes.DONE
    assert "is prepared already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert prepare.prepare(output, text, force=True) == exit_codes.DONE
    assert len(trainings) == 2


def test_an_interrupted_preparation_is_done_again(prepared):
    output, text, trainings = prepared
    (output / "completion.json").unlink()
    assert prepare.prepare(output, text, force=False) == exit_codes.DONE
    assert len(trainings) == 2


def test_train_and_heldout_prompts_are_disjoint_jsonl(prepared):
    output, _, _ = prepared
    train, heldout = (
        [json.loads(line) for line in (output / f"prompts_{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    )
    assert {tuple(record) for record in (*train, *heldout)} == {("prompt",)}
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in heldout}


def test_benchmarks_are_of_heldout_verses(prepared):
    """Written again where they are missing or the directory has moved."""
    output, text, _ = prepared
    moved = output.with_name('mov"ed')
    output.rename(moved)
    shutil.rmtree(moved / "benchmarks")
    assert prepare.prepare(moved, text, force=False) == exit_codes.DONE
    heldout = set((moved / "validation.txt").read_text().splitlines())
    documents = {
        name: [json.loads(x) for x in (moved / f"benchmarks/{name}.jsonl").read_text().splitlines()]
        for name in ("verses", "endings")
    }
    assert {d["text"] for d in documents["verses"]} <= heldout
    for document in documents["endings"]:
        whole = f"{document['beginning']} {document['endings'][document['own']]}"
        assert any(verse.startswith(whole) for verse in heldout)
        assert len(set(document["endings"])) == 4
    assert len({d["own"] for d in documents["endings"]}) == 4
    for name in documents:
        task = yaml.safe_load((moved / f"benchmarks/{name}.yaml").read_text())
        file = Path(task["dataset_kwargs"]["data_files"]["test"])
        assert (task["task"], file) == (name, (moved / f"benchmarks/{name}.jsonl").resolve())


def test_a_changed_file_or_another_text_is_refused(prepared, tmp_path):
    output, text, _ = prepared
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("the", "that"))
    with pytest.raises(ValueError, match=r"other settings or another text; .*--force"):
        prepare.prepare(output, other, force=False)
    (output / "sft.nemo").write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"changed after it was prepared \(sft.nemo\); .*--force"):
        prepare.prepare(output, text, force=False)


def test_useless_texts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--text .*absent.txt is not a file"):
        prepare.prepare(tmp_path / "out", tmp_path / "absent.txt", force=False)
    short = tmp_path / "short.txt"
    short.write_text("one line\n\n")
    with pytest.raises(ValueError, match="has 1 lines of text, too few to learn from"):
        prepare.prepare(tmp_path / "out", short, force=False)
    short.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"--text .*short.txt is not UTF-8"):
        prepare.prepare(tmp_path / "out", short, force=False)
    short.write_text("the same words\n" * 2000)
    with pytest.raises(ValueError, match=r"gives no tokenizer of 512 pieces: .*[Vv]ocabulary"):
        prepare.prepare(tmp_path / "out", short, force=False)


def test_lines_shorter_than_a_prompt_are_refused(lines, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("\n".join(line.split()[0] for line in lines))
    with pytest.raises(ValueError, match="no line is longer than the 11 tokens of a prompt"):
        prepare.prepare(tmp_path / "out", text, force=False)


def test_without_apt_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(kjv, "_installed", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"need Debian's apt-get; .*--text FILE"):
        kjv.verses(tmp_path / "cache")


def test_a_truncated_package_is_removed_so_that_a_rerun_fetches_it(tmp_path, monkeypatch):
    monkeypatch.setattr(kjv, "_installed", lambda: None)
    deb = tmp_path / "debs/bible-kjv_4.38_amd64.deb"
    deb.parent.mkdir()
    deb.write_bytes(b"!<arch>\n")
    with pytest.raises(ValueError, match=r"bible-kjv_4.38_amd64.deb cannot be unpacked .*rerun"):
        kjv.verses(tmp_path)
    assert not deb.exists()
