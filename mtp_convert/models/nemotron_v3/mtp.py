"""Nemotron-V3's MTP depths: fusion with the next token's embedding, then a few blocks of the backbone's kinds.

Symbols: B rows, S positions, H hidden size, D depths that run, P sub-layers of one depth.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import NemotronHConfig

from mtp_convert.models.mtp import MTPConfig, MTPModule
from mtp_convert.models.nemotron_v3.batch import Batch
from mtp_convert.models.nemotron_v3.config import BackendConfig, BlockType, MoEConfig, Numerics, prepare_config
from mtp_convert.models.nemotron_v3.config import mtp_block_types as types_of
from mtp_convert.models.nemotron_v3.initialize import init_weights
from mtp_convert.models.nemotron_v3.layers import NemotronV3Block, make_norm, normalize


class NemotronV3MTPSublayer(NemotronV3Block):
    """One sub-layer of a depth.

    The first of a depth (`has_fusion`) has `enorm`, `hnorm` [H] and `eh_proj` [H, 2H], whose columns 0..H-1 meet the
    embedding and H..2H-1 the hidden state. The last one (`has_final_norm`) has `final_layernorm` [H].
    """

    def __init__(
        self,
        config: NemotronHConfig,
        layer_idx: int,
        block_type: BlockType,
        *,
        has_fusion: bool,
        has_final_norm: bool,
        numerics: Numerics | None = None,
    ) -> None:
        super().__init__(config, layer_idx, block_type, numerics or Numerics())
        self.has_fusion, self.has_final_norm = has_fusion, has_final_norm
        if has_fusion:
            self.enorm, self.hnorm = make_norm(config), make_norm(config)
            self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        if has_final_norm:
            self.final_layernorm = make_norm(config)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        batch: Batch | None = None,
        embed_input: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """[B, S, H] -> [B, S, H]; the first of a depth also needs `embed_input` [B, S, H].

        `position_ids` are accepted because every depth gets them; nothing here depends on positions.

        Raises ValueError if `embed_input` is missing, or given to a sub-layer that does not fuse.
        """
        if self.has_fusion != (embed_input is not None):
            wanted = "needs an" if self.has_fusion else "takes no"
            raise ValueError(f"MTP sub-layer {self.layer_idx} {wanted} embed_input")

        def run(hidden: Tensor, batch: Batch) -> Tensor:
            if embed_input is not None:
                hidden = self.fuse(hidden, embed_input)
            hidden = self._run(hidden, batch)
            return normalize(self.final_layernorm, hidden) if self.has_final_norm else hidden

        return self._maybe_checkpointed(run, hidden_states, batch or Batch())

    def fuse(self, hidden_states: Tensor, embed_input: Tensor) -> Tensor:
        """What the sub-layer continues, from the previous hidden state and an embedding, all [B, S, H]."""
        halves = normalize(self.enorm, embed_input), normalize(self.hnorm, hidden_states)
        fused: Tensor = self.eh_proj(torch.cat(halves, dim=-1))
        return fused


def build_nemotron_v3_mtp(
    config: NemotronHConfig,
    mtp_config: MTPConfig,
    backend: BackendConfig | None = None,
    moe_config: MoEConfig | None = None,
    dtype: torch.dtype | None = None,
    block_types: Sequence[BlockType] | None = None,
    *,
    numerics: Numerics | None = None,
) -> MTPModule:
    """All depths with fresh weights of type `dtype` (None: float32).

    `block_types` are the kinds of a depth's P sub-layers, by default what `config` says. Sub-layer f is block
    `config.num_hidden_layers` + f of the whole model.

    Raises ValueError if MTP is off, or if there is not one kind for each place of `mtp_config.layer_pattern`.
    """
    prepared, _ = prepare_config(config, backend=backend or BackendConfig(), moe_config=moe_config, moe_overrides=None)
    return make_mtp(prepared, mtp_config, block_types, numerics=numerics or Numerics(), dtype=dtype)


def make_mtp(
    config: NemotronHConfig,
    mtp_config: MTPConfig,
    block_types: Sequence[BlockType] | None = None,
    *,
    numerics: Numerics,
    dtype: torch.dtype | None = None,
) -> MTPModule:
    """As `build_nemotron_v3_mtp`, but the depths share `config`, which is prepared."""

    def sublayer(
        *, global_idx: int, depth: int, sublayer_idx: int, block_type: BlockType, has_fusion: bool, has_final_norm: bool
    ) -> nn.Module:
        return NemotronV3MTPSublayer(
            config,
            config.num_hidden_layers + global_idx,
            block_type,
            has_fusion=has_fusion,
            has_final_norm=has_final_norm,
            numerics=numerics,
        )

    types = types_of(config) or [] if block_types is None else block_types
    mtp = MTPModule(mtp_config, types, sublayer)
    init_weights(mtp, config)
    return mtp.to(dtype)
