import pytest
import tiny_models
from member_lab import Materials, write_prompts
from ranks import run_ranks
from reward_servers import VADER, running


def _save(path, tokenizer, seed):
    tiny_models.save_tiny_nemo(
        path,
        tokenizer,
        num_layers=4,
        share_embeddings_and_output_weights=True,
        seed=seed,
        encoder_seq_length=32,
        max_position_embeddings=32,
    )


@pytest.fixture(scope="session")
def materials(nemo, tmp_path_factory) -> Materials:
    """Two models of one architecture, and prompts."""
    folder = tmp_path_factory.mktemp("materials")
    tokenizer = tiny_models.write_tokenizer(folder)
    for name, seed in (("sft", 1234), ("other", 4321)):
        run_ranks(_save, 1, folder / f"{name}.nemo", tokenizer, seed)
    words = tiny_models._TEXT.replace("\n", " ").split()
    texts = [" ".join(words[i : i + 2 + i % 2]) for i in range(30)]
    return Materials(
        sft=folder / "sft.nemo",
        other=folder / "other.nemo",
        train=write_prompts(folder / "train.jsonl", texts[:18]),
        heldout=write_prompts(folder / "heldout.jsonl", texts[18:]),
    )


@pytest.fixture(scope="session")
def member_vader(materials, tmp_path_factory):
    """A VADER server whose run identity is the test members'."""
    with running(tmp_path_factory.mktemp("member-vader"), VADER, run_id="test") as server:
        yield server
