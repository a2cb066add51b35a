"""What we write without torch is what torch reads: items, objects, whole folders."""

import hashlib
import io
import pickle
import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from _dist_build import load, loaded, same
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from mtp_convert.containers import torch_dist, torch_zip
from mtp_convert.containers.base import StoredChunk, StoredTensor
from mtp_convert.containers.pickle_write import dumps
from mtp_convert.containers.torch_dist_write import extra_state
from mtp_convert.containers.torch_save import frame, save_object
from mtp_convert.encodings.dtype import BY_NAME, DTYPES, DType
from mtp_convert.engine.runner import write_files
from mtp_convert.engine.sinks import OutTensor, torch_dist_output
from mtp_convert.mapping.layout import build
from mtp_convert.mapping.plan import make_plan
from mtp_convert.mapping.rules import Block, Param, Placed, rule

SHAPES = [(), (1,), (0, 3), (3, 0), (300,), (2, 3), (2, 1, 70_000)]


def numbers(dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
    n = torch.Size(shape).numel() * dtype.itemsize
    if n == 0:
        return torch.empty(shape, dtype=dtype.torch())
    raw = np.frombuffer(random.Random(n).randbytes(n), np.uint8).copy()
    if dtype.name == "BOOL":
        raw %= 2
    return torch.from_numpy(raw).view(dtype.torch()).reshape(shape)


def payload(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_framed_payload_is_what_torch_loads(dtype: DType, shape: tuple[int, ...]) -> None:
    tensor = numbers(dtype, shape)
    made = frame(dtype, shape)
    assert len(made.prefix) % 64 == 0
    item = made.prefix + payload(tensor) + made.suffix
    assert same(torch.load(io.BytesIO(item), weights_only=True), tensor)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (3, 0)], ids=str)  # torch's stride there is (1, 1)
def test_torch_writes_the_same_structure(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Our reader finds equal facts in our frame and in torch's own file."""
    for dtype in DTYPES:
        tensor = numbers(dtype, shape)
        made, path = frame(dtype, shape), tmp_path / dtype.name
        path.write_bytes(made.prefix + payload(tensor) + made.suffix)
        torch.save(tensor, tmp_path / "torch")
        stubs = []
        for file in (path, tmp_path / "torch"):
            with file.open("rb") as opened:
                found = torch_zip.members(opened.fileno(), 0, file.stat().st_size)
                stub = torch_zip.read_structure(opened.fileno(), found, file.name)
                at = torch_zip.locate(stub, found)
                assert file.read_bytes()[at.start : at.start + tensor.nbytes] == payload(tensor)
                stubs.append((at.dtype, at.shape, stub.args[1:]))
        assert stubs[0] == stubs[1]


def test_objects_are_what_torch_loads() -> None:
    value = {"args": Namespace(a=1, b=[2.5, None, True], c=Namespace(d=("x", -1, 2**40, -(2**31), 255, 256))), "n": {}}
    found = torch.load(io.BytesIO(save_object(value)), weights_only=False)
    assert found == value
    assert isinstance(found["args"], Namespace)
    (state,) = torch.load(io.BytesIO(extra_state()), weights_only=True)
    assert (state.dtype, state.shape) == (torch.uint8, (0,))


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), 1j], ids=lambda v: type(v).__name__)
def test_values_that_no_record_needs(value: object) -> None:
    with pytest.raises(TypeError, match=f"cannot write a {type(value).__name__}"):
        dumps([value])


@pytest.mark.parametrize(
    "number", [0, 1, 255, 256, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63, 2**200, -(2**200)]
)
def test_whole_numbers(number: int) -> None:

    assert pickle.loads(dumps([number, str(number), "ä\ud800", float(number), ("x", "x")])) == [
        number,
        str(number),
        "ä\ud800",
        float(number),
        ("x", "x"),
    ]


def params() -> dict[str, torch.Tensor]:
    shapes = {"w": (6, 4), "scale": (4,), "e.0": (2, 3), "e.1": (2, 3), "e.2": (2, 3), "one": (1,)}
    types = {"w": "BF16", "scale": "F32", "one": "I64"}
    return {n: numbers(BY_NAME[types.get(n, "F8_E4M3")], s) for n, s in shapes.items()}


def written(folder: Path, *, limit: int, threads: int = 2) -> dict[str, torch.Tensor]:
    """Write the params as a torch_dist folder, experts stacked; returns what it must hold."""
    values, source = params(), {}
    (folder / "source").mkdir(parents=True)
    for name, tensor in values.items():
        path = folder / "source" / name
        path.write_bytes(payload(tensor))
        dtype = next(d for d in DTYPES if d.torch() == tensor.dtype)
        shape = tuple(tensor.shape)
        source[name] = StoredTensor(name, dtype, shape, (StoredChunk((0,) * len(shape), shape, path, 0),))
    declared = tuple(Param(n, tuple(t.shape)) for n, t in values.items() if not n.startswith("e."))
    plain = tuple(rule(p.name, p.name) for p in declared)
    rows = {"hf": (*plain, rule("e.{e}", "e.{e}")), "dist": (*plain, rule("experts", "e.{e}", over=("e",)))}
    block = Block((*declared, Param("e.{e}", (2, 3))), rows, {"e": range(3)})
    layouts = [build(n, [Placed(block, "", {n: ""})], {}) for n in ("hf", "dist")]
    steps = make_plan(*layouts).steps
    tensors = [OutTensor(s, source[s.sources[0]].dtype) for s in steps]
    objects = ["w._extra_state/shard_0_1", "experts._extra_state/shard_1_3"]
    output = torch_dist_output(tensors, source, folder="it", objects=objects, max_file_size=limit)
    write_files(output.files, folder, threads=threads)
    for path, content in output.small.items():
        (folder / path).write_bytes(content())
    experts = torch.stack([values[f"e.{e}"].view(torch.uint8) for e in range(3)]).view(torch.float8_e4m3fn)
    return {"w": values["w"], "scale": values["scale"], "one": values["one"], "experts": experts}


@pytest.mark.parametrize("limit", [1, 3000, 1 << 30])
def test_a_written_folder_is_what_torch_reads(tmp_path: Path, limit: int) -> None:
    wanted = written(tmp_path, limit=limit)
    found = load(tmp_path / "it", wanted)
    for name, tensor in wanted.items():
        assert same(found[name], tensor), name
    meta = FileSystemReader(tmp_path / "it").read_metadata()
    objects = {n for n, m in meta.state_dict_metadata.items() if isinstance(m, BytesStorageMetadata)}
    assert objects == {"w._extra_state/shard_0_1", "experts._extra_state/shard_1_3"}
    assert len(meta.state_dict_metadata["experts"].chunks) == 3
    files = sorted(p.name for p in (tmp_path / "it").glob("*.distcp"))
    assert files[0] == "__0_0.distcp"
    assert (len(files) == 1) == (limit > 10**6)


def test_a_written_folder_is_what_we_read(tmp_path: Path) -> None:
    wanted = written(tmp_path, limit=2000)
    stored = torch_dist.read(tmp_path / "it")
    assert {n: t.shape for n, t in stored.tensors.items()} == {n: tuple(t.shape) for n, t in wanted.items()}
    for name, tensor in wanted.items():
        assert same(loaded(stored.tensors[name]), tensor), name


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_two_runs_write_identical_bytes(tmp_path: Path) -> None:
    for run, threads in (("one", 1), ("two", 5)):
        written(tmp_path / run, limit=3000, threads=threads)
    assert digests(tmp_path / "one" / "it") == digests(tmp_path / "two" / "it")
