"""The feature pyramid as a pixel decoder (Lin et al., 2017; MaskFormer section 4.1)."""

from collections.abc import Mapping
from typing import cast

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


class FPNPixelDecoder(nn.Module):
    """Every level is the sum of the projected backbone map (``adapter_i``) and the coarser level, through a 3x3
    convolution (``layer_i``); i counts from 1 at the finest level. The coarsest level has no ``adapter_i``.
    """

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
        """Build with random weights.

        Args:
            in_channels, in_strides: channels and stride of each input map, by name.
            conv_dim: channels inside and of the three output levels.
            mask_dim: channels of the mask features.
            norm: normalisation of the convolutions.
            common_stride: stride of the mask features.

        Raises:
            ValueError: see `pyramid_inputs`.
        """
        super().__init__()
        self._inputs = pyramid_inputs(in_strides, common_stride)
        for number, name in enumerate(self._inputs, 1):
            is_coarsest = number == len(self._inputs)
            if not is_coarsest:
                self.add_module(f"adapter_{number}", projection(in_channels[name], conv_dim, norm))
            fused = self._coarsest_channels(in_channels[name], conv_dim) if is_coarsest else conv_dim
            self.add_module(f"layer_{number}", fusion(fused, conv_dim, norm))
        self.mask_features = mask_projection(conv_dim, mask_dim)

    def forward(self, features: Mapping[str, Tensor]) -> PixelFeatures:
        """Decode.

        Args:
            features: maps (B, C, h, w) by name.

        Returns:
            Mask features at ``common_stride`` and the three coarsest levels, lowest resolution first.
        """
        levels = self._pyramid(features, features[self._inputs[-1]])
        return PixelFeatures(self.mask_features(levels[-1]), levels[:NUM_LEVELS])

    def _coarsest_channels(self, in_channels: int, conv_dim: int) -> int:
        """Channels of what the coarsest 3x3 convolution gets."""
        return in_channels

    def _pyramid(self, features: Mapping[str, Tensor], coarsest: Tensor) -> list[Tensor]:
        """All levels (B, conv_dim, h, w), lowest resolution first, from the map that stands for the coarsest one."""
        levels = [self._part("layer", len(self._inputs))(coarsest)]
        for number, name in reversed(list(enumerate(self._inputs[:-1], 1))):
            lateral = self._part("adapter", number)(features[name])
            levels.append(self._part("layer", number)(lateral + upsampled(levels[-1], lateral)))
        return levels

    def _part(self, kind: str, number: int) -> nn.Module:
        return cast(nn.Module, getattr(self, f"{kind}_{number}"))
