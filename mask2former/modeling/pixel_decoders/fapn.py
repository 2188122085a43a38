"""Feature-aligned pyramid network as a pixel decoder (Huang et al., 2021, section 3)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.pixel_decoders.pyramid import (
    NUM_LEVELS,
    fusion,
    mask_projection,
    projection,
    pyramid_inputs,
    upsampled,
)
from mask2former.modeling.structures import PixelFeatures
from mask2former.ops.deform_conv import deform_conv2d

_KERNEL = 3


class FaPNPixelDecoder(nn.Module):
    """An FPN that selects channels of the backbone's maps, and aligns the coarser level before it is added."""

    def __init__(
        self,
        *,
        in_channels: Mapping[str, int],
        in_strides: Mapping[str, int],
        conv_dim: int = 256,
        mask_dim: int = 256,
        norm: str = "GN",
        common_stride: int = 4,
    ) -> None:
        """Build with random weights and offsets of zero; arguments and errors as of `FPNPixelDecoder`."""
        super().__init__()
        self._inputs = pyramid_inputs(in_strides, common_stride)
        # all of them finest first
        self.selections = nn.ModuleList(_Selection(in_channels[name], conv_dim, norm) for name in self._inputs)
        self.alignments = nn.ModuleList(_Alignment(conv_dim) for _ in self._inputs[:-1])
        self.layers = nn.ModuleList(fusion(conv_dim, conv_dim, norm) for _ in self._inputs)
        self.mask_features = mask_projection(conv_dim, mask_dim)

    def forward(self, features: Mapping[str, Tensor]) -> PixelFeatures:
        """Decode, see `FPNPixelDecoder`."""
        selected = [select(features[name]) for name, select in zip(self._inputs, self.selections, strict=True)]
        levels = [self.layers[-1](selected[-1])]
        for number in reversed(range(len(self.alignments))):
            fine = selected[number]
            aligned = self.alignments[number](fine, upsampled(levels[-1], fine))
            levels.append(self.layers[number](fine + aligned))
        return PixelFeatures(self.mask_features(levels[-1]), levels[:NUM_LEVELS])


class _Selection(nn.Module):
    """Feature selection module: channels are emphasised by what the whole map holds, then projected."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__()
        self.importance = nn.Conv2d(in_channels, in_channels, 1)
        self.project = projection(in_channels, out_channels, norm)

    def forward(self, level: Tensor) -> Tensor:
        importance = self.importance(level.mean((2, 3), keepdim=True)).sigmoid()  # (B, C, 1, 1)
        return self.project(level + level * importance)


class _Alignment(nn.Module):
    """Feature alignment module: a deformable convolution, with offsets that depend on the finer map, too."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(2 * dim, 2 * _KERNEL**2, _KERNEL, padding=_KERNEL // 2)
        self.weight = nn.Parameter(torch.empty(dim, dim, _KERNEL, _KERNEL))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.kaiming_uniform_(self.weight, a=1)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Two maps (B, C, h, w) of one size, the coarser one enlarged -> that one, aligned."""
        offsets_px = self.offset(torch.cat([fine, coarse], dim=1))  # (B, 18, h, w)
        return F.relu(deform_conv2d(coarse, offsets_px, self.weight, self.bias))
