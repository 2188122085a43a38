"""What the pixel decoders without deformable attention share: a pyramid of the backbone's maps, from coarse to fine."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.layers import ConvNorm, fill_conv_xavier, make_norm

NUM_LEVELS = 3
"""How many maps a transformer decoder gets: the coarsest ones."""


def pyramid_inputs(in_strides: Mapping[str, int], common_stride: int) -> list[str]:
    """Names of the maps that make up the pyramid, finest first.

    Args:
        in_strides: of each map, by name. Maps finer than ``common_stride`` are left out.
        common_stride: of the mask features.

    Raises:
        ValueError: if no map has ``common_stride``, or fewer than three are left.
    """
    names = sorted((n for n in in_strides if in_strides[n] >= common_stride), key=lambda name: in_strides[name])
    if len(names) < NUM_LEVELS or in_strides[names[0]] != common_stride:
        raise ValueError(
            f"in_strides must hold common_stride = {common_stride} and at least {NUM_LEVELS - 1} larger ones, got "
            f"{dict(in_strides)}"
        )
    return names


def projection(in_channels: int, out_channels: int, norm: str) -> ConvNorm:
    """A 1x1 convolution with a normalisation, without activation."""
    return _convolution(in_channels, out_channels, 1, norm, has_relu=False)


def fusion(in_channels: int, out_channels: int, norm: str) -> ConvNorm:
    """A 3x3 convolution with a normalisation and a ReLU."""
    return _convolution(in_channels, out_channels, 3, norm, has_relu=True)


def _convolution(in_channels: int, out_channels: int, size: int, norm: str, *, has_relu: bool) -> ConvNorm:
    convolution = ConvNorm(
        in_channels,
        out_channels,
        size,
        padding=size // 2,
        bias=norm == "",
        norm=make_norm(norm, out_channels),
        activation=F.relu if has_relu else None,
    )
    fill_conv_xavier(convolution)
    return convolution


def mask_projection(conv_dim: int, mask_dim: int) -> nn.Conv2d:
    """The 1x1 convolution that gives the mask features."""
    convolution = nn.Conv2d(conv_dim, mask_dim, 1)
    fill_conv_xavier(convolution)
    return convolution


def upsampled(coarse: Tensor, like: Tensor) -> Tensor:
    """A coarser map at the size of a finer one, each cell repeated."""
    return F.interpolate(coarse, like.shape[-2:], mode="nearest")
