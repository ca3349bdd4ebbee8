"""NeMo's logits of imported models against transformers', at every layout."""

from pathlib import Path

import pytest
import tiny_models
import torch
from hf_models import FAMILIES, VOCABULARY, hf_logits, write_hf_model
from omegaconf import open_dict
from ranks import run_ranks

from nemo_warp.checkpoints.families.exporting import export_hf
from nemo_warp.checkpoints.families.importing import import_hf

pytestmark = pytest.mark.nemo

LENGTH = 48
ON_A_CPU = {
    **{"transformer_engine": False, "precision": 32, "apply_rope_fusion": False},
    **{"masked_softmax_fusion": False, "persist_layer_norm": False, "use_cpu_initialization": True},
    **{"bias_dropout_add_fusion": False, "bias_activation_fusion": False},
    **{"optim": {"name": "adamw", "lr": 1e-3}},
}
"""What a recipe without a GPU sets as well: no kernels of Transformer Engine, apex or inductor."""
BUILT = [name for name in FAMILIES if name != "gemma2"]
"""Gemma 2's layers are Transformer Engine's own (gemma2_spec.py): only a GPU builds them."""


def _tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)


@pytest.fixture(scope="module")
def models(nemo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name in BUILT:
        write_hf_model(folder / name, name)
        import_hf(folder / name, folder / f"{name}.nemo")
        torch.save(hf_logits(folder / name, _tokens()), folder / f"{name}.pt")
    return folder


def _restore(path: Path, tensor: int, pipeline: int):
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector

    config = tiny_models.tiny_config(Path("unused"), tensor, pipeline)
    trainer, connector = tiny_models.build_trainer(config), NLPSaveRestoreConnector()
    stored = MegatronGPTModel.restore_from(
        str(path), trainer=trainer, return_config=True, save_restore_connector=connector
    )
    with open_dict(stored):
        stored.merge_with(ON_A_CPU)
        stored.tensor_model_parallel_size = tensor
        stored.pipeline_model_parallel_size = pipeline
    return MegatronGPTModel.restore_from(
        str(path),
        trainer=trainer,
        override_config_path=stored,
        save_restore_connector=connector,
        map_location="cpu",
    )


def _logits(model) -> torch.Tensor | None:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    positions = torch.arange(LENGTH).expand(2, -1)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    model.eval()
    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=model.get_forward_output_only_func(),
            data_iterator=iter([[_tokens(), mask, positions]]),
            model=[model.model],
            num_microbatches=1,
            forward_only=True,
            seq_length=LENGTH,
            micro_batch_size=2,
        )
    return found[0]["logits"] if parallel_state.is_pipeline_last_stage() else None


def _run(folder: Path, names: list[str], tensor: int, pipeline: int, save: bool) -> dict:
    found = {}
    for name in names:
        model = _restore(folder / f"{name}.nemo", tensor, pipeline)
        found[name] = _logits(model)
        if save:
            model.save_to(str(folder / f"{name}-saved.nemo"))
    return found


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)])
def test_logits_equal_those_of_transformers(models, tensor, pipeline):
    names = [n for n in BUILT if FAMILIES[n].get("num_key_value_heads", 2) % tensor == 0]
    save = pipeline == 2
    ranks = run_ranks(_run, tensor * pipeline, models, names, tensor, pipeline, save)
    for name in names:
        shards = [rank[name] for rank in ranks if rank[name] is not None]
        found = torch.cat(shards, dim=-1)[..., :VOCABULARY]
        expected = torch.load(models / f"{name}.pt")
        apart = (found - expected).abs().max().item()
        print(f"{name} tp{tensor} pp{pipeline}: {apart:.2e} of {expected.abs().max():.2f}")
        assert apart < 5e-6, f"{name} at TP {tensor} PP {pipeline}: {apart}"
        if save:  # what NeMo saved again is the same Hugging Face model
            export_hf(models / f"{name}-saved.nemo", models / f"{name}-back")
            back = hf_logits(models / f"{name}-back", _tokens())
            assert torch.equal(back, expected), name
