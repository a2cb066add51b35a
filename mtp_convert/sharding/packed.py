"""Experts that one rank holds in two tensors, as Megatron-Core's GroupedMLP did until 0.16, taken apart.

    weight1 [H, n * X]   in memory [n, H, X]: for every expert the transpose of its first matrix
    weight2 [n * I, H]   in memory [n, I, H]: the transpose of its second

n experts of the rank   H hidden   I inner size   X inner size, twice if gated

Every expert is one run of bytes, so that it becomes an entry of its own, `weight1.{expert}`, without being moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

from mtp_convert.containers.megatron_legacy import RankFile
from mtp_convert.containers.torch_zip import TensorBytes

MODULE = ".mlp.experts."
SPLIT = {f"{MODULE}weight1": 1, f"{MODULE}weight2": 0}  # end of the name -> the dimension that counts experts


def unpacked(files: Mapping[str, RankFile], experts: int) -> dict[str, RankFile]:
    """The same files with every packed expert as an entry; `experts` are those of one rank."""
    return {name: replace(file, models=_models(file, experts)) for name, file in files.items()}


def _models(file: RankFile, experts: int) -> dict[str, dict[str, TensorBytes]]:
    return {key: dict(_entries(model, experts)) for key, model in file.models.items()}


def _entries(model: Mapping[str, TensorBytes], experts: int) -> Iterator[tuple[str, TensorBytes]]:
    for name, tensor in model.items():
        dim = next((d for end, d in SPLIT.items() if name.endswith(end)), None)
        if dim is None or len(tensor.shape) != 2 or tensor.shape[dim] % experts:
            yield name, tensor
            continue
        share = tensor.shape[dim] // experts
        shape = (tensor.shape[0], share) if dim else (share, tensor.shape[1])
        size = prod(shape) * tensor.dtype.itemsize
        yield from ((f"{name}.{e}", TensorBytes(tensor.dtype, shape, tensor.start + e * size)) for e in range(experts))
