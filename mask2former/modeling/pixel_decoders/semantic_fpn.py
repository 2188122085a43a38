"""The semantic head of Panoptic FPN as a pixel decoder (Kirillov et al., 2019, section 3.1)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.pixel_decoders.fpn import FPNPixelDecoder
from mask2former.modeling.pixel_decoders.pyramid import NUM_LEVELS, fusion
from mask2former.modeling.structures import PixelFeatures


class SemanticFPNPixelDecoder(FPNPixelDecoder):
    """An FPN whose levels are all brought to the finest one in stages and summed.

    A stage is a 3x3 convolution and bilinear upsampling to the next finer level: as many stages as levels in
    between, and a single convolution for the finest one. The mask features are a projection of the sum; the output
    levels are those of the FPN.
    """

    def __init__(
        self,
        *,
        in_channels: Mapping[str, int],
        in_strides: Mapping[str, int],
        conv_dim: int = 256,
        norm: str = "GN",
        **pyramid: Any,
    ) -> None:
        """Build with random weights; arguments and errors as of `FPNPixelDecoder`."""
        super().__init__(in_channels=in_channels, in_strides=in_strides, conv_dim=conv_dim, norm=norm, **pyramid)
        # of each level, finest first
        self.stages = nn.ModuleList(
            nn.ModuleList(fusion(conv_dim, conv_dim, norm) for _ in range(max(steps, 1)))
            for steps in range(len(self._inputs))
        )

    def forward(self, features: Mapping[str, Tensor]) -> PixelFeatures:
        """Decode, see `FPNPixelDecoder`."""
        levels = self._pyramid(features, features[self._inputs[-1]])
        finest_first = levels[::-1]
        sizes = [level.shape[-2:] for level in finest_first]
        total, *others = (self._to_finest(number, level, sizes) for number, level in enumerate(finest_first))
        for other in others:
            total = total + other
        return PixelFeatures(self.mask_features(total), levels[:NUM_LEVELS])

    def _to_finest(self, number: int, level: Tensor, sizes: list[torch.Size]) -> Tensor:
        """A level, counted from 0 at the finest one, at the size of that one."""
        stages = self.stages[number]
        assert isinstance(stages, nn.ModuleList)
        for place, stage in enumerate(stages):
            level = stage(level)
            if number > 0:
                size = sizes[number - 1 - place]
                level = F.interpolate(level, size, mode="bilinear", align_corners=False)
        return level
