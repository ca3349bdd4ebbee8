"""What is refused with the right reason, and what a file may cost before it is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import struct
import tarfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from synthetic_checkpoints import read_torch_dist, tiny_weights, write_torch_dist
from torch.distributed.checkpoint import metadata as dcp

from nemo_warp.checkpoints import names
from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.io import open_files
from nemo_warp.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SIZES = {"layers": 2, "hidden": 8, "ffn": 12, "vocab": 20}


@pytest.fixture
def policy(tmp_path) -> Path:
    folder = tmp_path / "policy"
    write_torch_dist(folder / "model_weights", tiny_weights(0, **SIZES))
    return folder


def _refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(path)


def test_unfinished_whatever_it_is_called(policy, tmp_path):
    (tmp_path / "latest").symlink_to(policy)
    names = [policy, tmp_path / "latest", policy / "model_weights"]
    for path in names:
        open_checkpoint(path)
    (tmp_path / "policy-unfinished").touch()
    for path in names:
        _refused(path, r"is unfinished: .*policy-unfinished exists")


def test_quantised_weights(policy, tmp_path):
    weights = tiny_weights(0, **SIZES)
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        folder = tmp_path / str(dtype)
        small = {**weights, "output_layer.weight": torch.ones(4, 4).to(dtype)}
        write_torch_dist(folder / "model_weights", small)
        _refused(folder, r"output_layer.weight is stored as .*quantised weights cannot be merged")
        flat = tmp_path / f"flat {dtype}"
        flat.mkdir()
        state = {f"model.{key}": value for key, value in small.items()}
        torch.save(state, flat / "model_weights.ckpt")
        _refused(flat, r"output_layer.weight is stored as .*quantised weights cannot be merged")
    kept = {"position_ids": torch.arange(4), "a._extra_state": torch.zeros(4, dtype=torch.uint8)}
    write_torch_dist(tmp_path / "kept/model_weights", weights | kept)
    assert "position_ids" not in open_checkpoint(tmp_path / "kept").tensors


def test_a_members_checkpoint_as_init_leaves_its_anchor_behind(tmp_path):
    init = tiny_weights(0, **SIZES)
    policies = [tiny_weights(seed, **SIZES, around=init) for seed in (1, 2)]
    for name, weights in zip("iab", [init, *policies], strict=True):
        write_torch_dist(tmp_path / name / "model_weights", weights)
    folder = tmp_path / "i/model_weights"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    blob = io.BytesIO()
    torch.save(torch.ones(3, 4), blob)
    (folder / "__1_0.distcp").write_bytes(blob.getvalue())
    index = dcp.MetadataIndex("anchor.output_layer.weight", torch.Size((0, 0)))
    properties = dcp.TensorProperties(dtype=torch.float32)
    chunk = dcp.ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((3, 4)))
    metadata.state_dict_metadata[index.fqn] = dcp.TensorStorageMetadata(
        properties, torch.Size((3, 4)), [chunk]
    )
    place = next(iter(metadata.storage_data.values()))
    metadata.storage_data[index] = type(place)("__1_0.distcp", 0, len(blob.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    merge(tmp_path / "i", [tmp_path / "a", tmp_path / "b"], str(tmp_path / "out"))
    assert not any("anchor" in key for key in read_torch_dist(tmp_path / "out/model_weights"))


def test_names_of_before_megatron_core(tmp_path):
    """Embedding and final norm have angles of their own, padding does not count, TP 2 is joined."""

    def write(folder: Path, weights: dict, tp: int) -> Path:
        for rank in range(tp):
            part = {}
            for name, tensor in weights.items():
                axis = 1 if name.endswith(("attention.dense.weight", "4h_to_h.weight")) else 0
                if name.endswith("norm.weight"):
                    part[name] = tensor
                elif name.endswith("dense_h_to_4h.weight"):  # [gate; up] on every rank
                    halves = [half.chunk(tp)[rank] for half in tensor.chunk(2)]
                    part[name] = torch.cat(halves).contiguous()
                else:
                    part[name] = tensor.chunk(tp, dim=axis)[rank].contiguous()
            path = folder / (f"mp_rank_{rank:02d}" if tp > 1 else "") / "model_weights.ckpt"
            path.parent.mkdir(parents=True)
            torch.save({f"model.language_model.{n}": t.clone() for n, t in part.items()}, path)
        (folder / "model_config.yaml").write_text(
            "activation: fast-swiglu\noverride_vocab_size: 6\n"
        )
        return folder

    shapes = {"embedding.word_embeddings.weight": (8, 4), "encoder.final_layernorm.weight": (4,)}
    for i in range(2):
        layer = f"encoder.layers.{i}."
        shapes |= {f"{layer}self_attention.query_key_value.weight": (12, 4)}
        shapes |= {f"{layer}self_attention.dense.weight": (4, 4)}
        shapes |= {f"{layer}mlp.dense_h_to_4h.weight": (16, 4)}
        shapes |= {f"{layer}mlp.dense_4h_to_h.weight": (4, 8)}
    generator = torch.Generator().manual_seed(0)
    models = [{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(3)]
    models[1]["embedding.word_embeddings.weight"][6:] = 1e6  # padding
    one = [write(tmp_path / f"one{i}", model, 1) for i, model in enumerate(models)]
    two = [write(tmp_path / f"two{i}", model, 2) for i, model in enumerate(models)]
    results = [merge(p[0], p[1:], str(tmp_path / f"out{i}")) for i, p in enumerate((one, two))]
    mixed = merge(one[0], [two[1], one[2]], str(tmp_path / "mixed"))
    for result in (*results, mixed):
        assert list(result.units) == [
            *("embedding", "encoder.layers.0", "encoder.layers.1", "encoder.final_layernorm")
        ]
        assert result.units["embedding"].num_elements == 24
        for name, unit in result.units.items():
            assert (unit.gram == results[0].units[name].gram).all()


def test_links_that_leave_the_checkpoint(policy, tmp_path):
    (policy / "notes").symlink_to(policy / "model_weights/common.pt")
    open_checkpoint(policy)
    secret = tmp_path / "secret"
    secret.write_text("of somebody else")
    (policy / "0123_tokenizer.model").symlink_to(secret)
    _refused(policy, r"0123_tokenizer.model is a link to .*secret, outside the checkpoint; refused")


def test_refusals_that_say_what_to_do(policy, tmp_path):
    _refused(tmp_path, rf"did you mean {policy}\?")
    (policy / "model_weights/metadata.json").unlink()
    _refused(policy, "metadata.json, which is written last: its save was interrupted")
    (policy / "model_weights/common.pt").unlink()
    _refused(policy, "plain torch.distributed.checkpoint")
    ranks = tmp_path / "ranks"
    for rank in range(2):
        (ranks / f"mp_rank_{rank:02d}").mkdir(parents=True)
        state = {"model.sites.own.tensor": torch.full((4,), float(rank))}
        torch.save(state, ranks / f"mp_rank_{rank:02d}/model_weights.ckpt")
    with pytest.raises(CheckpointError, match="a tensor of a name that is not Megatron's"):
        merge(ranks, [ranks], str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("mp_rank_00/model_optim_rng.pt", "rank files ("),
        ("mp_rank_01_000_003/model_optim_rng.pt", "rank files of expert-parallel ranks ("),
        ("mp_rank_01_003/model_weights.ckpt", "rank files of expert-parallel ranks ("),
        ("tp_rank_00_pp_rank_000_ep_rank_001/model_weights.ckpt", "of expert-parallel ranks ("),
        ("iter_0000020/mp_rank_00_000_001/model_optim_rng.pt", "of expert-parallel ranks ("),
    ],
)
def test_rank_files_of_megatron_and_of_experts_say_the_way_out(tmp_path, name, who):
    folder = tmp_path / "run"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"never read")
    if name.startswith("iter"):
        (folder / "latest_checkpointed_iteration.txt").write_text("20")
    _refused(folder, re.escape(who))
    _refused(folder, "--ckpt-convert-format torch_dist --ckpt-convert-save DIR")


def test_pickles_change_no_class_of_torch(policy):
    place = policy / "model_weights/.metadata"
    properties = "ctorch.distributed.checkpoint.metadata\nTensorProperties\n"
    for state in ("(N(dS'dtype'\nS'broken'\nst", "(dS'dtype'\nS'broken'\ns"):
        before = vars(dcp.TensorProperties).copy()
        place.write_bytes(f"{properties}{state}b.".replace("(d", "}").encode())
        _refused(policy, "attributes of something that has none|cannot be unpickled")
        assert vars(dcp.TensorProperties) == before


def _metadata(policy: Path, data: bytes) -> None:
    (policy / "model_weights/.metadata").write_bytes(data)


def _many_sizes(policy: Path) -> None:
    data = b"\x80\x04]\x94B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"\x85\x94"
    _metadata(policy, data + b"(" + b"ctorch\nSize\nh\x01R" * 300 + b"e.")


def _many_layers(policy: Path) -> None:
    metadata = pickle.loads((policy / "model_weights/.metadata").read_bytes())
    described = metadata.state_dict_metadata["model.decoder.layers.mlp.linear_fc2.weight"]
    described.size = torch.Size((10_000_000, 8, 12))
    _metadata(policy, pickle.dumps(metadata))


def _same_bytes_again_and_again(policy: Path) -> None:
    metadata = pickle.loads((policy / "model_weights/.metadata").read_bytes())
    name = "model.decoder.final_layernorm.weight"
    index = next(index for index in metadata.storage_data if index.fqn == name)
    for i in range(5000):
        alias = dcp.MetadataIndex(f"model.more.{i}", index.offset)
        metadata.storage_data[alias] = metadata.storage_data[index]
        metadata.state_dict_metadata[alias.fqn] = metadata.state_dict_metadata[name]
    _metadata(policy, pickle.dumps(metadata))


def _equal_hashes(policy: Path) -> None:
    prime = (1 << 61) - 1
    table = {i * prime: 0 for i in range(1, 20_000)}
    _metadata(policy, pickle.dumps(table, protocol=2))


def _sparse_zarr(policy: Path) -> None:
    folder = policy / "model_weights/model.decoder.layers.mlp.linear_fc2.weight"
    folder.mkdir()
    length = 1 << 27
    described = {"shape": [length, 1], "chunks": [length, 1], "dtype": "bfloat16", "order": "C"}
    (folder / ".zarray").write_text(json.dumps({**described, "compressor": None, "filters": None}))
    with (folder / "0.0").open("wb") as stream:
        stream.truncate(2 * length)


def _backwards_tar(policy: Path) -> None:
    """A pax header that says a member has -1 bytes."""
    path = policy.with_suffix(".nemo")
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("./model_config.yaml")
        info.size, info.pax_headers = 0, {"size": "-1"}
        tar.addfile(info, io.BytesIO())
        big = tarfile.TarInfo("./model_weights.ckpt")
        big.size = 300_000_000
        with open("/dev/zero", "rb") as zeros:
            tar.addfile(big, zeros)


def _many_objects(policy: Path) -> None:
    data = b"\x80\x04" + b"ccollections\nOrderedDict\n)R" * 20_000 + b"."
    _metadata(policy, data)


COSTLY: dict[str, Callable[[Path], None]] = {
    "bytearray": lambda p: _metadata(p, b"\x80\x05\x96" + struct.pack("<Q", 1 << 31) + b"."),
    "sizes of bytes": _many_sizes,
    "layers": _many_layers,
    "the same bytes": _same_bytes_again_and_again,
    "equal hashes": _equal_hashes,
    "sparse zarr": _sparse_zarr,
    "tar of negative size": _backwards_tar,
    "many objects": _many_objects,
    "long integer": lambda p: _metadata(p, b"\x80\x04\x8b" + struct.pack("<i", 1 << 30) + b"."),
}


def _cost(path: Path) -> tuple[str, float, float]:
    """The refusal, and the seconds and bytes that it took, in a process of its own."""
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        open_checkpoint(path)
        said = "opened"
    except CheckpointError as error:
        said = str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return said, time.process_time() - begin, 1024 * peak


def _in_child(path: Path) -> tuple[str, float, float]:
    receiver, sender = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=lambda: sender.send(_cost(path)))
    process.start()
    assert receiver.poll(60)
    found = receiver.recv()
    process.join()
    return found


@pytest.mark.parametrize("name", COSTLY)
def test_what_hostile_files_cost(policy, name):
    COSTLY[name](policy)
    tar = policy.with_suffix(".nemo")
    said, seconds, peak = _in_child(tar if tar.exists() else policy)
    assert said != "opened"
    assert policy.name in said and len(said) < 1000
    assert seconds < 5
    assert peak < 200e6


def test_pieces_of_a_tensor_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "MAX_PATCHES_OF_TENSOR", 100)
    where = tmp_path / "model_weights/model.w"
    where.mkdir(parents=True)
    described = {"shape": [200, 2, 2], "chunks": [200, 1, 2], "dtype": "bfloat16", "order": "C"}
    (where / ".zarray").write_text(json.dumps({**described, "compressor": None, "filters": None}))
    for j in range(2):
        (where / f"0.{j}.0").write_bytes(bytes(200 * 2 * 2))
    (tmp_path / "model_weights/metadata.json").write_text("{}")
    _refused(tmp_path, "absurd number of pieces")


def test_many_files_take_few_descriptors(tmp_path, monkeypatch):
    """400 files per checkpoint, where a process may have 256 descriptors; each is synced once."""
    synced = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(fd) or real(fd))
    monkeypatch.setattr(open_files, "LIMIT", 16)
    init = {f"decoder.layers.{i}.w{j}": torch.randn(4, 4) for i in range(4) for j in range(100)}
    for seed, name in enumerate("iab"):
        moved = {n: t + seed * torch.randn(4, 4) for n, t in init.items()}
        folder = tmp_path / name / "model_weights"
        write_torch_dist(folder, moved, homogeneous=False, extra_state=False, tp=1)
        _one_file_each(folder)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        merge(tmp_path / "i", [tmp_path / "a", tmp_path / "b"], str(tmp_path / "out"), eta=[0.3])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 400
    assert len(synced) <= 2 * len(files)


def _one_file_each(folder: Path) -> None:
    """Give every item a file of its own, as a save of many ranks has it."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for number, (index, info) in enumerate(list(metadata.storage_data.items())):
        data = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        name = f"__{number}_9.distcp"
        (folder / name).write_bytes(data)
        metadata.storage_data[index] = type(info)(name, 0, info.length)
    for old in [*folder.glob("__*_0.distcp"), *folder.glob("__*_1.distcp")]:
        old.unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
