"""transformers' own model with the MTP depths that it leaves out, run as its decoder layers.

transformers drops MTP weights when it loads a folder. Here they become more decoder layers of the same model, and the
fusion in front of them is written out. Which released tensor is which part is a table of its own, apart from the
converter's: this is the Hugging Face side of a parity check. Symbols: B rows, S positions, H hidden size, V vocabulary,
N decoder layers, D depths, E experts, F expert size.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from mtp_convert.models.hf_weights import Made, empty, made_of
from mtp_convert.models.mtp import roll_tensor


@dataclass(frozen=True)
class Names:
    """Where a release keeps one depth: templates over `k` (depth) and `n` = N + k.

    layer: prefix of the decoder layer; hidden_first: columns of the projection are [hidden | embedding], not the usual
    [embedding | hidden].
    like_first: where the config has no `mtp_layer_types`, attention is like that of decoder layer k, not full.
    mlp: its kind, where that is not the last decoder layer's.
    """

    embedding_norm: str = "model.layers.{n}.enorm.weight"
    hidden_norm: str = "model.layers.{n}.hnorm.weight"
    projection: str = "model.layers.{n}.eh_proj.weight"
    final_norm: str = "model.layers.{n}.shared_head.norm.weight"
    layer: str = "model.layers.{n}."
    hidden_first: bool = False
    like_first: bool = False
    mlp: str | None = None


BEHIND_THE_DECODER = Names()
QWEN = Names(
    embedding_norm="mtp.pre_fc_norm_embedding.weight",
    hidden_norm="mtp.pre_fc_norm_hidden.weight",
    projection="mtp.fc.weight",
    final_norm="mtp.norm.weight",
    layer="mtp.layers.{k}.",
)
# Of native folders, and of folders with more depths than released names have room for.
SEVERAL = Names(
    embedding_norm="mtp.layers.{k}.enorm.weight",
    hidden_norm="mtp.layers.{k}.hnorm.weight",
    projection="mtp.layers.{k}.eh_proj.weight",
    final_norm="mtp.layers.{k}.final_layernorm.weight",
    layer="mtp.layers.{k}.",
)
MIMO = Names(
    embedding_norm="model.mtp_layers.{k}.token_layernorm.weight",
    hidden_norm="model.mtp_layers.{k}.hidden_layernorm.weight",
    projection="model.mtp_layers.{k}.input_proj.weight",
    final_norm="model.mtp_layers.{k}.final_layernorm.weight",
    layer="model.mtp_layers.{k}.",
    hidden_first=True,
)
OWN_NORM = replace(BEHIND_THE_DECODER, final_norm="model.layers.{n}.final_layernorm.weight")
EXAONE = replace(QWEN, like_first=True, mlp="dense")
NAMES: dict[str, Names] = {
    "deepseek_v3": BEHIND_THE_DECODER,
    "deepseek_v32": BEHIND_THE_DECODER,
    "glm4_moe": BEHIND_THE_DECODER,
    "glm4_moe_lite": BEHIND_THE_DECODER,
    "glm_moe_dsa": BEHIND_THE_DECODER,
    "qwen3": QWEN,
    "qwen3_next": QWEN,
    "qwen3_5_text": QWEN,
    "qwen3_5_moe_text": QWEN,
    "mellum": QWEN,
    "exaone_moe": EXAONE,
    "mimo": MIMO,
    "hy_v3": OWN_NORM,
}
COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # of the main embedding and head, below the layer's prefix
FULL = {"layer_types": "full_attention", "indexer_types": "full"}  # what MTP layers are, if decoder layers can be that
# Architectures of which transformers has no class of its own.
SAME_AS = {"mimo": "qwen2"}


@dataclass(frozen=True)
class Output:
    """One forward pass; entry k of a tuple belongs to MTP depth k."""

    logits: Tensor  # [B, S, V]
    hidden: Tensor  # [B, S, H] after the final norm
    mtp_hidden: tuple[Tensor, ...]  # each [B, S, H] after the depth's final norm
    mtp_logits: tuple[Tensor, ...]  # each [B, S, V]


class Depth(nn.Module):
    """One MTP depth around a decoder layer of the model; `kind` is that layer's entry in `layer_types`, if any."""

    def __init__(self, layer: nn.Module, norm: nn.Module, *, size: int, hidden_first: bool, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.enorm, self.hnorm, self.final_norm = (copy.deepcopy(norm) for _ in range(3))  # [H] each
        self.eh_proj = nn.Linear(2 * size, size, bias=False)  # [H, 2H]
        self.layer = layer
        self.hidden_first = hidden_first

    def forward(self, embedded: Tensor, hidden: Tensor, **attention: Any) -> Tensor:  # noqa: ANN401 - transformers' own
        """`embedded` and `hidden` [B, S, H] -> [B, S, H]."""
        x = self.layer(self.fuse(hidden, embedded), **attention)
        normed: Tensor = self.final_norm(x[0] if isinstance(x, tuple) else x)
        return normed

    def fuse(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """What the layer continues, from the previous hidden state and an embedding, all [B, S, H]."""
        both = self.enorm(embedded), self.hnorm(hidden)
        fused: Tensor = self.eh_proj(torch.cat(both[::-1] if self.hidden_first else both, dim=-1))
        return fused


class HfWithMtp(nn.Module):
    """A causal language model of transformers, and its depths."""

    def __init__(self, model: Any, depths: list[Depth]) -> None:  # noqa: ANN401 - any transformers model
        super().__init__()
        self.model = model
        self.depths = nn.ModuleList(depths)

    @classmethod
    def empty(cls, config: Any, stored: Collection[str], dtype: torch.dtype) -> tuple[HfWithMtp, dict[str, Made]]:  # noqa: ANN401 - a config class of transformers
        """The model of a text config on the meta device, see `hf_weights.empty`; and what makes its tensors, by name.

        MTP depths are as many as the names of the `stored` tensors have.

        Raises:
            ValueError: tensors of the model that nothing stored makes, or stored ones of a depth that make nothing.
        """
        model = empty(partial(AutoModelForCausalLM.from_config, config, dtype=dtype), dtype)
        depths, made = _depths(config, stored, dtype)
        made |= {f"model.{name}": how for name, how in made_of(model, {name: name for name in stored}).items()}
        for name, other in model.all_tied_weights_keys.items():
            made.setdefault(f"model.{name}", made[f"model.{other}"])
        whole = cls(model, depths).eval()
        if lacking := sorted(whole.state_dict().keys() - made.keys()):
            raise ValueError(f"nothing stored makes {len(lacking)} tensors of the model: {', '.join(lacking)}")
        return whole, made

    def forward(self, input_ids: Tensor, steps: int | None = None) -> Output:
        """Run backbone and `steps` depths (default: D) on `input_ids` [B, S]; step k runs stored depth k mod D."""
        steps = len(self.depths) if steps is None else steps
        hidden = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, S, H]
        embed, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        found: list[Tensor] = []
        ids, previous = input_ids, hidden
        for step in range(steps):
            ids = roll_tensor(ids)
            depth = self.depths[step % len(self.depths)]
            assert isinstance(depth, Depth)
            previous = depth(embed(ids), previous, **self._attention(depth.kind, previous))
            found.append(previous)
        return Output(head(hidden).float(), hidden, tuple(found), tuple(head(h).float() for h in found))

    def _attention(self, kind: str, hidden: Tensor) -> dict[str, Any]:
        """What a decoder layer must know of the positions of `hidden` [B, S, H], and of which it may see."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
        visible = mask(
            config=self.model.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            allow_is_causal_skip=False,  # an indexer chooses among what the mask shows
        )
        rotary = self.model.model.rotary_emb
        rope = rotary(hidden, positions, *([kind] if isinstance(rotary.rope_type, dict) else []))
        return {"attention_mask": visible, "position_ids": positions, "position_embeddings": rope}


def load_config(path: Path) -> Any:  # noqa: ANN401 - a config class of transformers
    """The text config in a `config.json`, with the released model type as `mtp_kind`, of plain unquantised weights.

    Raises:
        ValueError: transformers has no such model, or none without its vision part.
    """
    raw = json.loads(path.read_text(encoding="utf-8"))
    kind = raw.get("model_type")
    if kind in SAME_AS:
        config = AutoConfig.for_model(**{**raw, "model_type": SAME_AS[kind]})
    elif kind in CONFIG_MAPPING:
        config = AutoConfig.from_pretrained(path)
    else:
        raise ValueError(f"transformers {transformers.__version__} has no model_type {kind!r}")
    text = config.get_text_config()
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"transformers {transformers.__version__} has no language model of {text.model_type!r} alone")
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    text._experts_implementation = "eager"  # the only one that computes in every dtype
    text.mtp_kind = kind if kind in NAMES else text.model_type
    return text


def _depths(config: Any, stored: Collection[str], dtype: torch.dtype) -> tuple[list[Depth], dict[str, Made]]:  # noqa: ANN401
    """The depths as decoder layers N, N + 1, ... of a longer model, of which nothing else is kept; what makes them."""
    first, names = config.num_hidden_layers, NAMES.get(config.mtp_kind)
    if names is not None and names.projection.format(k=0, n=first) not in stored:
        names = replace(SEVERAL, like_first=names.like_first, mlp=names.mlp)
    depths_stored = 0 if names is None else _count(names, first, stored)
    if names is None or not depths_stored:
        return [], {}
    longer_config = _longer(config, names, depths_stored)
    longer = empty(partial(AutoModelForCausalLM.from_config, longer_config, dtype=dtype), dtype)
    kinds = getattr(longer_config, "layer_types", None) or [""] * (first + depths_stored)
    depths: list[Depth] = []
    made: dict[str, Made] = {}
    for k in range(depths_stored):
        layer, kind = longer.model.layers[first + k], kinds[first + k]
        with torch.device("meta"):
            depth = Depth(layer, longer.model.norm, size=config.hidden_size, hidden_first=names.hidden_first, kind=kind)
        depth.eh_proj.to(dtype)
        depths.append(depth)
        made |= {f"depths.{k}.{name}": how for name, how in _made_of_depth(longer, names, stored, k, first + k).items()}
    return depths, made


def _count(names: Names, first: int, stored: Collection[str]) -> int:
    """Stored depths."""
    if "{" not in names.projection:
        return int(names.projection in stored)
    return next(k for k in count() if names.projection.format(k=k, n=first + k) not in stored)


def _made_of_depth(longer: Any, names: Names, stored: Collection[str], k: int, n: int) -> dict[str, Made]:  # noqa: ANN401
    """What makes the tensors of a depth, whose decoder layer is layer `n` of `longer`."""
    own = {
        "enorm.weight": names.embedding_norm,
        "hnorm.weight": names.hidden_norm,
        "eh_proj.weight": names.projection,
        "final_norm.weight": names.final_norm,
    }
    made = {part: Made.of(template.format(k=k, n=n)) for part, template in own.items()}
    prefix, place = names.layer.format(k=k, n=n), f"model.layers.{n}."
    spared = {how.name for how in made.values()} | {prefix + copied for copied in COPIES}
    inner = {
        place + name.removeprefix(prefix): name for name in stored if name.startswith(prefix) and name not in spared
    }
    found = made_of(longer, inner)
    if unused := sorted(set(inner.values()) - {source for how in found.values() for source in how.sources}):
        raise ValueError(f"MTP tensors that no decoder layer has: {', '.join(unused)}")
    return made | {f"layer.{name.removeprefix(place)}": how for name, how in found.items()}


def _longer(config: Any, names: Names, count: int) -> Any:  # noqa: ANN401
    """The config with `count` more layers, of the kinds that MTP layers have."""
    longer = copy.deepcopy(config)
    for field, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(longer, field, [*value, *_mtp_kinds(config, names, field, value)[:count]])
    longer.num_hidden_layers = config.num_hidden_layers + count
    return longer


def _mtp_kinds(config: Any, names: Names, field: str, value: list[Any]) -> list[Any]:  # noqa: ANN401
    """Entries of MTP layers for a list with an entry per decoder layer."""
    if given := getattr(config, f"mtp_{field}", None):
        return list(given)
    if field == "layer_types" and names.like_first:
        return value
    usual = names.mlp if field == "mlp_layer_types" else FULL.get(field)
    return [usual if usual in value else value[-1]] * len(value)
