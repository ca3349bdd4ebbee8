"""The command behind tools/make_prompts.py."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_warp import exit_codes
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.prompt_sets.making import Prompts, Wishes, make_prompts
from nemo_warp.prompt_sets.rows import Row, read_rows
from nemo_warp.prompt_sets.templates import Template
from nemo_warp.records import write_text_atomically

_EPILOG = """\
examples:
  # GSM8K (Parquet with question and answer) for a reward that checks the number after ####
  make_prompts.py gsm8k/main/train-00000-of-00001.parquet --model Qwen2.5-0.5B-Instruct \\
      --output prompts --answer-after '####' --max-tokens 512

  # conversations ({"messages": [...]}), of which the last user's turn is answered
  make_prompts.py chats.jsonl --model gemma.nemo --output prompts --heldout 1024

Writes OUTPUT_train.jsonl and OUTPUT_heldout.jsonl: {"prompt": ...} and every other column as a
field, which rewards can read (docs/rewards.md). Read the examples that it shows: one BOS, special
tokens as one token each, and the end where the model's turn begins.
"""
_SHOWN = 3


def build_parser() -> argparse.ArgumentParser:
    """Without transformers, so that ``--help`` is answered at once."""
    parser = argparse.ArgumentParser(
        prog="make_prompts.py",
        description="Turn a data set into prompts with a model's own chat template.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", nargs="+", type=Path, help=".jsonl or .parquet files, or folders")
    parser.add_argument(
        "--model", type=Path, required=True, help="Hugging Face folder, or .nemo made from one"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="of both files' names"
    )
    parser.add_argument("--column", help="that holds the prompt [messages, prompt, question, ...]")
    parser.add_argument("--system", metavar="TEXT", help="a system message before each")
    parser.add_argument("--plain", action="store_true", help="no chat template: the text itself")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="leave longer prompts out")
    parser.add_argument("--heldout", type=int, default=512, metavar="N", help="held out [512]")
    parser.add_argument("--seed", type=int, default=0, help="which ones are held out [0]")
    parser.add_argument(
        "--rename", nargs="*", default=[], metavar="OLD=NEW", help="columns that become fields"
    )
    parser.add_argument("--answer-after", metavar="MARK", help="keep of answers what follows it")
    parser.add_argument(
        "--messages",
        action="store_true",
        help="keep the conversation, for rewards that have a chat template of their own",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the files")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns an exit code of `nemo_warp.exit_codes`."""
    parsed = build_parser().parse_args(arguments)
    try:
        run(parsed)
    except (ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISCONFIGURED
    return exit_codes.DONE


def run(arguments: argparse.Namespace) -> None:
    """Make the two files, and tell what they are.

    Raises:
        ValueError: with one sentence; nothing is written.
    """
    prefix = arguments.output
    paths = {part: prefix.with_name(f"{prefix.name}_{part}.jsonl") for part in ("train", "heldout")}
    for path in paths.values():
        if path.exists() and not arguments.force:
            raise ValueError(f"{path} exists; name another --output, or overwrite it with --force")
    wishes = Wishes(
        column=arguments.column,
        system=arguments.system,
        max_tokens=_positive(arguments.max_tokens, "--max-tokens"),
        heldout=_positive(arguments.heldout, "--heldout") or 0,
        seed=arguments.seed,
        rename=_renamed(arguments.rename),
        answer_after=arguments.answer_after,
        messages=arguments.messages,
    )
    sources = [(str(path), read_rows(path)) for path in arguments.data]
    template = Template(arguments.model, arguments.plain)
    found = make_prompts(sources, template, wishes)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for part, path in paths.items():
        write_text_atomically(path, _json_lines(getattr(found, part)))
    print(_told(found, paths))
    for line in found.train[:_SHOWN]:
        print(_shown(line, template))


def _renamed(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if not all(pair.partition("=")):
            raise ValueError(f"--rename {pair} is not OLD=NEW")
    return dict(pair.split("=", 1) for pair in pairs)


def _positive(value: int | None, name: str) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}, expected 1 or more")
    return value


def _json_lines(lines: list[Row]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _told(found: Prompts, paths: dict[str, Path]) -> str:
    lines = [
        f"{found.rows} rows: {found.duplicates} duplicates, {found.too_long} too long, "
        f"{found.empty} empty left out; the longest prompt has {found.longest} tokens",
        f"{paths['train']}: {len(found.train)} prompts",
        f"{paths['heldout']}: {len(found.heldout)} prompts",
        f"fields: {', '.join(found.train[0])}",
    ]
    if found.dropped_columns:
        names = ", ".join(sorted(found.dropped_columns))
        lines.append(f"columns left out, since JSON cannot hold them: {names}")
    return "\n".join(lines)


def _shown(line: Row, template: Template) -> str:
    tokens = template.tokens(line["prompt"])
    fields = {name: value for name, value in line.items() if name != "prompt"}
    return (
        f"\n{line['prompt']!r}\n  {len(tokens)} tokens: "
        f"{' | '.join(template.pieces(tokens))}\n  {json.dumps(fields, ensure_ascii=False)[:300]}"
    )
