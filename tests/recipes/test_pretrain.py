"""Pretraining through NeMo: its data, what it learns, and what stock NeMo restores from it."""

import json
import math
from pathlib import Path

import pytest
import tiny_models
import torch
from omegaconf import OmegaConf
from ranks import run_ranks

from nemo_warp import exit_codes


def test_documents_become_rows_with_eos_padding_and_mask(nemo):
    from nemo_warp.aligner.policy.document_gpt import DocumentDataset

    data = DocumentDataset([[5, 6], [7, 8, 9, 10, 11]], 4, eos_id=2, num_samples=2, seed=None)
    short, long = data[0], data[1]
    assert short["tokens"].tolist() == [5, 6, 2, 2]
    assert short["labels"].tolist() == [6, 2, 2, 2]
    assert short["loss_mask"].tolist() == [1, 1, 0, 0]  # EOS is learned, padding is not
    assert long["tokens"].tolist() == [7, 8, 9, 10]
    assert long["labels"].tolist() == [8, 9, 10, 11]  # cut: no EOS
    assert long["loss_mask"].tolist() == [1, 1, 1, 1]
    assert long["position_ids"].tolist() == [0, 1, 2, 3]


def test_each_pass_meets_each_document_once_in_its_own_order(nemo):
    from nemo_warp.aligner.policy.document_gpt import DocumentDataset

    documents = [[i] for i in range(10, 60)]
    data = DocumentDataset(documents, 2, eos_id=2, num_samples=120, seed=3)
    first = [int(data[i]["tokens"][0]) for i in range(120)]
    assert sorted(first[:50]) == sorted(first[50:100]) == list(range(10, 60))
    assert first[:50] != first[50:100]
    again = DocumentDataset(documents, 2, eos_id=2, num_samples=120, seed=3)
    assert first == [int(again[i]["tokens"][0]) for i in range(120)]


SENTENCES = ["and God saw the light", "the darkness he called Night", "the earth was without form"]


def _pretrain(tokenizer: Path, directory: Path) -> dict:
    from nemo_warp.aligner.pretrain import pretrain

    directory.mkdir()
    config = tiny_models.tiny_config(
        tokenizer,
        encoder_seq_length=16,
        max_position_embeddings=16,
        micro_batch_size=6,
        global_batch_size=6,
        data={"validation_drop_last": False},
        optim={"lr": 0.02},
    )
    files = {"output": str(directory / "sft.nemo"), "metrics": str(directory / "sft.json")}
    limits = {"max_steps": 40, "max_epochs": -1, "val_check_interval": 40, "limit_val_batches": 1.0}
    more = {"trainer": {**limits, "num_sanity_val_steps": 0}, "num_threads": 1, **files}
    exp_manager = {"exp_manager": {"log_tflops_per_sec_per_gpu": False}}
    config = OmegaConf.merge(config, more, exp_manager)
    return pretrain(config, {"train": SENTENCES * 2, "validation": SENTENCES})


def _restored(nemo_file: Path) -> tuple[float, str]:
    """Mean loss on `SENTENCES` and a greedy continuation, by stock NeMo from the file alone."""
    model = tiny_models.load_tiny_nemo(nemo_file)
    model.eval()
    losses = []
    for text in SENTENCES:
        ids = [*model.tokenizer.text_to_ids(text), model.tokenizer.eos_id][:17]
        tokens = torch.tensor([ids])
        positions = torch.arange(len(ids) - 1)[None]
        with torch.no_grad():
            loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
        losses += loss.flatten().tolist()
    return sum(losses) / len(losses), type(model).__name__


def test_learns_and_is_restored_by_stock_nemo_from_the_file_alone(nemo, tmp_path):
    (tmp_path / "made").mkdir()
    tokenizer = tiny_models.write_tokenizer(tmp_path / "made")
    (metrics,) = run_ranks(_pretrain, 1, tokenizer, tmp_path / "a")
    assert metrics["steps"] == 40
    assert metrics["validation_loss"] < 0.5 * math.log(tiny_models.VOCABULARY)
    assert metrics == json.loads((tmp_path / "a/sft.json").read_text())
    (again,) = run_ranks(_pretrain, 1, tokenizer, tmp_path / "b")
    assert again["validation_loss"] == metrics["validation_loss"]
    moved = tmp_path / "elsewhere.nemo"
    (tmp_path / "a/sft.nemo").rename(moved)
    for path in tokenizer.parent.iterdir():
        path.unlink()  # the tokenizer must be inside
    ((loss, name),) = run_ranks(_restored, 1, moved)
    assert name == "MegatronGPTModel"
    assert loss == pytest.approx(metrics["validation_loss"], rel=1e-5)


def test_missing_text_is_refused_before_nemo_is_loaded(tmp_path, capsys):
    from nemo_warp.aligner.pretrain import main

    config = tmp_path / "config.yaml"
    config.write_text("data: {train: a.txt, validation: b.txt}\noutput: ???\n")
    assert main(["--config", str(config)]) == exit_codes.MISCONFIGURED
    assert "no value given for output" in capsys.readouterr().err
    assert main(["--config", str(config), "output=x"]) == exit_codes.MISCONFIGURED
    assert "no text file a.txt to learn from" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("\n \n")
    assert main(["--config", str(config), "output=x", f"data.train={tmp_path}/a.txt"]) == 2
    assert "a.txt is empty" in capsys.readouterr().err
