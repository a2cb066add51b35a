"""What a conversion writes: element types, files that torch and Megatron open, and the same bytes every time."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _dist import read
from _kit import (
    AUTOMODEL,
    MEGATRON,
    TINY,
    Tensors,
    config_of,
    convert,
    files_of,
    golden_config,
    golden_tensors,
    hf_folder,
    there_and_back,
)
from safetensors.torch import load_file

from mtp_convert.checkpoint import PROVENANCE, open_checkpoint
from mtp_convert.errors import ConvertError
from mtp_convert.verify.forward import tensors_of

D1 = AUTOMODEL / "nemotron_d1"
KEPT = ("mixer.gate.e_score_correction_bias", "mixer.A_log", "mixer.D", "mixer.dt_bias")
PLACES = {"hf": "", "megatron": "release"}


def weights(folder: Path) -> Tensors:
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


class TestTypes:
    """--dtype."""

    def test_bf16_rounds_like_torch_and_spares_the_sensitive(self, tmp_path: Path) -> None:
        _, back = there_and_back(D1, tmp_path, dtype="bf16")
        given, found = golden_tensors("nemotron_d1"), weights(back)
        assert found.keys() == given.keys()
        for name, t in given.items():
            wanted = t if name.endswith(KEPT) else t.bfloat16()
            assert found[name].dtype == wanted.dtype, name
            assert torch.equal(found[name], wanted), name

    @pytest.mark.parametrize(("word", "dtype"), [("fp16", torch.float16), ("fp32", torch.float32)])
    def test_other_types(self, word: str, dtype: torch.dtype, tmp_path: Path) -> None:
        _, back = there_and_back(TINY, tmp_path, dtype=word)
        for name, t in weights(TINY).items():
            wanted = t if name.endswith(KEPT) else t.to(dtype)
            found = weights(back)[name]
            assert found.dtype == wanted.dtype, name
            assert torch.equal(found, wanted), name

    def test_unknown_type_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConvertError):
            convert(D1, tmp_path / "there", "megatron", dtype="float99")

    def test_config_follows(self, tmp_path: Path) -> None:
        _, back = there_and_back(D1, tmp_path, dtype="bf16")
        assert config_of(back)["dtype"] == "bfloat16"

    def test_megatron_source(self, tmp_path: Path) -> None:
        source = MEGATRON / "hyb_m"
        for dtype in ("auto", "bf16"):
            convert(source / "ckpt", tmp_path / dtype, "hf", hf_config=source / "config.json", dtype=dtype)
        given, found = weights(tmp_path / "auto"), weights(tmp_path / "bf16")
        assert all(torch.equal(t if n.endswith(KEPT) else t.bfloat16(), found[n]) for n, t in given.items())

    def test_types_that_would_mix_are_refused(self, tmp_path: Path) -> None:
        source = self.mixed(tmp_path)
        with pytest.raises(ConvertError) as caught:
            convert(source, tmp_path / "there", "megatron")
        assert caught.value.code == "MTP028"
        lines = [p.line() for p in caught.value.problems]
        assert len(lines) == 2
        assert lines[0].startswith("decoder.layers.1.self_attention.linear_qkv.weight would mix BF16, F32")
        assert "decoder.layers.2.mlp.experts.experts.linear_fc1.weight" in lines[1]
        assert "--dtype" in caught.value.hint

    def test_types_that_would_mix_are_cast_on_request(self, tmp_path: Path) -> None:
        _, back = there_and_back(self.mixed(tmp_path), tmp_path, dtype="fp32")
        assert {t.dtype for t in weights(back).values()} == {torch.float32}

    def test_separate_tensors_of_two_types_come_back(self, tmp_path: Path) -> None:
        tensors = {n: t if n.endswith(KEPT) else t.bfloat16() for n, t in golden_tensors("nemotron_d1").items()}
        source = hf_folder(tmp_path / "src", tensors, golden_config("nemotron_d1"))
        assert files_of(there_and_back(source, tmp_path)[1]) == files_of(source)

    @staticmethod
    def mixed(scratch: Path) -> Path:
        tensors = dict(golden_tensors("nemotron_d1"))
        for name in ("backbone.layers.1.mixer.q_proj.weight", "backbone.layers.2.mixer.experts.3.up_proj.weight"):
            tensors[name] = tensors[name].bfloat16()
        return hf_folder(scratch / "src", tensors, golden_config("nemotron_d1"))


@pytest.mark.parametrize("source", [D1, AUTOMODEL / "nemotron_latent_groups", TINY], ids=lambda p: p.name)
def test_torch_loads_what_we_write(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "there", "megatron", max_shard_size=100_000)
    assert len(list((tmp_path / "there" / "release").glob("*.distcp"))) > 1
    by_torch = read(tmp_path / "there" / "release")
    by_us = tensors_of(open_checkpoint(tmp_path / "there").stored)
    assert by_torch.keys() == by_us.keys()
    assert all(torch.equal(t.float(), by_us[n]) for n, t in by_torch.items())


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_two_runs_write_the_same_bytes(to: str, tmp_path: Path) -> None:
    """Other threads, another place, another process's order of sets: every file is the same, the record too."""
    source, config = (
        (D1, None) if to == "megatron" else (MEGATRON / "hyb_m" / "ckpt", MEGATRON / "hyb_m" / "config.json")
    )
    found = []
    for threads in (1, 4):
        target = tmp_path / str(threads) / "out"
        convert(source, target, to, hf_config=config, threads=threads, max_shard_size=50_000, restore_shards=False)
        found.append({**files_of(target), PROVENANCE: (target / PROVENANCE).read_bytes()})
    assert found[0] == found[1]
    assert len(found[0]) > 4


class TestMegatronFiles:
    """What lies beside the tensors."""

    @staticmethod
    def load_common(folder: Path) -> dict[str, Any]:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found: dict[str, Any] = torch.load(folder / "release" / "common.pt", weights_only=True)
        return found

    def test_common_pt(self, tmp_path: Path) -> None:
        source = AUTOMODEL / "nemotron_latent_groups"
        convert(source, tmp_path / "there", "megatron", parallel={"tensor": 2, "expert": 4, "pipeline": 3})
        state = self.load_common(tmp_path / "there")
        assert state["iteration"] == 0
        assert state["checkpoint_version"] == 3.0
        assert isinstance(state["args"], argparse.Namespace)
        wanted = {
            "num_layers": 6,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "group_query_attention": True,
            "kv_channels": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "mamba_state_dim": 16,
            "mamba_num_groups": 2,
            "num_experts": 8,
            "moe_ffn_hidden_size": 24,
            "moe_shared_expert_intermediate_size": 40,
            "moe_latent_size": 16,
            "moe_router_topk": 3,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_router_topk_scaling_factor": 2.5,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "mtp_num_layers": 2,
            "mtp_use_repeated_layer": False,
            "hybrid_layer_pattern": "M*E-ME/*E/*E",
            "is_hybrid_model": True,
            "squared_relu": True,
            "swiglu": False,
            "normalization": "RMSNorm",
            "norm_epsilon": 1e-5,
            "position_embedding_type": "none",
            "add_bias_linear": False,
            "untie_embeddings_and_output_weights": True,
            "vocab_size": 64,
            "padded_vocab_size": 64,
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 3,
            "expert_model_parallel_size": 4,
            "expert_tensor_parallel_size": 2,
            "ckpt_format": "torch_dist",
        }
        found = vars(state["args"])
        assert {n: found.get(n) for n in wanted} == wanted

    @pytest.mark.parametrize(
        ("version", "backends"),
        [("0.18", {"common_backend": "torch", "common_backend_version": 1}), ("0.19", {}), ("0.19.2", {})],
    )
    def test_metadata(self, version: str, backends: dict[str, object], tmp_path: Path) -> None:
        convert(D1, tmp_path / "there", "megatron", megatron_version=version)
        found = json.loads((tmp_path / "there" / "release" / "metadata.json").read_text())
        assert found == {"sharded_backend": "torch_dist", "sharded_backend_version": 1, **backends}
        assert (tmp_path / "there" / "latest_checkpointed_iteration.txt").read_text() == "release"

    def test_old_release_cannot_hold_mtp(self, tmp_path: Path) -> None:
        with pytest.raises(ConvertError, match=r"0\.16 has no MTP") as caught:
            convert(D1, tmp_path / "there", "megatron", megatron_version="0.16")
        assert caught.value.code == "MTP028"
        assert not (tmp_path / "there").exists()

    def test_old_release_holds_a_model_without_mtp(self, tmp_path: Path) -> None:
        config = golden_config("nemotron_d1", num_nextn_predict_layers=0, mtp_layers_block_type=None)
        tensors = {n: t for n, t in golden_tensors("nemotron_d1").items() if not n.startswith("mtp.")}
        source = hf_folder(tmp_path / "src", tensors, config)
        assert convert(source, tmp_path / "there", "megatron", megatron_version="0.16").physical == 0
        assert "mtp_num_layers" not in vars(self.load_common(tmp_path / "there")["args"])
