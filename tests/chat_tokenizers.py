"""Tokenizers with chat templates as Gemma and Llama 3 have them, small: of words in tiny_models."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_models

GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def write_gemma_tokenizer(folder: Path, vocabulary: int) -> None:
    """SentencePiece with control pieces (BOS) and user-defined ones (turns).

    Its settings are those that transformers 4 saves; 5 adds a tokenizer.json with one token more.
    """
    import sentencepiece

    special, turns = ["<pad>", "<eos>", "<bos>", "<unk>"], ["<start_of_turn>", "<end_of_turn>"]
    text = folder / "text.txt"
    text.write_text(tiny_models._TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=vocabulary,
        model_type="bpe", character_coverage=1.0, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", user_defined_symbols=[*turns, "\n"],
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    text.unlink()
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    settings = {
        **{"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False},
        **{f"{token[1:-1]}_token": token for token in special},
        **{"additional_special_tokens": turns, "clean_up_tokenization_spaces": False},
        "added_tokens_decoder": {
            str(number): {"content": token, **plain, "special": True}
            for number, token in enumerate(special + turns)
        },
        "chat_template": GEMMA,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    _write_ends(folder, special.index("<bos>"), [1, len(special) + 1])


def write_llama3_tokenizer(folder: Path, vocabulary: int) -> None:
    """Bytes and some pairs of them, and special tokens at the end, as Llama 3's are."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    special.append("<|eot_id|>")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([tiny_models._TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1],
        clean_up_tokenization_spaces=False,  # as since transformers 4.45
    )  # fmt: skip
    fast.chat_template = LLAMA3
    fast.save_pretrained(folder)
    first, *ends = map(fast.convert_tokens_to_ids, (*special[:2], "<|eot_id|>"))
    _write_ends(folder, first, ends)


def _write_ends(folder: Path, first: int, ends: list[int]) -> None:
    """Several end tokens in generation_config.json, and those of the tokenizer in config.json."""
    path, config = folder / "generation_config.json", folder / "config.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, "eos_token_id": ends}))
    if config.exists():
        keys = {**json.loads(config.read_text()), "bos_token_id": first}
        config.write_text(json.dumps({**keys, "eos_token_id": ends[0]}))
