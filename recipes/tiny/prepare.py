"""Prepare the tiny recipe: real text, a tokenizer, prompts, and a small GPT trained through NeMo.

Writes into ``--output`` (default ``build/tiny``)::

    tokenizer.model         SentencePiece BPE, 512 pieces, trained on the pretraining verses
    pretrain.txt            verses the GPT learns from, one a line
    validation.txt          held-out verses its validation loss is measured on
    prompts_train.jsonl     {"prompt": ...}: beginnings of the RL verses
    prompts_heldout.jsonl   {"prompt": ...}: beginnings of the held-out verses
    benchmarks/             task files of lm-evaluation-harness from held-out verses
    sft.nemo                the GPT, a distributed checkpoint
    sft_metrics.json        its validation loss
    completion.json         what made all this; written last

A verse belongs to exactly one of pretraining, RL and held-out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import sentencepiece
from kjv import verses
from verse_tasks import write_tasks

from nemo_warp import exit_codes
from nemo_warp.pipeline.ranks import die_with_parent
from nemo_warp.records import (
    Completion,
    RecordError,
    code_version,
    config_hash,
    hash_file,
    read_completion,
    write_completion,
    write_text_atomically,
)

HERE = Path(__file__).resolve().parent
SETTINGS = {
    "seed": 0,
    "pretrain_share": 0.80,
    "rl_share": 0.12,  # the rest is held out
    "prompt_tokens": 11,
}
TOKENIZER = {
    "model_type": "bpe",
    "vocab_size": 512,
    "character_coverage": 1.0,
    "normalization_rule_name": "identity",
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": 3,
    "num_threads": 1,
    "minloglevel": 2,
}
FILES = (
    "tokenizer.model",
    "pretrain.txt",
    "validation.txt",
    "prompts_train.jsonl",
    "prompts_heldout.jsonl",
    "sft.nemo",
    "sft_metrics.json",
)
MINIMUM_LINES = 2000
WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes the space before a word


def main() -> int:
    """Entry point; returns an exit code of `nemo_warp.exit_codes`."""
    arguments = _parse()
    try:
        return prepare(arguments.output, arguments.text, arguments.force)
    except (ValueError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISCONFIGURED


def prepare(output: Path, text: Path | None, force: bool) -> int:
    """Make what is missing in ``output``; does nothing when it is complete."""
    settings = {
        **SETTINGS,
        "tokenizer": TOKENIZER,
        "text": hash_file(_existing(text)).sha256 if text else "bible-kjv",
        "pretraining": hash_file(HERE / "pretrain.yaml").sha256,
    }
    if force and output.exists():
        (output / "completion.json").unlink(missing_ok=True)
    if _is_complete(output, settings):
        _write_benchmarks(output)  # an earlier version made none, and the directory may have moved
        print(f"{output} is prepared already (--force prepares it anew)")
        return exit_codes.DONE
    output.mkdir(parents=True, exist_ok=True)
    _write_text_files(output, text)
    _write_benchmarks(output)
    code = _pretrain(output)
    if code == exit_codes.DONE:
        write_completion(output, _completion(output, settings))
        print(f"prepared {output}")
    return code


def _write_text_files(output: Path, text: Path | None) -> None:
    """Everything but the model: some seconds, the same bytes each time."""
    lines = _lines_of(text) if text else verses(output / "cache")
    pretrain, rl, heldout = split(lines)
    write_text_atomically(output / "pretrain.txt", "\n".join(pretrain) + "\n")
    write_text_atomically(output / "validation.txt", "\n".join(heldout) + "\n")
    tokenizer = train_tokenizer(pretrain, output / "tokenizer.model")
    train_prompts = prompts_of(rl, tokenizer)
    heldout_prompts = prompts_of(heldout, tokenizer, exclude=set(train_prompts))
    if not train_prompts or not heldout_prompts:
        raise ValueError(
            f"no line is longer than the {SETTINGS['prompt_tokens']} tokens of a prompt; give "
            "--text with a sentence a line"
        )
    _write_prompts(output / "prompts_train.jsonl", train_prompts)
    _write_prompts(output / "prompts_heldout.jsonl", heldout_prompts)
    print(
        f"{len(lines)} verses: {len(pretrain)} to learn from, {len(train_prompts)} prompts from "
        f"{len(rl)} for RL, {len(heldout_prompts)} prompts from {len(heldout)} held out"
    )


def _write_benchmarks(output: Path) -> None:
    write_tasks((output / "validation.txt").read_text().splitlines(), output, SETTINGS["seed"])


def split(lines: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Shuffle with the seed, then cut into (pretraining, RL, held-out) verses."""
    shuffled = list(lines)
    random.Random(SETTINGS["seed"]).shuffle(shuffled)
    first = int(SETTINGS["pretrain_share"] * len(lines))
    second = first + int(SETTINGS["rl_share"] * len(lines))
    return shuffled[:first], shuffled[first:second], shuffled[second:]


def train_tokenizer(lines: list[str], path: Path) -> sentencepiece.SentencePieceProcessor:
    """A BPE model of the text's own characters; others become ``<unk>``. EOS ends a verse."""
    temporary = path.with_suffix(".partial")
    try:
        with temporary.open("wb") as stream:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=stream, **TOKENIZER
            )
    except RuntimeError as error:
        temporary.unlink()
        raise ValueError(f"this text gives no tokenizer of 512 pieces: {error}") from error
    temporary.replace(path)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def prompts_of(
    lines: list[str],
    tokenizer: sentencepiece.SentencePieceProcessor,
    exclude: frozenset[str] | set[str] = frozenset(),
) -> list[str]:
    """The first ``prompt_tokens`` tokens of each verse that has a word boundary there, as text.

    Cut at a word boundary, the text tokenizes to exactly those tokens again, and the response
    starts with a whole word. Equal length lets a batch be generated without padding. Verses that
    begin alike give one prompt, and those in ``exclude`` give none.
    """
    length, found = SETTINGS["prompt_tokens"], {}
    for ids in tokenizer.encode(lines):
        if len(ids) > length and tokenizer.id_to_piece(ids[length])[0] == WORD_START:
            prompt = tokenizer.decode(ids[:length])
            if prompt not in exclude and tokenizer.encode(prompt) == ids[:length]:
                found[prompt] = None
    return list(found)


def _pretrain(output: Path) -> int:
    """Train the GPT in two processes of its own, one a core."""
    work = output / "sft.partial"
    shutil.rmtree(work, ignore_errors=True)  # an interrupted training starts again
    work.mkdir()
    command = [
        *(sys.executable, "-m", "nemo_warp.pipeline.ranks", "--nproc-per-node", "2", "--"),
        *(sys.executable, "-m", "nemo_warp.aligner.pretrain"),
        *("--config", str(HERE / "pretrain.yaml")),
        f"data.train={output / 'pretrain.txt'}",
        f"data.validation={output / 'validation.txt'}",
        f"model.tokenizer.model={output / 'tokenizer.model'}",
        f"output={work / 'sft.nemo'}",
        f"metrics={work / 'sft_metrics.json'}",
    ]
    print("training the GPT through NeMo; loading it takes some seconds", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Killed with us, or it would go on writing what the next preparation writes.
    orphan_nothing = partial(die_with_parent, signal.SIGTERM)
    code = subprocess.run(
        command, check=False, env=environment, preexec_fn=orphan_nothing
    ).returncode
    if code == exit_codes.DONE:
        for name in ("sft.nemo", "sft_metrics.json"):
            (work / name).replace(output / name)
        shutil.rmtree(work)
    else:
        print(f"error: training the GPT ended with exit code {code}; see above", file=sys.stderr)
    return code


def _is_complete(output: Path, settings: dict[str, object]) -> bool:
    completion = read_completion(output)
    if completion is None:
        return False
    if completion.config_hash != config_hash(settings):
        raise ValueError(
            f"{output} was prepared with other settings or another text; "
            "choose another --output or prepare it anew with --force"
        )
    changed = [
        name
        for name, recorded in completion.files.items()
        if not (output / name).exists() or hash_file(output / name) != recorded
    ]
    if changed:
        raise ValueError(
            f"{output} was changed after it was prepared ({', '.join(changed)}); "
            "prepare it anew with --force"
        )
    return True


def _completion(output: Path, settings: dict[str, object]) -> Completion:
    metrics = json.loads((output / "sft_metrics.json").read_text())
    return Completion(
        kind="prepare",
        config_hash=config_hash(settings),
        files={name: hash_file(output / name) for name in FILES},
        details={**settings, **metrics},
        code_version=code_version(),
        versions={"sentencepiece": sentencepiece.__version__, **metrics["versions"]},
    )


def _write_prompts(path: Path, prompts: list[str]) -> None:
    write_text_atomically(path, "".join(json.dumps({"prompt": text}) + "\n" for text in prompts))


def _lines_of(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8 ({error}); convert it first") from error
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if len(lines) < MINIMUM_LINES:
        raise ValueError(
            f"--text {path} has {len(lines)} lines of text, too few to learn from; "
            f"give at least {MINIMUM_LINES}, one sentence a line"
        )
    return lines


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"--text {path} is not a file")
    return path


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Prepare the tiny recipe's text, tokenizer, prompts and SFT model (about 5 "
        "minutes on 2 cores, once; a rerun returns at once).",
        epilog="examples:\n"
        "  recipes/tiny/prepare.py                      King James Bible from Debian's packages\n"
        "  recipes/tiny/prepare.py --text my.txt --output build/mine   any text, a sentence a line",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = HERE.parent.parent / "build/tiny"
    parser.add_argument("--output", type=Path, default=default, help=f"directory [{default}]")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file instead of the King James")
    parser.add_argument("--force", action="store_true", help="prepare anew what is already there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
