"""Mistakes that a verification must catch and name: damaged values, and conversions by a wrong table.

Each mistake makes a checkpoint B from a healthy source A, and says by which tensors of A it should be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from _families import config_of, family_of, random_folder, random_tensors
from _kit import Tensors, convert, hf_folder
from _swaps import swaps


@dataclass(frozen=True)
class Mistake:
    """`make(folder)` writes A to folder/a and B to folder/b; `tensors` are A's that the culprit must be among."""

    name: str
    make: Callable[[Path], None]
    tensors: frozenset[str]


def damaged(family: str, name: str, change: Callable[[Tensors], set[str]]) -> Mistake:
    """B is the conversion of a source in which `change` has changed these tensors."""
    tensors = random_tensors(family)
    touched = change(tensors)
    assert touched

    def make(folder: Path) -> None:
        random_folder(family, folder / "a")
        convert(hf_folder(folder / "source", tensors, config_of(family)), folder / "b", "megatron")

    return Mistake(f"{family}: {name}", make, frozenset(touched))


def wrong_table(family: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mistake]:
    """B is converted by a table in which two params changed places."""
    family_object, dims = family_of(family)
    layout = family_object.layout("hf", dims)
    for swap in swaps(layout):

        def make(folder: Path, alias: object = swap.alias) -> None:
            random_folder(family, folder / "a")
            with monkeypatch.context() as patch:
                patch.setattr("mtp_convert.convert.folding", lambda *_: (alias, ()))
                convert(folder / "a", folder / "b", "megatron")

        held = {layout.home[p][0].tensor for p in swap.params}
        yield Mistake(f"{family}: table: {swap.name}", make, frozenset(held))


def value_mistakes(family: str) -> Iterator[Mistake]:
    """Every kind of damage to values that the family has a place for."""
    for name, change in CHANGES.items():
        tensors = random_tensors(family)
        if change(tensors):
            yield damaged(family, name, change)


def matrices(tensors: Tensors, *words: str) -> list[str]:
    """Names of matrices that contain all the words."""
    return sorted(n for n, t in tensors.items() if t.ndim >= 2 and t.is_floating_point() and all(w in n for w in words))


def flip_exponent(tensors: Tensors) -> set[str]:
    """One weight of the first MTP projection, in the lowest bit of its exponent: twice or half its value."""
    found = matrices(tensors, "eh_proj") or matrices(tensors, "fc.weight") or matrices(tensors, "proj")
    name = found[0]
    flat = tensors[name].flatten()
    at = int(flat.abs().argmax())
    bits = flat.view(torch.int32)
    bits[at] ^= 1 << 23
    tensors[name] = flat.view(tensors[name].shape)
    return {name}


def zero(tensors: Tensors) -> set[str]:
    """One matrix of a decoder layer."""
    found = matrices(tensors, "layers.1.") or matrices(tensors, "proj")
    tensors[found[-1]] = torch.zeros_like(tensors[found[-1]])
    return {found[-1]}


def exchange_experts(tensors: Tensors) -> set[str]:
    """Experts 0 and 1 of one layer change places."""
    firsts = [n for n in matrices(tensors, ".experts.0.")]
    if not firsts:
        return set()
    layer = firsts[0].partition(".experts.0.")[0]
    touched = set()
    for first in (n for n in firsts if n.startswith(layer + ".")):
        second = first.replace(".experts.0.", ".experts.1.")
        tensors[first], tensors[second] = tensors[second], tensors[first]
        touched |= {first, second}
    return touched


def forget_rope_order(tensors: Tensors) -> set[str]:
    """Rows of one head's query are stored interleaved instead of in halves."""
    found = matrices(tensors, "q_proj.weight") or matrices(tensors, "q_b_proj.weight")
    if not found:
        return set()
    name = found[0]
    rows = tensors[name].shape[0]
    head = next(size for size in (16, 8, 4) if rows % size == 0)
    order = torch.arange(rows).view(-1, 2, head // 2).transpose(1, 2).flatten()
    tensors[name] = tensors[name][order].contiguous()
    return {name}


def skip_final_norm(tensors: Tensors) -> set[str]:
    """The norm behind the decoder has no weight."""
    found = [n for n in ("model.norm.weight", "backbone.norm_f.weight", "norm.weight") if n in tensors]
    for name in found:
        tensors[name] = torch.ones_like(tensors[name])
    return set(found)


def offset_norm(tensors: Tensors) -> set[str]:
    """One norm's weight is stored around 0 instead of 1."""
    name = next(n for n, t in sorted(tensors.items()) if t.ndim == 1 and "norm" in n and "layers.0." in n)
    tensors[name] = tensors[name] - 1
    return {name}


def ignore_scale(tensors: Tensors) -> set[str]:
    """One matrix without its scale: 448 times too large. No norm follows it, which would take the factor out."""
    ends = ("down_proj.weight", ".w2.weight", "o_proj.weight", "out_proj.weight")
    name = next(n for n in matrices(tensors) if n.endswith(ends))
    tensors[name] = tensors[name] * 448
    return {name}


def swap_halves(tensors: Tensors) -> set[str]:
    """The halves of an MTP projection for embedding and hidden state change places."""
    found = [n for n in matrices(tensors) if n.endswith(("eh_proj.weight", "mtp.fc.weight", "input_proj.weight"))]
    if not found:
        return set()
    half = tensors[found[0]].shape[1] // 2
    tensors[found[0]] = tensors[found[0]].roll(half, 1)
    return {found[0]}


CHANGES: dict[str, Callable[[Tensors], set[str]]] = {
    "one exponent bit": flip_exponent,
    "tensor zeroed": zero,
    "two experts exchanged": exchange_experts,
    "RoPE order forgotten": forget_rope_order,
    "final norm skipped": skip_final_norm,
    "norm offset forgotten": offset_norm,
    "scale ignored": ignore_scale,
    "projection halves swapped": swap_halves,
}
