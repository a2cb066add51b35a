"""transformers' own model with the MTP depths that it leaves out, run as its decoder layers.

transformers drops MTP weights when it loads a folder. Here they become more decoder layers of the same model, and the
fusion in front of them is written out. Which released tensor is which part is a table of its own, apart from the
converter's: this is the Hugging Face side of a parity check. Symbols: B rows, S positions, H hidden size, V vocabulary,
N decoder layers, D depths, E experts, F expert size.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask

from mtp_convert.models.mtp import roll_tensor

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Names:
    """Where a release keeps one depth: templates over `k` (depth) and `n` = N + k.

    layer: prefix of the decoder layer; hidden_first: columns of the projection are [hidden | embedding], not the usual
    [embedding | hidden].
    """

    embedding_norm: str = "model.layers.{n}.enorm.weight"
    hidden_norm: str = "model.layers.{n}.hnorm.weight"
    projection: str = "model.layers.{n}.eh_proj.weight"
    final_norm: str = "model.layers.{n}.shared_head.norm.weight"
    layer: str = "model.layers.{n}."
    hidden_first: bool = False


BEHIND_THE_DECODER = Names()
QWEN = Names(
    embedding_norm="mtp.pre_fc_norm_embedding.weight",
    hidden_norm="mtp.pre_fc_norm_hidden.weight",
    projection="mtp.fc.weight",
    final_norm="mtp.norm.weight",
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
NAMES: dict[str, Names] = {
    "deepseek_v3": BEHIND_THE_DECODER,
    "deepseek_v32": BEHIND_THE_DECODER,
    "glm4_moe": BEHIND_THE_DECODER,
    "glm4_moe_lite": BEHIND_THE_DECODER,
    "glm_moe_dsa": BEHIND_THE_DECODER,
    "qwen3_next": QWEN,
    "qwen3_5_text": QWEN,
    "qwen3_5_moe_text": QWEN,
    "mellum": QWEN,
    "exaone_moe": QWEN,
    "mimo": MIMO,
    "hy_v3": OWN_NORM,
}
COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # of the main embedding and head, below the layer's prefix
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
    """One MTP depth around a decoder layer of the model."""

    def __init__(self, layer: nn.Module, norm: nn.Module, *, size: int, hidden_first: bool) -> None:
        super().__init__()
        self.enorm, self.hnorm, self.final_norm = (copy.deepcopy(norm) for _ in range(3))  # [H] each
        self.eh_proj = nn.Linear(2 * size, size, bias=False)  # [H, 2H]
        self.layer = layer
        self.hidden_first = hidden_first

    def forward(self, embedded: Tensor, hidden: Tensor, **attention: Any) -> Tensor:  # noqa: ANN401 - transformers' own
        """`embedded` and `hidden` [B, S, H] -> [B, S, H]."""
        both = self.enorm(embedded), self.hnorm(hidden)
        x = self.eh_proj(torch.cat(both[::-1] if self.hidden_first else both, dim=-1))
        x = self.layer(x, **attention)
        normed: Tensor = self.final_norm(x[0] if isinstance(x, tuple) else x)
        return normed


class HfWithMtp(nn.Module):
    """A causal language model of transformers, and its depths."""

    def __init__(self, model: Any, depths: list[Depth]) -> None:  # noqa: ANN401 - any transformers model
        super().__init__()
        self.model = model
        self.depths = nn.ModuleList(depths)

    @classmethod
    def from_folder(cls, folder: Path, *, dtype: torch.dtype = torch.float32) -> HfWithMtp:
        """Load a released folder; MTP depths are as many as are stored.

        Raises:
            ValueError: a model type without a table, or MTP tensors missing or left over.
        """
        config = load_config(folder)
        kind = config.mtp_kind
        if kind not in NAMES:
            raise ValueError(f"no table of MTP names for model_type {kind!r}; known are {', '.join(sorted(NAMES))}")
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype)
        stored = Files(folder)
        count = 0
        while NAMES[kind].projection.format(k=count, n=config.num_hidden_layers + count) in stored:
            count += 1
            if "{" not in NAMES[kind].projection:
                break
        depths = _depths(config, model, NAMES[kind], stored, count, dtype) if count else []
        return cls(model, depths).eval()

    def forward(self, input_ids: Tensor, steps: int | None = None) -> Output:
        """Run backbone and `steps` depths (default: D) on `input_ids` [B, S]; step k runs stored depth k mod D."""
        steps = len(self.depths) if steps is None else steps
        inner = self.model.model
        hidden = inner(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, S, H]
        embed, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        mask = create_causal_mask(
            config=self.model.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
        )
        attention = {"attention_mask": mask, "position_ids": positions}
        found: list[Tensor] = []
        ids, previous = input_ids, hidden
        for step in range(steps):
            ids = roll_tensor(ids)
            rope = inner.rotary_emb(previous, positions)
            depth = self.depths[step % len(self.depths)]
            previous = depth(embed(ids), previous, position_embeddings=rope, **attention)
            found.append(previous)
        return Output(head(hidden).float(), hidden, tuple(found), tuple(head(h).float() for h in found))


def load_config(folder: Path) -> Any:  # noqa: ANN401 - a config class of transformers
    """The text config of a folder, with the released model type as `mtp_kind`."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = raw.get("model_type")
    if kind in SAME_AS:
        config = AutoConfig.for_model(**{**raw, "model_type": SAME_AS[kind]})
    else:
        config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    text.mtp_kind = kind if kind in NAMES else text.model_type
    return text


def _depths(
    config: Any,  # noqa: ANN401
    model: Any,  # noqa: ANN401
    names: Names,
    stored: Mapping[str, Tensor],
    count: int,
    dtype: torch.dtype,
) -> list[Depth]:
    """The depths as decoder layers N, N + 1, ... of a longer model, of which nothing else is kept."""
    first = config.num_hidden_layers
    with torch.device("meta"):
        longer = AutoModelForCausalLM.from_config(_longer(config, count))  # type: ignore[no-untyped-call]
    depths = []
    for k in range(count):
        at = {"k": k, "n": first + k}
        depth = Depth(
            longer.model.layers[first + k], model.model.norm, size=config.hidden_size, hidden_first=names.hidden_first
        )
        own = {
            "enorm.weight": names.embedding_norm,
            "hnorm.weight": names.hidden_norm,
            "eh_proj.weight": names.projection,
            "final_norm.weight": names.final_norm,
        }
        state = {part: stored[template.format(**at)] for part, template in own.items()}
        prefix = names.layer.format(**at)
        taken = {template.format(**at) for template in own.values()}
        copies = {prefix + copied for copied in COPIES}
        inner = {n.removeprefix(prefix): stored[n] for n in stored if n.startswith(prefix) and n not in taken | copies}
        state |= {f"layer.{n}": t for n, t in _stack(inner, depth.layer).items()}
        depth.load_state_dict({n: t.to(dtype) for n, t in state.items()}, strict=True, assign=True)
        depths.append(depth)
    return depths


def _longer(config: Any, count: int) -> Any:  # noqa: ANN401
    """The config with `count` more layers, of full attention and of the last layer's kind of MLP."""
    longer = copy.deepcopy(config)
    first = config.num_hidden_layers
    for field, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == first:
            more = "full_attention" if field == "layer_types" and "full_attention" in value else value[-1]
            setattr(longer, field, [*value, *[more] * count])
    longer.num_hidden_layers = first + count
    return longer


def _stack(found: Mapping[str, Tensor], layer: nn.Module) -> dict[str, Tensor]:
    """Released tensors as the layer holds them: experts one by one become one tensor."""
    state = dict(found)
    for name, target in layer.state_dict().items():
        if name in state or not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
        module = name.rpartition(".")[0]
        rows = []
        for e in range(target.shape[0]):
            singles = [state.pop(f"{module}.{e}.{part}.weight") for part in parts]  # each [F, H] or [H, F]
            rows.append(torch.cat(singles))
        state[name] = torch.stack(rows)  # [E, 2F, H] or [E, H, F]
    return state


class Files(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files by name, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._where |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._where[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
