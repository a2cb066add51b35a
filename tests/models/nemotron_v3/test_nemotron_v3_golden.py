"""The Nemotron-V3 tree against what NeMo AutoModel and transformers compute from the same folders."""

from pathlib import Path

import pytest
import torch
from _nemotron_v3 import (
    D1,
    GROUPS,
    MAMBA,
    PACKED,
    REPEATED,
    TINY,
    TOLERANCE,
    exchange,
    golden,
    load,
    relative,
    report,
    run,
    some_ids,
    swap_halves,
)
from torch import Tensor
from transformers import NemotronHForCausalLM as TransformersModel

from mtp_convert.models.mtp import get_mtp_loss_scaling_factor
from mtp_convert.models.nemotron_v3 import NemotronHForCausalLM, Numerics

FOLDERS = [(D1, 1), (REPEATED, 2), (GROUPS, 2), (MAMBA, 2), (PACKED, 2)]
NUMERICS = [Numerics(), Numerics.automodel()]


def check(model: NemotronHForCausalLM, expected: dict[str, Tensor], depths: int, **packed: Tensor) -> None:
    output = run(model, expected["input_ids"], output_hidden_states=True, **packed)
    assert relative(output.logits, expected["logits"]) < TOLERANCE
    assert relative(output.hidden_states[0], expected["last_hidden"]) < TOLERANCE
    assert output.mtp_per_depth_h is not None
    assert len(output.mtp_per_depth_h) == depths
    for k, hidden in enumerate(output.mtp_per_depth_h):
        assert relative(hidden, expected[f"mtp_per_depth_h.{k}"]) < TOLERANCE
        assert relative(model.logits(hidden), expected[f"mtp_logits.{k}"]) < TOLERANCE


@pytest.mark.parametrize("numerics", NUMERICS, ids=["transformers", "automodel"])
@pytest.mark.parametrize(("folder", "depths"), FOLDERS, ids=lambda v: getattr(v, "name", v))
def test_outputs_equal_automodel(folder: Path, depths: int, numerics: Numerics) -> None:
    expected = golden(folder)
    packed = {"seq_idx": expected["seq_idx"]} if "seq_idx" in expected else {}
    mask = {"attention_mask": expected["attention_mask_4d"]} if packed else {}
    check(load(folder, numerics=numerics), expected, depths, **packed, **mask)


def test_without_a_mask_documents_are_kept_apart_all_the_same() -> None:
    expected = golden(PACKED)
    real = expected["seq_idx"] != 0  # in the golden mask padding sees only itself
    output = run(load(PACKED), expected["input_ids"], seq_idx=expected["seq_idx"])
    assert output.mtp_per_depth_h is not None
    assert relative(output.logits[real], expected["logits"][real]) < TOLERANCE
    for k, hidden in enumerate(output.mtp_per_depth_h):
        # Position 14 reads what follows its document in the row, which is padding.
        assert relative(hidden[real], expected[f"mtp_per_depth_h.{k}"][real]) < TOLERANCE


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("mtp.layers.0.enorm.weight", "mtp.layers.0.hnorm.weight"),
        ("mtp.layers.0.enorm.weight", "mtp.layers.0.norm.weight"),
        ("mtp.layers.1.final_layernorm.weight", "mtp.layers.1.norm.weight"),
        ("mtp.layers.0.mixer.k_proj.weight", "mtp.layers.0.mixer.v_proj.weight"),
        ("model.layers.0.mixer.D", "model.layers.0.mixer.A_log"),
        ("model.norm.weight", "model.layers.5.norm.weight"),
    ],
)
def test_an_exchange_of_weights_is_far_outside_the_tolerance(first: str, second: str) -> None:
    expected = golden(D1)
    model = load(D1)
    exchange(model, first, second)
    hidden = run(model, expected["input_ids"]).mtp_per_depth_h
    assert hidden is not None
    assert relative(hidden[0], expected["mtp_per_depth_h.0"]) > 1e-2


def test_halves_of_eh_proj_are_far_outside_the_tolerance() -> None:
    expected = golden(D1)
    model = load(D1)
    swap_halves(model, "mtp.layers.0.eh_proj.weight")
    hidden = run(model, expected["input_ids"]).mtp_per_depth_h
    assert hidden is not None
    assert relative(hidden[0], expected["mtp_per_depth_h.0"]) > 0.1


def round_scalars(model: NemotronHForCausalLM) -> None:
    """Give Mamba's scalars bfloat16 values: transformers casts what releases keep in float32."""
    for name, tensor in model.state_dict().items():
        if name.endswith((".A_log", ".D", ".dt_bias")):
            assert tensor.dtype == torch.float32
            tensor.copy_(tensor.bfloat16())


@pytest.mark.parametrize("folder", [GROUPS, TINY], ids=lambda folder: folder.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pad", [False, True], ids=["full", "padded"])
def test_the_backbone_equals_transformers_bit_for_bit(folder: Path, dtype: torch.dtype, pad: bool) -> None:
    ids = some_ids(3, 19)
    mask = torch.ones_like(ids)
    if pad:
        mask[0, :5] = mask[1, -4:] = 0
    theirs = TransformersModel.from_pretrained(folder, dtype=dtype)
    ours = load(folder, dtype=dtype)
    if dtype == torch.bfloat16:
        round_scalars(ours)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(run(ours, ids, attention_mask=mask).logits, expected)


def test_the_loss_equals_automodel() -> None:
    expected = golden(D1)
    loss = run(load(D1), expected["input_ids"], labels=expected["input_ids"]).loss
    assert float(loss) == pytest.approx(report(D1)["hf_loss_internal_shift_mean"], rel=1e-6)


def test_mtp_runs_in_training_or_when_asked_for_and_never_with_a_cache() -> None:
    model, ids = NemotronHForCausalLM.from_pretrained(D1), some_ids(1, 5)
    output = run(model, ids)
    assert (output.mtp_per_depth_h, output.mtp_loss_scaling_factor) == (None, None)
    assert run(model.train(), ids).mtp_per_depth_h is not None
    model.eval().compute_mtp_in_eval = True
    output = run(model, ids)
    assert output.mtp_per_depth_h is not None
    assert output.mtp_loss_scaling_factor == get_mtp_loss_scaling_factor(model) == 0.1
    assert run(model, ids, use_cache=True).mtp_per_depth_h is None


def test_fields_of_mtp_survive_a_rebuilt_output() -> None:
    output = run(load(D1), some_ids(1, 5))
    rebuilt = type(output)(**dict(output.items()))
    assert rebuilt.mtp_per_depth_h is not None
    assert rebuilt.mtp_loss_scaling_factor == 0.1
