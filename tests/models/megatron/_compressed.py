"""DeepSeek-V4 models: that of the golden checkpoint, a smaller one, and golden Hugging Face folders converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _golden import build, settle, tiny
from _kit import AUTOMODEL, convert
from safetensors.torch import load_file
from torch import Tensor

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.gpt_model import GPTModel
from mtp_convert.models.megatron.language_model import LanguageModel, Prediction
from mtp_convert.models.megatron.loading import load_tensors
from mtp_convert.verify.forward import tensors_of

# The golden checkpoint `dsv4_dev`, of which megatron-core gave the names and entries too.
GOLDEN_DSV4: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "vocab_size": 96,
    "layernorm_epsilon": 1e-6,
    "num_attention_heads": 4,
    "gated_linear_unit": True,
    "activation_func_clamp_value": 10.0,
    "position_embedding_type": "rope",
    "multi_latent_attention": True,
    "experimental_attention_variant": "dsv4_hybrid",
    "q_lora_rank": 16,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "csa_compress_ratios": (0, 4, 128, 4, 0),
    "csa_compress_rotary_base": 160000.0,
    "csa_window_size": 8,
    "dsa_indexer_n_heads": 2,
    "dsa_indexer_head_dim": 8,
    "dsa_indexer_topk": 4,
    "enable_hyper_connections": True,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "moe_router_score_function": "sqrtsoftplus",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_n_hash_layers": 1,
    "actual_vocab_size": 96,
    "mtp_num_layers": 1,
}
# Three kinds of layers, each in few tokens, and two depths of different kinds. With many heads in the indexer no two
# windows have the same score; with two, often both are zero, and what is chosen then depends on the device.
SMALL = GOLDEN_DSV4 | {
    "hidden_size": 16,
    "vocab_size": 32,
    "actual_vocab_size": 32,
    "activation_func_clamp_value": 0.5,
    "csa_compress_ratios": (0, 4, 3, 4, 4, 0),
    "csa_window_size": 3,
    "dsa_indexer_n_heads": 8,
    "dsa_indexer_topk": 1,
    "mtp_num_layers": 2,
}


def small(**changes: Any) -> LanguageModel:  # noqa: ANN401
    """A settled model in float64, whose table of token ids uses every expert."""
    model = settle(build(tiny(**{**SMALL, **changes})))
    generator = torch.Generator().manual_seed(1)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            table.copy_(torch.rand(len(table), 4, generator=generator).argsort(1)[:, : table.shape[1]])
    return model


class Converted:
    """A golden Hugging Face folder in Megatron's form: its tensors by key, its arguments, and the known outputs."""

    def __init__(self, name: str, scratch: Path) -> None:
        convert(AUTOMODEL / name, scratch / name, "megatron")
        stored = open_checkpoint(scratch / name).stored
        self.tensors = tensors_of(stored)
        self.args: dict[str, Any] = stored.arguments["args"]
        self.outputs = load_file(AUTOMODEL / name / "io.safetensors")

    def model(self, **changes: Any) -> LanguageModel:  # noqa: ANN401
        """The model of the arguments, filled."""
        model = GPTModel(TransformerConfig.from_megatron_args(self.args, **changes)).eval()
        load_tensors(model, self.tensors)
        return model

    def pairs(self, found: Prediction) -> dict[str, tuple[Tensor, Tensor]]:
        """Output and known output at the places of real tokens, by name."""
        known = self.outputs
        real = known.get("attention_mask", torch.ones_like(known["input_ids"])).bool()
        got = {"logits": found.logits, "last_hidden": found.hidden}
        got |= {f"mtp_per_depth_h.{k}": hidden for k, hidden in enumerate(found.mtp_hidden)}
        assert got.keys() == known.keys() - {"input_ids", "labels_pre_shifted", "attention_mask"}
        return {name: (tensor.cpu()[real], known[name][real]) for name, tensor in got.items()}
