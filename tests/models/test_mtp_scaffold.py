"""The order of depths and what reaches their sub-layers: by hand and against separate documents."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtp_convert.models.mtp import (
    MTPConfig,
    MTPModule,
    get_mtp_loss_scaling_factor,
    prepare_mtp_context_parallel_inputs,
    roll_tensor,
)

VOCAB, HIDDEN = 32, 8


class Sublayer(nn.Module):
    """A real sub-layer: fusion if it is the first, a causal mean over positions, a norm if it is the last."""

    def __init__(self, has_fusion: bool, has_final_norm: bool, **place: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.place = place
        self.seen: list[dict[str, Any]] = []
        self.mixer = nn.Linear(HIDDEN, HIDDEN)
        if has_fusion:
            self.enorm, self.hnorm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
            self.eh_proj = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        if has_final_norm:
            self.final_layernorm = nn.RMSNorm(HIDDEN)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # noqa: ANN401
        self.seen.append(kwargs)
        x = hidden_states  # [B, S, H]
        if hasattr(self, "eh_proj"):
            x = self.eh_proj(torch.cat([self.enorm(kwargs["embed_input"]), self.hnorm(x)], -1))
        mask: Tensor = kwargs.get("attention_mask", torch.ones(x.shape[-2], x.shape[-2]).tril())  # [S, S]
        x = x + self.mixer(mask / mask.sum(-1, keepdim=True) @ x)
        return self.final_layernorm(x) if hasattr(self, "final_layernorm") else x


def build(config: MTPConfig) -> MTPModule:
    torch.manual_seed(0)
    return MTPModule(config, [f"kind {symbol}" for symbol in config.layer_pattern], Sublayer)


def sublayers(mtp: MTPModule) -> list[Sublayer]:
    return [layer for layer in mtp.layers if isinstance(layer, Sublayer)]


@pytest.fixture
def embed() -> nn.Embedding:
    torch.manual_seed(1)
    return nn.Embedding(VOCAB, HIDDEN)


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(2))


# --- MTPConfig


@pytest.mark.parametrize(
    ("config", "length", "physical", "total", "enabled"),
    [
        (MTPConfig(), 0, 0, 0, False),
        (MTPConfig(2, "*E"), 2, 2, 4, True),
        (MTPConfig(3, "*E", use_repeated_layer=True), 2, 1, 2, True),
        (MTPConfig(2, ""), 0, 2, 0, False),
        (MTPConfig(0, "*", use_repeated_layer=True), 1, 0, 0, False),
    ],
)
def test_config_properties(config: MTPConfig, length: int, physical: int, total: int, enabled: bool) -> None:
    found = (config.pattern_length, config.num_physical_depths, config.total_sublayers, config.enabled)
    assert found == (length, physical, total, enabled)


def test_config_is_checked_and_immutable() -> None:
    with pytest.raises(ValueError, match="num_layers is -1, expected 0 or more"):
        MTPConfig(num_layers=-1)
    with pytest.raises(FrozenInstanceError):
        MTPConfig().num_layers = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("config", "expected"),
    [(MTPConfig(1, "*", loss_scaling_factor=0.3), 0.3), (None, 0.7), (SimpleNamespace(), 0.7)],
)
def test_loss_scaling_factor_of_a_model(config: object, expected: float) -> None:
    model = nn.Identity()
    model.mtp_config = config  # type: ignore[assignment]
    assert get_mtp_loss_scaling_factor(model, 0.7) == expected
    assert get_mtp_loss_scaling_factor(nn.Identity()) == 0.1


# --- MTPModule


def test_flat_layout_and_factory_keywords() -> None:
    mtp = build(MTPConfig(2, "*E-"))
    places = [layer.place for layer in sublayers(mtp)]
    assert [p["global_idx"] for p in places] == [0, 1, 2, 3, 4, 5]
    assert [p["depth"] for p in places] == [0, 0, 0, 1, 1, 1]
    assert [p["sublayer_idx"] for p in places] == [0, 1, 2, 0, 1, 2]
    assert [p["block_type"] for p in places] == ["kind *", "kind E", "kind -"] * 2
    assert [hasattr(layer, "eh_proj") for layer in mtp.layers] == [True, False, False] * 2
    assert [hasattr(layer, "final_layernorm") for layer in mtp.layers] == [False, False, True] * 2
    assert (mtp.num_depths, mtp.pattern_length) == (2, 3)
    assert "layers.3.eh_proj.weight" in mtp.state_dict()


def test_single_sublayer_is_first_and_last() -> None:
    mtp = build(MTPConfig(1, "E"))
    assert hasattr(mtp.layers[0], "eh_proj")
    assert hasattr(mtp.layers[0], "final_layernorm")


def test_module_refuses_configs() -> None:
    with pytest.raises(ValueError, match="at least one depth and one sub-layer"):
        build(MTPConfig(0, "*"))
    with pytest.raises(ValueError, match="has 1 entries, expected pattern_length 2"):
        MTPModule(MTPConfig(1, "*E"), ["attention"], Sublayer)


def test_ids_and_positions_roll_cumulatively(embed: nn.Embedding, ids: Tensor, hidden: Tensor) -> None:
    mtp = build(MTPConfig(2, "*E"))
    positions = torch.arange(1, 7).expand(2, -1)
    mtp(hidden, input_ids=ids, embed_fn=embed, position_ids=positions, seq_lens="kept")
    first, second, third, _ = (layer.seen[0] for layer in sublayers(mtp))
    assert torch.equal(first["embed_input"], embed(torch.tensor([[6, 7, 8, 9, 10, 0], [12, 13, 14, 15, 16, 0]])))
    assert torch.equal(third["embed_input"], embed(torch.tensor([[7, 8, 9, 10, 0, 0], [13, 14, 15, 16, 0, 0]])))
    assert "embed_input" not in second
    assert first["position_ids"].tolist() == second["position_ids"].tolist() == [[2, 3, 4, 5, 6, 0]] * 2
    assert third["position_ids"].tolist() == [[3, 4, 5, 6, 0, 0]] * 2
    assert first["seq_lens"] == second["seq_lens"] == "kept"


def test_no_positions_reach_sublayers_unless_given(embed: nn.Embedding, ids: Tensor, hidden: Tensor) -> None:
    mtp = build(MTPConfig(1, "*"))
    mtp(hidden, input_ids=ids, embed_fn=embed)
    assert sublayers(mtp)[0].seen[0].keys() == {"embed_input"}


def test_depths_are_chained(embed: nn.Embedding, ids: Tensor, hidden: Tensor) -> None:
    mtp = build(MTPConfig(2, "*E"))
    outputs = mtp(hidden, input_ids=ids, embed_fn=embed)
    a, b, c, d = sublayers(mtp)
    depth_0 = b(a(hidden, embed_input=embed(roll_tensor(ids))))
    depth_1 = d(c(depth_0, embed_input=embed(roll_tensor(ids, -2))))
    assert len(outputs) == 2
    assert torch.equal(outputs[0], depth_0)
    assert torch.equal(outputs[1], depth_1)


def test_repeated_layer_shares_weights_and_gradients(embed: nn.Embedding, ids: Tensor, hidden: Tensor) -> None:
    shared = build(MTPConfig(2, "*E", use_repeated_layer=True))
    unfolded = build(MTPConfig(2, "*E"))
    weights = shared.state_dict()
    copies = {f"layers.{int(name.split('.')[1]) + 2}.{name.split('.', 2)[2]}": w for name, w in weights.items()}
    unfolded.load_state_dict(weights | copies)
    assert len(shared.layers) == 2
    outputs = [mtp(hidden, input_ids=ids, embed_fn=embed) for mtp in (shared, unfolded)]
    assert len(outputs[0]) == 2
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)
        assert one.abs().max() > 0.1
    for mtp_outputs in outputs:
        sum(h.square().sum() for h in mtp_outputs).backward()  # type: ignore[union-attr]
    gradients = {name: w.grad for name, w in unfolded.named_parameters()}
    for name, w in shared.named_parameters():
        index, rest = int(name.split(".")[1]), name.split(".", 2)[2]
        both = gradients[name] + gradients[f"layers.{index + 2}.{rest}"]  # type: ignore[operator]
        torch.testing.assert_close(w.grad, both)


def test_finished_embeddings_are_used_as_they_are(hidden: Tensor) -> None:
    mtp = build(MTPConfig(2, "*"))
    embeddings = torch.randn(2, 2, 6, HIDDEN).unbind()
    mtp(hidden, embed_inputs=embeddings, position_ids=torch.arange(6).expand(2, -1))
    seen = [layer.seen[0] for layer in sublayers(mtp)]
    assert seen[0]["embed_input"] is embeddings[0]
    assert seen[1]["embed_input"] is embeddings[1]
    assert seen[1]["position_ids"].tolist() == [[2, 3, 4, 5, 0, 0]] * 2


def test_finished_ids_and_positions_are_used_as_they_are(embed: nn.Embedding, hidden: Tensor) -> None:
    mtp = build(MTPConfig(2, "*"))
    per_depth = torch.arange(24).view(2, 2, 6).unbind()
    axes = torch.arange(72).view(2, 3, 2, 6).unbind()  # [axes, B, S] each
    mtp(hidden, input_ids_per_depth=per_depth, embed_fn=embed, position_ids_per_depth=axes)
    for depth, layer in enumerate(sublayers(mtp)):
        assert torch.equal(layer.seen[0]["embed_input"], embed(per_depth[depth]))
        assert layer.seen[0]["position_ids"] is axes[depth]


def test_finished_positions_win_over_rolled_ones(hidden: Tensor) -> None:
    mtp = build(MTPConfig(1, "*"))
    finished = torch.full((2, 6), 3)
    mtp(
        hidden,
        embed_inputs=(torch.zeros(2, 6, HIDDEN),),
        position_ids=torch.arange(6).expand(2, -1),
        position_ids_per_depth=(finished,),
    )
    assert sublayers(mtp)[0].seen[0]["position_ids"] is finished


Call = Callable[[MTPModule, Tensor, Tensor, nn.Embedding, Tensor], list[Tensor]]
CALLS: list[Call] = [
    lambda mtp, ids, hidden, embed, positions: mtp(hidden, input_ids=ids, embed_fn=embed, position_ids=positions),
    lambda mtp, ids, hidden, embed, positions: mtp(
        input_ids=ids, hidden_states=hidden, embed_fn=embed, position_ids=positions
    ),
    lambda mtp, ids, hidden, embed, positions: mtp(ids, hidden, embed, positions),
    lambda mtp, ids, hidden, embed, positions: mtp(ids, hidden, embed_fn=embed, position_ids=positions),
    lambda mtp, ids, hidden, embed, positions: mtp(ids, hidden_states=hidden, embed_fn=embed, position_ids=positions),
]


@pytest.mark.parametrize("call", CALLS)
def test_both_call_orders(call: Call, embed: nn.Embedding, ids: Tensor, hidden: Tensor) -> None:
    mtp = build(MTPConfig(1, "*"))
    call(mtp, ids, hidden, embed, torch.arange(6).expand(2, -1))
    layer = sublayers(mtp)[0]
    embedding = embed(roll_tensor(ids))
    assert torch.equal(layer.seen[0]["embed_input"], embedding)
    assert layer.seen[0]["position_ids"].tolist() == [[1, 2, 3, 4, 5, 0]] * 2


def test_calls_that_cannot_be_meant(embed: nn.Embedding, ids: Tensor, hidden: Tensor) -> None:
    mtp = build(MTPConfig(1, "*"))
    with pytest.raises(TypeError, match="hidden_states is missing"):
        mtp(ids, embed_fn=embed)
    with pytest.raises(TypeError, match="given by position and by name: input_ids"):
        mtp(ids, hidden, embed, input_ids=ids)
    with pytest.raises(TypeError, match=r"2 arguments by position, expected at most \(hidden_states\)"):
        mtp(hidden, ids, embed_fn=embed)


IDS, POSITIONS, EMBEDDING = torch.zeros(4, dtype=torch.long), torch.arange(4), torch.zeros(4, HIDDEN)
TABLE = nn.Embedding(VOCAB, HIDDEN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs embed_inputs, or embed_fn together with input_ids"),
        ({"input_ids": IDS}, "needs embed_inputs, or embed_fn"),
        ({"embed_fn": TABLE}, "needs embed_inputs, or embed_fn"),
        ({"embed_inputs": [EMBEDDING] * 2, "input_ids": IDS}, "embed_inputs cannot be combined"),
        ({"embed_inputs": [EMBEDDING] * 2, "embed_fn": TABLE}, "embed_inputs cannot be combined"),
        (
            {"embed_inputs": [EMBEDDING] * 2, "input_ids_per_depth": [IDS] * 2, "position_ids_per_depth": [IDS] * 2},
            "embed_inputs cannot be combined",
        ),
        ({"embed_inputs": [EMBEDDING]}, "embed_inputs length 1 does not match num_depths 2"),
        (
            {"input_ids_per_depth": [IDS] * 2, "position_ids_per_depth": [POSITIONS] * 2},
            "needs embed_inputs, or embed_fn",
        ),
        (
            {"input_ids_per_depth": [IDS] * 2, "embed_fn": TABLE},
            "input_ids_per_depth and position_ids_per_depth must be provided together",
        ),
        (
            {
                "input_ids": IDS,
                "input_ids_per_depth": [IDS] * 2,
                "embed_fn": TABLE,
                "position_ids_per_depth": [IDS] * 2,
            },
            "input_ids cannot be combined with input_ids_per_depth",
        ),
        (
            {"input_ids_per_depth": [IDS] * 3, "embed_fn": TABLE, "position_ids_per_depth": [POSITIONS]},
            "input_ids_per_depth length 3 .* num_depths 2; position_ids_per_depth length 1",
        ),
        (
            {"input_ids": IDS, "embed_fn": TABLE, "position_ids_per_depth": [POSITIONS] * 2},
            "position_ids_per_depth requires precomputed embed_inputs .* rank-local input_ids rolling",
        ),
        (
            {"embed_inputs": [EMBEDDING] * 2, "position_ids_per_depth": [POSITIONS, POSITIONS[None]]},
            r"MTP depth 2 position_ids shape \(1, 4\) does not match token shape \(4,\)",
        ),
        (
            {
                "input_ids_per_depth": [IDS] * 2,
                "embed_fn": TABLE,
                "position_ids_per_depth": [POSITIONS[:2], POSITIONS[:3]],
            },
            r"depth 1 position_ids shape \(2,\) .* depth 2 position_ids shape \(3,\)",
        ),
        (
            {
                "embed_inputs": [EMBEDDING] * 2,
                "position_ids": POSITIONS[:3],
                "position_ids_per_depth": [POSITIONS] * 2,
            },
            r"depth 1 position_ids shape \(4,\) does not match token shape \(3,\)",
        ),
    ],
)
def test_module_refuses_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(MTPConfig(2, "*"))(EMBEDDING, **arguments)


def test_packed_documents_equal_separate_ones(embed: nn.Embedding) -> None:
    """With prepared ids nothing crosses a border, so every position of every depth is that of the document alone."""
    mtp = build(MTPConfig(2, "*E"))
    documents = [torch.tensor([[5, 6, 7]]), torch.tensor([[9, 10, 11, 12]])]
    streams = [torch.randn(1, d.shape[1], HIDDEN) for d in documents]
    row, seq_idx = torch.cat(documents, 1), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    mask = ((seq_idx[0, :, None] == seq_idx[0]) & torch.ones(7, 7, dtype=torch.bool).tril()).float()
    prepared = prepare_mtp_context_parallel_inputs({"input_ids": row, "labels": row, "seq_idx": seq_idx}, num_depths=2)
    packed = mtp(
        torch.cat(streams, 1),
        input_ids_per_depth=prepared.input_ids,
        position_ids_per_depth=prepared.position_ids,
        embed_fn=embed,
        attention_mask=mask,
    )
    rolled = mtp(torch.cat(streams, 1), input_ids=row, embed_fn=embed, attention_mask=mask)
    alone = [mtp(h, input_ids=d, embed_fn=embed) for d, h in zip(documents, streams, strict=True)]
    for depth in range(2):
        separate = torch.cat([outputs[depth] for outputs in alone], 1)
        torch.testing.assert_close(packed[depth], separate)
        differs = ((rolled[depth] - separate).abs() > 1e-4).any(-1)[0]
        assert differs.tolist() == [position in range(2 - depth, 3) for position in range(7)]
