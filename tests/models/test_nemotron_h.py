"""The Hugging Face side of Nemotron-H against NeMo AutoModel's outputs, and a trained fixture."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, NemotronHForCausalLM

from mtp_convert.models.nemotron_h import NemotronHOutput, NemotronHWithMTP, acceptance, shift_left

torch.set_num_threads(2)

FIXTURES = Path(__file__).parents[2] / "fixtures"
GOLDEN = FIXTURES / "golden" / "automodel"
TINY = FIXTURES / "tiny-nemotron-h"
TOLERANCE = 2e-4


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def swap_halves(weight: Tensor) -> None:
    """Exchange the column halves of eh_proj [H, 2H]."""
    weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))


def exchange(first: Tensor, second: Tensor) -> None:
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


@torch.no_grad()
def run(model: NemotronHWithMTP, ids: Tensor, mtp_steps: int | None = None) -> NemotronHOutput:
    output: NemotronHOutput = model(ids, mtp_steps=mtp_steps)
    return output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of the golden folder with all four block kinds inside MTP."""
    return Path(shutil.copytree(GOLDEN / "nemotron_mtpM", tmp_path / "model"))


@pytest.fixture(scope="module")
def heldout() -> Tensor:
    """Held-out text as token ids [B, S]."""
    data = list((FIXTURES / "text" / "heldout.txt").read_bytes())
    return torch.tensor(data[: len(data) // 96 * 96]).view(-1, 96)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("nemotron_d1", 1),
        ("nemotron_d2_rep", 2),  # one stored depth, run twice
        ("nemotron_mtpM", 2),
        ("nemotron_latent_groups", 2),
    ],
)
def test_outputs_equal_automodel(name: str, steps: int) -> None:
    golden = load_file(GOLDEN / name / "io.safetensors")
    model = NemotronHWithMTP.from_folder(GOLDEN / name)
    output = run(model, golden["input_ids"], steps)
    assert relative(output.logits, golden["logits"]) < TOLERANCE
    assert relative(output.hidden, golden["last_hidden"]) < TOLERANCE
    assert len(output.mtp_hidden) == len(output.mtp_logits) == steps
    for k in range(steps):
        assert relative(output.mtp_hidden[k], golden[f"mtp_per_depth_h.{k}"]) < TOLERANCE
        assert relative(output.mtp_logits[k], golden[f"mtp_logits.{k}"]) < TOLERANCE


def test_a_swapped_eh_proj_is_far_outside_the_tolerance() -> None:
    golden = load_file(GOLDEN / "nemotron_d1" / "io.safetensors")
    model = NemotronHWithMTP.from_folder(GOLDEN / "nemotron_d1")
    with torch.no_grad():
        swap_halves(model.mtp.layers[0].get_parameter("eh_proj.weight"))
    output = run(model, golden["input_ids"])
    assert relative(output.mtp_logits[0], golden["mtp_logits.0"]) > 0.1


def test_backbone_is_what_transformers_itself_loads() -> None:
    golden = load_file(GOLDEN / "nemotron_mtpM" / "io.safetensors")
    theirs = NemotronHForCausalLM.from_pretrained(GOLDEN / "nemotron_mtpM")
    ours = NemotronHWithMTP.from_folder(GOLDEN / "nemotron_mtpM")
    with torch.no_grad():
        expected = theirs(golden["input_ids"], use_cache=False).logits
    assert torch.equal(run(ours, golden["input_ids"], 0).logits, expected)


def test_steps_beyond_the_stored_depths_start_over() -> None:
    golden = load_file(GOLDEN / "nemotron_mtpM" / "io.safetensors")
    ids = golden["input_ids"]
    model = NemotronHWithMTP.from_folder(GOLDEN / "nemotron_mtpM")
    output = run(model, ids, 3)
    shifted = shift_left(shift_left(shift_left(ids)))
    with torch.no_grad():
        third = model.run_depth(shifted, output.mtp_hidden[1], depth=0)
    assert torch.equal(output.mtp_hidden[2], third)


def test_shift_left_fills_the_last_place_with_token_zero() -> None:
    ids = torch.tensor([[5, 6, 7]])
    assert shift_left(ids).tolist() == [[6, 7, 0]]
    assert ids.tolist() == [[5, 6, 7]]


def test_acceptance_compares_predictions_of_the_same_token() -> None:
    main = torch.tensor([[1, 2, 3, 4, 5]])  # choice at position i, for token i + 1
    draft = torch.tensor([[2, 3, 9, 5, 7]])  # choice at position i, for token i + 2
    one_hot = torch.nn.functional.one_hot
    logits, drafted = one_hot(main, 10).float(), one_hot(draft, 10).float()
    output = NemotronHOutput(logits, logits, (), (drafted, drafted))
    assert acceptance(output) == pytest.approx(3 / 4)
    assert acceptance(output, k=1) == pytest.approx(0 / 3)
    with pytest.raises(ValueError, match="5 tokens"):
        acceptance(output, k=4)


def test_released_state_is_the_file_again() -> None:
    stored = load_file(GOLDEN / "nemotron_latent_groups" / "model.safetensors")
    state = NemotronHWithMTP.from_folder(GOLDEN / "nemotron_latent_groups").released_state()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_missing_and_unexpected_tensors_are_named_together(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.layers.8.norm.weight"] = tensors.pop("mtp.layers.7.mixer.experts.3.up_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"experts\.3\.up_proj.*unexpected.*layers\.8\.norm"):
        NemotronHWithMTP.from_folder(folder)


def test_a_wrong_shape_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.layers.0.eh_proj.weight"] = tensors["mtp.layers.0.eh_proj.weight"].T.contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match="eh_proj"):
        NemotronHWithMTP.from_folder(folder)


def test_an_index_may_not_leave_its_folder(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its folder"):
        NemotronHWithMTP.from_folder(folder)


def as_patterns(config: dict[str, object]) -> None:
    del config["layers_block_type"], config["mtp_layers_block_type"]
    config |= {"hybrid_override_pattern": "M*E-ME", "mtp_hybrid_override_pattern": "M*-E"}


def as_old_names(config: dict[str, object]) -> None:
    old = {"linear_attention": "mamba", "full_attention": "attention", "moe": "moe", "mlp": "mlp"}
    for key in ("layers_block_type", "mtp_layers_block_type"):
        kinds = config[key]
        assert isinstance(kinds, list)
        config[key] = [old[kind] for kind in kinds]


@pytest.mark.parametrize("rewrite", [as_patterns, as_old_names])
def test_old_spellings_of_the_layer_kinds(folder: Path, rewrite: Callable[[dict[str, object]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    rewrite(config)
    (folder / "config.json").write_text(json.dumps(config))
    golden = load_file(folder / "io.safetensors")
    output = run(NemotronHWithMTP.from_folder(folder), golden["input_ids"])
    assert relative(output.mtp_logits[1], golden["mtp_logits.1"]) < TOLERANCE


def test_without_mtp_depths_there_is_only_a_backbone(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    save_file(kept, folder / "model.safetensors")
    golden = load_file(folder / "io.safetensors")
    model = NemotronHWithMTP.from_folder(folder)
    assert run(model, golden["input_ids"]).mtp_hidden == ()
    with pytest.raises(ValueError, match="no MTP depth"):
        run(model, golden["input_ids"], 1)


def test_a_narrower_type_spares_the_float32_tensors() -> None:
    state = NemotronHWithMTP.from_folder(GOLDEN / "nemotron_d1", torch.bfloat16).state_dict()
    kept = {name.rsplit(".", 1)[-1] for name, t in state.items() if t.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_bias", "e_score_correction_bias"}


def damage_nothing(model: NemotronHWithMTP) -> None:
    pass


def damage_halves(model: NemotronHWithMTP) -> None:
    swap_halves(model.mtp.layers[0].get_parameter("eh_proj.weight"))


def damage_norms(model: NemotronHWithMTP) -> None:
    layer = model.mtp.layers[0]
    exchange(layer.get_parameter("enorm.weight"), layer.get_parameter("hnorm.weight"))


@pytest.mark.parametrize(
    ("damage", "low", "high"),
    [(damage_nothing, 0.65, 1.0), (damage_halves, 0.0, 0.2), (damage_norms, 0.0, 0.45)],
)
def test_trained_heads_draft_until_damaged(
    heldout: Tensor, damage: Callable[[NemotronHWithMTP], None], low: float, high: float
) -> None:
    model = NemotronHWithMTP.from_folder(TINY, dtype=torch.float32)
    with torch.no_grad():
        damage(model)
    assert low < acceptance(run(model, heldout)) < high


def test_the_trained_fixture_loads_in_transformers(heldout: Tensor) -> None:
    text = "Alice, na\u00efve \u0103\n\u65e5 `x'  y"
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    theirs = NemotronHForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ours = NemotronHWithMTP.from_folder(TINY, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(heldout[:2], use_cache=False).logits
    assert torch.equal(run(ours, heldout[:2]).logits, expected)


def test_the_trained_fixture_stores_what_releases_store() -> None:
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
