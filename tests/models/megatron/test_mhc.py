"""Hyper-connections: names of the development branch, the formulas by hand, and what they are without mixing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _golden import DATA, build, differing, ids, lines, settle, tiny
from torch import Tensor

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.hyper_connection import HyperConnection, StreamHead, sinkhorn
from mtp_convert.models.megatron.language_model import LanguageModel
from mtp_convert.models.megatron.loading import load_tensors, tensors_from_ranks

QWEN: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 48,
    "gated_linear_unit": True,
    "position_embedding_type": "rope",
    "qk_layernorm": True,
    "mtp_num_layers": 2,
    "enable_hyper_connections": True,
}
HYPER: dict[str, Any] = {"enable_hyper_connections": True, "num_residual_streams": 3, "mtp_num_layers": 2}


def test_names_and_entries_are_those_of_megatron_core() -> None:
    _, *expected = (DATA / "dev_qwen_mhc.txt").read_text().splitlines()
    assert lines(build(TransformerConfig(**QWEN))) == expected


def test_checkpoints_come_back() -> None:
    """Stacked by layer, as the entries say."""
    one, other = (settle(build(tiny(**HYPER)), seed) for seed in (0, 1))
    tensors = tensors_from_ranks([one.sharded_state_dict()])
    assert tensors["decoder.layers.mlp_hyper_connection.bias"].shape == (2, 15)
    load_tensors(other, tensors)
    assert differing(one, other) == []


# --- the formulas ---------------------------------------------------------------------------------


def test_sinkhorn_makes_rows_and_columns_sum_to_one() -> None:
    matrix = sinkhorn(torch.randn(5, 4, 4, dtype=torch.float64), 50, 0.0)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(5, 4, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(-2), torch.ones(5, 4, dtype=torch.float64))
    assert (matrix > 0).all()


def test_sinkhorn_ends_with_columns() -> None:
    matrix = sinkhorn(torch.randn(4, 4, dtype=torch.float64), 1, 0.0)
    torch.testing.assert_close(matrix.sum(-2), torch.ones(4, dtype=torch.float64))
    assert (matrix.sum(-1) - 1).abs().max() > 1e-3


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(connection: HyperConnection, streams: list[list[float]], factor: float) -> list[list[float]]:
    """The streams of one token after a block that multiplies by `factor`, number by number."""
    config, n, size = connection.config, len(streams), len(streams[0])
    eps, flat = config.mhc_epsilon, [x for stream in streams for x in stream]
    rms = math.sqrt(sum(x * x for x in flat) / len(flat) + config.layernorm_epsilon)
    scales = [connection.alpha_pre] * n + [connection.alpha_post] * n + [connection.alpha_res] * n * n
    rows = zip(connection.mapping_proj.weight.tolist(), scales, connection.bias.tolist(), strict=True)
    raw = [sum(w * x for w, x in zip(row, flat, strict=True)) / rms * scale.item() + b for row, scale, b in rows]
    read, write = [sigmoid(x) + eps for x in raw[:n]], [2 * sigmoid(x) for x in raw[n : 2 * n]]
    mix = [[math.exp(x) for x in raw[2 * n + i * n : 2 * n + (i + 1) * n]] for i in range(n)]
    mix = [[x / sum(row) + eps for x in row] for row in mix]
    for step in range(2 * config.mhc_sinkhorn_iterations - 1):
        if step % 2:
            mix = [[x / (sum(row) + eps) for x in row] for row in mix]
        else:
            columns = [sum(row[j] for row in mix) + eps for j in range(n)]
            mix = [[row[j] / columns[j] for j in range(n)] for row in mix]
    output = [factor * sum(read[i] * streams[i][c] for i in range(n)) for c in range(size)]
    return [
        [write[i] * output[c] + sum(mix[j][i] * streams[j][c] for j in range(n)) for c in range(size)] for i in range(n)
    ]


@pytest.mark.parametrize("iterations", [1, 4])
def test_a_connection_by_hand(iterations: int) -> None:
    config = tiny(**HYPER, mhc_sinkhorn_iterations=iterations, mhc_epsilon=1e-3, layernorm_epsilon=1e-2)
    connection = HyperConnection(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    streams = torch.randn(2, 1, 3, 16, dtype=torch.float64, generator=generator)
    found = torch.unflatten(connection(streams.flatten(2), lambda x: 1.5 * x), -1, (3, 16))
    for token in range(2):
        expected = by_hand(connection, streams[token, 0].tolist(), 1.5)
        torch.testing.assert_close(found[token, 0], torch.tensor(expected, dtype=torch.float64))


def test_a_head_by_hand() -> None:
    head = StreamHead(tiny(**HYPER, mhc_epsilon=1e-3, layernorm_epsilon=1e-2))
    head.add_head()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    streams = torch.randn(1, 1, 3, 16, dtype=torch.float64, generator=generator)
    flat = streams.flatten().tolist()
    rms = math.sqrt(sum(x * x for x in flat) / len(flat) + 1e-2)
    scores = [sum(w * x for w, x in zip(row, flat, strict=True)) / rms for row in head.hc_head_fn.tolist()]
    weights = [
        sigmoid(score * head.hc_head_scale.item() + base) + 1e-3
        for score, base in zip(scores, head.hc_head_base.tolist(), strict=True)
    ]
    expected = sum(weight * streams[0, 0, i] for i, weight in enumerate(weights))
    torch.testing.assert_close(head.contract(streams.flatten(2))[0, 0], expected)


# --- whole models ---------------------------------------------------------------------------------


def still(model: LanguageModel, plain: LanguageModel) -> None:
    """The weights of `plain`, streams that are only read evenly, written to alike, and never mixed."""
    n, even = model.config.num_residual_streams, -math.log(model.config.num_residual_streams - 1)
    state, own = plain.state_dict(), model.state_dict()
    with torch.no_grad():
        for name, value in own.items():
            leaf = name.rsplit(".", 1)[-1]
            if name in state:
                value = state[name]
            elif "hyper_connection" in name and leaf == "bias":
                value = torch.cat((torch.full((n,), even), torch.zeros(n), 60 * torch.eye(n).flatten()))
            elif leaf == "hc_head_base":
                value = torch.full((n,), even)
            elif "hyper_connection" in name or leaf.startswith("hc_head"):
                value = torch.zeros_like(value)
            elif name.endswith(("e_proj.weight", "h_proj.weight")):
                half = 0 if "e_proj" in name else 1
                value = state[name.replace(f"{name[-13]}_proj", "eh_proj")].chunk(2, 1)[half]
            own[name] = value
    model.load_state_dict(own)


@torch.no_grad()
def test_streams_that_do_not_mix_are_a_residual_connection() -> None:
    plain, model = settle(build(tiny(mtp_num_layers=2))), build(tiny(**HYPER, mhc_epsilon=0.0))
    still(model, plain)
    found, expected = model.predict(ids()), plain.predict(ids())
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-6, atol=1e-6)
    # a depth begins with the raw streams, where one without streams gets them normalised
    plain.decoder.final_layernorm.register_forward_hook(lambda module, args, output: args[0])
    depth = plain.predict(ids()).mtp_hidden[0]
    torch.testing.assert_close(found.mtp_hidden[0], depth, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(depth, expected.mtp_hidden[0], rtol=1e-2)


@pytest.mark.parametrize("changes", [{}, {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 12}])
def test_gradients_reach_everything(changes: dict[str, Any]) -> None:
    model = settle(build(tiny(**HYPER, **changes))).train()
    model(ids(40), labels=ids(40)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_next_depth_gets_raw_streams() -> None:
    """Depth 1 does not depend on the final norm of depth 0, which its own output does."""
    model = settle(build(tiny(**HYPER)))
    before = model.predict(ids()).mtp_hidden
    with torch.no_grad():
        model.mtp.layers[0].final_layernorm.weight.mul_(2)
    after = model.predict(ids()).mtp_hidden
    torch.testing.assert_close(after[0], 2 * before[0])
    assert torch.equal(after[1], before[1])


@torch.no_grad()
def test_bfloat16_runs() -> None:
    exact, short = settle(build(tiny(**HYPER))), build(tiny(**HYPER, params_dtype=torch.bfloat16))
    load_tensors(short, tensors_from_ranks([exact.sharded_state_dict()]))
    assert short.decoder.hc_head_fn.dtype == torch.float32
    found, expected = short.predict(ids()), exact.predict(ids())

    def error(a: Tensor, b: Tensor) -> float:
        assert a.dtype == torch.bfloat16
        return float((a.double() - b).norm() / b.norm())

    assert error(found.logits, expected.logits) < 0.03
    assert max(error(a, b) for a, b in zip(found.mtp_hidden, expected.mtp_hidden, strict=True)) < 0.03
