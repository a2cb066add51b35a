"""The plain-PyTorch HybridModel against outputs of megatron-core 0.19.2 on the same checkpoints."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from mtp_convert.models import megatron_hybrid
from mtp_convert.models.megatron_hybrid import HybridOutput, HybridSettings, MegatronHybrid

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "megatron"
NAMES = ("hyb_m", "hyb_rep", "hyb_mtpM", "hyb_latent")
Weights = dict[str, Tensor]


@cache
def load_weights(name: str) -> Weights:
    """Every tensor of a torch_dist folder, read by torch alone."""
    reader = FileSystemReader(GOLDEN / name / "ckpt" / "iter_0000001")
    stored = reader.read_metadata().state_dict_metadata
    weights = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():  # "torch.distributed is disabled": one process is what we want
        warnings.simplefilter("ignore", UserWarning)
        load(weights, storage_reader=reader, no_dist=True)
    return weights


def read_json(name: str, file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / name / file).read_text())
    return content


def megatron_args(name: str) -> dict[str, Any]:
    """`model.json` under the names of Megatron-LM's arguments."""
    model = read_json(name, "model.json")
    top = ("hybrid_layer_pattern", "position_embedding_type", "vocab_size")
    untied = {"untie_embeddings_and_output_weights": not model["tied_embeddings"]}
    config: dict[str, Any] = model["transformer_config"]
    return config | {key: model[key] for key in top} | untied


def settings_of(name: str) -> HybridSettings:
    return HybridSettings.from_megatron_args(megatron_args(name))


@cache
def golden(name: str) -> Weights:
    return load_file(GOLDEN / name / "out.safetensors")


def run(name: str, weights: Weights) -> HybridOutput:
    return MegatronHybrid(settings_of(name), weights).forward(golden(name)["tokens"])


def flat(output: HybridOutput) -> Weights:
    """Under the names of `out.safetensors`."""
    tensors = {"logits": output.logits, "hidden": output.hidden}
    for step, (hidden, logits) in enumerate(zip(output.mtp_hidden, output.mtp_logits, strict=True)):
        tensors |= {f"hidden_mtp{step}": hidden, f"logits_mtp{step}": logits}
    return tensors


def relative(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_megatron_core(name: str) -> None:
    got = flat(run(name, load_weights(name)))
    expected = {key: value for key, value in golden(name).items() if key in got}
    assert len(expected) == 2 + 2 * settings_of(name).mtp_num_layers
    errors = {key: relative(got[key], expected[key]) for key in expected}
    assert max(errors.values()) < 1e-5, errors


# --- the same check must fail when a tensor is wrong --------------------------------------------


def swap_halves(w_H2H: Tensor) -> Tensor:
    return w_H2H.roll(w_H2H.shape[1] // 2, dims=1)


def swap_k_and_v(w: Tensor, *, groups: int = 2, head_dim: int = 8) -> Tensor:
    rows = w.view(groups, -1, head_dim, w.shape[1])
    return torch.cat([rows[:, :-2], rows[:, -1:], rows[:, -2:-1]], 1).reshape(w.shape)


def edit(*suffixes: str, by: Callable[[Tensor], Tensor]) -> Callable[[Weights], Weights]:
    """A mutant: the tensors whose names end so, changed."""
    return lambda weights: {key: by(tensor) if key.endswith(suffixes) else tensor for key, tensor in weights.items()}


def exchange(one: str, other: str) -> Callable[[Weights], Weights]:
    """A mutant: two tensors of each layer under each other's names."""

    def mutant(weights: Weights) -> Weights:
        def source(key: str) -> str:
            if key.endswith(one):
                return key.removesuffix(one) + other
            return key.removesuffix(other) + one if key.endswith(other) else key

        return {key: weights[source(key)] for key in weights}

    return mutant


EXPERTS = ("experts.experts.linear_fc1.weight", "experts.experts.linear_fc2.weight")
MUTANTS: dict[str, tuple[str, Callable[[Weights], Weights]]] = {
    "eh_proj halves": ("hyb_m", edit("eh_proj.weight", by=swap_halves)),
    "enorm / hnorm": ("hyb_m", exchange("enorm.weight", "hnorm.weight")),
    "k / v rows": ("hyb_m", edit("linear_qkv.weight", by=swap_k_and_v)),
    "experts shifted": ("hyb_m", edit(*EXPERTS, by=lambda w: w.roll(1, 0))),
    "depths": (
        "hyb_m",
        exchange("mtp.layers.0.eh_proj.weight", "mtp.layers.1.eh_proj.weight"),
    ),
    "expert bias": ("hyb_rep", edit("expert_bias", by=lambda w: w.flip(0))),
    "in_proj z / x": ("hyb_mtpM", exchange("in_proj.weight.z", "in_proj.weight.x")),
    "in_proj B / C": ("hyb_mtpM", exchange("in_proj.weight.B", "in_proj.weight.C")),
    "conv taps": ("hyb_mtpM", edit("conv1d.weight.x", by=lambda w: w.flip(-1))),
    "conv bias B / C": ("hyb_mtpM", exchange("conv1d.bias.B", "conv1d.bias.C")),
    "A_log / D": ("hyb_mtpM", exchange("mixer.A_log", "mixer.D")),
    "latent rows": ("hyb_latent", edit("fc1_latent_proj.weight", by=lambda w: w.roll(1, 0))),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_tensor_is_seen(mutant: str) -> None:
    name, change = MUTANTS[mutant]
    got = flat(run(name, change(load_weights(name))))
    errors = {key: relative(got[key], golden(name)[key]) for key in got}
    seen = [key for key in errors if key.startswith("hidden_mtp")]
    assert min(errors[key] for key in seen) > 1e-2, errors


def test_the_backbone_does_not_read_mtp_weights() -> None:
    got = run("hyb_m", MUTANTS["eh_proj halves"][1](load_weights("hyb_m")))
    assert relative(got.logits, golden("hyb_m")["logits"]) < 1e-5


def test_the_router_groups_are_used() -> None:
    plain = replace(settings_of("hyb_latent"), moe_router_num_groups=None, moe_router_group_topk=None)
    expected = golden("hyb_latent")
    got = MegatronHybrid(plain, load_weights("hyb_latent")).forward(expected["tokens"])
    assert relative(got.hidden, expected["hidden"]) > 1e-2


# --- keys, vocabulary, dtype --------------------------------------------------------------------


def test_keys_must_be_exactly_those_of_the_settings() -> None:
    weights = dict(load_weights("hyb_m"))
    weights["mtp.layers.2.enorm.weight"] = weights.pop("mtp.layers.1.enorm.weight")
    weights["decoder.final_norm._extra_state/shard_0_1"] = torch.empty(0)
    with pytest.raises(ValueError) as error:
        MegatronHybrid(settings_of("hyb_m"), weights)
    assert "missing mtp.layers.1.enorm.weight" in str(error.value)
    assert "unexpected mtp.layers.2.enorm.weight" in str(error.value)
    assert "_extra_state" not in str(error.value)


def test_padded_rows_of_the_vocabulary_are_cut() -> None:
    embeddings = ("embedding.word_embeddings.weight", "output_layer.weight")
    padded = edit(*embeddings, by=lambda w: torch.cat([w, torch.ones(32, w.shape[1])]))
    got = run("hyb_rep", padded(load_weights("hyb_rep")))
    assert relative(got.logits, golden("hyb_rep")["logits"]) < 1e-5
    too_few = edit(*embeddings, by=lambda w: w[:50])
    with pytest.raises(ValueError, match="50 rows"):
        run("hyb_rep", too_few(load_weights("hyb_rep")))


def test_tied_embeddings_have_no_output_layer() -> None:
    weights = dict(load_weights("hyb_rep"))
    weights["output_layer.weight"] = weights["embedding.word_embeddings.weight"]
    untied = run("hyb_rep", weights)
    del weights["output_layer.weight"]
    settings = replace(settings_of("hyb_rep"), tied_embeddings=True)
    tied = MegatronHybrid(settings, weights).forward(golden("hyb_rep")["tokens"])
    assert all(torch.equal(a, b) for a, b in zip(tied.mtp_logits, untied.mtp_logits, strict=True))


def test_bfloat16_weights_give_bfloat16_outputs() -> None:
    fp32 = ("expert_bias", "A_log", "mixer.D")  # what megatron-core keeps in float32
    weights = {key: w if key.endswith(fp32) else w.bfloat16() for key, w in load_weights("hyb_m").items()}
    got = flat(run("hyb_m", weights))
    assert {w.dtype for w in got.values()} == {torch.bfloat16}
    # A near tie of the router may send single tokens to another expert, so look at the median.
    gap = (got["logits_mtp0"].float() - golden("hyb_m")["logits_mtp0"]).abs().median()
    assert gap < 0.02 * golden("hyb_m")["logits_mtp0"].abs().max()


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_both_sources_give_the_same_settings(name: str) -> None:
    expected = settings_of(name)
    got = HybridSettings.from_hf_config(read_json(name, "config.json"))
    if expected.mtp_use_repeated_layer:  # config.json only counts what is stored
        assert got.mtp_num_layers == expected.mtp_stored_layers == 1
        steps = expected.mtp_num_layers
        got = replace(got, mtp_num_layers=steps, mtp_use_repeated_layer=True)
    assert got == expected


def test_every_spelling_of_a_pattern_is_read() -> None:
    new = read_json("hyb_m", "config.json")
    bare = {k: v for k, v in new.items() if not k.endswith("layers_block_type")}
    old = bare | {
        "layers_block_type": ["mamba", "attention", "mamba", "moe", "mlp"],
        "mtp_layers_block_type": ["attention", "moe"],
    }
    text = bare | {"hybrid_override_pattern": "M*ME-", "mtp_hybrid_override_pattern": "*E"}
    both = new | {"hybrid_override_pattern": "M*ME-"}
    expected = HybridSettings.from_hf_config(new)
    assert (expected.pattern, expected.mtp_pattern) == ("M*ME-", "*E")
    assert [HybridSettings.from_hf_config(c) for c in (old, text, both)] == [expected] * 3
    with pytest.raises(ValueError, match="disagree"):
        HybridSettings.from_hf_config(new | {"hybrid_override_pattern": "MMME-"})


def test_megatron_patterns_with_stages_and_the_old_mtp_argument() -> None:
    args = megatron_args("hyb_m")
    expected = HybridSettings.from_megatron_args(args)
    staged = args | {"hybrid_layer_pattern": "M*|ME-/*E/*E"}
    old = args | {"hybrid_layer_pattern": "M*ME-", "mtp_hybrid_override_pattern": "*E"}
    assert HybridSettings.from_megatron_args(staged) == expected
    assert HybridSettings.from_megatron_args(old) == expected
    for wrong in ("M*ME-/*E/ME", "M*ME-/*E", "M*DE-/*E/*E"):
        with pytest.raises(ValueError):
            HybridSettings.from_megatron_args(args | {"hybrid_layer_pattern": wrong})


def test_what_is_not_implemented_is_refused_by_name() -> None:
    args = megatron_args("hyb_m")
    with pytest.raises(ValueError, match="position_embedding_type='rope'"):
        HybridSettings.from_megatron_args(args | {"position_embedding_type": "rope"})
    with pytest.raises(ValueError, match="mlp_hidden_act='silu'"):
        HybridSettings.from_hf_config(read_json("hyb_m", "config.json") | {"mlp_hidden_act": "silu"})
    with pytest.raises(ValueError, match=r"\['kv_channels', 'mamba_head_dim'\]"):
        HybridSettings.from_megatron_args(args | {"kv_channels": None, "mamba_head_dim": None})


def test_the_check_shares_no_code_with_the_converter() -> None:
    """Its only import from the package is its own settings file, which imports none."""
    path = Path(megatron_hybrid.__file__)
    imported = set()
    for file in (path, path.with_name("_hybrid_settings.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
            elif isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
    assert [m for m in sorted(imported) if m.startswith("mtp_convert")] == ["mtp_convert.models._hybrid_settings"]
