"""The estimate of a rank's memory against what a real member holds, in bf16 with O2."""

import gc
import weakref

import member_lab as lab
import pytest
import tiny_models
import torch
from member_lab import Layout, Materials
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.nemo

HIDDEN, LAYERS, LENGTH = 128, 4, 64
HELD_WITHIN = 0.03
"""Of the tensors that are held: rotary tables, masks, counters are not estimated."""
TRAINING_WITHIN = 0.4
"""Of what a forward and a backward pass add: eager norms and gates keep what fused ones do not."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, as long as they live."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._known = 0, 0, set(_storages())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return found

    def _count(self, storage):
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known.add(key)
            self.live += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self._known.discard(key)
        self.live -= size


def _held_bytes():
    """Of all tensors that Python can reach, each storage once."""
    return sum(_storages().values())


def _storages():
    """Storage -> its bytes."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor):
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage._cdata] = storage.nbytes()
    return storages


def _save(path, tokenizer):
    tiny_models.save_tiny_nemo(
        path, tokenizer, num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=4 * HIDDEN,
        num_attention_heads=8, num_query_groups=4, encoder_seq_length=LENGTH,
        max_position_embeddings=LENGTH,
    )  # fmt: skip


@pytest.fixture(scope="module")
def larger(nemo, tmp_path_factory):
    """A model large enough that what is estimated outweighs the rest."""
    folder = tmp_path_factory.mktemp("larger")
    tokenizer = tiny_models.write_tokenizer(folder)
    run_ranks(_save, 1, folder / "sft.nemo", tokenizer)
    return Materials(folder / "sft.nemo", folder / "sft.nemo", folder / "a", folder / "b")


def measured(materials, directory, layout, optimizer, sequence_parallel):
    from nemo_warp.aligner.policy.device import sizes_of
    from nemo_warp.config import to_plain
    from nemo_warp.core.footprint import stage_footprint

    before = _held_bytes()
    config = lab.member_config(
        materials, directory, layout, optim={"name": optimizer, "lr": 1e-3, "warmup_steps": 2},
        also=["model.megatron_amp_O2=true", 'trainer.precision="bf16"',
              f"model.sequence_parallel={str(sequence_parallel).lower()}",
              "rollout.max_response_tokens=60", "prompts.max_tokens=4"],
    )  # fmt: skip
    trainer = lab.build_trainer(config)
    sft = trainer.anchor.weights.clone().round_()  # a member holds one
    batches = trainer.optimizer_batches(trainer.objective.batch(lab.given_rollouts(0)).data)
    trainer.run_training(batches)
    held = _held_bytes() - before
    tokens = torch.randint(4, 128, (8, LENGTH))
    weights = torch.ones(8, LENGTH - 1) / 8
    batch = trainer.optimizer_batches({"response_tokens": tokens, "weights": weights})[0]
    with LiveBytes() as tracker:
        trainer.model.prepare_for_training()
        trainer.model.prepare_for_training_step()
        trainer.model.get_loss_and_metrics(batch=batch, forward_only=False)
    sizes = sizes_of(trainer.model)
    parameters = sum(p.numel() for p in {id(p): p for p in trainer.model.parameters()}.values())
    stage = 0
    if layout.pipeline > 1:
        from megatron.core import parallel_state

        stage = parallel_state.get_pipeline_model_parallel_rank()
    expected = sizes.stage_parameters(layout.tensor, layout.pipeline, stage)
    assert sft.nbytes > 0
    return {
        "parameters": (parameters, expected),
        "held": held,
        "training": tracker.peak,
        "estimate": stage_footprint(sizes, to_plain(config), stage),
    }


CASES = [
    (Layout(1, 1, 2), "mcore_distributed_optim", False),
    (Layout(2), "adam", True),
    (Layout(1, 2), "adam", False),
]


@pytest.mark.parametrize(("layout", "optimizer", "sequence_parallel"), CASES, ids=str)
def test_a_real_member_holds_what_was_estimated(
    larger, tmp_path, layout, optimizer, sequence_parallel
):
    for rank in run_ranks(
        measured, layout.ranks, larger, tmp_path, layout, optimizer, sequence_parallel
    ):
        parameters, expected = rank["parameters"]
        assert parameters == expected
        estimate = rank["estimate"]
        assert rank["held"] == pytest.approx(estimate.always, rel=HELD_WITHIN)
        training = sum(estimate.phases["training"].values())
        if optimizer == "adam":  # else gloo copies all gradients to reduce and scatter them
            assert rank["training"] == pytest.approx(training, rel=TRAINING_WITHIN)
