"""Parallel sizes against the sizes of a model, in Megatron's argument names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtp_convert.errors import ConvertError, Problem

# size -> model arguments that it must divide
DIVIDES: dict[str, tuple[str, ...]] = {
    "tensor": (
        "num_attention_heads",
        "num_query_groups",
        "ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "mamba_num_heads",
        "mamba_num_groups",
    ),
    "expert": ("num_experts",),
    "expert_tensor": ("moe_ffn_hidden_size",),
    "pipeline": ("num_layers",),
}


def check(args: Mapping[str, Any], parallel: Mapping[str, int]) -> None:
    """Refuse sizes that Megatron could not load.

    Raises:
        ConvertError: MTP001, naming every argument that does not divide.
    """
    problems = []
    for size, names in DIVIDES.items():
        n = parallel.get(size, 1)
        for name in names:
            value = args.get(name)
            if isinstance(value, int) and value % n:
                problems.append(Problem(f"{size} parallel size {n} does not divide {name}", got=str(value)))
    if problems:
        raise ConvertError("MTP001", problems, hint="choose a divisor of all of them")
