"""Parallel sizes against the sizes of a model, in Megatron's argument names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtp_convert.errors import ConvertError, Problem
from mtp_convert.options import Options
from mtp_convert.sharding.pipeline import Chunk, Split, chunks, pattern_of
from mtp_convert.sharding.sizes import ARGUMENTS, Sizes, requested

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
}


@dataclass(frozen=True)
class Placement:
    """Where a model will lie: the sizes, how its layers are cut into chunks, and what was asked for beyond sizes."""

    sizes: Sizes
    chunks: tuple[Chunk, ...]
    split: Split

    def arguments(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """The training arguments that say the same to Megatron-LM."""
        found: dict[str, Any] = {name: getattr(self.sizes, size) for size, name in ARGUMENTS.items()}
        if self.sizes.virtual == 1:
            found[ARGUMENTS["virtual"]] = None
        if args.get("hybrid_layer_pattern"):  # its bars say what the options of other models say
            return found | {"hybrid_layer_pattern": pattern_of(args, self.chunks, self.sizes)}
        options = {
            "pipeline_model_parallel_layout": self.split.layout or None,
            "decoder_first_pipeline_num_layers": self.split.first,
            "decoder_last_pipeline_num_layers": self.split.last,
        }
        return found | {name: value for name, value in options.items() if value is not None}


def place(args: Mapping[str, Any], options: Options) -> Placement:
    """The placement that the options ask for.

    Raises:
        ConvertError: MTP001 for sizes that Megatron could not load, naming every argument that does not divide.
    """
    sizes = requested(options.parallel)
    problems = []
    for size, names in DIVIDES.items():
        n = getattr(sizes, size)
        for name in names:
            value = args.get(name)
            if isinstance(value, int) and value % n:
                problems.append(Problem(f"{size} parallel size {n} does not divide {name}", got=str(value)))
    if problems:
        raise ConvertError("MTP001", problems, hint="choose a divisor of all of them")
    split = Split(options.pipeline_layout, options.parallel.get("first"), options.parallel.get("last"))
    return Placement(sizes, chunks(args, sizes, split), split)
