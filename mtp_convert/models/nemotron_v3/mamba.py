"""transformers' Mamba-2 mixer, with packed documents, states that can go back, and one rule for time steps.

Symbols: B rows, S positions, H hidden size, C convolved channels, W convolution width, N heads, P head size, G groups,
R state size.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHMamba2Mixer,
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba2_chunk_scan,
    mamba2_selective_state_update,
)

from mtp_convert.models.nemotron_v3.batch import Batch
from mtp_convert.models.nemotron_v3.cache import MambaLayer, MambaState
from mtp_convert.models.nemotron_v3.config import Numerics
from mtp_convert.models.nemotron_v3.precision import KeepsFloat32


class NemotronV3Mamba(KeepsFloat32, NemotronHMamba2Mixer):
    """The mixer of a "mamba" block.

    Without a cache it is transformers' code, which takes the fused kernels where they are installed. Decoding differs
    from transformers on purpose: there, time steps below their limit are raised in whole sequences only, so that
    decoding yields other states than a forward pass over the same tokens. Here both raise them.
    """

    def __init__(self, config: NemotronHConfig, layer_idx: int, numerics: Numerics) -> None:
        # transformers looks its kind up in the list of backbone blocks, where MTP's are not.
        super().__init__(config, layer_idx=0)
        self.layer_idx: int = layer_idx
        self.layer_type = "linear_attention"
        self.mask_after_conv = numerics.mask_after_conv
        if numerics.time_step_limit == "time_step_limit":
            low, high = config.time_step_limit
            self.time_step_limit = (float(low), float(high))

    def forward(self, hidden_states: Tensor, *, batch: Batch) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        if batch.cache is None and (batch.padding_mask is None or self.mask_after_conv):
            if batch.documents is None:
                return self._of_transformers(hidden_states, attention_mask=batch.padding_mask)
            if hidden_states.is_cuda and _kernels_installed():
                return self._of_transformers(hidden_states, seq_idx=batch.documents.seq_idx)
        projected = self.in_proj(_without_padding(hidden_states, batch.padding_mask))
        gate, channels, steps = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        if batch.cache is not None:
            mixed = self._cached(channels, steps, batch.cache.mamba(self.layer_idx), batch.padding_mask)
        elif batch.documents is not None:
            mixed = batch.documents.each(self._from_start, channels, steps)
        else:
            mixed = self._from_start(channels, steps, batch.padding_mask)
        normed = self.norm(mixed, gate).to(hidden_states.dtype)
        out: Tensor = self.out_proj(normed)
        return out

    def _of_transformers(self, hidden_states: Tensor, **options: Tensor | None) -> Tensor:
        out: Tensor = super().forward(hidden_states, **options)
        return out

    def _from_start(self, channels: Tensor, steps: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Convolve `channels` [B, S, C] and scan it with raw time steps [B, S, N], from empty states: [B, S, N * P]."""
        convolved, _ = self._convolve(channels, None, padding_mask)
        return self._scan(convolved, steps, None)[0]

    def _cached(self, channels: Tensor, steps: Tensor, layer: MambaLayer, padding_mask: Tensor | None) -> Tensor:
        state = layer.state
        if layer.record_past:
            return self._step_by_step(channels, steps, layer, padding_mask)
        tracked = torch.is_grad_enabled() and channels.requires_grad  # then no state may be overwritten
        if state is not None and channels.shape[1] == 1 and not tracked:
            return self._one_step(channels, steps, state)
        convolved, window = self._convolve(channels, state, padding_mask)
        mixed, ssm = self._scan(convolved, steps, state)
        layer.store([MambaState(window[..., -self.conv_kernel_size :].clone(), ssm)])
        return mixed

    def _one_step(self, channels: Tensor, steps: Tensor, state: MambaState) -> Tensor:
        """One token; `state` is overwritten."""
        weight = self.conv1d.weight.squeeze(1)
        convolved = causal_conv1d_update(
            channels.transpose(1, 2), state.conv, weight, self.conv1d.bias, activation=self.activation
        )
        return self._advance(convolved.transpose(1, 2), steps, state.ssm)

    def _step_by_step(self, channels: Tensor, steps: Tensor, layer: MambaLayer, padding_mask: Tensor | None) -> Tensor:
        """As many single steps as there are tokens, the state after each of them kept."""
        state = layer.state or self._empty_state(channels)
        convolved, window = self._convolve(channels, state, padding_mask)
        width, states, mixed = self.conv_kernel_size, [state], []
        for i in range(channels.shape[1]):
            ssm = states[-1].ssm.clone()
            mixed.append(self._advance(convolved[:, i : i + 1], steps[:, i : i + 1], ssm))
            states.append(MambaState(window[..., i + 1 : i + 1 + width], ssm))
        # Of the window only the last state stays when the record is dropped: it must not hold on to the rest.
        states[-1] = MambaState(states[-1].conv.clone(), states[-1].ssm)
        layer.store(states)
        return torch.cat(mixed, dim=1)

    def _empty_state(self, channels: Tensor) -> MambaState:
        rows = len(channels)
        ssm = self.A_log.new_zeros(rows, self.num_heads, self.head_dim, self.ssm_state_size, dtype=torch.float32)
        return MambaState(channels.new_zeros(rows, self.conv_dim, self.conv_kernel_size), ssm)

    def _convolve(
        self, channels: Tensor, before: MambaState | None, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """[B, S, C] behind the inputs of `before` -> [B, S, C], and all inputs [B, C, W + S] that were read."""
        length, width = channels.shape[1], self.conv_kernel_size
        own = channels.transpose(1, 2)
        window = F.pad(own, (width, 0)) if before is None else torch.cat([before.conv, own], dim=-1)
        convolved = causal_conv1d_fn(
            own if before is None else window,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation=self.activation,
        )[..., -length:].transpose(1, 2)
        if self.mask_after_conv:
            convolved = _without_padding(convolved, padding_mask)
        return convolved, window

    def _scan(self, convolved: Tensor, steps: Tensor, before: MambaState | None) -> tuple[Tensor, Tensor]:
        """[B, S, C] -> outputs [B, S, N * P] and the last recurrent state [B, N, P, R]."""
        rows, length, _ = convolved.shape
        x, b, c = self._split(convolved)
        mixed, ssm = mamba2_chunk_scan(
            x.reshape(rows, length, self.num_heads, self.head_dim),
            steps,
            -torch.exp(self.A_log.float()),
            b.reshape(rows, length, self.n_groups, self.ssm_state_size),
            c.reshape(rows, length, self.n_groups, self.ssm_state_size),
            chunk_size=self.chunk_size,
            D=self.D,
            z=None,
            initial_states=None if before is None else before.ssm,
            return_final_states=True,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.time_step_limit,
        )
        return mixed.reshape(rows, length, -1), ssm

    def _advance(self, convolved: Tensor, steps: Tensor, ssm: Tensor) -> Tensor:
        """One token [B, 1, C] with its raw time step [B, 1, N]; `ssm` is overwritten. Returns [B, 1, N * P]."""
        rows, heads, size = len(convolved), self.num_heads, self.head_dim
        x, b, c = (part.squeeze(1) for part in self._split(convolved))
        low, high = self.time_step_limit
        # The kernel for single steps knows no limits, so steps are finished here.
        dt = F.softplus(steps.squeeze(1).float() + self.dt_bias.float()).clamp(low, high)
        mixed: Tensor = mamba2_selective_state_update(
            ssm,
            x.reshape(rows, heads, size),
            dt[:, :, None].expand(-1, -1, size),
            -torch.exp(self.A_log.float())[:, None, None].expand(-1, size, self.ssm_state_size),
            b.reshape(rows, self.n_groups, self.ssm_state_size),
            c.reshape(rows, self.n_groups, self.ssm_state_size),
            self.D[:, None].expand(-1, size),
            z=None,
            dt_bias=None,
            dt_softplus=False,
        )
        return mixed.reshape(rows, 1, -1)

    def _split(self, convolved: Tensor) -> tuple[Tensor, ...]:
        """[.., C] -> inputs [.., N * P], and the state's input and output maps [.., G * R] each."""
        states = self.n_groups * self.ssm_state_size
        return torch.split(convolved, [self.intermediate_size, states, states], dim=-1)


def _without_padding(t: Tensor, padding_mask: Tensor | None) -> Tensor:
    """[B, S, ..] with zeros where `padding_mask` [B, S] has them."""
    return t if padding_mask is None else (t * padding_mask[:, :, None]).to(t.dtype)


@cache
def _kernels_installed() -> bool:
    """Whether transformers has code that keeps packed documents apart; its own PyTorch code refuses them."""
    return find_spec("mamba_ssm") is not None and find_spec("causal_conv1d") is not None
