"""Encoded checkpoints there and back: decoded by formula, the same bytes again, and what happens to changed weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from _coded import same_bits
from _kit import (
    AUTOMODEL,
    FIXTURES,
    Cli,
    Tensors,
    config_of,
    convert,
    differing,
    files_of,
    golden_config,
    golden_tensors,
    hf_folder,
)
from _reference import E4M3, E8M0, FORMATS, decode
from _releases import FP8, QUANTIZATION, all_linear, encoded, modelopt, of_format, release, streams
from safetensors.torch import load_file, save_file

from mtp_convert.adapters import find
from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.difference import diff
from mtp_convert.errors import ConvertError
from mtp_convert.inspection import inspect_checkpoint
from mtp_convert.options import Options
from mtp_convert.roundtrip import roundtrip


def weights(folder: Path) -> Tensors:
    """Every tensor of a safetensors folder."""
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


@pytest.mark.parametrize("format", FORMATS)
def test_values_are_the_formulas_and_bytes_come_back(format: str, tmp_path: Path) -> None:
    source, meant = of_format(tmp_path / "source", format)
    convert(source, tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "plain", "hf")
    convert(tmp_path / "megatron", tmp_path / "back", "hf", encoding="source")
    plain = weights(tmp_path / "plain")
    assert len(meant) > 60
    assert all(same_bits(plain[n], meant[n].bfloat16()) for n in meant)
    assert "quantization_config" not in config_of(tmp_path / "plain")
    assert differing(source, tmp_path / "back") == []


def test_mixed_release_with_scales_of_activations(tmp_path: Path) -> None:
    source, meant = modelopt(tmp_path / "source")
    for to in ("megatron", "native"):
        convert(source, tmp_path / to, to)
        convert(tmp_path / to, tmp_path / f"{to}-back", "hf", encoding="source")
        convert(tmp_path / to, tmp_path / f"{to}-plain", "hf")
        assert differing(source, tmp_path / f"{to}-back") == []
        plain = weights(tmp_path / f"{to}-plain")
        assert all(same_bits(plain[n], meant[n].bfloat16()) for n in meant)
        assert not [n for n in plain if n.endswith("scale")]
        assert not (tmp_path / f"{to}-plain" / "hf_quant_config.json").exists()
    assert "quantization_config" not in config_of(tmp_path / "native")
    assert not (tmp_path / "native" / "hf_quant_config.json").exists()


def test_scales_beside_params_that_are_called_scales(tmp_path: Path) -> None:
    """Hyper-connections have float32 params named `hc_attn_scale`; weights have `.scale` beside them."""
    source, meant = release(tmp_path / "source", streams, "dsv4_d1", **QUANTIZATION["fp8_powers"])
    raw = weights(source)
    assert {raw[n].dtype for n in raw if n.endswith("hc_attn_scale")} == {torch.float32}
    convert(source, tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "plain", "hf")
    convert(tmp_path / "megatron", tmp_path / "back", "hf", encoding="source")
    plain = weights(tmp_path / "plain")
    assert all(same_bits(plain[n], meant[n].bfloat16()) for n in meant)
    assert {n for n in plain if plain[n].dtype == torch.float32} == {n for n in raw if raw[n].dtype == torch.float32}
    assert differing(source, tmp_path / "back") == []
    convert(tmp_path / "plain", tmp_path / "again", "hf", encoding="fp8-block")
    found = weights(tmp_path / "again")
    assert {n for n in found if found[n].dtype == E4M3} == meant.keys()


def test_scales_travel_over_several_conversions(tmp_path: Path) -> None:
    source, _ = modelopt(tmp_path / "source")
    convert(source, tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "megatron", "megatron", container="legacy", parallel={"tensor": 2})
    convert(tmp_path / "megatron", tmp_path / "again", "megatron")
    convert(tmp_path / "again", tmp_path / "back", "hf", encoding="source")
    assert differing(source, tmp_path / "back") == []


def test_original_folder_in_place_of_what_was_carried(tmp_path: Path) -> None:
    source, _ = of_format(tmp_path / "source", "fp8_block")
    convert(source, tmp_path / "megatron", "megatron")
    shutil.rmtree(tmp_path / "megatron" / "hf")
    convert(tmp_path / "megatron", tmp_path / "back", "hf", hf_config=source, encoding="source")
    raw, back = weights(source), weights(tmp_path / "back")
    assert raw.keys() == back.keys()
    assert all(same_bits(raw[n], back[n]) for n in raw)
    assert config_of(tmp_path / "back") == config_of(source)


@pytest.mark.parametrize("via", ["megatron", "native"])
def test_roundtrip_compares_raw_bytes(via: str, tmp_path: Path) -> None:
    source, _ = of_format(tmp_path / "source", "mxfp4")
    result = roundtrip(open_checkpoint(source), Options(via))
    assert result.ok
    assert result.same_files
    assert result.tensors == len(weights(source))


def test_exact_products_in_float32(tmp_path: Path) -> None:
    source, meant = of_format(tmp_path / "source", "fp8_block")
    convert(source, tmp_path / "megatron", "megatron", dtype="fp32")
    convert(tmp_path / "megatron", tmp_path / "plain", "hf", encoding="bf16")
    convert(tmp_path / "megatron", tmp_path / "back", "hf", encoding="source")
    plain = weights(tmp_path / "plain")
    assert all(same_bits(plain[n], meant[n]) for n in meant)
    raw, back = weights(source), weights(tmp_path / "back")
    scaled = {n for n in raw if n.endswith("_scale_inv")}
    codes = {n.removesuffix("_scale_inv") for n in scaled}
    assert all(same_bits(raw[n], back[n]) for n in scaled | codes)


def test_diff_compares_values(tmp_path: Path) -> None:
    source, _ = of_format(tmp_path / "source", "fp8_block")
    convert(source, tmp_path / "bf16", "megatron")
    convert(source, tmp_path / "fp32", "megatron", dtype="fp32")
    checkpoint = open_checkpoint(source)
    assert diff(checkpoint, open_checkpoint(tmp_path / "bf16")).equal
    assert diff(checkpoint, open_checkpoint(tmp_path / "fp32")).equal
    raw = weights(source)
    name = next(n for n in raw if n.endswith("_scale_inv"))
    raw[name] = raw[name] * 2
    other = hf_folder(tmp_path / "other", raw, config_of(source))
    assert {d.a for d in diff(checkpoint, open_checkpoint(other)).differing} == {name.removesuffix("_scale_inv")}


def test_changed_weights_are_coded_again(tmp_path: Path) -> None:
    """As training leaves them: one weight of the Megatron side is another one, all other bytes stay."""
    source, _ = of_format(tmp_path / "source", "fp8_block")
    convert(source, tmp_path / "native", "native")
    path = tmp_path / "native" / "model.safetensors"
    trained = load_file(path)
    name = next(n for n, t in trained.items() if n.endswith("o_proj.weight"))
    trained[name] = (trained[name].float() * 1.37 + 0.01).bfloat16()
    save_file(trained, path, metadata={"format": "pt"})
    convert(tmp_path / "native", tmp_path / "back", "hf", encoding="source")
    raw, back = weights(source), weights(tmp_path / "back")
    changed = {n for n in raw if not same_bits(raw[n], back[n])}
    hf_name = next(n for n in changed if n.endswith("o_proj.weight"))
    assert changed == {hf_name, f"{hf_name}_scale_inv"}
    found = decode(back[hf_name], back[f"{hf_name}_scale_inv"], (128, 128))
    assert torch.allclose(found, trained[name].float(), atol=float(trained[name].abs().max()) / 16)
    assert not torch.allclose(found, decode(raw[hf_name], raw[f"{hf_name}_scale_inv"], (128, 128)), atol=0.005)


def test_auto_never_quantises(tmp_path: Path) -> None:
    source, _ = of_format(tmp_path / "source", "fp8_block")
    convert(source, tmp_path / "megatron", "megatron")
    result = convert(tmp_path / "megatron", tmp_path / "plain", "hf")
    assert {t.dtype for t in weights(tmp_path / "plain").values()} <= {torch.bfloat16, torch.float32}
    assert any("--encoding source" in note for note in result.notes)


class TestSameLayout:
    """Hugging Face to Hugging Face: codes are copied, not made again."""

    def test_auto_keeps_codes(self, tmp_path: Path) -> None:
        source, _ = modelopt(tmp_path / "source")
        convert(source, tmp_path / "same", "hf")
        assert differing(source, tmp_path / "same") == []

    def test_codes_below_a_nan_scale_are_copied(self, tmp_path: Path) -> None:
        """Their values cannot tell the codes any more, so nothing but a copy keeps them."""
        source, _ = of_format(tmp_path / "source", "mxfp4_packed")
        raw = weights(source)
        name = next(n for n in raw if n.endswith("weight_scale"))
        raw[name][0, 0] = 255
        broken = hf_folder(tmp_path / "broken", raw, config_of(source))
        convert(broken, tmp_path / "same", "hf", words={"trunk": "model"})
        found = weights(tmp_path / "same")
        assert all(same_bits(t, found[n.replace("backbone.", "model.")]) for n, t in raw.items())

    def test_codes_cannot_be_stacked(self, tmp_path: Path) -> None:
        config = json.loads((FIXTURES / "configs" / "deepseek_v3.json").read_text())
        family, _ = find(config)
        layout = family.layout("hf", family.dims(config, family.depths.declared(config)))
        values = {b.tensor: torch.randn(b.shape) for b in layout.bindings.values()}
        raw, _ = encoded(values, lambda n: "fp8_block" if ".experts." in n else None)
        source = hf_folder(tmp_path / "source", raw, {**config, "quantization_config": FP8})
        with pytest.raises(ConvertError) as caught:
            convert(source, tmp_path / "stacked", "hf", words={"experts": "stacked"})
        assert caught.value.code == "MTP028"
        assert "--encoding bf16" in caught.value.hint
        convert(source, tmp_path / "plain", "hf", words={"experts": "stacked"}, encoding="bf16")
        assert [n for n in weights(tmp_path / "plain") if n.endswith("experts.down_proj")]

    def test_bf16_decodes(self, tmp_path: Path) -> None:
        source, meant = modelopt(tmp_path / "source")
        result = convert(source, tmp_path / "plain", "hf", encoding="bf16")
        plain = weights(tmp_path / "plain")
        assert all(same_bits(plain[n], meant[n].bfloat16()) for n in meant)
        assert any("scales of activations" in note for note in result.notes)

    def test_a_type_decodes(self, tmp_path: Path) -> None:
        source, meant = of_format(tmp_path / "source", "nvfp4")
        convert(source, tmp_path / "plain", "hf", dtype="fp32")
        plain = weights(tmp_path / "plain")
        assert all(same_bits(plain[n], meant[n]) for n in meant)

    def test_depths_fold_and_unfold(self, tmp_path: Path) -> None:
        source, _ = of_format(tmp_path / "source", "nvfp4")
        convert(source, tmp_path / "two", "hf", depths=2)
        convert(tmp_path / "two", tmp_path / "one", "hf", depths=1)
        raw, two, one = (weights(p) for p in (source, tmp_path / "two", tmp_path / "one"))
        mtp = [n for n in raw if n.startswith("mtp.layers.0.")]
        assert all(same_bits(raw[n], two[n.replace("layers.0.", "layers.2.", 1)]) for n in mtp)
        assert all(same_bits(t, one[n]) for n, t in raw.items())

    def test_averaged_depths_are_coded_again(self, tmp_path: Path) -> None:
        source, meant = of_format(tmp_path / "source", "fp8_block", "nemotron_mtpM")
        convert(source, tmp_path / "one", "hf", depths=1, force_fold="mean")
        found = weights(tmp_path / "one")
        names = [n for n in meant if n.startswith("mtp.layers.1.")]
        assert names
        for name in names:
            mean = (meant[name] + meant[name.replace("layers.1.", "layers.5.", 1)]) / 2
            back = decode(found[name], found[f"{name}_scale_inv"], (128, 128))
            assert torch.allclose(back, mean, atol=float(mean.abs().max()) / 16)

    def test_heads_come_off_and_on(self, tmp_path: Path, cli: Cli) -> None:
        source, _ = of_format(tmp_path / "source", "nvfp4")
        assert cli("drop", source, tmp_path / "dropped").code == 0
        assert cli("extract", source, tmp_path / "heads").code == 0
        assert cli("graft", tmp_path / "dropped", tmp_path / "heads", tmp_path / "whole").code == 0
        raw, dropped, heads, whole = (weights(tmp_path / p) for p in ("source", "dropped", "heads", "whole"))
        mtp = {n for n in raw if n.startswith("mtp.")}
        assert mtp <= heads.keys()
        assert dropped.keys() == raw.keys() - mtp
        assert {n for n in raw if not n.endswith("input_scale")} <= whole.keys()
        for part in (dropped, heads, whole):
            assert all(same_bits(part[n], raw[n]) for n in part)

    def test_other_spelling(self, tmp_path: Path) -> None:
        source, _ = modelopt(tmp_path / "source")
        convert(source, tmp_path / "renamed", "hf", words={"trunk": "model"})
        raw, found = weights(source), weights(tmp_path / "renamed")
        assert {n.replace("backbone.", "model.") for n in raw} == found.keys()
        assert all(same_bits(t, found[n.replace("backbone.", "model.")]) for n, t in raw.items())


class TestNewCodes:
    """Weights that never were codes, or were other ones."""

    def source(self, tmp_path: Path) -> Path:
        raw, _ = encoded(golden_tensors("nemotron_d1"), lambda name: None)
        return hf_folder(tmp_path / "source", raw, golden_config("nemotron_d1", dtype="bfloat16"))

    def test_fp8_block(self, tmp_path: Path) -> None:
        source = self.source(tmp_path)
        convert(source, tmp_path / "megatron", "megatron")
        convert(tmp_path / "megatron", tmp_path / "fp8", "hf", encoding="fp8-block")
        raw, found = weights(source), weights(tmp_path / "fp8")
        coded = {n.removesuffix("_scale_inv") for n in found if n.endswith("_scale_inv")}
        assert coded == {n for n in raw if n.endswith("_proj.weight") and "eh_proj" not in n}
        for name in coded:
            wanted = FORMATS["fp8_block"](raw[name].float())
            assert same_bits(found[name], wanted["weight"])
            assert same_bits(found[f"{name}_scale_inv"], wanted["weight_scale_inv"])
        assert all(same_bits(found[n], raw[n]) for n in raw if n not in coded)
        said = config_of(tmp_path / "fp8")["quantization_config"]
        assert said["weight_block_size"] == [128, 128]
        left = {f"{m}.weight" for m in said["modules_to_not_convert"]}
        assert {n for n in raw if n.startswith("mtp.") and raw[n].ndim == 2} - coded <= left
        assert roundtrip(open_checkpoint(tmp_path / "fp8"), Options("megatron")).ok

    def test_mxfp4_experts(self, tmp_path: Path) -> None:
        source = self.source(tmp_path)
        convert(source, tmp_path / "mx", "hf", encoding="mxfp4")
        raw, found = weights(source), weights(tmp_path / "mx")
        coded = {n.removesuffix("_packed") for n in found if n.endswith("_packed")}
        assert coded == {n for n in raw if ".experts." in n and raw[n].shape[1] % 32 == 0}
        checkpoint = open_checkpoint(tmp_path / "mx")
        assert inspect_checkpoint(checkpoint).encodings == {"mxfp4": len(coded)}
        assert not checkpoint.notes
        assert roundtrip(checkpoint, Options("megatron")).ok

    def test_another_form_for_the_same_weights(self, tmp_path: Path) -> None:
        source, _ = release(
            tmp_path / "source", lambda n: "nvfp4" if ".experts." in n else None, quant_method="modelopt"
        )
        convert(source, tmp_path / "fp8", "hf", encoding="fp8-block")
        raw, found = weights(source), weights(tmp_path / "fp8")
        before = {n.removesuffix("_scale_2") for n in raw if n.endswith("_scale_2")}
        assert {n.removesuffix("_scale_inv") for n in found if n.endswith("_scale_inv")} == before

    def test_names_of_scales_stay(self, tmp_path: Path) -> None:
        """A release whose scales are called `.scale` keeps that, with powers of two, and with its field for experts."""
        source, _ = release(tmp_path / "source", all_linear("fp8_powers"), **QUANTIZATION["fp8_powers"])
        convert(source, tmp_path / "mx", "hf", encoding="mxfp4")
        found = weights(tmp_path / "mx")
        experts = {n for n, t in found.items() if t.dtype == torch.int8}
        assert experts
        assert all(".experts." in n for n in experts)
        assert {found[n.removesuffix("weight") + "scale"].dtype for n in experts} == {E8M0}
        assert {t.dtype for n, t in found.items() if n.endswith("o_proj.weight")} == {E4M3}
        assert config_of(tmp_path / "mx")["expert_dtype"] == "fp4"
        open_checkpoint(tmp_path / "mx")
        convert(tmp_path / "mx", tmp_path / "plain", "hf", encoding="bf16")
        assert not {"expert_dtype", "quantization_config"} & config_of(tmp_path / "plain").keys()


class TestRefusals:
    def refused(self, source: Path, target: Path, to: str, code: str, **options: object) -> str:
        with pytest.raises(ConvertError) as caught:
            convert(source, target, to, **options)
        assert caught.value.code == code
        assert not target.exists()
        return str(caught.value)

    @pytest.mark.parametrize("to", ["megatron", "native"])
    def test_other_layouts_hold_values(self, to: str, tmp_path: Path) -> None:
        source, _ = of_format(tmp_path / "source", "fp8_block")
        assert to in self.refused(source, tmp_path / "out", to, "MTP001", encoding="fp8-block")

    def test_unknown_encoding(self, tmp_path: Path) -> None:
        self.refused(AUTOMODEL / "nemotron_d1", tmp_path / "out", "hf", "MTP001", encoding="int3")

    def test_nothing_is_known(self, tmp_path: Path) -> None:
        convert(AUTOMODEL / "nemotron_d1", tmp_path / "megatron", "megatron")
        config = tmp_path / "megatron" / "hf" / "config.json"
        shutil.rmtree(tmp_path / "megatron" / "hf" / "weights_layout")
        text = self.refused(
            tmp_path / "megatron", tmp_path / "out", "hf", "MTP028", hf_config=config, encoding="source"
        )
        assert "does not say" in text

    def test_lost_scales(self, tmp_path: Path) -> None:
        source, _ = of_format(tmp_path / "source", "fp8_block")
        convert(source, tmp_path / "megatron", "megatron")
        shutil.rmtree(tmp_path / "megatron" / "hf" / "weights_encoding")
        assert "was not kept" in self.refused(
            tmp_path / "megatron", tmp_path / "out", "hf", "MTP028", encoding="source"
        )

    def test_foreign_scales(self, tmp_path: Path) -> None:
        source, _ = of_format(tmp_path / "source", "fp8_block")
        convert(source, tmp_path / "megatron", "megatron")
        kept = tmp_path / "megatron" / "hf" / "weights_encoding" / "model.safetensors"
        scales = load_file(kept)
        first = next(iter(scales))
        save_file({**scales, first: torch.ones(7, 7)}, kept)
        self.refused(tmp_path / "megatron", tmp_path / "out", "hf", "MTP010", encoding="source")

    def test_all_problems_of_a_folder(self, tmp_path: Path) -> None:
        source, _ = of_format(tmp_path / "source", "fp8_block")
        raw = weights(source)
        names = sorted(n for n in raw if n.endswith("_scale_inv"))
        del raw[names[0]]
        raw[names[1]] = torch.ones(3, 3)
        config = {**config_of(source), "quantization_config": {**FP8, "ignored_layers": ["mtp.layers.0"]}}
        broken = hf_folder(tmp_path / "broken", raw, config)
        with pytest.raises(ConvertError) as caught:
            open_checkpoint(broken)
        assert caught.value.code == "MTP031"
        lines = [p.line() for p in caught.value.problems]
        assert any("has no scale" in line for line in lines)
        assert any("does not fit" in line for line in lines)
        assert any(line.startswith("mtp.layers.0.mixer") and "ignore list" in line for line in lines)


def test_inspect_shows_encodings(tmp_path: Path, cli: Cli) -> None:
    source, _ = modelopt(tmp_path / "source")
    shown = cli("inspect", source)
    assert shown.code == 0
    assert "x nvfp4" in shown.out
    assert "x fp8 per tensor" in shown.out
    assert "scales of activations or caches" in shown.out
    data = cli("inspect", source, "--format", "json").data
    assert data["tensors"] == len(weights(source))
    assert data["nbytes"] == sum(t.nbytes for t in weights(source).values())
    assert set(data["encodings"]) == {"nvfp4", "fp8 per tensor"}
    assert any("MTP weights in high precision" in note for note in data["notes"])


def test_the_command_line_has_the_option(tmp_path: Path, cli: Cli) -> None:
    source, _ = of_format(tmp_path / "source", "fp8_rows")
    assert cli("hf-to-megatron", source, tmp_path / "megatron").code == 0
    back = cli("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--encoding", "source")
    assert back.code == 0
    assert differing(source, tmp_path / "back") == []
    planned = cli("plan", tmp_path / "megatron", "--to", "hf", "--encoding", "source", "--format", "json").data
    assert planned["encodings"] == {"fp8 per row": 68}
    assert planned["nbytes"] == (tmp_path / "back" / "model.safetensors").stat().st_size
    assert cli("roundtrip", source).code == 0
    assert cli("check", tmp_path / "megatron").code == 0
    assert json.loads((tmp_path / "megatron" / "mtp_convert.json").read_text())["source"]["encodings"]


def test_the_way_back_is_told(tmp_path: Path, cli: Cli) -> None:
    """Without the option the way back gives values."""
    source, _ = of_format(tmp_path / "source", "fp8_block")
    done = cli("hf-to-megatron", source, tmp_path / "megatron")
    assert f"megatron-to-hf {tmp_path / 'megatron'} OUT --encoding source" in done.out
    notes = cli("inspect", tmp_path / "megatron", "--format", "json").data["notes"]
    assert any("--encoding source" in note for note in notes)
    plain = cli("hf-to-megatron", AUTOMODEL / "nemotron_d1", tmp_path / "plain")
    assert "--encoding" not in plain.out
    assert cli("inspect", tmp_path / "plain", "--format", "json").data["notes"] == []


def test_two_runs_write_the_same(tmp_path: Path) -> None:
    source, _ = of_format(tmp_path / "source", "nvfp4")
    for run in ("a", "b"):
        convert(source, tmp_path / run, "megatron", threads=1 if run == "a" else 4)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
