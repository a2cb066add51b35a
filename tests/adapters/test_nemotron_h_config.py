"""Configs of Nemotron-H: both spellings of the pattern, refusals that name the field, and the spelling of layouts."""

from itertools import product
from typing import Any

import pytest
from test_nemotron_h_names import layout, tiny

from mtp_convert.adapters import families, find
from mtp_convert.adapters.nemotron_h import FAMILY, LETTERS
from mtp_convert.errors import ConvertError
from mtp_convert.mapping.family import ConfigError, with_depths
from mtp_convert.mapping.layout import Layout

SIZES = [k for k, v in tiny("M*E-").items() if isinstance(v, int) and k not in ("num_experts_per_tok", "head_dim")]
FULL = tiny("M*E-", mtp_layers_block_type=["attention", "moe"], num_nextn_predict_layers=2)


def refused(config: dict[str, Any], depths: int = 0) -> str:
    with pytest.raises(ConfigError) as caught:
        FAMILY.dims(config, depths)
    return str(caught.value)


@pytest.mark.parametrize("field", SIZES)
def test_a_missing_size_is_named(field: str) -> None:
    assert refused({k: v for k, v in FULL.items() if k != field}).startswith(field)


@pytest.mark.parametrize("value", [0, -1, "16", 16.0, True, None, [16], 10**12 * 2, float("nan")], ids=repr)
@pytest.mark.parametrize("field", SIZES)
def test_a_size_that_is_no_size_is_named(field: str, value: object) -> None:
    assert refused({**FULL, field: value}).startswith(field)


@pytest.mark.parametrize("value", [-8, "8", 8.5, True, [8]], ids=repr)
@pytest.mark.parametrize("field", ["head_dim", "attention_head_dim", "moe_latent_size"])
def test_an_optional_size_that_is_no_size_is_named(field: str, value: object) -> None:
    config = {k: v for k, v in FULL.items() if k != "head_dim"} | {field: value}
    assert refused(config).startswith(field)


@pytest.mark.parametrize("value", [-1, "1", 1.5, True, [1], 10**9], ids=repr)
def test_depths_that_are_no_number_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="num_nextn_predict_layers"):
        FAMILY.depths.declared({**FULL, "num_nextn_predict_layers": value})


def test_declared_depths() -> None:
    assert FAMILY.depths.declared(FULL) == 2
    assert FAMILY.depths.declared(tiny("M")) == 0
    assert FAMILY.depths.declared({"num_nextn_predict_layers": None}) == 0
    assert FAMILY.depths.corrected(FULL, 1) == {**FULL, "num_nextn_predict_layers": 1}


def test_sizes_that_no_block_needs_may_be_absent() -> None:
    needed = {"vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "layers_block_type"}
    config = {k: v for k, v in tiny("**").items() if k in needed}
    assert FAMILY.dims(config, 0).attention.D == 4
    assert "intermediate_size" in refused({**config, "layers_block_type": ["mlp"]})


def test_more_experts_than_anyone_has_are_refused_before_they_are_listed() -> None:
    assert "n_routed_experts" in refused({**FULL, "n_routed_experts": 10**9})


def test_heads_that_do_not_divide() -> None:
    assert "num_attention_heads 4 is no multiple of num_key_value_heads 3" in refused(
        {**FULL, "num_key_value_heads": 3}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_bias": True}, "use_bias"),
        ({"mamba_proj_bias": True}, "use_bias"),
        ({"use_conv_bias": False}, "use_conv_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5, the pattern 'M*E-' has 4"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is 4"),
        ({"hybrid_override_pattern": "M*E"}, "hybrid_override_pattern = 'M*E' and layers_block_type = 'M*E-' disagree"),
        ({"layers_block_type": ["mamba", "conv", "gru"]}, "unknown block kinds: conv, gru"),
        ({"layers_block_type": "mamba"}, "layers_block_type must be a list"),
        ({"layers_block_type": 5}, "layers_block_type must be a list"),
        ({"layers_block_type": [["mamba"]]}, "unknown block kinds"),
        ({"layers_block_type": []}, "nothing"),
        ({"layers_block_type": None}, "neither hybrid_override_pattern nor layers_block_type is given"),
        ({"layers_block_type": None, "hybrid_override_pattern": "M*X"}, "unknown block kinds ['X']"),
        ({"layers_block_type": None, "hybrid_override_pattern": 7}, "unknown block kinds ['7']"),
        ({"mtp_hybrid_override_pattern": "*-"}, "disagree"),
    ],
    ids=lambda x: str(x)[:50] if isinstance(x, dict) else "",
)
def test_contradictions_are_named(change: dict[str, Any], message: str) -> None:
    assert message in refused({**FULL, **change})


def test_depths_need_an_mtp_pattern() -> None:
    assert "mtp_hybrid_override_pattern" in refused(tiny("M"), 1)
    assert FAMILY.dims(tiny("M"), 0).mtp_pattern == ""


def test_both_forms_and_both_generations_mean_the_same() -> None:
    old = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    new = {**old, "M": "linear_attention", "*": "full_attention"}
    plain = {k: v for k, v in FULL.items() if k not in ("layers_block_type", "mtp_layers_block_type")}
    forms: list[dict[str, Any]] = [
        {"hybrid_override_pattern": "M*E-", "mtp_hybrid_override_pattern": "*E"},
        {"hybrid_override_pattern": "M*|E-", "mtp_layers_block_type": [old[x] for x in "*E"]},
        *(
            {"layers_block_type": [w[x] for x in "M*E-"], "mtp_layers_block_type": [w[x] for x in "*E"]}
            for w in (old, new)
        ),
    ]
    found = [FAMILY.dims(plain | form | {"num_hidden_layers": 4}, 2) for form in forms]
    assert found[0] == found[1] == found[2] == found[3]
    assert set(old.values()) | set(new.values()) == LETTERS.keys()


@pytest.mark.parametrize("model_type", [None, "llama", 7, ["nemotron_h"], {"a": 1}], ids=repr)
def test_an_unknown_family_is_refused_with_the_known_ones(model_type: object) -> None:
    with pytest.raises(ConvertError, match="nemotron_h") as caught:
        find({"model_type": model_type})
    assert (caught.value.code, caught.value.exit_code) == ("MTP021", 4)


@pytest.mark.parametrize("field", ["text_config", "llm_config", "language_config"])
def test_the_language_model_of_a_wrapper_is_found(field: str) -> None:
    assert find({"model_type": "a_vlm", field: FULL}) == (FAMILY, (field,))


def test_families_are_told_apart() -> None:
    types = [t for f in families() for t in f.model_types]
    assert len(types) == len(set(types))


def found(name: str, config: dict[str, Any], depths: int, words: dict[str, str]) -> tuple[Layout, Layout]:
    """A layout in a spelling, and the one that is chosen for its names."""
    dims = FAMILY.dims(config, depths)
    stored = FAMILY.layout(name, dims, words)
    return stored, FAMILY.fit(name, dims, frozenset(stored.bindings))


MODELS = {
    "all kinds": (FULL, 2),
    "tied, no MTP": (tiny("M*E-", tie_word_embeddings=True), 0),
    "equal layers": (tiny("**", tie_word_embeddings=True), 0),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "words", list(FAMILY.spellings("hf", FAMILY.dims(FULL, 2))), ids=lambda w: "/".join(w.values())
)
def test_every_hf_spelling_is_found(model: str, words: dict[str, str]) -> None:
    stored, chosen = found("hf", *MODELS[model], words)
    assert chosen.bindings == stored.bindings


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("wrapper", FAMILY.choices["megatron"]["wrapper"])
def test_every_megatron_spelling_is_found(model: str, wrapper: str) -> None:
    choices = FAMILY.choices["megatron"]
    free = [w for w in choices if w not in ("wrapper", "decoder")]
    stacks = choices["decoder"] if model == "equal layers" else ("per_layer",)
    some = list(product(*(choices[w] for w in free)))[choices["wrapper"].index(wrapper) :: 53]
    for n, combo in enumerate(some):
        words = {**dict(zip(free, combo, strict=True)), "wrapper": wrapper, "decoder": stacks[n % len(stacks)]}
        stored, chosen = found("megatron", *MODELS[model], words)
        assert chosen.bindings == stored.bindings, words


def test_a_spelling_is_found_in_an_incomplete_checkpoint() -> None:
    dims = FAMILY.dims(FULL, 2)
    stored = FAMILY.layout("hf", dims, {"trunk": "model", "embeddings": "embed_tokens", "norm": "norm"})
    some = frozenset(n for n in stored.bindings if "experts" not in n and not n.startswith("model.layers.1"))
    assert FAMILY.fit("hf", dims, some).bindings == stored.bindings


def test_words_that_nothing_speaks_for_stay_as_released() -> None:
    dims = FAMILY.dims(FULL, 2)
    stored = FAMILY.layout("megatron", dims, {"final_norm": "final_layernorm"})
    some = frozenset(n for n in stored.bindings if not n.startswith("mtp."))
    assert FAMILY.fit("megatron", dims, some).words == stored.words


def test_stored_depths_are_counted_without_a_gap() -> None:
    dims = FAMILY.dims(FULL, 2)
    for name in ("hf", "megatron"):
        whole = FAMILY.layout(name, with_depths(dims, 3))
        depths = [FAMILY.depth_tensors(whole, dims, k) for k in range(3)]
        assert FAMILY.stored_depths(whole, dims, frozenset(whole.bindings)) == 3
        assert FAMILY.stored_depths(whole, dims, frozenset(whole.bindings) - depths[1]) == 1
        assert FAMILY.stored_depths(whole, dims, frozenset(whole.bindings) - depths[0] - depths[1] - depths[2]) == 0


def test_every_rule_of_the_tables_is_used() -> None:
    """The tiny models together bind every tensor name that the tables can make (indices blanked)."""
    used: set[str] = set()
    for config, depths in (*MODELS.values(), (tiny("E-*", moe_latent_size=4, attention_bias=True), 0)):
        for name in ("hf", "megatron"):
            made = layout(config, name, depths)
            used |= {".".join("#" if p.isdigit() else p for p in n.split(".")) for n in made.bindings}
    for tensor in ("fc1_latent_proj", "q_proj.bias", "shared_experts", "eh_proj", "A_log", "linear_qkv.bias", "router"):
        assert any(tensor in n for n in used), tensor
    assert len(used) > 90
