"""What megatron-core computed and stored, and models to compare with it.

`fixtures/golden/megatron` holds checkpoints with their outputs; `data/` holds, all made by the megatron-core that the
files name, on CPU with pure-torch stand-ins of TransformerEngine, mamba_ssm and fla:

    keys/      one line per name of the state dict and its sharded entry, whole models
    parallel/  the same for every rank of two processes
    features/  weights, outputs and those lines of small models, one setting or a few at a time
"""

from __future__ import annotations

import argparse
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.gpt_model import GPTModel
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.hybrid_model import HybridModel
from mtp_convert.models.megatron.language_model import LanguageModel, Prediction
from mtp_convert.models.megatron.loading import load_tensors
from mtp_convert.models.megatron.loss_logging import MTPLossLoggingHelper
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.sharding import ShardedEntry, ShardedObject, ShardedTensorFactory

GOLDEN = Path(__file__).parents[3] / "fixtures" / "golden" / "megatron"
DATA = Path(__file__).parent / "data"
GPT = ("qwen2_te", "dsv3_te")
HYBRID = ("hyb_m", "hyb_rep", "hyb_mtpM", "hyb_latent")
FEATURES = tuple(sorted(p.stem for p in (DATA / "features").glob("*.safetensors")))
Tensors = dict[str, Tensor]

# A small whole model of each kind, for tests that bring their own numbers.
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "vocab_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 4,
    "ffn_hidden_size": 24,
    "gated_linear_unit": True,
    "position_embedding_type": "rope",
    "init_method_std": 0.2,
}
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 12,
    "moe_shared_expert_intermediate_size": 8,
}
MAMBA: dict[str, Any] = {"mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_state_dim": 4, "mamba_num_groups": 2}
LINEAR: dict[str, Any] = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def build(config: TransformerConfig, groups: ProcessGroupCollection | None = None, **kwargs: Any) -> LanguageModel:  # noqa: ANN401
    """The model of a config, ready to predict."""
    model = GPTModel if config.hybrid is None else HybridModel
    return model(config, pg_collection=groups, **kwargs).eval()


def tiny(**changes: Any) -> TransformerConfig:  # noqa: ANN401
    """A GPT model of two layers and two depths, in float64, or what `changes` make of it."""
    usual: dict[str, Any] = {"num_layers": 2, "mtp_num_layers": 2, "params_dtype": torch.float64}
    return TransformerConfig(**{**TINY, **usual, **changes})


def settle(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """Weights that depend on nothing but the seed: no norm is 1, no bias 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            leaf = name.rsplit(".", 1)[-1]
            around = 1.0 if "norm" in name or leaf == "D" else -1.0 if leaf == "dt_bias" else 0.0
            value.copy_(around + (0.2 if value.dim() > 1 or around else 0.1) * noise)
    return model


def ids(length: int = 8, *, rows: int = 2, vocab: int = 32, seed: int = 5) -> Tensor:
    """Token ids [rows, length]."""
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def arguments(name: str) -> dict[str, Any]:
    """`model.json` of a golden folder under the names of Megatron-LM's arguments."""
    model = read_json(GOLDEN / name / "model.json")
    top = {n: model[n] for n in ("hybrid_layer_pattern", "position_embedding_type", "vocab_size") if n in model}
    tied = {"untie_embeddings_and_output_weights": not model["tied_embeddings"]}
    return model["transformer_config"] | top | tied | {"squared_relu": "squared_relu" in model["activation"]}


def golden_config(name: str, **changes: object) -> TransformerConfig:
    return TransformerConfig.from_megatron_args(arguments(name), **changes)


@cache
def golden_outputs(name: str) -> Tensors:
    return load_file(GOLDEN / name / "out.safetensors")


@cache
def golden_tensors(name: str) -> Tensors:
    """Every tensor of a torch_dist folder by its key, read by torch alone."""
    reader = FileSystemReader(GOLDEN / name / "ckpt" / "iter_0000001")
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():  # "torch.distributed is disabled": one process is what we want
        warnings.simplefilter("ignore", UserWarning)
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def golden_rank(name: str, folder: str = "legacy", rank: str = "mp_rank_00") -> dict[str, Any]:
    """The state dict that one process stored."""
    path = GOLDEN / name / folder / "iter_0000001" / rank / "model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        state: dict[str, Any] = torch.load(path, weights_only=True)["model"]
    return state


def settings_of(model: dict[str, Any], **changes: Any) -> TransformerConfig:  # noqa: ANN401
    """A config from fields in JSON."""
    return TransformerConfig(**{n: tuple(v) if isinstance(v, list) else v for n, v in model.items()}, **changes)


def feature(name: str) -> tuple[TransformerConfig, Tensors, list[str]]:
    """Config, tensors (`state.*` are the weights) and lines of a small model of megatron-core."""
    path = DATA / "features" / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        stored = file.metadata()
    return settings_of(json.loads(stored["model"])), load_file(path), json.loads(stored["lines"])


def flat(prediction: Prediction) -> Tensors:
    """Under the names of the outputs."""
    tensors = {"logits": prediction.logits, "hidden": prediction.hidden}
    for depth, (hidden, logits) in enumerate(zip(prediction.mtp_hidden, prediction.mtp_logits, strict=True)):
        tensors |= {f"hidden_mtp{depth}": hidden, f"logits_mtp{depth}": logits}
    return tensors


def errors(prediction: Prediction, expected: Tensors) -> dict[str, float]:
    """Largest difference of every output over its largest value; every expected output must be there."""
    got = flat(prediction)
    wanted = {n: t for n, t in expected.items() if n.startswith(("logits", "hidden"))}
    assert got.keys() == wanted.keys()
    return {n: relative(got[n], wanted[n]) for n in wanted}


def loaded(name: str) -> LanguageModel:
    """The model of a golden folder, filled from its torch_dist checkpoint."""
    model = build(golden_config(name))
    load_tensors(model, golden_tensors(name))
    return model


def golden_errors(name: str, **changed: Tensor) -> dict[str, float]:
    """Errors of a golden folder's model, with tensors of its checkpoint `changed`."""
    model = loaded(name)
    load_tensors(model, golden_tensors(name) | changed)
    with torch.no_grad():
        return errors(model.predict(golden_outputs(name)["tokens"]), golden_outputs(name))


def feature_errors(name: str) -> dict[str, float]:
    """Errors of a feature's model, loaded by name."""
    config, tensors, _ = feature(name)
    model = build(config)
    own = {n: t for n, t in model.state_dict().items() if n.endswith("_extra_state")}
    stored = {n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")}
    model.load_state_dict(own | stored, strict=True)
    with torch.no_grad():
        return errors(model.predict(tensors["tokens"]), tensors)


def check_losses(name: str) -> None:
    """A golden folder's model in training: its loss per token and the MTP losses that it logs."""
    model, outputs = loaded(name).train(), golden_outputs(name)
    tokens = outputs["tokens"]
    labels = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], 1)
    mask = torch.ones(tokens.shape)
    mask[:, -1] = 0
    MTPLossLoggingHelper.clean_loss_in_tracker()
    loss = model(tokens, labels=labels, loss_mask=mask)
    torch.testing.assert_close(loss, outputs["lm_loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(MTPLossLoggingHelper.tracker["loss_values"], outputs["mtp_loss"], rtol=1e-5, atol=1e-6)


def check_packed(model: LanguageModel) -> None:
    """Sequences packed into one row compute what each computes alone."""
    lengths = [3, 5, 4]
    row, ends = ids(sum(lengths), rows=1), torch.tensor([0, 3, 8, 12], dtype=torch.int32)
    with torch.no_grad():
        together = flat(model.predict(row, PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)))
        alone = [flat(model.predict(part)) for part in row.split(lengths, 1)]
    for name, got in together.items():
        torch.testing.assert_close(got, torch.cat([each[name] for each in alone], 1), rtol=1e-10, atol=1e-10)


def differing(one: LanguageModel, other: LanguageModel) -> list[str]:
    """Names of weights and buffers that are not equal, or not in both."""
    a, b = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (one, other))
    assert a.keys() == b.keys()
    return [n for n in a if not torch.equal(a[n], b[n])]


def relative(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.cpu().double() - expected.double()).abs().max() / expected.abs().max())


def lines(model: LanguageModel, metadata: dict[str, Any] | None = None) -> list[str]:
    """What a model holds, one line per name of its state dict, as in `data/keys`."""
    entries, state = model.sharded_state_dict(metadata=metadata), model.state_dict()
    found = []
    for name, value in state.items():
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        entry = _spelled(entries[name]) if name in entries else "(not in sharded)"
        found.append(f"{name} {shape}  -> {entry}")
    for name in entries.keys() - state.keys():
        entry = entries[name]
        assert isinstance(entry, ShardedObject)
        fields = {"kind": "ShardedObject", "key": entry.key, "unique": entry.unique_key}
        fields |= {"glob": [*entry.global_shape], "off": [*entry.global_offset], "replica": [*entry.replica_id]}
        found.append(f"ONLY-SHARDED {name} {fields}")
    return found


def _spelled(entry: ShardedEntry) -> str:
    if isinstance(entry, ShardedTensorFactory):
        return f"F {entry.key} {{{'; '.join(map(_spelled, entry.build()))}}}"
    if isinstance(entry, ShardedObject):
        return f"O {entry.unique_key} rep{entry.replica_id}"
    place = f"glob{[*entry.global_shape]} off{[*entry.global_offset]} frag{list(entry.axis_fragmentations or ())}"
    mismatch = " MISMATCH_OK" if entry.allow_shape_mismatch else ""
    dtype = str(entry.dtype).removeprefix("torch.")
    return f"T {entry.key} {place} rep{entry.replica_id} prep{entry.prepend_axis_num}{mismatch} {dtype}"
