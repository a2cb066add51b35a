"""The MTP depths of DeepSeek-V4 on their own."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _dsv4 import D1, D2, golden, predictions, raw_config, relative, run, scrambled, training
from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from mtp_convert.models.deepseek_v4 import (
    BackendConfig,
    DeepseekV4ForCausalLM,
    DeepseekV4MTPBlock,
    DeepseekV4MTPModule,
    MoEConfig,
    build_deepseek_v4_mtp,
    build_mtp_config_from_hf,
    read_config,
)
from mtp_convert.models.mtp import MTPConfig, roll_tensor


def build(config: DeepseekV4Config, mtp_config: MTPConfig, dtype: torch.dtype = torch.float32) -> DeepseekV4MTPModule:
    rotary = DeepseekV4RotaryEmbedding(config)
    return build_deepseek_v4_mtp(config, mtp_config, BackendConfig(), MoEConfig(), dtype, rotary, rotary)


@pytest.fixture(scope="module")
def model() -> DeepseekV4ForCausalLM:
    return training(D2)


@pytest.fixture(scope="module")
def mtp(model: DeepseekV4ForCausalLM) -> DeepseekV4MTPModule:
    assert isinstance(model.mtp, DeepseekV4MTPModule)
    return model.mtp


@pytest.fixture
def streams() -> Tensor:
    """[B, S, X, H]."""
    return torch.randn(2, 9, 4, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(18).view(2, 9) * 3 % 64


@pytest.mark.parametrize(("stored", "depths"), [(0, 0), (None, 0), (1, 1), (2, 2)])
def test_mtp_config_follows_the_model_config(stored: int | None, depths: int) -> None:
    config = build_mtp_config_from_hf(SimpleNamespace(num_nextn_predict_layers=stored), loss_scaling_factor=0.3)
    assert config == MTPConfig(num_layers=depths, layer_pattern="*", loss_scaling_factor=0.3)
    assert config.enabled == (depths > 0)


def test_a_config_without_the_field_has_no_mtp() -> None:
    assert not build_mtp_config_from_hf(SimpleNamespace()).enabled


@pytest.mark.parametrize("mtp_config", [MTPConfig(), MTPConfig(num_layers=1, layer_pattern="*E")])
def test_a_config_without_depths_of_one_layer_is_refused(mtp_config: MTPConfig) -> None:
    with pytest.raises(ValueError, match="one layer each"):
        build(read_config(D1), mtp_config)


def test_every_depth_attends_by_its_own_ratio(mtp: DeepseekV4MTPModule) -> None:
    blocks: list[Any] = list(mtp.layers)
    assert [block.layer_idx for block in blocks] == [4, 5]
    assert [block.self_attn.layer_type for block in blocks] == ["compressed_sparse_attention", "sliding_attention"]
    assert [block.self_attn.rope_layer_type for block in blocks] == ["compress", "main"]
    assert not any(block.mlp.is_hash for block in blocks)


def test_a_depth_behind_the_ratios_uses_sliding_attention() -> None:
    transformers_config = DeepseekV4Config.from_pretrained(D2)  # this one has lost the ratios of MTP
    module = build(transformers_config, MTPConfig(num_layers=3, layer_pattern="*"))
    blocks: list[Any] = list(module.layers)
    assert [block.self_attn.layer_type for block in blocks] == ["sliding_attention"] * 3


def test_any_other_ratio_pools_disjoint_windows() -> None:
    config = raw_config(D1, compress_ratios=[0, 4, 16, 4, 8])
    model = scrambled(config).train()
    compressor = model.get_submodule("mtp.layers.0.self_attn.compressor")
    assert compressor.get_parameter("position_bias").shape == (8, 16)
    assert "indexer" not in dict(compressor.named_children())
    ids = golden(D1)["input_ids"]
    moved = run(model, ids.clone().index_fill_(1, torch.tensor([10]), 5))
    # Position 30 is out of the sliding window of position 10, and sees it through the compressed entries alone.
    assert relative(predictions(moved)[1][:, 30:], predictions(run(model, ids))[1][:, 30:]) > 1e-3


def test_rotary_modules_are_shared_and_in_no_state_dict(model: DeepseekV4ForCausalLM) -> None:
    assert not [name for name in model.state_dict() if "rotary" in name or "inv_freq" in name]
    everywhere = model.named_modules(remove_duplicate=False)
    owners = [name for name, module in everywhere if isinstance(module, DeepseekV4RotaryEmbedding)]
    assert owners == ["model.rotary_emb"]
    rotary = model.model.rotary_emb
    for module in model.modules():
        assert module.__dict__.get("rotary_emb", rotary) is rotary
    block: Any = model.get_submodule("mtp.layers.0")
    assert block.rotaries == {"main": rotary, "compress": rotary}


def test_ids_are_rolled_and_positions_are_not(mtp: DeepseekV4MTPModule, streams: Tensor, ids: Tensor) -> None:
    seen: list[Tensor] = []
    positions: list[Tensor] = []

    def embed(shifted: Tensor) -> Tensor:
        seen.append(shifted)
        return torch.ones(*shifted.shape, 32)

    hooks = [
        block.register_forward_pre_hook(
            lambda _, __, given: positions.append(given["batch"].position_ids), with_kwargs=True
        )
        for block in mtp.layers
    ]
    given = torch.arange(9).expand(2, -1)
    mtp(streams, input_ids=ids, embed_fn=embed, position_ids=given)
    for hook in hooks:
        hook.remove()
    assert torch.equal(seen[0], roll_tensor(ids))
    assert torch.equal(seen[1], roll_tensor(roll_tensor(ids)))
    assert seen[1][:, -2:].eq(0).all()
    assert len(positions) == 2
    assert all(torch.equal(p, given) for p in positions)


def test_finished_embeddings_equal_ids(
    model: DeepseekV4ForCausalLM, mtp: DeepseekV4MTPModule, streams: Tensor, ids: Tensor
) -> None:
    embed = model.get_input_embeddings()
    assert embed is not None
    shifted = roll_tensor(ids)
    finished = (embed(shifted), embed(roll_tensor(shifted)))
    by_ids = mtp(streams, input_ids=ids, embed_fn=embed)
    assert len(by_ids) == mtp.num_depths == 2
    for one, other in zip(by_ids, mtp(streams, embed_inputs=finished), strict=True):
        assert one.shape == (2, 9, 32)
        assert torch.equal(one, other)


def test_a_block_chains_streams_and_yields_a_prediction(
    model: DeepseekV4ForCausalLM, mtp: DeepseekV4MTPModule, streams: Tensor, ids: Tensor
) -> None:
    embed = model.get_input_embeddings()
    assert embed is not None
    expected = mtp(streams, input_ids=ids, embed_fn=embed)
    for block, prediction in zip(mtp.layers, expected, strict=True):
        ids = roll_tensor(ids)
        mask = torch.ones_like(ids)
        streams, hidden = block(streams, embed_input=embed(ids), input_ids=ids, attention_mask=mask)
        assert streams.shape == (2, 9, 4, 32)
        assert torch.equal(hidden, prediction)


def test_a_repeated_depth_runs_the_same_weights_again(streams: Tensor, ids: Tensor) -> None:
    config = read_config(D1)
    once = MTPConfig(num_layers=1, layer_pattern="*")
    repeated = build(config, dataclasses.replace(once, num_layers=3, use_repeated_layer=True))
    single = build(config, once)
    single.load_state_dict(repeated.state_dict())
    embeds = [torch.randn(2, 9, 32) for _ in range(3)]
    outputs = repeated(streams, embed_inputs=embeds)
    assert len(repeated.layers) == 1
    assert len(outputs) == repeated.num_depths == 3
    for embedded, output in zip(embeds, outputs, strict=True):
        streams, prediction = single.layers[0](streams, embed_input=embedded)
        assert torch.equal(prediction, output)


def embeds(count: int) -> list[Tensor]:
    return [torch.zeros(2, 9, 32)] * count


def embed_zeros(shifted: Tensor) -> Tensor:
    return torch.zeros(*shifted.shape, 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda ids: {}, "either embed_inputs or both"),
        (lambda ids: {"input_ids": ids}, "either embed_inputs or both"),
        (lambda ids: {"embed_fn": embed_zeros}, "either embed_inputs or both"),
        (lambda ids: {"input_ids": ids, "embed_inputs": embeds(2)}, "one of the two"),
        (lambda ids: {"embed_fn": embed_zeros, "embed_inputs": embeds(2)}, "one of the two"),
        (lambda ids: {"embed_inputs": embeds(1)}, "1 embed_inputs are given, expected one for each of 2"),
        (lambda ids: {"embed_inputs": embeds(2), "position_ids": ids[:, :4]}, r"position_ids has shape \(2, 4\)"),
        (lambda ids: {"embed_inputs": embeds(2), "attention_mask": ids[:, :4]}, r"attention_mask has shape \(2, 4\)"),
        (lambda ids: {"embed_inputs": embeds(2), "padding_mask": ids[:1]}, r"padding_mask has shape \(1, 9\)"),
    ],
)
def test_wrong_arguments_are_refused(
    mtp: DeepseekV4MTPModule, streams: Tensor, ids: Tensor, given: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mtp(streams, **given(ids))


@pytest.mark.parametrize("shape", [(2, 9, 32), (2, 9, 3, 32)])
def test_other_than_streams_are_refused(mtp: DeepseekV4MTPModule, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected streams"):
        mtp(torch.zeros(shape), embed_inputs=embeds(2))


def test_an_unknown_argument_is_refused(mtp: DeepseekV4MTPModule, streams: Tensor) -> None:
    with pytest.raises(TypeError, match="qkv_format"):
        mtp(streams, embed_inputs=embeds(2), qkv_format="thd")


def test_a_block_alone_keeps_float32_parameters_and_fresh_values() -> None:
    config = read_config(D2)
    rotary = DeepseekV4RotaryEmbedding(config)
    block = DeepseekV4MTPBlock(config, 4, MoEConfig(), BackendConfig(), torch.bfloat16, rotary, rotary)
    kinds = {name: tensor.dtype for name, tensor in block.named_parameters()}
    assert kinds["e_proj.weight"] == kinds["self_attn.compressor.kv_proj.weight"] == torch.bfloat16
    assert kinds["hnorm.weight"] == kinds["attn_hc.fn"] == kinds["self_attn.sinks"] == torch.float32
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(float("nan"))
    block.init_weights(buffer_device=torch.device("cpu"))
    assert all(tensor.isfinite().all() for tensor in block.state_dict().values())
    assert block.get_parameter("enorm.weight").eq(1).all()
    assert float(block.get_parameter("h_proj.weight").detach().float().std()) == pytest.approx(0.02, rel=0.2)


def test_a_module_on_the_meta_device_comes_alive() -> None:
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM.from_config(D2)
    model = model.to_empty(device="cpu").train()
    model.init_weights()
    output = run(model, golden(D2)["input_ids"])
    assert all(part.isfinite().all() for part in predictions(output))
    frequencies = dict(model.named_buffers())["model.rotary_emb.compress_inv_freq"]
    fresh: nn.Module = DeepseekV4RotaryEmbedding(read_config(D2))
    assert torch.equal(frequencies, fresh.get_buffer("compress_inv_freq"))


def test_fresh_token_id_routing_is_valid() -> None:
    table = DeepseekV4ForCausalLM.from_config(D1).state_dict()["model.layers.0.mlp.gate.tid2eid"]
    assert table.shape == (64, 2)
    assert all(len(set(experts)) == 2 for experts in table.tolist())
    assert table.flatten().bincount(minlength=8).tolist() == [16] * 8
