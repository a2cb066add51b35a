"""Where NeMo AutoModel differs from transformers: each difference on its own; and what stays in float32."""

from typing import Any, Literal

import pytest
import torch
from _dsv4 import D2, PAD, TOLERANCE, golden, predictions, raw_config, relative, run, scrambled, training
from torch.nn import functional as F
from transformers import DeepseekV4ForCausalLM as TransformersModel

from mtp_convert.models.deepseek_v4 import BackendConfig, DeepseekV4ForCausalLM, MoEConfig

RAW = MoEConfig(normalization="configured")


def routed(model: DeepseekV4ForCausalLM, name: str, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of a router's choice and the weights it gives them, each [tokens, top_k]."""
    router: Any = model.get_submodule(f"{name}.mlp.gate")
    with torch.no_grad():
        logits, weights, experts = router(hidden)
    return F.softplus(logits).sqrt().gather(1, experts), weights


@pytest.mark.parametrize("layer", ["model.layers.2", "mtp.layers.0"])
@pytest.mark.parametrize(
    ("changes", "moe_config", "sums_to_one"),
    [
        ({"num_experts_per_tok": 1}, MoEConfig(), True),
        ({"num_experts_per_tok": 1}, RAW, False),
        ({"norm_topk_prob": False}, MoEConfig(), True),
        ({"norm_topk_prob": False}, RAW, False),
        ({}, RAW, True),
    ],
)
def test_expert_weights_are_normalised_or_raw(
    layer: str, changes: dict[str, Any], moe_config: MoEConfig, sums_to_one: bool
) -> None:
    model = scrambled(raw_config(D2, **changes), moe_config=moe_config)
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    scores, weights = routed(model, layer, hidden)
    expected = scores / scores.sum(-1, keepdim=True) if sums_to_one else scores
    torch.testing.assert_close(weights, 1.5 * expected)


def test_top_1_of_transformers_is_the_default() -> None:
    config = raw_config(D2, num_experts_per_tok=1)
    ours = scrambled(config)
    theirs = TransformersModel(ours.config)
    theirs.load_state_dict({n: t for n, t in ours.state_dict().items() if not n.startswith("mtp.")})
    ids = golden(D2)["input_ids"]
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
    assert relative(run(ours, ids).logits, expected) < TOLERANCE
    raw = scrambled(config, moe_config=RAW)
    assert relative(run(raw, ids).logits, expected) > 1e-2


def test_token_id_routing_normalises_either_way() -> None:
    model = scrambled(raw_config(D2, norm_topk_prob=False), moe_config=RAW)
    router: Any = model.get_submodule("model.layers.0.mlp.gate")
    with torch.no_grad():
        _, weights, _ = router(torch.ones(1, 3, 32), torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(weights.sum(-1), torch.full((3,), 1.5))


@pytest.mark.parametrize(
    ("where", "changed"), [("always", [False, False]), ("mtp", [True, False]), ("never", [True, True])]
)
def test_padding_is_routed_where_asked(where: Literal["always", "mtp", "never"], changed: list[bool]) -> None:
    """`changed`: whether the experts of backbone and MTP are left out for padded tokens."""
    given = golden(PAD)
    model = training(PAD, moe_config=MoEConfig(route_padding=where))
    calls: dict[str, int] = {}
    for name in ("model.layers.2", "mtp.layers.0"):
        experts = model.get_submodule(f"{name}.mlp.experts")
        experts.register_forward_pre_hook(lambda _, args, name=name: calls.update({name: len(args[0])}))
    padded = run(model, given["input_ids"], attention_mask=given["attention_mask"])
    tokens, valid = given["input_ids"].numel(), int(given["attention_mask"].sum())
    assert list(calls.values()) == [valid if left_out else tokens for left_out in changed]
    plain = run(training(PAD), given["input_ids"], attention_mask=given["attention_mask"])
    own = given["attention_mask"].bool()
    for one, other in zip(predictions(padded), predictions(plain), strict=True):
        torch.testing.assert_close(one[own], other[own], rtol=0, atol=1e-5)


def test_a_padding_mask_of_its_own_is_for_routing_alone() -> None:
    ids = golden(PAD)["input_ids"]
    model = training(PAD, moe_config=MoEConfig(route_padding="never"))
    padding = torch.zeros_like(ids, dtype=torch.bool)
    padding[:, 20:] = True
    whole, partly = run(model, ids), run(model, ids, padding_mask=padding)
    assert relative(partly.logits[:, :20], whole.logits[:, :20]) < TOLERANCE
    assert relative(partly.logits[:, 20:], whole.logits[:, 20:]) > 1e-2


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
def test_other_expert_kernels_compute_the_same(experts: Literal["batched_mm", "grouped_mm"]) -> None:
    ids = golden(D2)["input_ids"]
    plain = run(training(D2), ids)
    output = run(training(D2, backend=BackendConfig(experts=experts)), ids)
    for one, other in zip(predictions(output), predictions(plain), strict=True):
        assert relative(one, other) < TOLERANCE


def test_a_float32_head_multiplies_in_float32() -> None:
    ids = golden(D2)["input_ids"]
    model = training(D2, dtype=torch.bfloat16, backend=BackendConfig(float32_head=True))
    output = run(model, ids, output_hidden_states=True)
    assert output.hidden_states is not None
    weight = model.get_parameter("lm_head.weight")
    assert weight.dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16
    with torch.no_grad():
        expected = (output.hidden_states.float() @ weight.T).bfloat16()
    assert torch.equal(output.logits, expected)
    assert training(D2, dtype=torch.bfloat16).get_parameter("lm_head.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("layer", ["model.layers.1", "model.layers.2", "mtp.layers.0"])
def test_a_float32_compressor_pools_in_float32(layer: str) -> None:
    backend = BackendConfig(float32_compressor=True)
    narrow = training(D2, dtype=torch.bfloat16, backend=backend)
    wide, plain = training(D2), training(D2, dtype=torch.bfloat16)
    hidden = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    residual = torch.zeros(1, 32, 24)  # of the query: it only ranks entries
    positions = torch.arange(32).unsqueeze(0)

    def entries(model: DeepseekV4ForCausalLM, dtype: torch.dtype) -> torch.Tensor:
        compressor = model.get_submodule(f"{layer}.self_attn.compressor")
        with torch.no_grad():
            pooled: torch.Tensor = compressor(hidden.to(dtype), residual.to(dtype), positions, None, 0)[0]
        return pooled

    assert entries(narrow, torch.bfloat16).dtype == torch.bfloat16
    # The rotary tables are bfloat16 in the narrow model: compare what they do not turn, the first 8 of 16 features.
    expected = entries(wide, torch.float32)[..., :8]
    assert torch.equal(entries(narrow, torch.bfloat16)[..., :8], expected.bfloat16())
    assert not torch.equal(entries(plain, torch.bfloat16)[..., :8], expected.bfloat16())
    assert run(narrow, golden(D2)["input_ids"]).logits.isfinite().all()


def test_casting_spares_what_stays_in_float32() -> None:
    loaded = training(D2, dtype=torch.bfloat16)
    cast = training(D2).to(torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        assert cast.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(cast.state_dict()[name], tensor), name
    buffers = dict(cast.named_buffers())
    assert buffers["model.rotary_emb.main_inv_freq"].dtype == torch.float32
    ids = golden(D2)["input_ids"]
    assert torch.equal(run(loaded, ids).logits, run(cast, ids).logits)


def test_gradients_of_spared_parameters_keep_their_type() -> None:
    model = training(D2)
    model(golden(D2)["input_ids"], labels=golden(D2)["input_ids"]).loss.backward()
    model.to(torch.bfloat16)
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())


def test_casting_to_more_casts_everything() -> None:
    model = training(D2).double()
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float64, torch.int64}


def test_the_float32_parameters_of_mtp() -> None:
    state = training(D2, dtype=torch.bfloat16).state_dict()
    own = {
        n.removeprefix("mtp.layers.0.")
        for n, t in state.items()
        if n.startswith("mtp.layers.0.") and t.dtype == torch.float32
    }
    assert {"enorm.weight", "hnorm.weight", "norm.weight", "hc_head.hc_fn", "self_attn.sinks", "ffn_hc.scale"} < own
    assert own.isdisjoint({"e_proj.weight", "h_proj.weight", "mlp.gate.weight", "mlp.experts.down_proj"})
