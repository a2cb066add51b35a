"""Rotary position embeddings: the angles of every token, and turning queries and keys by them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.packed import PackedSeqParams


def sequence_numbers(length: int, packed: PackedSeqParams | None, device: torch.device) -> Tensor | None:
    """For every token of a row [S] the number of its packed sequence; None if the row is one sequence.

    Tokens behind the last sequence count as one more.
    """
    if packed is None or packed.boundaries is None:
        return None
    boundaries = packed.boundaries.to(device)
    places = torch.arange(length, device=device, dtype=boundaries.dtype)
    return torch.searchsorted(boundaries[1:].contiguous(), places, right=True)


def token_positions(length: int, packed: PackedSeqParams | None, device: torch.device) -> Tensor:
    """Place of every token [S] in its own sequence, from 0."""
    places = torch.arange(length, device=device)
    numbers = sequence_numbers(length, packed, device)
    if numbers is None or packed is None or packed.boundaries is None:
        return places
    return places - packed.boundaries.to(device)[numbers]


def rotary_angles(positions: Tensor, config: TransformerConfig) -> Tensor:
    """Angles [S, 1, 1, R] of positions [S] for the first `rotary_percent` of every head, each angle twice."""
    size = config.kv_channels
    rotated = int(size * config.rotary_percent) if config.rotary_percent < 1 else size
    angles = torch.outer(positions.float(), _frequencies(rotated, config.rotary_base, positions.device))
    twice = angles.repeat_interleave(2, -1) if config.rotary_interleaved else torch.cat((angles, angles), -1)
    return twice[:, None, None, :]


def latent_attention_angles(positions: Tensor, config: TransformerConfig) -> tuple[Tensor, float]:
    """Angles [S, 1, 1, R] for the rotated part of a latent attention head, and the factor of their sine and cosine."""
    frequencies = _frequencies(config.qk_pos_emb_head_dim, config.rotary_base, positions.device)
    factor = 1.0
    if config.rope_type == "yarn":
        frequencies = _yarn(frequencies, config, config.rotary_base)
        factor = yarn_mscale(config.rotary_scaling_factor, config.mscale)
        factor /= yarn_mscale(config.rotary_scaling_factor, config.mscale_all_dim)
    angles = torch.outer(positions.float(), frequencies)
    return torch.cat((angles, angles), -1)[:, None, None, :], factor


def compressed_attention_angles(positions: Tensor, config: TransformerConfig, *, compressed: bool) -> Tensor:
    """Angles [S, 1, 1, R], for neighbours that turn together; layers with `compressed` keys have a base of their own.

    Only their context is extended, and without YaRN's correction of attention.
    """
    base = config.csa_compress_rotary_base if compressed else config.rotary_base
    frequencies = _frequencies(config.qk_pos_emb_head_dim, base, positions.device)
    if compressed:
        frequencies = _yarn(frequencies, config, base)
    return torch.outer(positions.float(), frequencies).repeat_interleave(2, -1)[:, None, None, :]


def rotate_last(x_SBNC: Tensor, angles: Tensor) -> Tensor:
    """Turn the last R values of every head, neighbours together, by `angles` [S, 1, 1, R]; the others stay."""
    rotated = angles.shape[-1]
    turned = rotate(x_SBNC[..., -rotated:], angles, interleaved=True)
    return torch.cat((x_SBNC[..., :-rotated], turned), -1)


def rotate(
    x_SBNC: Tensor, angles: Tensor, *, interleaved: bool = False, reorder: bool = False, factor: float = 1.0
) -> Tensor:
    """Turn the first R values of every head by `angles` [S, 1, 1, R]; the others stay.

    Two values that turn together are neighbours if `interleaved`, else one half apart. `reorder` first brings
    neighbours one half apart, as latent attention does.
    """
    rotated = angles.shape[-1]
    x, rest = x_SBNC[..., :rotated], x_SBNC[..., rotated:]
    if reorder:
        x = torch.cat((x[..., ::2], x[..., 1::2]), -1)
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    cos, sin = ((f(angles) * factor).to(x.dtype) for f in (torch.cos, torch.sin))
    return torch.cat((x * cos + turned * sin, rest), -1)


def yarn_mscale(scale: float, mscale: float) -> float:
    """YaRN's correction of attention for a context `scale` times longer; 1 if it is not."""
    return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1 else 1.0


def _frequencies(size: int, base: float, device: torch.device) -> Tensor:
    """base^(-2i/size) [size / 2]."""
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    return 1.0 / base**exponents


def _yarn(frequencies: Tensor, config: TransformerConfig, base: float) -> Tensor:
    """Frequencies that turn often in the original context stay, slow ones are divided, with a ramp between."""
    size, context = config.qk_pos_emb_head_dim, config.original_max_position_embeddings

    def place(turns: float) -> float:
        """Index of the frequency that turns so often in the original context."""
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(place(config.beta_fast)), 0)
    high = min(math.ceil(place(config.beta_slow)), size - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(size // 2, dtype=torch.float32, device=frequencies.device) - low) / width).clamp(0, 1)
    keep = 1.0 - ramp
    return frequencies / config.rotary_scaling_factor * (1 - keep) + frequencies * keep
