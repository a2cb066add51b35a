"""The part of Multi-Token Prediction (MTP) that is the same in every model: depths, their inputs, their order.

Depth k = 0, 1, .. D - 1 sees at position t the hidden state of depth k - 1 (of the backbone for k = 0) and the
embedding of token t + k + 1, and predicts token t + k + 2 through the model's own LM head. What a sub-layer computes
is the model's business and comes from a factory. Symbols: B rows, S positions, H hidden size, D depths, P sub-layers
of one depth.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from torch import Tensor, nn

from mtp_convert.models.mtp_inputs import (
    MTPContextParallelInputs,
    prepare_mtp_context_parallel_inputs,
    roll_tensor,
    shift_packed_tensor,
)

__all__ = [
    "MTPConfig",
    "MTPContextParallelInputs",
    "MTPModule",
    "get_mtp_loss_scaling_factor",
    "prepare_mtp_context_parallel_inputs",
    "roll_tensor",
    "shift_packed_tensor",
]

EmbedFn = Callable[[Tensor], Tensor]  # token ids [B, S] -> embeddings [B, S, H]

_OLDER_ORDER = ("input_ids", "hidden_states", "embed_fn", "position_ids")


@dataclass(frozen=True)
class MTPConfig:
    """How many depths run and what they are made of; immutable, `dataclasses.replace` makes a changed one.

    Attributes:
        num_layers: depths that run (D); 0 turns MTP off. Megatron's `--mtp-num-layers`.
        layer_pattern: one symbol per sub-layer of a depth, e.g. "*E". Only its length is read here.
        loss_scaling_factor: weight of the mean of the D losses; one depth weighs `loss_scaling_factor / D`.
        use_repeated_layer: all depths run the same weights. Megatron's `--mtp-use-repeated-layer`.
    """

    num_layers: int = 0
    layer_pattern: str = ""
    loss_scaling_factor: float = 0.1
    use_repeated_layer: bool = False

    def __post_init__(self) -> None:
        if self.num_layers < 0:
            raise ValueError(f"num_layers is {self.num_layers}, expected 0 or more")

    @property
    def pattern_length(self) -> int:
        """Sub-layers of one depth (P)."""
        return len(self.layer_pattern)

    @property
    def num_physical_depths(self) -> int:
        """Depths that have weights of their own: D, or 1 if all depths share them."""
        return min(self.num_layers, 1) if self.use_repeated_layer else self.num_layers

    @property
    def total_sublayers(self) -> int:
        """Length of the flat sub-layer list."""
        return self.num_physical_depths * self.pattern_length

    @property
    def enabled(self) -> bool:
        """Whether there is anything to run."""
        return self.num_layers > 0 and self.pattern_length > 0


def get_mtp_loss_scaling_factor(model: nn.Module, default: float = 0.1) -> float:
    """`model.mtp_config.loss_scaling_factor`, or `default` for a model without one."""
    config = getattr(model, "mtp_config", None)
    return float(getattr(config, "loss_scaling_factor", default))


class MTPModule(nn.Module):
    """D depths of P sub-layers in one flat list, `layers.{physical depth * P + s}`, as released names number them.

    Args:
        mtp_config: depths, pattern, weight sharing.
        block_types_per_sublayer: P words that the factory understands; this class passes them on unread.
        sublayer_factory: called with the keywords `global_idx` (place in the flat list), `depth` (physical),
            `sublayer_idx` (0 .. P - 1), `block_type`, `has_fusion` (first of its depth: the module owns `enorm`,
            `hnorm`, `eh_proj`) and `has_final_norm` (last of its depth: it owns `final_layernorm`). The module it
            returns is called as `sublayer(hidden_states, **kwargs)`; with fusion also with `embed_input` [B, S, H].

    Raises:
        ValueError: the config describes no depth, or there is not one block type per sub-layer.
    """

    def __init__(
        self,
        mtp_config: MTPConfig,
        block_types_per_sublayer: Sequence[str],
        sublayer_factory: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        if not mtp_config.enabled:
            raise ValueError(f"MTPModule needs at least one depth and one sub-layer, got {mtp_config}")
        length, given = mtp_config.pattern_length, len(block_types_per_sublayer)
        if given != length:
            raise ValueError(f"block_types_per_sublayer has {given} entries, expected pattern_length {length}")
        self.mtp_config = mtp_config
        self.layers = nn.ModuleList(
            sublayer_factory(
                global_idx=depth * length + index,
                depth=depth,
                sublayer_idx=index,
                block_type=block_type,
                has_fusion=index == 0,
                has_final_norm=index == length - 1,
            )
            for depth in range(mtp_config.num_physical_depths)
            for index, block_type in enumerate(block_types_per_sublayer)
        )

    @property
    def num_depths(self) -> int:
        """Depths that run (D), also where they share one physical depth."""
        return self.mtp_config.num_layers

    @property
    def pattern_length(self) -> int:
        """Sub-layers of one depth (P)."""
        return self.mtp_config.pattern_length

    def depth_layers(self, depth: int) -> list[nn.Module]:
        """The P sub-layers that run at `depth`; the same ones at every depth if they are shared."""
        start = (depth % self.mtp_config.num_physical_depths) * self.pattern_length
        return list(self.layers)[start : start + self.pattern_length]

    def forward(
        self,
        *args: Tensor | EmbedFn,
        hidden_states: Tensor | None = None,
        input_ids: Tensor | None = None,
        embed_fn: EmbedFn | None = None,
        embed_inputs: Sequence[Tensor] | None = None,
        position_ids: Tensor | None = None,
        input_ids_per_depth: Sequence[Tensor] | None = None,
        position_ids_per_depth: Sequence[Tensor] | None = None,
        **block_kwargs: object,
    ) -> list[Tensor]:
        """Run all depths; entry k of the result is what depth k computed, [B, S, H], after its final norm.

        Everything may be named. By position it is `(hidden_states)`, or, when the first argument holds integers, the
        older order `(input_ids, hidden_states, embed_fn, position_ids)`.

        Args:
            args: see above.
            hidden_states: what depth 0 continues, [B, S, H] (or [T, H], or the model's own residual stream).
            input_ids: [B, S] or [T]; depth k embeds them k + 1 places to the left. The freed places at the end hold
                token 0. Borders of packed documents are not seen: the last k + 1 positions of a document embed
                tokens of the next one, and the loss has to leave them out (`calculate_mtp_loss` with `seq_idx`).
            embed_fn: token ids -> embeddings, usually the model's input embedding.
            embed_inputs: instead of ids, one finished embedding [B, S, H] per depth.
            position_ids: [B, S] or [T] (or [axes, B, S]), rolled along with the ids and given to every sub-layer.
            input_ids_per_depth: instead of `input_ids`, one finished tensor per depth, together with
                `position_ids_per_depth`. `prepare_mtp_context_parallel_inputs` makes both, and lets nothing cross
                the border of a packed document.
            position_ids_per_depth: one finished tensor per depth, used as it is.
            block_kwargs: passed to every sub-layer.

        Raises:
            TypeError: an argument is missing or given twice.
            ValueError: the ids, embeddings and positions given do not fit together; all problems are named.
        """
        named = {
            "hidden_states": hidden_states,
            "input_ids": input_ids,
            "embed_fn": embed_fn,
            "position_ids": position_ids,
        }
        source = _Source(
            embed_inputs=embed_inputs,
            input_ids_per_depth=input_ids_per_depth,
            position_ids_per_depth=position_ids_per_depth,
            **_with_positional(args, named),
        )
        source.check(self.num_depths)
        outputs: list[Tensor] = []
        hidden = source.hidden_states
        steps = zip(source.embeddings(self.num_depths), source.positions(self.num_depths), strict=True)
        for depth, (embedding, positions) in enumerate(steps):
            shared = block_kwargs if positions is None else {**block_kwargs, "position_ids": positions}
            first, *others = self.depth_layers(depth)
            hidden = first(hidden, embed_input=embedding, **shared)
            for layer in others:
                hidden = layer(hidden, **shared)
            outputs.append(hidden)
        return outputs


def _with_positional(args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """`named` with the positional arguments filled in; see `MTPModule.forward` for the two orders."""
    older = bool(args) and isinstance(args[0], Tensor) and not args[0].is_floating_point()
    order = _OLDER_ORDER if older else ("hidden_states",)
    if len(args) > len(order):
        raise TypeError(f"{len(args)} arguments by position, expected at most ({', '.join(order)})")
    twice = [name for name, _ in zip(order, args, strict=False) if named[name] is not None]
    if twice:
        raise TypeError(f"given by position and by name: {', '.join(twice)}")
    named = named | dict(zip(order, args, strict=False))
    if named["hidden_states"] is None:
        raise TypeError("hidden_states is missing")
    return named


@dataclass(frozen=True)
class _Source:
    """Where embeddings and positions of the depths come from, as `MTPModule.forward` documents it."""

    hidden_states: Tensor
    input_ids: Tensor | None
    embed_fn: EmbedFn | None
    position_ids: Tensor | None
    embed_inputs: Sequence[Tensor] | None
    input_ids_per_depth: Sequence[Tensor] | None
    position_ids_per_depth: Sequence[Tensor] | None

    def check(self, num_depths: int) -> None:
        """Raise ValueError with every problem found."""
        problems = [*self._conflicts(), *self._wrong_counts(num_depths)]
        if not problems:
            problems = list(self._wrong_shapes())
        if problems:
            raise ValueError("; ".join(problems))

    def _conflicts(self) -> Iterator[str]:
        ids, finished = self.input_ids is not None, self.input_ids_per_depth is not None
        if self.embed_inputs is not None:
            if ids or finished or self.embed_fn is not None:
                yield "embed_inputs cannot be combined with input_ids, input_ids_per_depth or embed_fn"
            return
        if not (ids or finished) or self.embed_fn is None:
            yield "MTP needs embed_inputs, or embed_fn together with input_ids or input_ids_per_depth"
        if ids and finished:
            yield "input_ids cannot be combined with input_ids_per_depth"
        if finished and self.position_ids_per_depth is None:
            yield "input_ids_per_depth and position_ids_per_depth must be provided together"
        if ids and not finished and self.position_ids_per_depth is not None:
            yield (
                "position_ids_per_depth requires precomputed embed_inputs or input_ids_per_depth; "
                "it cannot be combined with rank-local input_ids rolling"
            )

    def _wrong_counts(self, num_depths: int) -> Iterator[str]:
        for name in ("embed_inputs", "input_ids_per_depth", "position_ids_per_depth"):
            given = getattr(self, name)
            if given is not None and len(given) != num_depths:
                yield f"{name} length {len(given)} does not match num_depths {num_depths}"

    def _wrong_shapes(self) -> Iterator[str]:
        for depth, positions in enumerate(self.position_ids_per_depth or ()):
            expected = self._token_shape(depth)
            shape = tuple(positions.shape)
            several_axes = len(shape) == 3 and len(expected) == 2 and shape[1:] == expected
            if shape != expected and not several_axes:
                yield f"MTP depth {depth + 1} position_ids shape {shape} does not match token shape {expected}"

    def _token_shape(self, depth: int) -> tuple[int, ...]:
        if self.position_ids is not None:
            return tuple(self.position_ids.shape)
        if self.input_ids_per_depth is not None:
            return tuple(self.input_ids_per_depth[depth].shape)
        assert self.embed_inputs is not None
        return tuple(self.embed_inputs[depth].shape[:-1])

    def embeddings(self, num_depths: int) -> Iterator[Tensor]:
        """One [B, S, H] per depth, made when its depth runs."""
        if self.embed_inputs is not None:
            yield from self.embed_inputs
            return
        assert self.embed_fn is not None
        for ids in self.input_ids_per_depth or _rolled(self.input_ids, num_depths):
            yield self.embed_fn(ids)

    def positions(self, num_depths: int) -> Iterator[Tensor | None]:
        """What every sub-layer of a depth gets as `position_ids`; None for no such argument."""
        if self.position_ids_per_depth is not None:
            yield from self.position_ids_per_depth
        elif self.position_ids is not None:
            yield from _rolled(self.position_ids, num_depths)
        else:
            yield from repeat(None, num_depths)


def _rolled(t: Tensor | None, count: int) -> Iterator[Tensor]:
    """`t` [.., S] one, two, .. `count` places to the left."""
    assert t is not None
    for _ in range(count):
        t = roll_tensor(t)
        yield t
