"""Checkpoints that NeMo wrote, merged, against float64 and against NeMo's own reading."""

import itertools
import tarfile
from pathlib import Path

import golden_models as golden
import pytest
import tiny_models
import torch
from ranks import run_ranks

from nemo_warp.merge import merge

pytestmark = pytest.mark.nemo

LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))
RESHARDED = {(1, 1): (2, 2), (2, 2): (1, 1), (2, 1): (1, 2), (1, 2): (2, 1)}
"""Layout -> another one, from which a model with the same padding is restored too."""
ETA = 0.3


def _name(model: str, policy: str, layout: tuple[int, int], kind: str) -> str:
    return f"{model}-{policy}-tp{layout[0]}pp{layout[1]}-{kind}.nemo"


def _write_all(folder: Path, tokenizer: Path, tensor: int, pipeline: int) -> None:
    """Every model and policy at one layout, in every format that NeMo writes."""
    for name in golden.MODELS:
        model = golden.build(name, tokenizer, tensor, pipeline)
        kinds = ("dist", "ranks")
        if (name, pipeline) == ("llama", 1):
            kinds = ("dist", "ranks", "zarr", "bf16")
        for kind, policy in itertools.product(kinds, golden.POLICIES):
            if kind == "bf16":
                model.bfloat16()
            golden.fill(model, lambda n, s, p=policy: golden.weight(p, n, s, torch.float32))
            _save(model, folder / _name(name, policy, (tensor, pipeline), kind), kind)


def _save(model, path: Path, kind: str) -> None:
    model.cfg.dist_ckpt_format = "zarr" if kind == "zarr" else "torch_dist"
    if kind == "ranks":  # what NeMo does for models without distributed checkpoints
        model.sharded_state_dict = lambda prefix="": None
    model.save_to(str(path))
    if kind == "ranks":
        del model.sharded_state_dict


@pytest.fixture(scope="module")
def written(nemo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    tokenizer = tiny_models.write_tokenizer(folder, golden.VOCABULARY)
    for tensor, pipeline in LAYOUTS:
        run_ranks(_write_all, tensor * pipeline, folder, tokenizer, tensor, pipeline)
    return folder


def _cases() -> dict[str, tuple[str, ...]]:
    """Name of the merged file -> (model, init, policy, policy), layouts and formats all mixed."""
    cases = {}
    for i, here in enumerate(LAYOUTS):
        there, elsewhere = LAYOUTS[(i + 1) % 5], LAYOUTS[(i + 3) % 5]
        for model, (init, a, b) in itertools.product(
            golden.MODELS, (("dist", "dist", "ranks"), ("ranks", "ranks", "dist"))
        ):
            inputs = ((here, init), (there, a), (elsewhere, b))
            cases[_name(model, "merged", here, init)] = (model, *_inputs(model, inputs))
    for kind, here in (("zarr", (1, 1)), ("zarr", (2, 1)), ("bf16", (2, 1)), ("bf16", (4, 1))):
        inputs = ((here, kind), ((1, 1), kind), ((4, 1), "bf16" if kind == "bf16" else "dist"))
        cases[_name("llama", "merged", here, kind)] = ("llama", *_inputs("llama", inputs))
    return cases


def _inputs(model: str, inputs) -> tuple[str, ...]:
    pairs = zip(golden.POLICIES, inputs, strict=True)
    return tuple(_name(model, policy, layout, kind) for policy, (layout, kind) in pairs)


@pytest.fixture(scope="module")
def merged(written) -> Path:
    """All cases merged; nothing tells the merger the true size of the vocabulary."""
    for name, (_, init, *policies) in _cases().items():
        paths = [written / policy for policy in policies]
        merge(written / init, paths, str(written / name), eta=ETA, workers=2)
    return written


def _check_restored(path: Path, dtype: torch.dtype, tensor: int, pipeline: int) -> None:
    """Stock NeMo's reading of a merged file against float64, element by element and as logits."""
    model = tiny_models.load_tiny_nemo(path, tensor, pipeline)
    loaded = {(n, str(where)): data.clone() for n, _, where, data in golden.shards(model)}
    shapes = {name: shape for name, shape, *_ in golden.shards(model)}
    expected = golden.expected_merge(shapes, dtype, ETA, dtype)
    elements, different = 0, 0
    for name, _, where, _ in golden.shards(model):
        if golden.is_vocabulary(name):  # NeMo gives padding rows as this layout pads
            rows = slice(0, max(0, golden.VOCABULARY - where[0].start))
        else:
            rows = slice(None)
        got, wanted = loaded[name, str(where)][rows].to(dtype), expected[name][where][rows]
        apart = golden.ulps_apart(got, wanted)
        assert apart.numel() == 0 or apart.max() <= 1, f"{path.name}: {name} at {where}"
        elements, different = elements + apart.numel(), different + int(apart.count_nonzero())
    assert different <= elements // 1000
    found = golden.logits(model)
    golden.fill(model, lambda name, _: expected[name])
    by_hand = golden.logits(model)
    golden.fill(model, lambda name, shape: golden.weight("init", name, shape, dtype))
    of_init = golden.logits(model)
    if found is not None:
        vocabulary = slice(0, golden.VOCABULARY_MULTIPLE)  # true tokens, on the first rank
        torch.testing.assert_close(found[..., vocabulary], by_hand[..., vocabulary])
        assert (found - of_init)[..., vocabulary].abs().max() > 0.01


def _restore_all(folder: Path, names: list[str], tensor: int, pipeline: int) -> None:
    for name in names:
        dtype = torch.bfloat16 if "bf16" in name else torch.float32
        _check_restored(folder / name, dtype, tensor, pipeline)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}pp{}".format(*layout))
def test_nemo_restores_the_float64_reference(merged, layout):
    names = [name for name in _cases() if _name("", "", layout, "").split("-")[2] in name]
    assert len(names) >= 6
    if layout in RESHARDED:
        names.append(_name("mixed", "merged", RESHARDED[layout], "dist"))
    run_ranks(_restore_all, layout[0] * layout[1], merged, names, *layout)


def test_configuration_and_artifacts_are_the_inits(merged):
    for name, (_, init, *_) in _cases().items():
        with tarfile.open(merged / init) as before, tarfile.open(merged / name) as after:
            for member in before.getmembers():
                if member.isfile() and "model_weights" not in member.name:
                    kept = after.extractfile(member.name).read()
                    assert kept == before.extractfile(member.name).read(), member.name


def _save_as_nemo_2(folder: Path, tokenizer: Path, tensor: int) -> None:
    """Weights by NeMo 2's own writer; ``context`` by hand, since that writer needs nemo_run."""
    from nemo.lightning.io.pl import MegatronCheckpointIO

    model = golden.build("llama", tokenizer, tensor, 1)
    for policy in golden.POLICIES:
        golden.fill(model, lambda n, s, p=policy: golden.weight(p, n, s, torch.float32))
        state = {"sharded_state_dict": model.model.sharded_state_dict(prefix="module.")}
        target = folder / f"{policy}-tp{tensor}"
        MegatronCheckpointIO().save_checkpoint({**state, "global_step": 7, "epoch": 0}, target)
        (target / "context" / "nemo_tokenizer").mkdir(parents=True, exist_ok=True)
        (target / "context" / "model.yaml").write_text(
            "_target_: nemo.collections.llm.gpt.model.llama.LlamaModel\n"
            f"config: {{rotary_base: 10000, tensor_model_parallel_size: {tensor}}}\n"
        )
        (target / "context" / "nemo_tokenizer" / "special_tokens_map.json").write_text(policy)


def _check_by_nemo_2(path: Path, tokenizer: Path, tensor: int) -> None:
    """Its reader, strict: every key is asked for and there."""
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from nemo.lightning.io import pl

    pl._fix_tensors_device = lambda checkpoint: checkpoint  # to the GPU, of which there is none
    model = golden.build("llama", tokenizer, tensor, 1)
    state = {"sharded_state_dict": model.model.sharded_state_dict(prefix="module.")}
    loaded = pl.MegatronCheckpointIO().load_checkpoint(
        path, sharded_state_dict=state, strict=StrictHandling.RAISE_ALL
    )["sharded_state_dict"]
    model.model.load_state_dict({k.removeprefix("module."): v for k, v in loaded.items()})
    shapes = {name: shape for name, shape, *_ in golden.shards(model)}
    expected = golden.expected_merge(shapes, torch.float32, ETA, torch.float32)
    for name, _, where, data in golden.shards(model):
        rows = slice(None)
        if golden.is_vocabulary(name):
            rows = slice(0, max(0, golden.VOCABULARY - where[0].start))
        apart = golden.ulps_apart(data[rows], expected[name][where][rows])
        assert apart.numel() == 0 or apart.max() <= 1, f"{name} at {where}"


def test_nemo_2_folders(nemo, tmp_path):
    tokenizer = tiny_models.write_tokenizer(tmp_path, golden.VOCABULARY)
    for tensor in (1, 2):
        run_ranks(_save_as_nemo_2, tensor, tmp_path, tokenizer, tensor)
    for policies, output in ((("a-tp1", "b-tp2"), "out"), (("a-tp2", "b-tp1"), "again")):
        merge(
            tmp_path / "init-tp2",
            [tmp_path / policy for policy in policies],
            str(tmp_path / output),
            eta=ETA,
            vocab_size=golden.VOCABULARY,
        )
        kept = [
            path.relative_to(tmp_path / output).as_posix()
            for path in (tmp_path / output).rglob("*")
        ]
        assert {"context/model.yaml", "context/nemo_tokenizer/special_tokens_map.json"} <= {*kept}
        run_ranks(_check_by_nemo_2, 2, tmp_path / output, tokenizer, 2)
    other = tmp_path / "b-tp2" / "context" / "model.yaml"
    other.write_text(other.read_text().replace("10000", "500000"))
    with pytest.raises(ValueError, match=r"rotary_base is 10000 in .*init-tp2 and 500000 in"):
        merge(tmp_path / "init-tp2", [tmp_path / "a-tp1", other.parents[1]], str(tmp_path / "no"))
