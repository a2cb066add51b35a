"""Reading folders, strictly, and the names of the tree."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from _nemotron_v3 import (
    D1,
    GOLDEN,
    GROUPS,
    MAMBA,
    PACKED,
    REPEATED,
    TINY,
    TOLERANCE,
    config_of,
    golden,
    load,
    relative,
    run,
    some_ids,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import NemotronHForCausalLM as TransformersModel

from mtp_convert.models.nemotron_v3 import NemotronHForCausalLM, Numerics


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of the golden folder with all four block kinds inside MTP."""
    return Path(shutil.copytree(MAMBA, tmp_path / "model"))


def rewrite(folder: Path, change: Any) -> None:  # noqa: ANN401
    """Let `change` edit the folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("source", [D1, REPEATED, GROUPS, MAMBA, PACKED], ids=lambda source: source.name)
def test_released_tensors_are_the_file_again(source: Path) -> None:
    stored = load_file(source / "model.safetensors")
    state = load(source).released_state()
    assert list(state) == sorted(stored)
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_names_and_shapes_of_the_tree() -> None:
    model = load(GROUPS)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert {n: s for n, s in shapes.items() if n.startswith(("model.layers.2.", "mtp.layers.1."))} == {
        **moe_shapes("model.layers.2."),
        **moe_shapes("mtp.layers.1."),
        "mtp.layers.1.final_layernorm.weight": (32,),
    }
    assert {n: s for n, s in shapes.items() if not n.startswith(("model.layers.", "mtp."))} == {
        "model.embed_tokens.weight": (64, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (64, 32),
    }
    fusion = {n.rsplit(".", 2)[1] for n in shapes if n.startswith("mtp.layers.2.")} - {"mixer"}
    assert fusion >= {"enorm", "hnorm", "eh_proj", "norm"}
    assert shapes["mtp.layers.2.eh_proj.weight"] == (32, 64)


def moe_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        prefix + name: shape
        for name, shape in {
            "norm.weight": (32,),
            "mixer.gate.weight": (8, 32),
            "mixer.gate.e_score_correction_bias": (8,),
            "mixer.experts.up_proj": (8, 24, 16),
            "mixer.experts.down_proj": (8, 16, 24),
            "mixer.shared_experts.up_proj.weight": (40, 32),
            "mixer.shared_experts.down_proj.weight": (32, 40),
            "mixer.fc1_latent_proj.weight": (16, 32),
            "mixer.fc2_latent_proj.weight": (32, 16),
        }.items()
    }


def native(folder: Path) -> None:
    """Store the tree's own names."""
    save_file(load(MAMBA).state_dict(), folder / "model.safetensors")


def by_transformers(folder: Path) -> None:
    """Store the names that transformers' tree has: experts stacked, no MTP."""
    model = TransformersModel.from_pretrained(MAMBA)
    mtp = {n: t for n, t in load_file(MAMBA / "model.safetensors").items() if n.startswith("mtp.")}
    save_file({**model.state_dict(), **mtp}, folder / "model.safetensors")


def saved_by_transformers(folder: Path) -> None:
    mtp = {n: t for n, t in load_file(MAMBA / "model.safetensors").items() if n.startswith("mtp.")}
    TransformersModel.from_pretrained(MAMBA).save_pretrained(folder)
    rewrite(folder, lambda tensors: tensors.update(mtp))


def in_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[:70], "b.safetensors": names[70:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("store", [native, by_transformers, saved_by_transformers, in_shards])
def test_other_spellings_and_shards(folder: Path, store: Any) -> None:  # noqa: ANN401
    store(folder)
    state = NemotronHForCausalLM.from_pretrained(folder).state_dict()
    expected = load(MAMBA).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_everything_that_is_wrong_is_named_at_once(folder: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["mtp.layers.8.norm.weight"] = tensors.pop("mtp.layers.7.mixer.experts.3.up_proj.weight")
        tensors["mtp.layers.0.eh_proj.weight"] = tensors["mtp.layers.0.eh_proj.weight"].T.contiguous()
        tensors["backbone.layers.2.mixer.experts.0.down_proj.weight"] = torch.zeros(32, 25)
        del tensors["backbone.norm_f.weight"]

    rewrite(folder, damage)
    with pytest.raises(ValueError, match=r"^model: tensors missing") as error:
        NemotronHForCausalLM.from_pretrained(folder)
    text = str(error.value)
    assert "missing: ['backbone.norm_f.weight', 'mtp.layers.7.mixer.experts.3.up_proj.weight']" in text
    assert "unexpected: ['mtp.layers.8.norm.weight']" in text
    assert "mtp.layers.0.eh_proj.weight has shape (64, 32), expected (32, 64)" in text
    assert "experts.0.down_proj.weight has shape (32, 25), expected (32, 24)" in text
    assert "without MTP" not in text  # more is missing than MTP


def test_a_tensor_under_two_names_is_one_too_many(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.embeddings.weight": t["backbone.embeddings.weight"].clone()}))
    with pytest.raises(ValueError, match=r"unexpected: \['model\.embeddings\.weight'\]"):
        NemotronHForCausalLM.from_pretrained(folder)


def test_two_files_must_not_hold_one_name(folder: Path) -> None:
    in_shards(folder)
    tensors = load_file(folder / "b.safetensors")
    save_file({**tensors, "backbone.embeddings.weight": torch.zeros(64, 32)}, folder / "b.safetensors")
    with pytest.raises(ValueError, match=r"in more than one file: \['backbone\.embeddings\.weight'\]"):
        NemotronHForCausalLM.from_pretrained(folder)


def test_an_index_may_not_leave_its_folder(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"outside its folder: \['\.\./model\.safetensors'\]"):
        NemotronHForCausalLM.from_pretrained(folder)


def test_only_local_folders_are_read(tmp_path: Path) -> None:
    for source in ("someone/a-model", tmp_path):
        with pytest.raises(ValueError, match="no local folder"):
            NemotronHForCausalLM.from_pretrained(source)


# Which depths are read


def test_mtp_can_be_left_out() -> None:
    model = load(MAMBA, num_nextn_predict_layers=0)
    assert model.mtp is None
    assert not [name for name in model.state_dict() if name.startswith("mtp.")]
    assert torch.equal(run(model, some_ids(1, 5)).logits, run(load(MAMBA), some_ids(1, 5)).logits)


def test_a_folder_without_depths_is_a_backbone(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith("mtp.")}
    save_file(tensors, folder / "model.safetensors")
    model = NemotronHForCausalLM.from_pretrained(folder)
    model.compute_mtp_in_eval = True
    output = run(model, golden(folder)["input_ids"])
    assert relative(output.logits, golden(folder)["logits"]) < TOLERANCE
    assert output.mtp_per_depth_h is None
    with pytest.raises(ValueError, match=r"missing: \['mtp\.layers\.0\."):
        NemotronHForCausalLM.from_pretrained(folder, num_nextn_predict_layers=1)


def test_fewer_depths_than_stored() -> None:
    expected = golden(MAMBA)
    hidden = run(load(MAMBA, num_nextn_predict_layers=1), expected["input_ids"]).mtp_per_depth_h
    assert hidden is not None
    assert len(hidden) == 1
    assert relative(hidden[0], expected["mtp_per_depth_h.0"]) < 1e-5


def test_several_stored_depths_are_not_folded_into_one() -> None:
    with pytest.raises(ValueError, match=r"unexpected: \['mtp\.layers\.4\."):
        NemotronHForCausalLM.from_pretrained(MAMBA, num_nextn_predict_layers=2, mtp_use_repeated_layer=True)


def test_more_depths_than_stored_lack_weights() -> None:
    with pytest.raises(ValueError, match=r"missing: \['mtp\.layers\.2\..*; for a model without MTP give"):
        NemotronHForCausalLM.from_pretrained(D1, num_nextn_predict_layers=2)


# Types, config, generation settings


def test_stored_types_are_kept_unless_another_is_asked_for() -> None:
    stored = {name: t.dtype for name, t in NemotronHForCausalLM.from_pretrained(TINY).state_dict().items()}
    assert set(stored.values()) == {torch.bfloat16, torch.float32}
    assert {t.dtype for t in load(TINY, dtype=torch.float32).state_dict().values()} == {torch.float32}
    narrow = load(D1, dtype=torch.bfloat16).state_dict()
    kept = {name.rsplit(".", 1)[-1] for name, t in narrow.items() if t.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_bias", "e_score_correction_bias"}


def test_options_reach_the_model(folder: Path) -> None:
    config = config_of(MAMBA, output_hidden_states=True)
    model = NemotronHForCausalLM.from_pretrained(
        str(folder), config=config, mtp_loss_scaling_factor=0.3, numerics=Numerics.automodel()
    )
    assert model.mtp_config.loss_scaling_factor == 0.3
    assert model.numerics == Numerics.automodel()
    assert run(model, some_ids(1, 3)).hidden_states is not None
    assert not model.training


def test_generation_settings_of_the_folder(folder: Path) -> None:
    settings = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert NemotronHForCausalLM.from_pretrained(folder).generate(some_ids(1, 4)).shape == (1, 7)


def as_patterns(config: dict[str, Any]) -> None:
    del config["layers_block_type"], config["mtp_layers_block_type"]
    config |= {"hybrid_override_pattern": "M*E-ME", "mtp_hybrid_override_pattern": "M*-E"}


def as_old_names(config: dict[str, Any]) -> None:
    old = {"linear_attention": "mamba", "full_attention": "attention", "moe": "moe", "mlp": "mlp"}
    for key in ("layers_block_type", "mtp_layers_block_type"):
        config[key] = [old[kind] for kind in config[key]]


@pytest.mark.parametrize("spell", [as_patterns, as_old_names])
def test_old_spellings_of_the_block_kinds(folder: Path, spell: Any) -> None:  # noqa: ANN401
    config = json.loads((folder / "config.json").read_text())
    spell(config)
    (folder / "config.json").write_text(json.dumps(config))
    expected = golden(MAMBA)
    model = NemotronHForCausalLM.from_pretrained(folder).train()
    hidden = run(model, expected["input_ids"]).mtp_per_depth_h
    assert hidden is not None
    assert relative(hidden[1], expected["mtp_per_depth_h.1"]) < 1e-5


def test_golden_folders_are_all_covered() -> None:
    assert {p for p in GOLDEN.iterdir() if p.name.startswith("nemotron")} == {D1, REPEATED, GROUPS, MAMBA, PACKED}
