"""The two sides: the same places, computed alike from the same inputs, whole or streamed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from _families import config_of, random_folder, random_tensors
from _kit import AUTOMODEL, MEGATRON, convert, hf_folder
from _sides import both, error, forced, from_same_inputs, recorded, repeated, side, source, token_ids
from safetensors.torch import load_file

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.errors import ConvertError
from mtp_convert.verify.side import Side, open_side

EQUAL = 5e-6  # relative, float32; router scores and recurrences amplify rounding a little
FAMILIES = ("deepseek_v3", "deepseek_v4", "glm4_moe", "mimo", "nemotron_h", "qwen3_next")
GOLDEN = ("dsv4_mtpratio4", "nemotron_d2_rep", "nemotron_mtpM", "tiny-nemotron-h")


Pairs = Callable[[str], tuple[Side, Side]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """A folder by its name, and its conversion to Megatron; each made once."""
    return cache(lambda name: both(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", [*FAMILIES, *GOLDEN])
def test_same_places_and_the_same_from_the_same_inputs(name: str, pair: Pairs) -> None:
    a, b = pair(name)
    assert a.places() == b.places()
    errors = from_same_inputs(a, b)
    assert errors.keys() == set(a.places())
    assert max(errors.values()) < (2e-5 if name == "qwen3_next" else EQUAL), errors


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_is_whole_bit_for_bit(name: str, pair: Pairs) -> None:
    for one in pair(name):
        whole, streamed = recorded(one), recorded(one, streamed=True)
        assert whole.inputs.keys() == set(one.places()) - {"embedding"}
        for place in one.places():
            assert torch.equal(whole.outputs[place], streamed.outputs[place]), place


@pytest.mark.parametrize("name", ["deepseek_v4", "glm_moe_dsa", "nemotron_d2_rep"])
def test_every_place_runs_alone(name: str, pair: Pairs) -> None:
    for one in pair(name):
        whole = recorded(one)
        for place in one.places():
            assert torch.equal(forced(one, whole.inputs, [place])[place], whole.outputs[place]), place


@pytest.mark.parametrize("name", ["hyb_m", "qwen2_te", "dsv3_te"])
def test_megatron_side_is_what_megatron_core_computed(name: str) -> None:
    config = MEGATRON / name / "config.json"
    golden = load_file(MEGATRON / name / "out.safetensors")
    found = {}
    for container in ("ckpt", "legacy"):
        tap, one = _Outputs(), side(MEGATRON / name / container, config)
        one.run(golden["tokens"], tap, dtype=torch.float32, device=torch.device("cpu"), streamed=True)
        found[container] = tap.outputs
        assert error(tap.outputs["logits"], golden["logits"]) < 1e-5
        assert error(tap.outputs["mtp.0.block"], golden["hidden_mtp0"]) < 1e-5
    assert all(torch.equal(value, found["legacy"][place]) for place, value in found["ckpt"].items())


class _Outputs:
    """Keeps outputs."""

    def __init__(self) -> None:
        self.outputs: dict[str, torch.Tensor] = {}

    def enter(self, place: str, value: torch.Tensor) -> torch.Tensor:
        return value

    def leave(self, place: str, value: torch.Tensor) -> None:
        self.outputs[place] = value.clone()


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}])
def test_ranks_are_put_together(parallel: dict[str, int], tmp_path: Path) -> None:
    folder = source("deepseek_v3", tmp_path)
    convert(folder, tmp_path / "one", "megatron")
    convert(folder, tmp_path / "many", "megatron", container="legacy", parallel=parallel)
    one, many = (recorded(side(tmp_path / name)).outputs for name in ("one", "many"))
    assert all(torch.equal(value, many[place]) for place, value in one.items())


@pytest.mark.parametrize(("name", "encoding"), [("deepseek_v3", "fp8-block"), ("deepseek_v4", "mxfp4")])
def test_codes_run_as_their_values(name: str, encoding: str, tmp_path: Path) -> None:
    folder = source(name, tmp_path)
    convert(folder, tmp_path / "coded", "hf", encoding=encoding)
    convert(tmp_path / "coded", tmp_path / "plain", "hf", encoding="bf16")
    coded, plain = (recorded(side(tmp_path / which)).outputs for which in ("coded", "plain"))
    assert all(torch.equal(value, plain[place]) for place, value in coded.items())
    assert error(coded["logits"], recorded(side(folder)).outputs["logits"]) > 1e-3


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v4", "mimo", "nemotron_h"])
def test_native_folders_run(name: str, tmp_path: Path) -> None:
    folder = source(name, tmp_path)
    convert(folder, tmp_path / "native", "native")
    assert max(from_same_inputs(side(folder), side(tmp_path / "native")).values()) < EQUAL


def test_one_depth_runs_several_times(tmp_path: Path) -> None:
    folder = random_folder("deepseek_v3", tmp_path / "hf")
    convert(folder, tmp_path / "megatron", "megatron", steps=3)
    a, b = repeated(folder, 3), side(tmp_path / "megatron")
    assert a.places()[-1] == "mtp.2.logits"
    assert a.tensors("mtp.0.block") == a.tensors("mtp.2.block")
    assert b.tensors("mtp.0.fused") == b.tensors("mtp.2.fused")
    assert max(from_same_inputs(a, b).values()) < EQUAL


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    tensors = random_tensors("qwen3")
    tensors.pop("lm_head.weight", None)
    folder = hf_folder(tmp_path / "hf", tensors, config_of("qwen3") | {"tie_word_embeddings": True})
    convert(folder, tmp_path / "megatron", "megatron")
    a, b = side(folder), side(tmp_path / "megatron")
    assert a.tensors("logits") == a.tensors("embedding")
    assert b.tensors("logits") == b.tensors("embedding")
    assert max(from_same_inputs(a, b).values()) < EQUAL
    assert torch.equal(recorded(b, streamed=True).outputs["logits"], recorded(b).outputs["logits"])


def test_tensors_that_feed_a_place_change_it_alone(tmp_path: Path) -> None:
    healthy = side(random_folder("glm4_moe", tmp_path / "hf"))
    for place in ("layers.2", "mtp.0.block", "mtp.0.fused"):
        tensors = random_tensors("glm4_moe")
        touched = next(name for name in healthy.tensors(place) if tensors[name].dim() == 2 and "embed" not in name)
        tensors[touched] = tensors[touched].flip(0)
        wrong = side(hf_folder(tmp_path / place, tensors, config_of("glm4_moe")))
        assert {p for p, e in from_same_inputs(healthy, wrong).items() if e > EQUAL} == {place}, touched


def test_a_place_reads_what_it_says(pair: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtp_convert.verify.stored_weights import Index, StoredValues

    read: set[str] = set()
    original = StoredValues.__getitem__

    def noted(self: StoredValues, index: Index) -> torch.Tensor:
        read.add(self.tensor.name)
        return original(self, index)

    monkeypatch.setattr(StoredValues, "__getitem__", noted)
    for one in pair("deepseek_v3"):
        inputs = recorded(one).inputs
        for place in ("embedding", "layers.1", "logits", "mtp.0.fused", "mtp.0.block"):
            read.clear()
            forced(one, inputs, [place])
            assert read == set(one.tensors(place)), place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v4", "nemotron_d1"])
def test_every_dtype_runs(name: str, dtype: torch.dtype, pair: Pairs) -> None:
    for one in pair(name):
        plain, other = recorded(one), recorded(one, dtype=dtype)
        assert other.outputs["layers.0"].dtype == dtype
        low, high = (0.0, 1e-5) if dtype == torch.float64 else (1e-4, 0.1)
        assert low < error(other.outputs["layers.0"].float(), plain.outputs["layers.0"]) < high


class TestRefusals:
    """What cannot run is said in one line each."""

    def test_a_family_without_code(self, tmp_path: Path) -> None:
        with pytest.raises(ConvertError, match="no model_type 'bailing_moe_v2'") as caught:
            side(random_folder("bailing_moe", tmp_path / "hf"))
        assert (caught.value.code, caught.value.exit_code) == ("MTP032", 4)

    def test_mtp_under_unknown_names(self, tmp_path: Path) -> None:
        with pytest.raises(ConvertError, match=r"no MTP tensors under names that are known.*deepseek_v3"):
            side(random_folder("longcat_flash", tmp_path / "hf"))

    def test_tensors_that_the_tree_has_not(self, tmp_path: Path) -> None:
        convert(AUTOMODEL / "nemotron_d1", tmp_path / "b", "native", variant="automodel")
        with pytest.raises(ConvertError, match="missing") as caught:
            side(tmp_path / "b")
        assert len(caught.value.problems) > 10

    def test_another_backend(self) -> None:
        with pytest.raises(ConvertError, match=r"backend in nemotron_d1: got megatron-core, expected none"):
            open_side(open_checkpoint(AUTOMODEL / "nemotron_d1"), backend="megatron-core")


def test_a_checkpoint_without_arguments_is_what_its_config_says(tmp_path: Path) -> None:
    golden, config = MEGATRON / "dsv4_dev" / "ckpt", MEGATRON / "dsv4_dev" / "config.json"
    assert not open_checkpoint(golden, hf_config=config).stored.arguments.get("args")
    convert(golden, tmp_path / "hf", "hf", hf_config=config)
    assert max(from_same_inputs(side(tmp_path / "hf"), side(golden, config)).values()) < EQUAL


def test_rows_do_not_see_each_other(pair: Pairs) -> None:
    one, _ = pair("deepseek_v3")
    two, tap = recorded(one), _Outputs()
    one.run(token_ids()[:1], tap, dtype=torch.float32, device=torch.device("cpu"), streamed=False)
    assert error(tap.outputs["mtp.0.logits"], two.outputs["mtp.0.logits"][:1]) < EQUAL
