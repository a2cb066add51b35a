"""Tensors whose values two layouts count from different numbers (`Rule.plus`): their element type, and the way back.

A shift rounds: in float32, 0.1 is another number after - 1 + 1. So 16-bit values become float32, and a conversion notes
the bytes of every tensor that it shifted. Going back writes them again where they are what made the stored values, and
shifts those values where somebody has changed them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

import numpy as np

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.encodings.cast import cast
from mtp_convert.encodings.dtype import BY_NAME, DType
from mtp_convert.engine.compare import StoredExtent
from mtp_convert.engine.files import Extent, TensorExtent
from mtp_convert.engine.gather import Bytes, Reader
from mtp_convert.mapping.plan import Step

FLOAT64 = BY_NAME["F64"]


def dtype_after(types: Iterable[DType]) -> DType:
    """What shifted values of these types become unless something else is asked for: the widest, float32 at least."""
    return max((BY_NAME["F32"], *types), key=lambda dtype: dtype.itemsize)


def noted(source: Checkpoint, steps: Iterable[Step]) -> dict[str, str]:
    """Element type and bytes, in hex, of every stored tensor that the steps shift."""
    tensors = {n: source.tensor(n) for step in steps if step.shift for n in step.sources}
    return {n: f"{t.dtype} {_read(StoredExtent(t)).tobytes().hex()}" for n, t in tensors.items()}


def known(source: Checkpoint, step: Step, dtype: DType, notes: Mapping[str, str]) -> bytes | None:
    """The bytes that a target tensor had before, by the notes of an earlier conversion; None where these do not lead to
    what is stored now, or are no notes of `dtype`."""
    note = notes.get(step.tensor, "") if step.shift and step.averaged == 1 else ""
    before = _noted(note, dtype, prod(step.shape))
    types = {source.tensor(n).dtype for n in step.sources}
    if before is None or len(types) > 1:
        return None
    stored = types.pop()
    unshifted = replace(step, binding=replace(step.binding, plus=step.binding.plus - step.shift))
    now = _read(TensorExtent(unshifted, source.stored.tensors, stored, (0,) * len(step.shape), step.shape))
    values = cast(before, dtype, FLOAT64.torch_name).view(np.float64) - step.shift
    same = np.array_equal(cast(values.view(np.uint8), FLOAT64, stored.torch_name), now)
    return before.tobytes() if same else None


def _noted(note: str, dtype: DType, count: int) -> Bytes | None:
    """The bytes in a note of `count` elements; None where it is no such note."""
    name, _, text = note.partition(" ")
    try:
        found: Bytes = np.frombuffer(bytes.fromhex(text), dtype=np.uint8).copy()
    except ValueError:
        return None
    return found if name == dtype.name and len(found) == count * dtype.itemsize else None


def _read(extent: Extent) -> Bytes:
    out: Bytes = np.empty(extent.nbytes, dtype=np.uint8)
    reader = Reader()
    try:
        extent.fill(reader, out, 0, extent.nbytes)
    finally:
        reader.close()
    return out
