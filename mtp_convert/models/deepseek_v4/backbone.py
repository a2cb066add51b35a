"""The layers of DeepSeek-V4 between token ids and the output head.

Symbols: B rows, S positions, H hidden size, X hyper-connection streams.
"""

from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4HyperHead,
    DeepseekV4RMSNorm,
    DeepseekV4RotaryEmbedding,
)

from mtp_convert.models.deepseek_v4.batch import Batch
from mtp_convert.models.deepseek_v4.config import BackendConfig, MoEConfig, attention_kinds, hash_layers
from mtp_convert.models.deepseek_v4.layer import DeepseekV4Layer


class DeepseekV4Backbone(nn.Module):
    """Embedding, decoder layers and the collapse of the streams; a pipeline stage has some of them.

    Layers are keyed by their number, so that a stage keeps the state-dict names of the whole model.
    """

    def __init__(self, config: DeepseekV4Config, moe_config: MoEConfig, backend: BackendConfig) -> None:
        super().__init__()
        self.hc_mult: int = config.hc_mult
        self.embed_tokens: nn.Module | None = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.rotary_emb: nn.Module = DeepseekV4RotaryEmbedding(config)
        kinds = attention_kinds(config)[: config.num_hidden_layers]
        self.layers = nn.ModuleDict()
        for i, kind in enumerate(kinds):
            self.layers[str(i)] = DeepseekV4Layer(
                config,
                i,
                kind,
                hashed=i in hash_layers(config),
                route_padding=moe_config.route_padding == "always",
                moe_config=moe_config,
                backend=backend,
                rotary=self.rotary_emb,
            )
        self.hc_head: nn.Module | None = DeepseekV4HyperHead(config)
        self.norm: nn.Module | None = DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Ids [B, S] -> equal streams [B, S, X, H]."""
        assert self.embed_tokens is not None
        embedded: Tensor = self.embed_tokens(input_ids)
        return embedded.unsqueeze(2).expand(-1, -1, self.hc_mult, -1).contiguous()

    def forward(self, streams: Tensor, batch: Batch) -> Tensor:
        """Streams [B, S, X, H] through the layers that are here."""
        for layer in self.layers.values():
            streams = layer(streams, batch)
        return streams

    def collapse(self, streams: Tensor) -> Tensor:
        """Streams [B, S, X, H] -> normed hidden state [B, S, H]."""
        assert self.hc_head is not None
        assert self.norm is not None
        hidden: Tensor = self.norm(self.hc_head(streams))
        return hidden
