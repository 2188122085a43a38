"""Sine position encoding of a 2-D map (DETR, section A.4)."""

import math

import torch
from torch import Tensor

_TEMPERATURE = 10000.0
_EPSILON = 1e-6


def sine_position_encoding(
    height: int, width: int, channels: int, *, device: torch.device | None = None
) -> Tensor:
    """Sine and cosine of the normalised row and column, in several frequencies.

    The first half of the channels encodes y, the second half x; sine and cosine alternate. Rows count from 1
    and are normalised so that the last one is 2 pi.

    Args:
        height, width: size of the map.
        channels: number of channels, a multiple of 4.
        device: where to make it.

    Returns:
        (channels, height, width) float32.

    Raises:
        ValueError: if ``channels`` is no multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"channels must be a multiple of 4, got {channels}")
    y = _encode_axis(height, channels // 2, device)  # (C/2, H)
    x = _encode_axis(width, channels // 2, device)  # (C/2, W)
    y_map = y[:, :, None].expand(-1, height, width)
    x_map = x[:, None, :].expand(-1, height, width)
    return torch.cat([y_map, x_map])


def _encode_axis(length: int, features: int, device: torch.device | None) -> Tensor:
    position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
    position = position / (length + _EPSILON) * (2 * math.pi)
    exponent = torch.arange(0, features, 2, dtype=torch.float32, device=device) / features
    angle = position / (_TEMPERATURE**exponent)[:, None]  # (features/2, length)
    return torch.stack([angle.sin(), angle.cos()], dim=1).flatten(0, 1)  # (features, length)
