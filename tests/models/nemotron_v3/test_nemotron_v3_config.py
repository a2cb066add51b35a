"""What configs say, how the tree is built from them, and what a forward pass accepts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _nemotron_v3 import (
    D1,
    GROUPS,
    MAMBA,
    REPEATED,
    TOLERANCE,
    config_of,
    fresh,
    load,
    predictions,
    relative,
    run,
    some_ids,
)
from torch import nn

from mtp_convert.models.mtp import MTPConfig
from mtp_convert.models.nemotron_v3 import (
    BackendConfig,
    ModelClass,
    MoEConfig,
    NemotronHForCausalLM,
    NemotronV3Model,
    NemotronV3MTPSublayer,
    build_mtp_config_from_hf,
    build_nemotron_v3_mtp,
    parse_mtp_layer_pattern,
)
from mtp_convert.models.nemotron_v3.config import mtp_block_types
from mtp_convert.models.nemotron_v3.layers import NemotronV3Block, Numerics


def test_patterns() -> None:
    assert parse_mtp_layer_pattern("*E") == ["attention", "moe"]
    assert parse_mtp_layer_pattern("M*-E") == ["mamba", "attention", "mlp", "moe"]
    with pytest.raises(ValueError, match="MTP layer pattern is empty"):
        parse_mtp_layer_pattern("")
    with pytest.raises(ValueError, match=r"Unknown MTP layer symbol in '\*X': \['X'\]"):
        parse_mtp_layer_pattern("*X")


def test_block_types_of_a_depth() -> None:
    words = ["full_attention", "linear_attention", "attention", "mamba", "mlp", "moe"]
    both = SimpleNamespace(mtp_hybrid_override_pattern="E", mtp_layers_block_type=words)
    assert mtp_block_types(both) == ["moe"]
    listed = SimpleNamespace(mtp_layers_block_type=words)
    assert mtp_block_types(listed) == ["attention", "mamba", "attention", "mamba", "mlp", "moe"]
    assert mtp_block_types(SimpleNamespace()) is None
    with pytest.raises(ValueError, match=r"mtp_layers_block_type has unknown block types \['rnn'\]"):
        mtp_block_types(SimpleNamespace(mtp_layers_block_type=["moe", "rnn"]))


def test_mtp_configs() -> None:
    config = config_of(MAMBA)
    assert build_mtp_config_from_hf(config) == MTPConfig(2, "M*-E", 0.1, False)
    changed = build_mtp_config_from_hf(
        config, loss_scaling_factor=0.3, num_nextn_predict_layers=3, use_repeated_layer=True
    )
    assert changed == MTPConfig(3, "M*-E", 0.3, True)
    assert not build_mtp_config_from_hf(config, num_nextn_predict_layers=0).enabled
    assert build_mtp_config_from_hf(SimpleNamespace()) == MTPConfig()
    listed = SimpleNamespace(num_nextn_predict_layers=2, mtp_layers_block_type=["attention", "moe"])
    assert build_mtp_config_from_hf(listed) == MTPConfig(2, "*E")
    with pytest.raises(ValueError, match="2 MTP depths, but the config has neither"):
        build_mtp_config_from_hf(SimpleNamespace(num_nextn_predict_layers=2))


def test_where_fusion_and_final_norms_are() -> None:
    model = load(GROUPS)  # two depths of *E
    assert model.mtp is not None
    flags = [(hasattr(s, "eh_proj"), hasattr(s, "final_layernorm"), s.layer_idx) for s in model.mtp.layers]
    assert flags == [(True, False, 6), (False, True, 7), (True, False, 8), (False, True, 9)]
    single = build_nemotron_v3_mtp(config_of(D1), MTPConfig(2, "E"), block_types=["moe"])
    assert all(hasattr(s, "eh_proj") and hasattr(s, "final_layernorm") for s in single.layers)
    shared = load(REPEATED)
    assert shared.mtp is not None
    assert (shared.mtp.num_depths, len(shared.mtp.layers)) == (2, 2)
    with pytest.raises(ValueError, match="2 entries, expected pattern_length 1"):
        build_nemotron_v3_mtp(config_of(D1), MTPConfig(1, "E"), block_types=["moe", "mlp"])
    with pytest.raises(ValueError, match="at least one depth"):
        build_nemotron_v3_mtp(config_of(D1), MTPConfig())


def test_a_sublayer_alone() -> None:
    torch.manual_seed(0)
    config = config_of(D1)
    sublayer = NemotronV3MTPSublayer(config, 6, "attention", has_fusion=True, has_final_norm=True)
    plain = NemotronV3MTPSublayer(config, 7, "mlp", has_fusion=False, has_final_norm=False)
    hidden, embedded = torch.randn(2, 1, 5, 32).unbind(0)
    with torch.no_grad():
        for p in sublayer.parameters():
            p.add_(0.1 * torch.randn_like(p))
        fused = sublayer.eh_proj(torch.cat([sublayer.enorm(embedded), sublayer.hnorm(hidden)], dim=-1))
        block = NemotronV3Block.forward(sublayer, fused)
        expected = sublayer.final_layernorm(block)
        found = sublayer(hidden, embed_input=embedded, position_ids=torch.arange(5)[None])
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(plain(hidden), hidden + plain.mixer(plain.norm(hidden)))
    with pytest.raises(ValueError, match="sub-layer 6 needs an embed_input"):
        sublayer(hidden)
    with pytest.raises(ValueError, match="sub-layer 7 takes no embed_input"):
        plain(hidden, embed_input=embedded)


def test_the_input_config_is_left_alone() -> None:
    config = config_of(D1)
    before = config.to_dict()
    model = NemotronHForCausalLM(config, BackendConfig(experts="eager"), moe_overrides={"num_experts_per_tok": 1})
    assert config.to_dict() == before
    assert model.config.num_experts_per_tok == 1
    assert model.get_experts_implementation() == {"": "eager"}


def test_experts_can_be_configured() -> None:
    model = NemotronV3Model(config_of(D1), moe_overrides={"n_routed_experts": 4, "moe_latent_size": 8})
    assert model.moe_config is not None
    assert model.moe_config.n_routed_experts == 4
    assert model.state_dict()["layers.2.mixer.experts.up_proj"].shape == (4, 24, 8)
    given = MoEConfig(4, 3, 16, 20, routed_scaling_factor=1.5)
    model = NemotronV3Model(config_of(D1), moe_config=given)
    assert model.moe_config == given
    gate = model.layers["2"].get_submodule("mixer.gate")
    assert (gate.top_k, gate.routed_scaling_factor) == (3, 1.5)
    with pytest.raises(ValueError, match="moe_config and moe_overrides cannot both"):
        NemotronV3Model(config_of(D1), moe_config=given, moe_overrides={})


def test_a_dense_model_has_no_experts() -> None:
    dense = {"layers_block_type": ["linear_attention", "mlp", "full_attention"], "num_nextn_predict_layers": 0}
    model = fresh(D1, **dense, mtp_layers_block_type=["full_attention", "mlp"], n_routed_experts=1)
    assert model.model.moe_config is None
    assert model.mtp is None
    assert model.generate(some_ids(1, 4), max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"n_group": 3}, "8 experts in 3 groups"),
        ({"n_group": 8}, "8 experts in 8 groups, expected equal groups of at least 2"),
        ({"n_group": 4, "topk_group": 5}, "topk_group is 5, expected 1 to 4"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "is 3, expected 1 to 2"),
        ({"tie_word_embeddings": True, "num_experts_per_tok": 0}, "num_experts_per_tok is 0.*; tie_word_embeddings"),
    ],
)
def test_configs_that_cannot_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NemotronHForCausalLM(config_of(D1, **changes))


def test_unknown_block_types() -> None:
    with pytest.raises(ValueError, match="block type 'rnn', expected one of"):
        NemotronV3Block(config_of(D1), 0, "rnn", Numerics())  # type: ignore[arg-type]


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_implementations_of_experts_agree(experts: Any) -> None:  # noqa: ANN401
    ids = some_ids(2, 7)
    found = run(load(D1, backend=BackendConfig(experts=experts)), ids).logits
    assert relative(found, run(load(D1), ids).logits) < TOLERANCE


# The forward pass


def test_logits_to_keep() -> None:
    model, ids = load(D1), some_ids(2, 9)
    every = run(model, ids).logits
    assert torch.equal(run(model, ids, logits_to_keep=0).logits, every)
    assert relative(run(model, ids, logits_to_keep=3).logits, every[:, -3:]) < TOLERANCE
    places = torch.tensor([7, 0, 2])
    assert relative(run(model, ids, logits_to_keep=places).logits, every[:, places]) < TOLERANCE
    assert run(model, ids, logits_to_keep=torch.tensor([], dtype=torch.long)).logits.shape == (2, 0, 64)


def test_hidden_states_are_returned_on_demand() -> None:
    model, ids = load(D1), some_ids(1, 5)
    assert run(model, ids).hidden_states is None
    (hidden,) = run(model, ids, output_hidden_states=True).hidden_states
    assert torch.equal(hidden, model.model(ids))
    model.config.output_hidden_states = True
    assert run(model, ids).hidden_states is not None
    assert run(model, ids, output_hidden_states=False).hidden_states is None


def test_embeddings_instead_of_ids() -> None:
    model, ids = load(MAMBA), some_ids(2, 9)
    embeds = model.model.embed(ids)
    by_ids, by_embeds = predictions(run(model, ids)), predictions(run(model, inputs_embeds=embeds))
    assert torch.equal(by_ids[0], by_embeds[0])
    for k in (1, 2):  # behind the row, ids are followed by token 0 and embeddings by zeros
        assert relative(by_embeds[k][:, :-k], by_ids[k][:, :-k]) < TOLERANCE
        assert relative(by_embeds[k][:, -k:], by_ids[k][:, -k:]) > 1e-3
    both = run(model, some_ids(2, 9, seed=5), inputs_embeds=embeds)
    assert torch.equal(both.logits, by_ids[0])
    model.set_input_embeddings(nn.Identity())
    assert torch.equal(run(model, inputs_embeds=embeds).logits, by_ids[0])


def test_masks_in_every_form() -> None:
    model, ids = load(D1), some_ids(2, 7)
    expected = run(model, ids).logits
    causal = model._make_causal_mask(7, 7, 2, torch.float32, torch.device("cpu"))
    for options in (
        {"attention_mask": torch.ones(2, 7)},
        {"attention_mask": causal},
        {"attention_mask": causal == 0},
        {"causal_mask_mapping": {"full_attention": causal}},
        {"padding_mask": torch.zeros(2, 7, dtype=torch.bool)},
    ):
        found = predictions(run(model, ids, **options))
        assert relative(found[0], expected) < TOLERANCE
    mask = torch.ones(2, 7)
    mask[0, -2:] = 0
    padded = run(model, ids, attention_mask=mask).logits
    assert torch.equal(run(model, ids, padding_mask=mask == 0).logits, padded)
    assert relative(padded[0, :5], expected[0, :5]) < TOLERANCE


def test_causal_masks() -> None:
    mask = NemotronHForCausalLM._make_causal_mask(2, 4, 3, torch.float16, torch.device("cpu"))
    assert mask.shape == (3, 1, 2, 4)
    assert mask.dtype == torch.float16
    assert (mask[0, 0] == 0).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert (NemotronHForCausalLM._make_causal_mask(1, 9, 1, torch.float32, torch.device("cpu")) == 0).all()


def test_accessors() -> None:
    model = load(D1)
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    head = nn.Linear(32, 64, bias=False)
    model.set_output_embeddings(head)
    assert model.lm_head is head
    assert (model.device, model.dtype, model.main_input_name) == (torch.device("cpu"), torch.float32, "input_ids")
    assert ModelClass is NemotronHForCausalLM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either input_ids or inputs_embeds is needed"),
        ({"input_ids": some_ids(1, 4), "logits_to_keep": -1}, "logits_to_keep is -1"),
        ({"input_ids": some_ids(1, 4), "labels": some_ids(1, 4), "logits_to_keep": 2}, "labels need the logits of all"),
        ({"input_ids": some_ids(1, 4), "labels": some_ids(1, 5)}, "labels have 5 positions, expected 4"),
        ({"input_ids": some_ids(1, 4), "attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\)"),
        ({"input_ids": some_ids(1, 4), "attention_mask": torch.ones(1, 1, 4, 5)}, r"expected \(1, 4\) or"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(load(D1), **options)
