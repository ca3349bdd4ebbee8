"""Families through members, merge, front and export: `family_lab` does it and checks each step."""

import json
import shutil

import pytest
from chat_tokenizers import write_gemma_tokenizer, write_llama3_tokenizer
from family_lab import Walk, member_config, walk_through
from hf_models import write_hf_model
from member_lab import Layout, write_prompts
from ranks import RankError, run_ranks
from reward_servers import VADER, running

from nemo_warp.checkpoints.families.importing import import_hf
from nemo_warp.config import CONF_DIRECTORY, load_config

pytestmark = pytest.mark.nemo

OTHERS = ["qwen2_5", "gemma2"]
"""Beside the paper's own; the rest by family_lab's command (CI has no minute for each)."""


@pytest.fixture(scope="module")
def endpoint(nemo, tmp_path_factory):
    with running(tmp_path_factory.mktemp("vader"), VADER, run_id="test") as server:
        yield server.endpoint_file


def test_the_papers_family_from_hugging_face_to_hugging_face(endpoint, tmp_path):
    row = walk_through(Walk("gemma_7b", tmp_path, endpoint))
    assert row["members at"] == "tp2-pp1-dp1, tp1-pp2-dp1"


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_other_families(endpoint, tmp_path, family):
    """Padded vocabulary, untied output layer and biases; double norms and soft-capping."""
    walk_through(Walk(family, tmp_path, endpoint))


CHATS = {"gemma_7b": (write_gemma_tokenizer, 96), "llama3": (write_llama3_tokenizer, 304)}
"""Family -> its kind of tokenizer, and rows; the last four of the second are no token's."""


def _read(config_path, texts, *overrides):
    """How a member reads prompts, ends responses and tells them to rewards."""
    from nemo_warp.aligner.policy.build import build_policy

    config = load_config(CONF_DIRECTORY / "member.yaml", config_path, [*overrides])
    model = build_policy(config, 8, 4)[0].model
    encoded = [model.prompt_encoder()(text) for text in texts]
    ends = sorted(model._end_tokens)
    return encoded, ends, model.response_text([*encoded[0][2:5], ends[-1]])


@pytest.mark.parametrize("family", CHATS)
def test_prompts_are_read_as_transformers_reads_them(nemo, tmp_path, family):
    """Chat templates, BOS and several end tokens, with the tokenizer inside the .nemo only."""
    import transformers

    write, rows = CHATS[family]
    walk = Walk(family, tmp_path, tmp_path / "none")
    folder = write_hf_model(walk.path("hf"), family, changes={"vocab_size": rows})
    (folder / "tokenizer.json").unlink()
    write(folder, rows if family == "gemma_7b" else rows - 4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=family != "gemma_7b")
    chat = [{"role": "user", "content": "And the earth"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = [tokenizer(prompt, add_special_tokens=False).input_ids]
    plain = tokenizer("the waters", add_special_tokens=False).input_ids
    begins = [tokenizer.bos_token_id] if family == "gemma_7b" else []
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    spoken = tokenizer.decode(expected[0][2:5], skip_special_tokens=True)
    import_hf(folder, walk.path("sft.nemo"))
    shutil.rmtree(folder)
    write_prompts(walk.path("prompts.jsonl"), [prompt])
    config = member_config(walk, "member_1", Layout(), 1)
    ((found, found_ends, text),) = run_ranks(_read, 1, config, [prompt, "the waters"])
    assert found == [*expected, begins + plain]
    assert found_ends == sorted(ends)
    assert text.strip() == spoken.strip()


def test_a_tokenizer_that_is_only_named_and_cannot_be_had_is_one_sentence(nemo, tmp_path):
    walk = Walk("llama3", tmp_path, tmp_path / "none")
    import_hf(write_hf_model(walk.path("hf"), "llama3"), walk.path("sft.nemo"))
    write_prompts(walk.path("prompts.jsonl"), ["abc"])
    config = member_config(walk, "member_1", Layout(), 1)
    with pytest.raises(RankError) as caught:
        run_ranks(_read, 1, config, ["abc"], "model.extra={tokenizer: {type: nobody/nothing}}")
    last = str(caught.value).strip().splitlines()[-1]
    assert last.startswith("ValueError: the tokenizer of ") and "model.extra.tokenizer.type" in last
