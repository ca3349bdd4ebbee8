"""NeMo's logits of imported models against transformers', at every layout."""

from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, VOCABULARY, expressible, hf_logits, write_hf_model
from nemo_logits import nemo_logits, restore, sample_tokens
from ranks import run_ranks

from nemo_warp.checkpoints.families.exporting import export_hf
from nemo_warp.checkpoints.families.importing import import_hf

pytestmark = pytest.mark.nemo


@pytest.fixture(scope="module")
def models(nemo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        write_hf_model(folder / name, name)
        import_hf(folder / name, folder / f"{name}.nemo")
        torch.save(hf_logits(folder / name, sample_tokens()), folder / f"{name}.pt")
    return folder


def _run(folder: Path, names: list[str], tensor: int, pipeline: int, save: bool) -> dict:
    found = {}
    for name in names:
        model = restore(folder / f"{name}.nemo", tensor, pipeline)
        found[name] = nemo_logits(model)
        if save:
            model.save_to(str(folder / f"{name}-saved.nemo"))
    return found


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)])
def test_logits_equal_those_of_transformers(models, tensor, pipeline):
    names = [n for n in FAMILIES if expressible(n, tensor, pipeline)]
    save = pipeline == 2
    ranks = run_ranks(_run, tensor * pipeline, models, names, tensor, pipeline, save)
    for name in names:
        shards = [rank[name] for rank in ranks if rank[name] is not None]
        found = torch.cat(shards, dim=-1)[..., :VOCABULARY]
        whole = torch.load(models / f"{name}.pt")
        expected = whole[..., :VOCABULARY]
        apart = (found - expected).abs().max().item()
        print(f"{name} tp{tensor} pp{pipeline}: {apart:.2e} of {expected.abs().max():.2f}")
        assert apart < 5e-6, f"{name} at TP {tensor} PP {pipeline}: {apart}"
        if save:  # what NeMo saved again is the same Hugging Face model
            export_hf(models / f"{name}-saved.nemo", models / f"{name}-back")
            back = hf_logits(models / f"{name}-back", sample_tokens())
            assert torch.equal(back, whole), name
