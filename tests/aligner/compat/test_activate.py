"""What compat replaces, that it says so, and that in the container it replaces nothing."""

import json
import os
import queue
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is not replaced here")

SNAPSHOT = '''
import json, os, sys, types
import torch, torch.cuda.random, torch.cuda.nvtx, torch.distributed.checkpoint.filesystem
import torch._dynamo  # replaces torch.manual_seed itself

WATCHED = [torch, torch.Tensor, torch.nn.Module, torch.cuda, torch.cuda.random, torch.cuda.nvtx]
WATCHED += [torch.distributed, torch.distributed.checkpoint.filesystem]

def name_of(owner):
    return f"{owner.__module__}.{owner.__name__}" if isinstance(owner, type) else owner.__name__

def snapshot():
    """Everything a replacement could change in torch: name -> the object there."""
    return {
        f"{name_of(owner)}.{name}": value
        for owner in WATCHED
        for name, value in vars(owner).items()
        if not isinstance(value, types.ModuleType)
    }

def changed(before):
    after = snapshot()
    return sorted(name for name in before if after.get(name) is not before[name])
'''


def _in_fresh_python(program: str, path: Path | None = None) -> dict:
    """Run a program that prints one line of JSON last, optionally with ``path`` to import from."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "RANK": "0"}
    environment.pop("NVIDIA_PYTORCH_VERSION", None)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path or ""), *sys.path]))
    command = [sys.executable, "-c", SNAPSHOT + program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def _install_packages(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).mkdir(parents=True)
        (directory / name / "__init__.py").write_text("")
    return directory


def test_nothing_is_touched_in_the_container(tmp_path):
    """The container: real packages, a GPU, and the torch that Megatron-core was written for."""
    path = _install_packages(tmp_path, "apex", "transformer_engine", "tensorrt_llm")
    program = """
def _write_item(stream, data, write_item, storage_key):
    "The signature of the container's torch."

def create_default_local_load_plan(state_dict, metadata, strict=True):
    "The container's torch does not look at sizes."

torch.distributed.checkpoint.filesystem._write_item = _write_item
planner = torch.distributed.checkpoint.default_planner
planner.create_default_local_load_plan = create_default_local_load_plan
torch.cuda.is_available = lambda: True
before, environment, modules = snapshot(), dict(os.environ), set(sys.modules)
from nemo_warp.aligner.compat import activate
report = activate()
new = {name.partition(".")[0] for name in set(sys.modules) - modules}
print(json.dumps({
    "report": [report.missing, report.stand_ins, report.cuda_on_cpu, report.summary()],
    "changed": changed(before),
    "environment": dict(os.environ) == environment,
    "imported": sorted(new & {"apex", "megatron", "nemo", "nemo_aligner", "tensorrt_llm"}),
}))
"""
    assert _in_fresh_python(program, path) == {
        "report": [[], [], [], []],
        "changed": [],
        "environment": True,
        "imported": [],
    }


def test_importing_nemo_warp_activates_nothing():
    program = """
before, environment = snapshot(), dict(os.environ)
import nemo_warp, nemo_warp.cli, nemo_warp.doctor
import nemo_warp.aligner, nemo_warp.aligner.compat
import nemo_warp.aligner.compat.stand_ins, nemo_warp.aligner.compat.cuda_on_cpu
print(json.dumps([changed(before), dict(os.environ) == environment, "nemo" in sys.modules]))
"""
    assert _in_fresh_python(program) == [[], True, False]


@needs_no_gpu
def test_every_change_to_torch_is_reported(nemo):
    program = """
before = snapshot()
from nemo_warp.aligner.compat import cuda_on_cpu
from nemo_warp.aligner.compat.replacements import Replacements
replacements = Replacements()
cuda_on_cpu.replace_before_nemo(replacements)
print(json.dumps([changed(before), replacements.made]))
"""
    changed, made = _in_fresh_python(program)
    assert len(changed) > 40
    assert set(changed) <= {entry.partition(":")[0] for entry in made}
    assert set(made) <= set(nemo.cuda_on_cpu)


def test_activation_happens_once(nemo):
    from nemo_warp.aligner.compat import activate

    assert activate() is nemo


def test_absent_packages_are_looked_for_one_by_one(tmp_path, monkeypatch):
    from nemo_warp.aligner.compat import stand_ins

    absent = stand_ins.absent()
    monkeypatch.syspath_prepend(_install_packages(tmp_path, "apex"))
    assert stand_ins.absent() == [name for name in absent if name != "apex"]


@needs_no_gpu
def test_late_activation_is_refused(monkeypatch):
    from nemo_warp.aligner import compat

    monkeypatch.setattr(compat, "_report", None)
    monkeypatch.setitem(sys.modules, "megatron.core", sys.modules[__name__])
    with pytest.raises(RuntimeError, match=r"megatron\.core.* imported before .*activate\(\)"):
        compat.activate()


def test_missing_nemo_is_one_sentence(monkeypatch):
    from nemo_warp.aligner import compat

    monkeypatch.setattr(compat, "_report", None)
    monkeypatch.setattr(compat, "find_spec", lambda name: None)
    message = "nemo-toolkit, nemo-aligner, megatron-core not installed.*make setup"
    with pytest.raises(ModuleNotFoundError, match=message):
        compat.activate()


def test_summary_names_what_was_replaced(nemo):
    text = "\n".join(nemo.summary())
    for package in nemo.missing:
        assert package in text
    if not torch.cuda.is_available():
        assert "current_device" in text
        assert "all_gather_into_tensor" in text


# ----------------------------------------------------------------- what the replacements compute


@needs_no_gpu
def test_cuda_means_the_cpu(nemo):
    cpu = torch.device("cpu")
    assert torch.cuda.current_device() == cpu
    assert torch.zeros(2, device="cuda").device == cpu
    assert torch.arange(3, device=torch.device("cuda", 1)).tolist() == [0, 1, 2]
    assert torch.ones(2).to("cuda", torch.float64).dtype == torch.float64
    assert torch.ones(2).to(device="cuda:0").device == cpu
    assert torch.nn.Linear(2, 2).to("cuda").weight.device == cpu
    assert torch.nn.Linear(2, 2).cuda().weight.cuda().device == cpu
    assert torch.zeros(2).new_ones(3, device="cuda").tolist() == [1, 1, 1]
    assert torch.cuda.LongTensor([1, 2]).dtype == torch.int64
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()


def _scripted(x: torch.Tensor) -> torch.Tensor:
    return x + torch.ones(2, dtype=torch.float32) + torch.zeros_like(x).to(torch.float32)


@needs_no_gpu
def test_scripted_functions_still_compile(nemo):
    assert torch.jit.script(_scripted)(torch.ones(2)).tolist() == [2, 2]


def _tracker_draws():
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    before = torch.rand(2)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        inside = torch.rand(2)
    after = torch.rand(2)
    torch.manual_seed(0)
    torch.cuda.manual_seed(7)  # the seed outside the tracker
    return inside.tolist(), [*before.tolist(), *after.tolist()], torch.rand(4).tolist()


@needs_no_gpu
def test_random_tracker_is_per_rank_and_leaves_the_generator_alone(nemo):
    [(inside_0, outside_0, expected), (inside_1, outside_1, _)] = run_ranks(_tracker_draws, 2)
    assert inside_0 != inside_1
    assert outside_0 == outside_1
    assert outside_0 == expected


def _gather_scalars():
    torch.distributed.init_process_group("gloo")
    output = torch.empty(2)
    torch.distributed.all_gather_into_tensor(output, torch.tensor(float(os.environ["RANK"])))
    return output.tolist()


@needs_no_gpu
def test_scalars_are_gathered_over_gloo(nemo):
    assert run_ranks(_gather_scalars, 2) == [[0.0, 1.0], [0.0, 1.0]]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_results_of_forked_writers_arrive_in_order():
    from nemo_warp.aligner.compat.cuda_on_cpu import _Results

    results = _Results()
    with pytest.raises(queue.Empty):
        results.get_nowait()
    results.put({0: "x" * 100_000})  # more than a pipe holds
    if (child := os.fork()) == 0:
        results.put({1: ValueError("disk full")})
        os._exit(0)
    os.waitpid(child, 0)
    assert results.get_nowait() == {0: "x" * 100_000}
    assert str(results.get_nowait()[1]) == "disk full"
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_foreach_kernels():
    from nemo_warp.aligner.compat.stand_ins import multi_tensor_l2norm, multi_tensor_scale

    tensors = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0], [12.0]])]
    total, none = multi_tensor_l2norm(torch.zeros(1), [tensors])
    assert (total.tolist(), none) == ([13.0], None)
    _, each = multi_tensor_l2norm(torch.zeros(1), [tensors], True)
    assert each.tolist() == pytest.approx([3.0, 160**0.5])
    targets = [torch.empty(2, dtype=torch.bfloat16), torch.empty(2, 1)]
    multi_tensor_scale(torch.zeros(1), [tensors, targets], 0.5)
    assert [target.flatten().tolist() for target in targets] == [[1.5, 0.0], [2.0, 6.0]]


def test_tensorrt_says_what_to_do(nemo):
    if "tensorrt_llm" not in nemo.missing:
        pytest.skip("TensorRT-LLM is installed")
    from nemo_aligner.utils.trt_llm import GPTGenerateTRTLLM

    with pytest.raises(ValueError, match=r"tensorrt_llm is not installed.*NeMo container"):
        GPTGenerateTRTLLM({}, [], None)


def test_specs_only_transformer_engine_has_are_refused(nemo):
    if "transformer_engine" not in nemo.missing:
        pytest.skip("Transformer Engine is installed")
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import get_specs

    with pytest.raises(ValueError, match=r"'te_gpt_hyena' needs Transformer Engine"):
        get_specs("te_gpt_hyena", None, True)


def test_two_members_on_a_node_build_their_engines_apart(nemo, monkeypatch):
    """Upstream's exporter has one directory for all, and no key for another."""
    from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import (
        MegatronGPTReinforceActorModel,
    )
    from omegaconf import OmegaConf

    from nemo_warp.aligner.entry.engine import engine_directory
    from nemo_warp.aligner.policy.actor import WarpActorModel

    def upstream(self, cfg, trainer):
        torch.nn.Module.__init__(self)
        self.use_trtllm_generation = True
        exporter = SimpleNamespace(model_dir="/tmp/trt_llm_model")
        self.trtllm_generate = SimpleNamespace(trt_llm_exporter=exporter)

    monkeypatch.setattr(MegatronGPTReinforceActorModel, "__init__", upstream)
    found = []
    for member in ("member_01", "member_02"):
        directory = engine_directory({"run": {"directory": f"/run/iteration_01/{member}"}})
        cfg = OmegaConf.create({"reinforce": {"engine_directory": directory}})
        found.append(WarpActorModel(cfg, None).trtllm_generate.trt_llm_exporter.model_dir)
    assert found[0] != found[1]
    assert "/tmp/trt_llm_model" not in found
