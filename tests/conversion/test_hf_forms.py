"""The same model under other Hugging Face names, configs and files: every form is read, and comes back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _kit import (
    AUTOMODEL,
    Config,
    Tensors,
    config_of,
    convert,
    differing,
    files_of,
    golden_config,
    golden_tensors,
    hf_folder,
    sharded_folder,
    there_and_back,
)
from safetensors.torch import load_file

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.errors import ConvertError
from mtp_convert.verify.forward import relative_error, run_hf, run_megatron

NAME = "nemotron_d1"
OLD_WORDS = {"linear_attention": "mamba", "full_attention": "attention"}


def renamed(change: Callable[[str], str]) -> Tensors:
    return {change(n): t for n, t in golden_tensors(NAME).items()}


def nested(name: str) -> Config:
    """A multi-modal wrapper around the language model's config."""
    return {"model_type": "some_vision_language_model", name: golden_config(NAME), "vision_config": {"depth": 2}}


def old_words(key: str) -> list[str]:
    return [OLD_WORDS.get(w, w) for w in golden_config(NAME)[key]]


def no_mtp(**changed: object) -> Config:
    return golden_config(NAME, num_nextn_predict_layers=0, mtp_layers_block_type=None, **changed)


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    made = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=made) * 0.2 for n, s in shapes.items()}


STRINGS: Config = {
    "layers_block_type": None,
    "mtp_layers_block_type": None,
    "hybrid_override_pattern": "M*E-ME",
    "mtp_hybrid_override_pattern": "*E",
}
FORMS: dict[str, tuple[Callable[[], Tensors], Callable[[], Config], dict[str, str]]] = {
    "model trunk": (lambda: renamed(lambda n: n.replace("backbone.", "model.")), lambda: golden_config(NAME), {}),
    "language_model wrapper": (
        lambda: renamed(lambda n: f"language_model.{n}"),
        lambda: nested("text_config"),
        {"wrapper": "language_model."},
    ),
    "llm_config section": (lambda: golden_tensors(NAME), lambda: nested("llm_config"), {"wrapper": ""}),
    "embedding": (
        lambda: renamed(lambda n: n.replace("backbone.embeddings", "backbone.embedding")),
        lambda: golden_config(NAME),
        {"embeddings": "embedding"},
    ),
    "embed_tokens and norm": (
        lambda: renamed(
            lambda n: (
                n.replace("backbone.embeddings", "model.embed_tokens")
                .replace("backbone.norm_f", "model.norm")
                .replace("backbone.", "model.")
            )
        ),
        lambda: golden_config(NAME),
        {"trunk": "model", "embeddings": "embed_tokens", "norm": "norm"},
    ),
    "pattern strings": (lambda: golden_tensors(NAME), lambda: golden_config(NAME, **STRINGS), {}),
    "pattern strings with bars": (
        lambda: golden_tensors(NAME),
        lambda: golden_config(NAME, **STRINGS | {"hybrid_override_pattern": "M*E|-ME"}),
        {},
    ),
    "old words": (
        lambda: golden_tensors(NAME),
        lambda: golden_config(NAME, **{k: old_words(k) for k in ("layers_block_type", "mtp_layers_block_type")}),
        {},
    ),
    "no mtp": (lambda: {n: t for n, t in golden_tensors(NAME).items() if n[:3] != "mtp"}, no_mtp, {}),
    "num_hidden_layers": (lambda: golden_tensors(NAME), lambda: golden_config(NAME, num_hidden_layers=6), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_form_is_read_and_comes_back(form: str, tmp_path: Path) -> None:
    tensors, config, words = FORMS[form]
    source = hf_folder(tmp_path / "src", tensors(), config())
    assert words.items() <= open_checkpoint(source).layout.words.items()
    there, back = there_and_back(source, tmp_path)
    assert differing(source, back) == []
    reference = convert(AUTOMODEL / NAME, tmp_path / "reference", "megatron").target
    if form != "no mtp":
        payload = "release/__0_0.distcp"
        assert files_of(there)[payload] == files_of(reference)[payload]  # the other spelling changes no byte


def test_other_file_name_comes_back(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "src", golden_tensors(NAME), golden_config(NAME), "weights.safetensors")
    assert differing(source, there_and_back(source, tmp_path)[1]) == []


def test_shards_and_index_come_back(tmp_path: Path) -> None:
    source = sharded_folder(tmp_path / "src", golden_tensors(NAME), golden_config(NAME))
    assert differing(source, there_and_back(source, tmp_path)[1]) == []


def test_other_files_come_back(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "src", golden_tensors(NAME), golden_config(NAME))
    (source / "remote").mkdir()
    (source / "remote" / "modeling_x.py").write_text("raise SystemExit('never run')\n")
    (source / "tokenizer.json").write_bytes(b"\xff\x00 any bytes")
    assert differing(source, there_and_back(source, tmp_path)[1]) == []


def test_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "src", golden_tensors(NAME), golden_config(NAME))
    (tmp_path / "secret").write_text("not part of the checkpoint")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with contextlib.suppress(ConvertError):
        convert(source, tmp_path / "there", "megatron")
    assert not (tmp_path / "there" / "hf" / "tokenizer.json").exists()


def test_hub_cache_comes_back_as_plain_files(tmp_path: Path) -> None:
    """`snapshots/REV/*` are links into `blobs`; the links themselves stay where they are."""
    plain = hf_folder(tmp_path / "plain", golden_tensors(NAME), golden_config(NAME))
    (plain / "tokenizer.json").write_text("{}")
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "rev", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, (name, data) in enumerate(files_of(plain).items()):
        (blobs / str(i)).write_bytes(data)
        (snapshot / name).symlink_to(Path("../../blobs") / str(i))
    _, back = there_and_back(snapshot, tmp_path)
    assert differing(plain, back) == []
    assert not any(p.is_symlink() for p in back.rglob("*"))


def test_unreadable_config_bytes_come_back(tmp_path: Path) -> None:
    """A byte order mark and odd spacing belong to the file."""
    source = hf_folder(tmp_path / "src", golden_tensors(NAME), golden_config(NAME))
    config = source / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes() + b"\n\n")
    assert differing(source, there_and_back(source, tmp_path)[1]) == []


class TestTied:
    """One tensor for embedding and head, with or without a stored copy."""

    @pytest.mark.parametrize("stored", [False, True], ids=["alone", "with a copy"])
    def test_comes_back(self, stored: bool, tmp_path: Path) -> None:
        source = self.folder(tmp_path, stored)
        checkpoint = open_checkpoint(source)
        assert checkpoint.copies == ({"lm_head.weight"} if stored else set())
        there, back = there_and_back(source, tmp_path)
        assert differing(source, back) == []
        found = open_checkpoint(there)
        assert "output_layer.weight" not in found.stored.tensors
        args: Any = found.stored.arguments["args"]
        assert args["untie_embeddings_and_output_weights"] is False

    def test_forward(self, tmp_path: Path) -> None:
        source = self.folder(tmp_path, True)
        there, _ = there_and_back(source, tmp_path)
        ids = load_file(AUTOMODEL / NAME / "io.safetensors")["input_ids"]
        a, b = run_megatron(open_checkpoint(there).stored, ids), run_hf(source, ids)
        assert relative_error(a.logits, b.logits) < 2e-4
        assert relative_error(a.mtp_logits[0], b.mtp_logits[0]) < 2e-4

    def test_different_copy_is_refused_with_its_size(self, tmp_path: Path) -> None:
        source = self.folder(tmp_path, True, change=0.25)
        with pytest.raises(ConvertError) as caught:
            convert(source, tmp_path / "there", "megatron")
        assert caught.value.code == "MTP026"
        line = caught.value.problems[0].line()
        assert "lm_head.weight" in line
        assert "1 elements differ" in line
        assert "0.25" in line
        assert not (tmp_path / "there").exists()

    @staticmethod
    def folder(scratch: Path, stored: bool, change: float = 0.0) -> Path:
        tensors = dict(golden_tensors(NAME))
        del tensors["lm_head.weight"]
        if stored:
            copy = tensors["backbone.embeddings.weight"].clone()
            copy[1, 2] += change
            tensors["lm_head.weight"] = copy
        return hf_folder(scratch / "src", tensors, golden_config(NAME, tie_word_embeddings=True))


def test_dense_model_without_experts(tmp_path: Path) -> None:
    """Only attention and MLP: the config need not mention experts or Mamba."""
    words = {"layers_block_type": ["full_attention", "mlp"], "mtp_layers_block_type": ["full_attention", "mlp"]}
    sizes = golden_config(NAME)
    keep = ("model_type", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    config = {k: sizes[k] for k in (*keep, "intermediate_size", "layer_norm_epsilon")} | words
    config["num_nextn_predict_layers"] = 1
    H, F, V, Q, K = 32, 48, 64, 32, 16
    attention = {"q_proj": (Q, H), "k_proj": (K, H), "v_proj": (K, H), "o_proj": (H, Q)}
    mlp = {"up_proj": (F, H), "down_proj": (H, F)}
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (V, H), "lm_head.weight": (V, H)}
    for root in ("backbone", "mtp"):
        for i, block in enumerate((attention, mlp)):
            shapes[f"{root}.layers.{i}.norm.weight"] = (H,)
            shapes |= {f"{root}.layers.{i}.mixer.{n}.weight": s for n, s in block.items()}
    shapes |= {f"mtp.layers.0.{n}.weight": (H,) for n in ("enorm", "hnorm")}
    shapes |= {"mtp.layers.0.eh_proj.weight": (H, 2 * H), "mtp.layers.1.final_layernorm.weight": (H,)}
    shapes["backbone.norm_f.weight"] = (H,)
    source = hf_folder(tmp_path / "src", random_tensors(shapes), config)
    there, back = there_and_back(source, tmp_path)
    assert differing(source, back) == []
    ids = load_file(AUTOMODEL / NAME / "io.safetensors")["input_ids"]
    a, b = run_megatron(open_checkpoint(there).stored, ids), run_hf(source, ids)
    assert relative_error(a.mtp_logits[0], b.mtp_logits[0]) < 2e-4


def test_config_that_counts_steps_is_a_repeated_layer(tmp_path: Path) -> None:
    """Two declared depths over one stored depth."""
    source = hf_folder(tmp_path / "src", golden_tensors(NAME), golden_config(NAME, num_nextn_predict_layers=2))
    result = convert(source, tmp_path / "there", "megatron")
    assert (result.physical, result.steps, result.repeated) == (1, 2, True)
    assert any("2 MTP depths over one stored depth" in n for n in result.notes)
    args: Any = open_checkpoint(tmp_path / "there").stored.arguments["args"]
    assert (args["mtp_num_layers"], args["mtp_use_repeated_layer"]) == (2, True)
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert config_of(tmp_path / "back")["num_nextn_predict_layers"] == 1
    assert differing(source, tmp_path / "back") == ["config.json"]
