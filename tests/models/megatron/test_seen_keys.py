"""Which keys a query sees: windows, layers without positions, and the choice of an indexer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _golden import EXPERTS, build, check_packed, ids, settle, tiny
from torch import Tensor

from mtp_convert.models.megatron.language_model import LanguageModel
from mtp_convert.models.megatron.loading import mtp_experts

LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_head_dim": 4,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 4,
}
SPARSE: dict[str, Any] = {
    **LATENT,
    "experimental_attention_variant": "dsa",
    "dsa_indexer_n_heads": 2,
    "dsa_indexer_head_dim": 8,
    "dsa_indexer_topk": 3,
}


def model(**changes: Any) -> LanguageModel:  # noqa: ANN401
    return settle(build(tiny(**changes)))


def reach(whole: LanguageModel, length: int = 8) -> list[int]:
    """How many of the last tokens the main logits of the last position depend on."""
    row = ids(length, rows=1)

    def last(tokens: Tensor) -> Tensor:
        return whole.predict(tokens).logits[0, -1]

    seen = [i for i in range(length) if not torch.equal(last(row), last(changed(row, i)))]
    return [length - i for i in seen]


def changed(row: Tensor, place: int) -> Tensor:
    other = row.clone()
    other[0, place] = (row[0, place] + 1) % 32
    return other


@pytest.mark.parametrize(
    ("changes", "farthest"),
    [
        ({"num_layers": 1}, 8),
        ({"num_layers": 1, "window_size": (2, 0)}, 3),
        ({"num_layers": 1, "window_size": (-1, 0)}, 8),
        ({"window_size": (2, 0)}, 5),
        ({"window_size": (2, 0), "window_attn_skip_freq": 2}, 8),
        ({"window_size": (2, 0), "window_attn_skip_freq": (0, 0)}, 8),
    ],
    ids=str,
)
def test_a_window_hides_what_lies_before_it(changes: dict[str, Any], farthest: int) -> None:
    assert max(reach(model(**changes))) == farthest


def test_a_layer_without_positions_does_not_know_the_order() -> None:
    row = ids(6, rows=1)
    swapped = row[:, [1, 0, 2, 3, 4, 5]]
    for freq, blind in [(1, True), ((1,), True), ((0,), False), (None, False)]:
        whole = model(num_layers=1, no_rope_freq=freq)
        one, other = (whole.predict(tokens).logits[0, -1] for tokens in (row, swapped))
        assert torch.allclose(one, other, rtol=0, atol=1e-12) is blind


def test_mtp_layers_are_counted_from_the_first_layer_again() -> None:
    whole = model(window_size=(2, 0), window_attn_skip_freq=(1, 0), no_rope_freq=(0, 1), num_layers=2)
    inner = [getattr(layer, whole.config.mtp_inner_name).self_attention for layer in whole.mtp.layers]
    assert [(attention.before, attention.rotary) for attention in inner] == [(2, True), (None, False)]


def test_an_indexer_that_chooses_everything_changes_nothing() -> None:
    sparse, dense = model(**SPARSE | {"dsa_indexer_topk": 8}), model(**LATENT)
    state = dense.state_dict()
    for rank in ("q", "kv"):
        fused, apart = f"linear_{rank}_up_proj.layer_norm_", f"{rank}_layernorm."
        state = {name.replace(fused, apart): value for name, value in state.items()}
    missing = sparse.load_state_dict(state, strict=False).missing_keys
    assert all(".indexer." in name or name.endswith("layernorm._extra_state") for name in missing)
    for got, expected in zip(sparse.predict(ids()).mtp_logits, dense.predict(ids()).mtp_logits, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_queries_see_what_the_indexer_chose() -> None:
    whole = model(**SPARSE, num_layers=1, mtp_num_layers=None)
    embedded_SBH = torch.randn(8, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    embedded_SBH.requires_grad_()
    whole(ids(8, rows=1), decoder_input=embedded_SBH)[0, -1].sum().backward()
    assert embedded_SBH.grad is not None
    seen = set(embedded_SBH.grad.abs().sum((1, 2)).nonzero().flatten().tolist())
    chosen_BSK = whole.decoder.layers[0].self_attention.core_attention.choices[0]
    assert chosen_BSK.shape == (1, 8, 3)
    assert seen == {*chosen_BSK[0, -1].tolist(), 7}  # a residual keeps the token itself


def test_layers_may_share_a_choice() -> None:
    whole = model(**SPARSE, num_layers=4, dsa_indexer_topk_freq=2, dsa_indexer_skip_topk_offset=2)
    cores = [layer.self_attention.core_attention for layer in whole.decoder.layers]
    assert [core.source for core in cores] == [0, 1, 1, 3]
    assert [core.indexer is None for core in cores] == [False, False, True, False]
    whole.predict(ids())
    assert sorted(cores[0].choices) == [0, 1, 3]
    cores[0].choices.clear()
    x_SBH = torch.zeros(4, 1, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="layer 1, whose indexer chooses, must run before"):
        cores[2].hide(x_SBH, x_SBH, None, None)


def test_packed_sequences_do_not_see_each_other() -> None:
    check_packed(model(**SPARSE, dsa_indexer_scoring_relu=False))  # with it, equal scores of 0 are chosen by place
    check_packed(model(window_size=(2, 0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_lora_rank": None}, "sizes missing for sparse attention: q_lora_rank"),
        ({"dsa_indexer_topk_freq": 0}, "dsa_indexer_topk_freq is 0"),
        ({"transformer_impl": "local"}, "dsa needs multi_latent_attention"),
        ({"window_size": (2, 0), "window_attn_skip_freq": (1,)}, "window_attn_skip_freq has 1 entries for 2 layers"),
        ({"hybrid_layer_pattern": "++"}, "models with a layer pattern: dsa attention"),
        ({"window_size": (2, 0)}, "window_size is not supported with multi_latent_attention"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**{**SPARSE, **changes})


def test_mtp_layers_may_be_dense_behind_experts() -> None:
    whole = model(**EXPERTS, mtp_experts=False)
    names = [name for name in whole.state_dict() if not name.endswith("_extra_state")]
    assert any("decoder.layers.1.mlp.router." in name for name in names)
    assert mtp_experts(names) is False
    assert mtp_experts(model(**EXPERTS).state_dict()) is True
    assert mtp_experts(["decoder.layers.0.mlp.router.weight"]) is None
