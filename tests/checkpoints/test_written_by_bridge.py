"""What Megatron-Bridge 0.3.1 wrote, beside the weights: read, carried over, tracked, refused.

Its weights are among the cases of test_written.py.
"""

import re
import shutil
from pathlib import Path

import pytest
import torch
import written_checkpoints as written
import written_weights as known

from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.inspection import read_tensor
from nemo_warp.checkpoints.io.reading import FileCache
from nemo_warp.checkpoints.iterations import newest_iteration, read_train_state
from nemo_warp.checkpoints.meaning import read_meaning
from nemo_warp.checkpoints.vocabulary import true_vocab_size
from nemo_warp.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CASES = ("bridge_init", "bridge_a", "bridge_b")
TEXT, STATE = "latest_checkpointed_iteration.txt", "latest_train_state.pt"
ITS_OWN = (".metadata", "metadata.json", "README.md", "warp_merge.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With every case unpacked."""
    place = tmp_path_factory.mktemp("bridge")
    for case in CASES:
        written.unpack(case, place)
    return place


@pytest.fixture
def run(folder, tmp_path) -> Path:
    """A copy of what training wrote, for harm."""
    return shutil.copytree(folder / "bridge_a", tmp_path / "run")


def _merge(folder: Path, output: Path, init: str = "bridge_a", **options) -> None:
    policies = [folder / case for case in CASES if case != init]
    merge(folder / init, policies, str(output), workers=1, **options)


def _refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize("case", CASES)
def test_its_configuration_is_understood(folder, case):
    """Tokens without padding, and what the weights mean; the parent stands for its folder."""
    checkpoint = open_checkpoint(folder / case)
    assert checkpoint.path.name == f"iter_{written.iteration_of(case):07d}"
    assert true_vocab_size(checkpoint) == known.TOKENS < known.VOCABULARY
    meaning = read_meaning(checkpoint.path)
    assert meaning["num_attention_heads"] == known.HEADS
    assert meaning["rotary_base"] == 10000.0 and "silu" in str(meaning["activation_func"])
    assert meaning == read_meaning(open_checkpoint(folder / "bridge_init").path)
    assert len(meaning["tokenizer.vocabulary"]) == 64


def test_masters_that_can_be_told_apart_are_unrounded(folder):
    """Those of its fully reshardable optimizer; its default keeps them in one flat buffer."""
    assert not open_checkpoint(folder / "bridge_a").store.masters()
    masters = open_checkpoint(folder / "bridge_b").store.masters()
    assert masters.keys() == known.shapes(False).keys()
    with FileCache() as files:
        for name, tensor in masters.items():
            exact = torch.from_numpy(known.weight("b", name, tensor.shape))
            assert torch.equal(read_tensor(files, tensor).view(tensor.shape), exact), name


@pytest.mark.parametrize("init", CASES)
def test_everything_beside_the_weights_goes_along(folder, tmp_path, init):
    output = tmp_path / "iter_0000007"
    _merge(folder, output, init)
    source = open_checkpoint(folder / init).path
    beside = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    beside = [path for path in beside if path.suffix != ".distcp" and path.name not in ITS_OWN]
    assert {str(path) for path in beside} > {
        *("common.pt", "run_config.yaml", "train_state.pt", "modelopt_run_config.yaml"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    }
    assert "`checkpoint.pretrained_checkpoint=PARENT`" in (output / "README.md").read_text()
    for path in beside:
        assert (output / path).read_bytes() == (source / path).read_bytes(), path


@pytest.mark.parametrize("number", [0, 7])
def test_both_trackers_name_the_merge(folder, tmp_path, caplog, number):
    """Bridge takes no 0 from the text; all its other counters stay the init's."""
    caplog.set_level("INFO")
    output = tmp_path / f"iter_{number:07d}"
    _merge(folder, output)
    assert (tmp_path / TEXT).read_text() == f"{number}\n"
    found = torch.load(tmp_path / STATE, weights_only=True)
    before = torch.load(folder / "bridge_a" / STATE, weights_only=True)
    assert int(found.pop("step")) == number and int(before.pop("step")) == known.ITERATION
    assert found == before and len(found) == 7
    assert open_checkpoint(tmp_path).path == output
    assert f"loads it with checkpoint.pretrained_checkpoint={tmp_path}" in caplog.text


def test_its_tracker_goes_forward_only(folder, run, caplog):
    _merge(folder, run / "iter_0000019")
    assert "names 20 and was left as it is, not set to 19" in caplog.text
    assert newest_iteration(run) == "20"
    _merge(folder, run / "release")
    assert newest_iteration(run) == "20"
    _merge(folder, run / "iter_0000021")
    assert newest_iteration(run) == "21" and (run / TEXT).read_text() == "21\n"
    (run / TEXT).write_text("30")
    _merge(folder, run / "iter_0000040")
    assert "were left as they are" in caplog.text and "names 30 and" in caplog.text
    assert int(read_train_state(run / STATE)["step"]) == 21


def test_a_merge_beside_its_inputs_is_not_gone_on_from(folder, run):
    policies = [folder / case for case in ("bridge_init", "bridge_b")]
    merge(run / "iter_0000020", policies, str(run / "iter_0000030"), workers=1)
    assert newest_iteration(run) == "20"


def test_one_tracker_is_enough_and_two_must_agree(run):
    (run / TEXT).unlink()
    assert open_checkpoint(run).path.name == "iter_0000020"
    (run / TEXT).write_text("10")
    _refused(run, r"names 10 and .*latest_train_state\.pt names 20.* name the iter_ folder")
    open_checkpoint(run / "iter_0000020")
    (run / TEXT).write_text("20")
    (run / "iter_0000020").rename(run / "iter_0000021")
    _refused(run, r"latest_train_state\.pt names iter_0000020, which is not in")


@pytest.mark.parametrize("missing", ["metadata.json", "run_config.yaml", ".metadata"])
def test_an_interrupted_save_is_refused(run, missing):
    (run / "iter_0000020" / missing).unlink()
    _refused(run, "interrupted" if missing != ".metadata" else re.escape(".metadata"))


def test_a_quantised_model_is_refused(run):
    """By modelopt's state, not by its description of the model, which is in every checkpoint."""
    (run / "iter_0000020" / "modelopt_state").mkdir()
    (run / "iter_0000020" / "modelopt_state" / "common.pt").write_bytes(b"never read")
    _refused(run, "quantised")


def test_training_states_that_are_none(run):
    class Hostile:
        def __reduce__(self):
            return print, ("run",)

    for state, message in (
        ({"step": Hostile()}, "wants to import"),
        ({"step": torch.zeros(2)}, "no counter"),
        ({"step": torch.tensor(1.5)}, "at which step"),
        ({"steps": torch.tensor(1)}, "at which step"),
        ([torch.tensor(1)], "no table"),
    ):
        torch.save(state, run / STATE)
        _refused(run, message)
    (run / STATE).write_bytes(b"PK, but no zip")
    _refused(run, STATE)
    (run / STATE).write_bytes(bytes(2 << 20))
    _refused(run, "too many")


def test_models_of_other_meaning_are_refused(folder, run):
    place = run / "iter_0000020" / "run_config.yaml"
    text = place.read_text()
    changed = text.replace("rotary_base: 10000", "rotary_base: 500000")
    tokens = run / "iter_0000020" / "tokenizer" / "tokenizer.json"
    for file, content, message in (
        (place, changed, r"rotary_base is 10000 in .* and 500000"),
        (tokens, tokens.read_text().replace('"w7"', '"x7"'), "tokenizer.vocabulary is"),
    ):
        before = file.read_text()
        assert content != before
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            merge(folder / "bridge_init", [folder / "bridge_b", run], str(run.with_name("out")))
        file.write_text(before)
