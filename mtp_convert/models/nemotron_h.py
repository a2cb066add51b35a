"""Nemotron-H with its MTP heads, as Hugging Face files hold it and transformers' blocks run it.

transformers drops the MTP tensors of a Nemotron-H folder, so nothing there can show that they are
right. Here they run as real modules. Symbols: B batch, S sequence, H hidden size, V vocabulary,
P sub-layers of one MTP depth, D stored depths, E experts, I expert size, L expert input size.

Everything below is derived from the Hugging Face files alone and shares no table with the
converter: agreement between the two is evidence only as long as neither reads the other.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock, NemotronHRMSNorm

# Parameters that releases store in float32 beside bfloat16 weights; a narrower `dtype` spares them.
_FLOAT32_LEAVES = frozenset({"e_score_correction_bias", "A_log", "D", "dt_bias"})
_STACKED_EXPERTS = (".mixer.experts.up_proj", ".mixer.experts.down_proj")


@dataclass(frozen=True)
class NemotronHOutput:
    """What one forward pass yields; entry k of a tuple belongs to MTP step k."""

    logits: Tensor  # [B, S, V]; position i predicts token i + 1
    hidden: Tensor  # [B, S, H], after the backbone's final norm
    mtp_hidden: tuple[Tensor, ...]  # each [B, S, H], after that depth's final norm
    mtp_logits: tuple[Tensor, ...]  # each [B, S, V]; position i of step k predicts token i + k + 2


class _MTPHeads(nn.Module):
    """All sub-layers of all depths in one flat list, as the released names number them."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_mtp_blocks(config))


class NemotronHWithMTP(nn.Module):
    """transformers' Nemotron-H and the D MTP depths of its checkpoint.

    `state_dict` has the released names (`backbone.*`, `lm_head.weight`, `mtp.layers.{f}.*`), except
    that transformers stacks experts: `mixer.experts.up_proj` [E, I, L], `down_proj` [E, L, I].
    """

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        causal = NemotronHForCausalLM(config)
        self.config = causal.config
        self.backbone = causal.model
        self.lm_head = causal.lm_head
        self.depths = config.num_nextn_predict_layers
        self.pattern_length = len(_mtp_pattern(config))
        self.mtp = _MTPHeads(self.config)
        self.mtp.apply(causal._init_weights)  # transformers' own fresh values; experts start empty

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype | None = None) -> Self:
        """Load a released folder; every tensor must be expected and every expected one present.

        `dtype` None keeps the stored types. A narrower type leaves the router bias and the Mamba
        scalars as stored, as releases do.
        """
        config = NemotronHConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = cls(config)
        state = _stack_experts(_read_tensors(folder), model)
        if dtype is not None:
            state = {name: _cast(name, tensor, dtype) for name, tensor in state.items()}
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()

    def released_state(self) -> dict[str, Tensor]:
        """The weights under their released names, experts one by one; sorted, detached."""
        state: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            if name.endswith(_STACKED_EXPERTS):
                singles = _expert_names(name, count=tensor.shape[0])
                state.update(zip(singles, tensor.unbind(0), strict=True))
            else:
                state[name] = tensor
        return dict(sorted(state.items()))

    def forward(self, input_ids: Tensor, mtp_steps: int | None = None) -> NemotronHOutput:
        """Run the backbone and `mtp_steps` MTP steps (default: D) on `input_ids` [B, S].

        Step k runs stored depth k mod D, so one repeated depth gives any number of steps.
        """
        steps = self.depths if mtp_steps is None else mtp_steps
        if steps and not self.depths:
            raise ValueError(f"mtp_steps is {steps}, but the model stores no MTP depth")
        hidden = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, S, H]
        mtp_hidden: list[Tensor] = []
        shifted, previous = input_ids, hidden
        for step in range(steps):
            shifted = shift_left(shifted)
            previous = self.run_depth(shifted, previous, depth=step % self.depths)
            mtp_hidden.append(previous)
        return NemotronHOutput(
            logits=self.lm_head(hidden).float(),
            hidden=hidden,
            mtp_hidden=tuple(mtp_hidden),
            mtp_logits=tuple(self.lm_head(h).float() for h in mtp_hidden),
        )

    def run_depth(self, shifted_ids: Tensor, previous: Tensor, *, depth: int) -> Tensor:
        """One MTP depth: `shifted_ids` [B, S] and `previous` hidden [B, S, H] give [B, S, H]."""
        start = depth * self.pattern_length
        blocks: list[Any] = list(self.mtp.layers[start : start + self.pattern_length])
        first, last = blocks[0], blocks[-1]
        embedded = self.backbone.embeddings(shifted_ids)  # [B, S, H]
        # Columns 0..H-1 of eh_proj meet the embedding, columns H..2H-1 the hidden state.
        x = first.eh_proj(torch.cat([first.enorm(embedded), first.hnorm(previous)], dim=-1))
        # Only attention needs a mask: Mamba is causal by itself, MoE and MLP see single positions.
        mask = create_causal_mask(config=self.config, inputs_embeds=x, attention_mask=None, past_key_values=None)
        for block in blocks:
            attends = block.block_type == "full_attention"
            x = block(x, attention_mask=mask if attends else None)
        normed: Tensor = last.final_layernorm(x)
        return normed


def shift_left(ids: Tensor) -> Tensor:
    """Token ids [B, S] one place to the left; the freed last place holds token 0."""
    shifted = ids.roll(-1, dims=1)
    shifted[:, -1] = 0
    return shifted


def acceptance(output: NemotronHOutput, k: int = 0) -> float:
    """Share of positions where MTP step k proposes the token that the main model would choose.

    Step k at position i and the main model at i + k + 1 both predict token i + k + 2. The last
    k + 1 positions are left out: their drafts read filled-in tokens and have no main prediction.
    """
    length = output.logits.shape[1]
    if length < k + 2:
        raise ValueError(f"a sequence of {length} tokens has no position to compare at step {k}")
    drafted = output.mtp_logits[k][:, : length - k - 1].argmax(-1)  # [B, S - k - 1]
    chosen = output.logits[:, k + 1 :].argmax(-1)  # [B, S - k - 1]
    return float((drafted == chosen).float().mean())


def _mtp_blocks(config: NemotronHConfig) -> Iterator[nn.Module]:
    """The D * P sub-layers in flat order; a depth's first and last one carry extra modules."""
    pattern = _mtp_pattern(config)
    # A transformers block finds its kind through `layers_block_type[layer_idx]`.
    flat = copy.deepcopy(config)
    flat.layers_block_type = pattern * config.num_nextn_predict_layers
    hidden_size: int = config.hidden_size
    for index in range(len(pattern) * config.num_nextn_predict_layers):
        block: Any = NemotronHBlock(flat, layer_idx=index)  # type: ignore[no-untyped-call]
        position = index % len(pattern)
        if position == 0:
            block.enorm = _norm(config)  # [H]
            block.hnorm = _norm(config)  # [H]
            block.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)  # [H, 2H]
        if position == len(pattern) - 1:
            block.final_layernorm = _norm(config)  # [H]
        yield block


def _mtp_pattern(config: NemotronHConfig) -> list[str]:
    """Kinds of one depth's sub-layers; the config has already turned old spellings into these."""
    return list(config.mtp_layers_block_type or ())


def _norm(config: NemotronHConfig) -> nn.Module:
    norm: nn.Module = NemotronHRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
    return norm


def _expert_names(stacked: str, *, count: int) -> list[str]:
    """`x.experts.up_proj` -> `x.experts.0.up_proj.weight`, ... for `count` experts."""
    parent, leaf = stacked.rsplit(".", 1)
    return [f"{parent}.{expert}.{leaf}.weight" for expert in range(count)]


def _stack_experts(found: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn released tensors into the model's own; all missing and unexpected ones in one error."""
    sources: dict[str, list[str]] = {}
    for name, target in model.state_dict().items():
        stacked = name.endswith(_STACKED_EXPERTS)
        sources[name] = _expert_names(name, count=target.shape[0]) if stacked else [name]
    expected = {source for names in sources.values() for source in names}
    if expected != found.keys():
        missing, unexpected = sorted(expected - found.keys()), sorted(found.keys() - expected)
        raise ValueError(f"tensors missing: {missing}; tensors unexpected: {unexpected}")
    return {
        name: torch.stack([found[source] for source in names]) if name.endswith(_STACKED_EXPERTS) else found[names[0]]
        for name, names in sources.items()
    }


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors file, or of the files that its index names."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"the index names a file outside its folder: {file}")
        part = load_file(folder / file)
        if twice := sorted(tensors.keys() & part.keys()):
            raise ValueError(f"tensors in more than one file: {twice}")
        tensors |= part
    return tensors


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _FLOAT32_LEAVES:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tensor.to(dtype)
