"""Encoded weights on disk, read back through the engine in any layout and in windows of any size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from _reference import Tensors
from safetensors.torch import save_file
from torch import Tensor

from mtp_convert.containers import safetensors
from mtp_convert.containers.base import Encoded, Stored, StoredTensor
from mtp_convert.encoded import grouped
from mtp_convert.encodings.dtype import BY_NAME
from mtp_convert.engine.encode import CodedExtent, Coder
from mtp_convert.engine.files import Extent, TensorExtent
from mtp_convert.engine.gather import Reader
from mtp_convert.mapping.layout import Layout, build
from mtp_convert.mapping.ops import Concat, Grouped, Op, Permute
from mtp_convert.mapping.plan import Step, make_plan
from mtp_convert.mapping.rules import Block, Param, Placed, Row, rule
from mtp_convert.quantization import Quantization

WEIGHT = "m.weight"
PARTS = 2


def layout(kind: str, shape: tuple[int, ...]) -> Layout:
    """Two equal params in one tensor, or the one param that a tensor is."""
    ops: Mapping[str, Op] = {
        "rows": Concat(0),
        "columns": Concat(1),
        "grouped": Grouped(PARTS),
        "turned": Permute((1, 0), Concat(0)),
    }
    rows: dict[str, tuple[Row, ...]] = {
        "same": (rule(WEIGHT, "p.0"),),
        "transposed": (rule(WEIGHT, "p.0", op=Permute((1, 0))),),
        "apart": (rule("{e}.weight", "p.{e}"),),
        "apart_turned": (rule("{e}.weight", "p.{e}", op=Permute((1, 0))),),
        "stacked": (rule(WEIGHT, "p.{e}", over=("e",)),),
    }
    names = [f"p.{e}" for e in range(PARTS)]
    row = rows.get(kind) or (rule(WEIGHT, *names, op=ops[kind]),)
    count = 1 if kind in ("same", "transposed") else PARTS
    block = Block((Param("p.{e}", shape),), {kind: row}, {"e": range(count)})
    return build(kind, [Placed(block, "", {kind: ""})], {})


def on_disk(folder: Path, raw: Tensors, said: Quantization | None = None, **config: object) -> StoredTensor:
    """The tensor of values that the tensors of one weight make; `raw` names them without the module."""
    return all_on_disk(folder, {f"m.{n}": t for n, t in raw.items()}, said, **config).tensors[WEIGHT]


def all_on_disk(folder: Path, raw: Tensors, said: Quantization | None = None, **config: object) -> Stored:
    """A checkpoint of these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in raw.items()}, folder / "model.safetensors")
    return grouped(safetensors.read(folder), said or Quantization(), config)


def plain(folder: Path, values: Tensor) -> StoredTensor:
    """A tensor that is stored as values."""
    return all_on_disk(folder, {WEIGHT: values}).tensors[WEIGHT]


def steps(source: str, target: str, shape: tuple[int, ...]) -> tuple[Step, ...]:
    """From one of the layouts to another; `shape` is a param's."""
    return make_plan(layout(source, shape), layout(target, shape)).steps


def read(tensor: StoredTensor, source: str, target: str, shape: tuple[int, ...], dtype: str = "F32") -> Tensors:
    """The target tensors, each filled in windows of odd sizes."""
    found = {}
    for step in steps(source, target, shape):
        extent = TensorExtent(step, {WEIGHT: tensor}, BY_NAME[dtype], (0,) * len(step.shape), step.shape)
        found[step.tensor] = as_tensor(filled(extent, 49_999), dtype, step.shape)
    return found


def filled(extent: Extent, window: int = 1 << 22) -> bytes:
    """All bytes of an extent, from windows that are filled on their own, the last one first."""
    reader = Reader()
    parts = []
    try:
        for lo in reversed(range(0, extent.nbytes, window)):
            hi = min(lo + window, extent.nbytes)
            out = np.full(hi - lo, 0xA5, dtype=np.uint8)
            extent.fill(reader, out, lo, hi)
            parts.append(out.tobytes())
    finally:
        reader.close()
    return b"".join(reversed(parts))


def as_tensor(raw: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=BY_NAME[dtype].torch()).reshape(shape)


def coder(values: StoredTensor, encoded: Encoded) -> Coder:
    """Writes values in the form of `encoded`, whose stored scales are the ones from before."""
    (step,) = steps("same", "same", values.shape)
    return Coder(step, {WEIGHT: values}, values.dtype, encoded)


def encode(values: StoredTensor, encoded: Encoded, window: int = 1 << 22) -> Tensors:
    """Codes and scales of values, as tensors under the names that they would be stored with."""
    writing = coder(values, encoded)
    found = {}
    for role in ("scales", "codes", "whole"):
        raw: StoredTensor | None = getattr(encoded, role)
        if raw is not None:
            data = filled(CodedExtent(writing, role), window)
            found[raw.name.removeprefix("m.")] = as_tensor(data, raw.dtype.name, raw.shape)
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def bits(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
