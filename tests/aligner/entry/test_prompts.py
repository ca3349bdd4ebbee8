"""Prompts as tokens: what is too long, the template around them, and BOS."""

from pathlib import Path

import pytest
import sentencepiece
import tiny_models

from nemo_warp.aligner.entry.prompts import (
    Rules,
    bos_token,
    describe,
    encoder,
    lacking_bos,
    tokenize,
)
from nemo_warp.config import CONF_DIRECTORY, identity_hash, load_config, to_plain
from nemo_warp.prompts import PromptLine

FILE = Path("prompts.jsonl")


class Tokenizer:
    """A real SentencePiece model under the names of NeMo's tokenizers."""

    def __init__(self, file: Path) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        self.unk_id = self._model.unk_id()

    def text_to_ids(self, text: str) -> list[int]:
        return self._model.encode_as_ids(text)

    def ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self._model.id_to_piece(i) for i in ids]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_models.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def lines(*texts: str) -> list[PromptLine]:
    return [PromptLine(text, {"answer": text.upper()}) for text in texts]


GIVEN = ("God said", "And the evening and the morning were the first day", "Let there be")


def test_a_prompt_that_is_too_long_is_refused_or_dropped(tokenizer: Tokenizer) -> None:
    longest = len(tokenizer.text_to_ids(GIVEN[1]))
    with pytest.raises(ValueError, match=rf"prompt 2 has {longest} tokens, .*too_long=drop"):
        tokenize(lines(*GIVEN), tokenizer.text_to_ids, Rules(longest - 1), FILE)
    rules = Rules(longest - 1, too_long="drop")
    kept = tokenize(lines(*GIVEN), tokenizer.text_to_ids, rules, FILE)
    assert [p.text for p in kept] == [GIVEN[0], GIVEN[2]]
    assert [p.fields["answer"] for p in kept] == ["GOD SAID", "LET THERE BE"], "fields stay"
    assert "1 of 3 prompts are too long and left out" in next(describe(kept, 3, tokenizer, FILE))
    with pytest.raises(ValueError, match=r"2 of 3 prompts have at most .* but 3 are needed"):
        tokenize(lines(*GIVEN), tokenizer.text_to_ids, rules, FILE, needed=3)
    assert len(tokenize(lines(*GIVEN), tokenizer.text_to_ids, Rules(longest), FILE)) == 3


def test_a_template_is_part_of_text_tokens_and_length(tokenizer: Tokenizer) -> None:
    rules = Rules(50, template="God said: {prompt}\nAnd")
    (prompt,) = tokenize(lines("Let there be"), tokenizer.text_to_ids, rules, FILE)
    assert prompt.text == "God said: Let there be\nAnd"
    assert prompt.tokens == tokenizer.text_to_ids(prompt.text)
    with pytest.raises(ValueError, match=f"has {len(prompt.tokens)} tokens"):
        tokenize(
            lines("Let there be"), tokenizer.text_to_ids, Rules(5, template=rules.template), FILE
        )


def test_bos_is_added_once_shown_and_missed(tokenizer: Tokenizer) -> None:
    plain = tokenize(lines(*GIVEN), tokenizer.text_to_ids, Rules(50), FILE)
    encode = encoder(tokenizer.text_to_ids, tokenizer, add_bos=True)
    with_bos = tokenize(lines(*GIVEN), encode, Rules(50), FILE)
    assert [p.tokens for p in with_bos] == [[1, *p.tokens] for p in plain]
    (shown,) = describe(with_bos, 3, tokenizer, FILE)
    assert f"first prompt's {len(with_bos[0].tokens)} tokens: <s>=1 " in shown
    assert lacking_bos(with_bos, tokenizer) is None
    warning = lacking_bos([*with_bos, plain[0]], tokenizer)
    assert warning is not None and "<s>=1, and 1 of 4 prompts do not begin with it" in warning

    twice = tokenize(lines(*GIVEN), encoder(encode, tokenizer, add_bos=True), Rules(50), FILE)
    assert twice == with_bos, "not a second one"
    assert encoder(encode, tokenizer, add_bos=False) is encode


@pytest.mark.parametrize("bos", [None, -1, 2, 0], ids=["none", "absent", "is EOS", "unknown"])
def test_a_tokenizer_without_a_bos_of_its_own(tokenizer: Tokenizer, bos: int | None) -> None:
    other = Tokenizer.__new__(Tokenizer)
    other.__dict__.update(tokenizer.__dict__ | {"bos_id": bos})
    assert bos_token(other) is None
    assert lacking_bos(tokenize(lines(*GIVEN), other.text_to_ids, Rules(50), FILE), other) is None
    with pytest.raises(ValueError, match=r"prompts\.add_bos is true, but the tokenizer has no BOS"):
        encoder(other.text_to_ids, other, add_bos=True)


def test_earlier_members_stay_the_ones_they_are() -> None:
    """The new keys change a member's identity where they change its prompts, and only there."""
    given = {"init": "x", "rewards": [], "run": {"directory": "d"}}
    prompts = {"train": "a", "heldout": "b"}

    def identity(**changes: object) -> str:
        config = {**given, "prompts": {**prompts, **changes}}
        return identity_hash(to_plain(load_config(CONF_DIRECTORY / "member.yaml", config)))

    plain = to_plain(
        load_config(CONF_DIRECTORY / "member.yaml", {**given, "prompts": dict(prompts)})
    )
    for key in ("too_long", "template", "add_bos"):
        del plain["prompts"][key]
    del plain["profile"]
    assert identity() == identity_hash(plain)
    changed = {identity(too_long="drop"), identity(template="a {prompt}"), identity(add_bos=True)}
    assert len(changed | {identity()}) == 4
    with pytest.raises(ValueError, match=r"template' in .* expected text with \{prompt\} in it"):
        identity(template="no place for it")
