"""Each difference between transformers and NeMo AutoModel against a plain computation of both rules."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from _nemotron_v3 import D1, GROUPS, TOLERANCE, config_of, fresh, relative, run, some_ids
from torch import Tensor
from torch.nn import functional as F

from mtp_convert.models.nemotron_v3 import NemotronHForCausalLM, Numerics
from mtp_convert.models.nemotron_v3.batch import Batch
from mtp_convert.models.nemotron_v3.layers import NemotronV3Attention, NemotronV3Block, NemotronV3Router
from mtp_convert.models.nemotron_v3.mamba import NemotronV3Mamba


def test_the_rules_differ_in_every_field() -> None:
    ours, theirs = Numerics(), Numerics.automodel()
    assert all(getattr(ours, f.name) != getattr(theirs, f.name) for f in fields(Numerics))


# The router


def router(numerics: Numerics, *, bias: float = 0.0, **changes: Any) -> NemotronV3Router:  # noqa: ANN401
    made = NemotronV3Router(config_of(GROUPS, **changes), numerics)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=draw))
        made.e_score_correction_bias.copy_(bias + 0.1 * torch.randn(8, generator=draw))
    return made


def routed(made: NemotronV3Router, token: Tensor, *, numerics: Numerics) -> dict[int, float]:
    """Expert -> weight for one token [H], counted out."""
    scores = (made.weight.detach().double() @ token.double()).sigmoid().tolist()
    biased = [s + float(b) for s, b in zip(scores, made.e_score_correction_bias, strict=True)]
    size = len(scores) // made.num_group
    groups = [sorted(biased[g * size : (g + 1) * size])[-2:] for g in range(made.num_group)]
    best = sorted(range(made.num_group), key=lambda g: -sum(groups[g]))[: made.topk_group]
    outside = 0.0 if numerics.masked_groups == "zero" else float("-inf")
    reachable = [b if e // size in best else outside for e, b in enumerate(biased)]
    chosen = sorted(range(len(scores)), key=lambda e: -reachable[e])[: made.top_k]
    total = sum(scores[e] for e in chosen)
    if not made.norm_topk_prob or (made.top_k == 1 and not numerics.normalize_top1):
        total = 1.0
    return {e: scores[e] / total * made.routed_scaling_factor for e in chosen}


ROUTERS: list[tuple[float, dict[str, Any]]] = [
    (0.0, {}),
    (-3.0, {"num_experts_per_tok": 4}),  # every biased score is negative, so that the 4 of other groups win as zeros
    (-3.0, {"num_experts_per_tok": 2, "topk_group": 3, "norm_topk_prob": False}),
    (0.0, {"num_experts_per_tok": 1}),
    (0.0, {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    (0.0, {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}),
]


@pytest.mark.parametrize("normalize_top1", [True, False])
@pytest.mark.parametrize("masked_groups", ["excluded", "zero"])
@pytest.mark.parametrize(("bias", "changes"), ROUTERS)
def test_routing(bias: float, changes: dict[str, Any], masked_groups: Any, normalize_top1: bool) -> None:  # noqa: ANN401
    numerics = Numerics(normalize_top1=normalize_top1, masked_groups=masked_groups)
    made = router(numerics, bias=bias, **changes)
    tokens = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    _, weights, indices = made(tokens)
    for token, w, i in zip(tokens, weights.tolist(), indices.tolist(), strict=True):
        expected = routed(made, token, numerics=numerics)
        found = dict(zip(i, w, strict=True))
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-4)


def test_both_rules_of_the_router_matter_here() -> None:
    tokens = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    chosen = [router(Numerics(masked_groups=m), bias=-3.0)(tokens)[2].sort().values for m in ("excluded", "zero")]
    assert not torch.equal(*chosen)
    top1 = [router(Numerics(normalize_top1=n), num_experts_per_tok=1)(tokens)[1] for n in (True, False)]
    assert relative(*top1) > 0.1


# The Mamba mixer


def mixer(numerics: Numerics, *, dt_bias: float = 0.0) -> NemotronV3Mamba:
    made = fresh(D1, numerics=numerics).model.layers["0"].mixer
    assert isinstance(made, NemotronV3Mamba)
    with torch.no_grad():
        made.dt_bias.add_(dt_bias)
    return made


@torch.no_grad()
def stepwise(made: NemotronV3Mamba, x: Tensor, mask: Tensor, *, low: float, mask_after_conv: bool) -> Tensor:
    """The mixer over [B, S, H], one position after the other in float64; `mask` [B, S]."""
    made = made.double()
    rows, length, _ = x.shape
    heads, size, states = made.num_heads, made.head_dim, made.ssm_state_size
    projected = made.in_proj(x.double() * mask[..., None])
    gate, channels, steps = projected.split([heads * size, made.conv_dim, heads], dim=-1)
    window = torch.zeros(rows, made.conv_dim, 4, dtype=torch.float64)
    state = torch.zeros(rows, heads, size, states, dtype=torch.float64)
    out = []
    for t in range(length):
        window = torch.cat([window[..., 1:], channels[:, t, :, None]], dim=-1)
        convolved = F.silu((window * made.conv1d.weight[:, 0]).sum(-1) + made.conv1d.bias)
        convolved = convolved * mask[:, t, None] if mask_after_conv else convolved
        u, b, c = convolved.split([heads * size, 2 * states, 2 * states], dim=-1)
        u = u.view(rows, heads, size)
        b, c = (part.view(rows, 2, states).repeat_interleave(heads // 2, dim=1) for part in (b, c))
        dt = F.softplus(steps[:, t] + made.dt_bias).clamp(min=low)
        decay = torch.exp(-dt * made.A_log.exp())
        state = decay[..., None, None] * state + (dt[..., None] * u)[..., None] * b[:, :, None]
        out.append(((state * c[:, :, None]).sum(-1) + made.D[:, None] * u).flatten(1))
    y = torch.stack(out, dim=1) * F.silu(gate)
    grouped = y.unflatten(-1, (2, -1))
    normed = grouped / (grouped.square().mean(-1, keepdim=True) + made.norm.variance_epsilon).sqrt()
    result: Tensor = made.out_proj(normed.flatten(2) * made.norm.weight)
    return result


@pytest.mark.parametrize("mask_after_conv", [True, False])
@pytest.mark.parametrize("limit", ["time_step_min", "time_step_limit"])
@pytest.mark.parametrize("dt_bias", [0.0, -9.0])
@torch.no_grad()
def test_the_mixer_over_a_padded_row(limit: Any, dt_bias: float, mask_after_conv: bool) -> None:  # noqa: ANN401
    numerics = Numerics(time_step_limit=limit, mask_after_conv=mask_after_conv)
    x = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 21)
    mask[0, :6] = 0
    found = mixer(numerics, dt_bias=dt_bias)(x, batch=Batch(padding_mask=mask))
    low = 0.001 if limit == "time_step_min" else 0.0
    plain = mixer(numerics, dt_bias=dt_bias)
    expected = stepwise(plain, x, mask, low=low, mask_after_conv=mask_after_conv)
    assert relative(found, expected) < TOLERANCE


@torch.no_grad()
def test_both_rules_of_the_mixer_matter_here() -> None:
    x = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 21)
    mask[0, :6] = 0
    for name, value, dt_bias in (("time_step_limit", "time_step_limit", -9.0), ("mask_after_conv", False, 0.0)):
        changed = replace(Numerics(), **{name: value})
        outputs = [mixer(n, dt_bias=dt_bias)(x, batch=Batch(padding_mask=mask)) for n in (Numerics(), changed)]
        assert relative(*outputs) > 100 * TOLERANCE


# The residual stream, biases, logits


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("obeyed", [True, False])
def test_the_type_of_the_residual_stream(asked: bool, obeyed: bool) -> None:
    numerics = Numerics(residual_in_fp32=obeyed)
    model = fresh(D1, numerics=numerics, residual_in_fp32=asked).to(torch.bfloat16).train()
    seen = []
    for block in model.modules():
        if isinstance(block, NemotronV3Block):
            block.register_forward_hook(lambda module, _, out: seen.append((module.layer_idx, out.dtype)))
    output = run(model, some_ids(1, 6))
    expected = torch.float32 if asked and obeyed else torch.bfloat16
    # The last block of a depth ends in a norm, which has the type of its weights.
    assert {dtype for index, dtype in seen if index != 7} == {expected}
    assert output.mtp_per_depth_h is not None
    assert {h.dtype for h in output.mtp_per_depth_h} == {torch.bfloat16}


def test_a_float32_stream_is_more_exact() -> None:
    exact = fresh(D1, std=0.05)
    wide, narrow = (
        fresh(D1, std=0.05, residual_in_fp32=True, numerics=Numerics(residual_in_fp32=r)) for r in (True, False)
    )
    ids = some_ids(2, 12)
    expected = run(exact, ids).logits
    errors = [float((run(m.to(torch.bfloat16), ids).logits - expected).norm()) for m in (wide, narrow)]
    assert errors[0] < errors[1]


def test_attention_biases() -> None:
    config = config_of(D1, attention_bias=True)
    plain, biased = (NemotronV3Attention(config, 1, Numerics(attention_bias=b)) for b in (False, True))
    assert not [name for name, _ in plain.named_parameters() if name.endswith("bias")]
    found = {name for name, _ in biased.named_parameters() if name.endswith("bias")}
    assert found == {"q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"}
    unasked = NemotronV3Attention(config_of(D1), 1, Numerics(attention_bias=True))
    assert unasked.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(1, 5, 32)
    biased.load_state_dict(
        {
            **plain.state_dict(),
            **{f"{p}_proj.bias": torch.zeros(n) for p, n in zip("qkvo", (32, 16, 16, 32), strict=True)},
        }
    )
    assert torch.equal(biased(x, batch=Batch()), plain(x, batch=Batch()))
    with torch.no_grad():
        biased.o_proj.bias.fill_(2.0)
    assert relative(biased(x, batch=Batch()), plain(x, batch=Batch()) + 2.0) < TOLERANCE


@pytest.mark.parametrize(("float32", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_type_of_logits(float32: bool, dtype: torch.dtype) -> None:
    model = NemotronHForCausalLM(config_of(D1), numerics=Numerics(float32_logits=float32), dtype=torch.bfloat16)
    output = run(model, some_ids(1, 4), labels=some_ids(1, 4))
    assert output.logits.dtype == dtype
    assert output.loss.dtype == torch.float32
