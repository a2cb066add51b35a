"""Fresh values for every kind of module in a Nemotron-V3 tree.

L is the number of backbone blocks.
"""

import math

import torch
from torch import Tensor, nn
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHAttention,
    NemotronHExperts,
    NemotronHMamba2Mixer,
    NemotronHMLP,
    NemotronHRMSNorm,
    NemotronHRMSNormGated,
    NemotronHTopkRouter,
)

# Modules -> their projections that write into the residual stream.
_OUTPUTS: dict[type, str] = {
    NemotronHAttention: "o_proj.weight",
    NemotronHMamba2Mixer: "out_proj.weight",
    NemotronHMLP: "down_proj.weight",
    NemotronHExperts: "down_proj",
}


@torch.no_grad()
def init_weights(root: nn.Module, config: NemotronHConfig) -> None:
    """Draw every parameter under `root` anew, so that calling it twice is the same as calling it once.

    Matrices: normal with `initializer_range`; those that write into the residual stream are divided by sqrt(L) if
    `rescale_prenorm_residual` is set. Norms and `D`: 1. Biases: 0. `A_log`: log of 1, 2, .. heads. `dt_bias`: such that
    steps are log-uniform between `time_step_min` and `time_step_max`, and at least `time_step_floor`. Convolutions:
    PyTorch's own rule. A tree on the meta device is left alone.
    """
    if next(root.parameters()).is_meta:
        return  # no memory yet: whoever gives it some also fills it
    for module in root.modules():
        _fill(module, config)
    if config.rescale_prenorm_residual:
        for module in root.modules():
            for kind, name in _OUTPUTS.items():
                if isinstance(module, kind):
                    module.get_parameter(name).div_(math.sqrt(config.num_hidden_layers))


def _fill(module: nn.Module, config: NemotronHConfig) -> None:
    std = config.initializer_range
    if isinstance(module, nn.Linear | nn.Embedding | NemotronHTopkRouter):
        module.weight.normal_(0.0, std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        module.bias.zero_()
    if isinstance(module, NemotronHTopkRouter):
        module.e_score_correction_bias.zero_()
    if isinstance(module, NemotronHExperts):
        module.up_proj.normal_(0.0, std)
        module.down_proj.normal_(0.0, std)
    if isinstance(module, NemotronHRMSNorm | NemotronHRMSNormGated):
        module.weight.fill_(1.0)
    if isinstance(module, nn.Conv1d):
        module.reset_parameters()
    if isinstance(module, NemotronHMamba2Mixer):
        module.A_log.copy_(torch.arange(1, module.num_heads + 1, dtype=torch.float32).log())
        module.D.fill_(1.0)
        module.dt_bias.copy_(_time_step_biases(module.dt_bias, config))


def _time_step_biases(like: Tensor, config: NemotronHConfig) -> Tensor:
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    drawn = torch.rand(like.shape, dtype=torch.float32, device=like.device) * (high - low) + low
    step = drawn.exp().clamp(min=config.time_step_floor)
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
