"""Fresh values for every kind of module in a DeepSeek-V4 tree."""

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4CSACompressor,
    DeepseekV4Experts,
    DeepseekV4HashRouter,
    DeepseekV4HCACompressor,
    DeepseekV4HyperConnection,
    DeepseekV4HyperHead,
    DeepseekV4Indexer,
    DeepseekV4RMSNorm,
    DeepseekV4RotaryEmbedding,
    DeepseekV4TopKRouter,
)

# Module class -> its own parameters drawn from a normal distribution, set to zero, set to one.
_VALUES: dict[type, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    nn.Linear: (("weight",), (), ()),
    nn.Embedding: (("weight",), (), ()),
    DeepseekV4RMSNorm: ((), (), ("weight",)),
    DeepseekV4Experts: (("gate_up_proj", "down_proj"), (), ()),
    DeepseekV4TopKRouter: (("weight",), ("e_score_correction_bias",), ()),
    DeepseekV4HashRouter: (("weight",), (), ()),
    DeepseekV4Attention: ((), ("sinks",), ()),
    DeepseekV4HyperConnection: (("fn",), ("base",), ("scale",)),
    DeepseekV4HyperHead: (("hc_fn",), ("hc_base",), ("hc_scale",)),
    DeepseekV4HCACompressor: ((), ("position_bias",), ()),
    DeepseekV4CSACompressor: ((), ("position_bias",), ()),
    DeepseekV4Indexer: ((), ("position_bias",), ()),
}


@torch.no_grad()
def init_weights(root: nn.Module, *, std: float, buffer_device: torch.device | None = None) -> None:
    """Fill every parameter and buffer under `root`; `buffer_device` moves the buffers there first.

    Tensors on the meta device stay as they are. Values are transformers', except that token-id routing gets tables
    that are valid: transformers leaves zeros, which send a token to expert 0 several times.
    """
    for module in root.modules():
        if buffer_device is not None:
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty_like(buffer, device=buffer_device))
        for kind, (normal, zeros, ones) in _VALUES.items():
            if isinstance(module, kind):
                _fill(module, normal, zeros, ones, std=std)
        if isinstance(module, DeepseekV4HashRouter):
            module.tid2eid.copy_(spread_experts(*module.tid2eid.shape, experts=module.num_experts))
        if isinstance(module, DeepseekV4RotaryEmbedding):
            reset_rotary(module)


def spread_experts(vocab: int, top_k: int, *, experts: int) -> Tensor:
    """[vocab, top_k] expert indices: distinct within a token, and every expert equally often."""
    if top_k > experts:
        raise ValueError(f"a token cannot have {top_k} distinct experts of {experts}")
    return torch.arange(vocab * top_k).view(vocab, top_k) % experts


def reset_rotary(rotary: nn.Module) -> None:
    """Compute the frequencies again, on the device where the buffers are, or on the CPU if they are nowhere yet."""
    kind: type[nn.Module] = type(rotary)
    with torch.device("cpu"):
        fresh = kind(rotary.config)
    for name, buffer in fresh.named_buffers():
        old = rotary.get_buffer(name)
        rotary._buffers[name] = buffer if old.is_meta else buffer.to(old.device)


def _fill(
    module: nn.Module, normal: tuple[str, ...], zeros: tuple[str, ...], ones: tuple[str, ...], *, std: float
) -> None:
    for name in normal:
        if not getattr(module, name).is_meta:  # filling nothing is slow
            getattr(module, name).normal_(mean=0.0, std=std)
    for name in zeros:
        getattr(module, name).zero_()
    for name in ones:
        getattr(module, name).fill_(1.0)
