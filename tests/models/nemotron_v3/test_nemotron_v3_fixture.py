"""The trained fixture: what its folder holds, and that its depth has learned to draft."""

import json
from collections.abc import Callable

import pytest
import torch
from _nemotron_v3 import FIXTURES, TINY, exchange, load, run, swap_halves
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from mtp_convert.models.nemotron_v3 import NemotronHForCausalLM


@pytest.fixture(scope="module")
def heldout() -> Tensor:
    """All held-out text as ids [B, 96]."""
    data = list((FIXTURES / "text" / "heldout.txt").read_bytes())
    return torch.tensor(data[: len(data) // 96 * 96]).view(-1, 96)


def damage_nothing(model: NemotronHForCausalLM) -> None:
    pass


def damage_halves(model: NemotronHForCausalLM) -> None:
    swap_halves(model, "mtp.layers.0.eh_proj.weight")


def damage_norms(model: NemotronHForCausalLM) -> None:
    exchange(model, "mtp.layers.0.enorm.weight", "mtp.layers.0.hnorm.weight")


@pytest.mark.parametrize(
    ("damage", "low", "high"),
    [(damage_nothing, 0.65, 1.0), (damage_halves, 0.0, 0.2), (damage_norms, 0.0, 0.45)],
)
def test_the_trained_depth_drafts_until_damaged(
    heldout: Tensor, damage: Callable[[NemotronHForCausalLM], None], low: float, high: float
) -> None:
    model = load(TINY, dtype=torch.float32)
    damage(model)
    output = run(model, heldout)
    assert output.mtp_per_depth_h is not None
    # Draft at position i and the main model at i + 1 both predict token i + 2.
    drafted = model.logits(output.mtp_per_depth_h[0])[:, :-1].argmax(-1)
    chosen = output.logits[:, 1:].argmax(-1)
    assert low < float((drafted == chosen).double().mean()) < high


def test_ids_are_bytes() -> None:
    text = "Alice, na\u00efve \u0103\n\u65e5 `x'  y"
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_it_stores_what_releases_store() -> None:
    index = json.loads((TINY / "model.safetensors.index.json").read_text())
    shards = {name: load_file(TINY / name) for name in set(index["weight_map"].values())}
    tensors = {key: tensor for shard in shards.values() for key, tensor in shard.items()}
    assert len(shards) == 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert all(key in shards[name] for key, name in index["weight_map"].items())
    router_bias = "mtp.layers.1.mixer.gate.e_score_correction_bias"
    assert tensors[router_bias].dtype == torch.float32
    assert tensors[router_bias].count_nonzero() == 8
    assert tensors["mtp.layers.0.eh_proj.weight"].dtype == torch.bfloat16
