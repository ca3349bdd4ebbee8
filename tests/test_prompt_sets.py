"""Prompts from data sets: chat templates, splits, filters, fields, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
from chat_tokenizers import write_gemma_tokenizer, write_llama3_tokenizer

from nemo_warp.prompt_sets.command import main
from nemo_warp.prompts import read_prompts

QUESTIONS = [f"the earth and {n} waters" for n in range(12)]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    write_gemma_tokenizer(folder, 96)
    return folder


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_chat_template_split_filters_and_fields(gemma, tmp_path, capsys):
    rows = [{"question": q, "answer": f"so it is\n#### {n}"} for n, q in enumerate(QUESTIONS)]
    rows += [rows[3], {"question": " ", "answer": "#### 0"}]
    rows.append({"question": "the waters " * 40, "answer": "#### 1"})
    data = _write(tmp_path / "data.jsonl", rows)
    words = [str(data), "--model", str(gemma), "--output", str(tmp_path / "out"), "--heldout", "4"]
    words += ["--max-tokens", "60", "--answer-after", "####"]
    assert main(words) == 0
    train, heldout = (_lines(tmp_path / f"out_{part}.jsonl") for part in ("train", "heldout"))
    assert (len(train), len(heldout)) == (8, 4)
    assert not {line["prompt"] for line in train} & {line["prompt"] for line in heldout}
    by_text = {line["prompt"]: line for line in train + heldout}
    expected = f"<bos><start_of_turn>user\n{QUESTIONS[7]}<end_of_turn>\n<start_of_turn>model\n"
    assert by_text[expected] == {"prompt": expected, "answer": "7"}
    assert read_prompts(tmp_path / "out_train.jsonl", "prompt")
    told = capsys.readouterr().out
    assert "15 rows: 1 duplicates, 1 too long, 1 empty left out" in told
    assert told.count("<bos> | <start_of_turn> | ") == 3
    # the conversation is kept on request, for reward models with a template of their own
    assert main([*words, "--force", "--messages"]) == 0
    line = _lines(tmp_path / "out_train.jsonl")[0]
    assert line["messages"][-1]["content"] in line["prompt"] and line["answer"]
    assert [message["role"] for message in line["messages"]][-1] == "user"
    # a second time nothing is overwritten; in another order the same ones are held out
    assert main(words) == 2
    _write(data, rows[::-1])
    assert main([*words, "--force"]) == 0
    again = {line["prompt"] for line in _lines(tmp_path / "out_heldout.jsonl")}
    assert again == {line["prompt"] for line in heldout}


def test_parquet_and_messages_end_with_the_users_turn(gemma, tmp_path, capsys):
    import datetime

    import pyarrow
    from pyarrow import parquet

    turns = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": "so"}] for q in QUESTIONS
    ]
    day = datetime.date(2026, 11, 25)
    table = {"prompt": turns, "level": list(range(12)), "day": [day] * 12}
    parquet.write_table(pyarrow.table(table), tmp_path / "data.parquet")
    words = [str(tmp_path), "--model", str(gemma), "--output", str(tmp_path / "out")]
    assert main([*words, "--heldout", "2", "--rename", "level=difficulty"]) == 0
    line = _lines(tmp_path / "out_train.jsonl")[0]
    assert line["prompt"].endswith("<end_of_turn>\n<start_of_turn>model\n")
    assert "so<" not in line["prompt"] and line.keys() == {"prompt", "difficulty"}
    assert "columns left out, since JSON cannot hold them: day" in capsys.readouterr().out


def test_plain_texts_begin_with_bos_where_the_tokenizer_adds_it(gemma, tmp_path):
    data = _write(tmp_path / "data.jsonl", [{"prompt": q} for q in QUESTIONS])
    llama = tmp_path / "llama"
    llama.mkdir()
    write_llama3_tokenizer(llama, 300)
    for model, begin in ((gemma, "<bos>"), (llama, "")):
        output = tmp_path / f"out-{model.name}"
        words = [str(data), "--model", str(model), "--output", str(output), "--heldout", "1"]
        assert main([*words, "--plain"]) == 0
        first = _lines(Path(f"{output}_train.jsonl"))[0]["prompt"]
        assert first.startswith(f"{begin}the earth")


BAD = {
    "no data set": (None, []),
    "has no column": ([{"text": "a"}], []),
    "line 1 is no object": (["a"], []),
    "System role not supported": ([{"prompt": "a"}], ["--system", "be kind"]),
    "prompts are left of 1 rows": ([{"prompt": "a"}], []),
    "expected a text or messages": ([{"prompt": 3}], []),
    "expected role and content": ([{"messages": [{"who": "me"}]}], []),
    "holds no '####'": ([{"prompt": "a", "answer": "b"}], ["--answer-after", "####"]),
    "half of a surrogate pair": ([{"prompt": "\ud800"}], []),
    "--heldout is 0": ([{"prompt": "a"}], ["--heldout", "0"]),
    "is not OLD=NEW": ([{"prompt": "a"}], ["--rename", "a"]),
    "no model": ([{"prompt": "a"}], ["--model", "nowhere"]),
}


@pytest.mark.parametrize("message", BAD)
def test_refused_in_one_sentence_and_nothing_is_written(gemma, tmp_path, capsys, message):
    rows, extra = BAD[message]
    data = tmp_path / "data.jsonl"
    if rows is not None:
        _write(data, rows)
    output = tmp_path / "new" / "out"
    assert main([str(data), "--model", str(gemma), "--output", str(output), *extra]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed
    assert not output.parent.exists()


def test_tool_answers_help_without_transformers():
    import subprocess

    tool = Path(__file__).parents[1] / "tools" / "make_prompts.py"
    code = f"import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_path({str(tool)!r}, run_name='__main__')\nexcept SystemExit: pass\nassert 'transformers' not in sys.modules"  # noqa: E501
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--answer-after" in run.stdout
