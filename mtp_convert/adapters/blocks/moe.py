"""Mixture of experts with its pre-norm, in Megatron's names and in those of DeepSeek and Qwen.

H hidden   E experts   I expert inner size   S shared expert's inner size   L what experts see (H, or a latent size)
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_convert.adapters.blocks.base import halves, te, with_hf
from mtp_convert.mapping.ops import Concat, Permute
from mtp_convert.mapping.rules import Block, Param, Row, only, rule


@dataclass(frozen=True, slots=True)
class Moe:
    """Sizes of a mixture of experts; S is 0 without a shared expert, `latent` None when experts see the hidden size.

    router_bias: a bias added to the scores for the choice alone. shared_gate: the shared expert has a sigmoid gate.
    scored: shared experts that the router scores, behind the others. zero: experts without weights that it may choose,
    behind the others. normed: whether the block has a norm of its own. wide_router: the router's weight is released in
    float32, and stays in its stored dtype when everything else is cast.
    """

    H: int
    E: int
    I: int  # noqa: E741 - the field's letter for the expert width
    S: int
    latent: int | None = None
    gated: bool = False
    router_bias: bool = True
    shared_gate: bool = False
    scored: int = 0
    zero: int = 0
    normed: bool = True
    wide_router: bool = False

    @property
    def first(self) -> tuple[str, ...]:
        """Params of an expert's first matrix, in Megatron's row order."""
        return ("gate", "up") if self.gated else ("up",)


def moe(d: Moe) -> Block:
    """The numbers of one expert are as in a dense MLP."""
    L = d.latent or d.H
    params = [
        *([Param("norm", (d.H,))] if d.normed else []),
        Param("router", (d.E + d.scored + d.zero, d.H), high_precision=d.wide_router, unquantised=True),
        *(Param(f"experts.{{e}}.{p}", (d.I, L), cut=0) for p in d.first),
        Param("experts.{e}.down", (L, d.I), cut=1),
    ]
    rows: list[Row] = [
        *([rule("{moe_norm}", "norm")] if d.normed else []),
        rule("mlp.router.weight", "router"),
        *(te("pre_mlp_layernorm") if d.normed else ()),
        *_experts(d),
    ]
    if d.router_bias:
        params.append(Param("router_bias", (d.E + d.zero,), high_precision=True))
        rows.append(rule("mlp.router.expert_bias", "router_bias"))
    for more, names in (_shared(d), _latent(d)):
        params += more
        rows += names
    return Block(tuple(params), {"megatron": tuple(rows)}, {"e": range(d.E)})


def _experts(d: Moe) -> tuple[Row, ...]:
    """Stacked in torch_dist (if whole); a grouped layer numbers its weights, and a list of experts its modules.

    Until Megatron-Core 0.16 there was a layer that packed the experts of a rank, transposed (see `sharding.packed`).
    """
    first = tuple(f"experts.{{e}}.{p}" for p in d.first)

    def fc(name: str, suffix: str = "", over: tuple[str, ...] = ()) -> tuple[Row, ...]:
        fc1, fc2 = (f"mlp.experts.{name}linear_fc{n}" for n in (1, 2))
        stacked = (rule(f"{fc1}.weight", *first, op=Concat(0), over=over),)
        return (
            *(stacked if over else halves(f"{fc1}.weight{suffix}", *first)),
            rule(f"{fc2}.weight{suffix}", "experts.{e}.down", over=over),
            *te(fc1, fc2, over=over),
        )

    return (
        *only(*fc("experts.", over=("e",)), keys="dist", shards="whole"),
        *only(*fc("experts.{e}."), keys="dist", shards="single"),
        *only(*fc("", "{e}"), keys="state_dict", experts="grouped"),
        *only(*fc("local_experts.{e}."), keys="state_dict", experts="sequential"),
        *only(
            rule("mlp.experts.weight1.{e}", *first, op=Permute((1, 0), Concat(0))),
            rule("mlp.experts.weight2.{e}", "experts.{e}.down", op=Permute((1, 0))),
            keys="state_dict",
            experts="packed",
        ),
    )


def _shared(d: Moe) -> tuple[list[Param], list[Row]]:
    if not d.S:
        return [], []
    module = "mlp.shared_experts"
    params = [
        *(Param(f"shared.{p}", (d.S, d.H), cut=0) for p in d.first),
        Param("shared.down", (d.H, d.S), cut=1),
    ]
    rows: list[Row] = [
        *halves(f"{module}.linear_fc1.weight", *(f"shared.{p}" for p in d.first)),
        rule(f"{module}.linear_fc2.weight", "shared.down"),
        *te(f"{module}.linear_fc1", f"{module}.linear_fc2"),
    ]
    if d.shared_gate:
        params.append(Param("shared_gate", (1, d.H)))
        rows.append(rule(f"{module}.gate_weight", "shared_gate"))
    return params, rows


def _latent(d: Moe) -> tuple[list[Param], list[Row]]:
    if not d.latent:
        return [], []
    params = [Param("latent_in", (d.latent, d.H)), Param("latent_out", (d.H, d.latent))]
    rows: list[Row] = [
        rule("mlp.fc1_latent_proj.weight", "latent_in"),
        rule("mlp.fc2_latent_proj.weight", "latent_out"),
        *te("mlp.fc1_latent_proj", "mlp.fc2_latent_proj"),
    ]
    return params, rows


def llama_moe(
    d: Moe,
    norm: str = "post_attention_layernorm",
    *,
    module: str = "mlp",
    router: str = "gate",
    bias: str = "gate.e_score_correction_bias",
    shared: str = "shared_experts",
    split: bool = True,
    word: str = "experts",
) -> Block:
    """Gated experts with the Hugging Face names of DeepSeek and Qwen.

    `split`: released one by one (the layout has a word, named by `word`, that says "split" or "stacked", for releases
    that store what transformers holds in memory); the native tree always stacks them.
    """
    rows: list[Row] = [rule(f"{norm}.weight", "norm")] if d.normed else []
    rows.append(rule(f"{module}.{router}.weight", "router"))
    if d.router_bias:
        rows.append(rule(f"{module}.{bias}", "router_bias"))
    if d.S:
        rows += [rule(f"{module}.{shared}.{p}_proj.weight", f"shared.{p}") for p in (*d.first, "down")]
    if d.shared_gate:
        rows.append(rule(f"{module}.shared_expert_gate.weight", "shared_gate"))
    single = [rule(f"{module}.experts.{{e}}.{p}_proj.weight", f"experts.{{e}}.{p}") for p in (*d.first, "down")]
    first = tuple(f"experts.{{e}}.{p}" for p in d.first)
    stacked = [
        rule(f"{module}.experts.{'_'.join(d.first)}_proj", *first, op=Concat(0), over=("e",)),
        rule(f"{module}.experts.down_proj", "experts.{e}.down", over=("e",)),
    ]
    either = (*only(*single, **{word: "split"}), *only(*stacked, **{word: "stacked"})) if split else tuple(stacked)
    return with_hf(moe(d), *rows, *either, native=(*rows, *stacked))
