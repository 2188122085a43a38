"""The bidirectional feature pyramid of EfficientDet as a pixel decoder (Tan et al., 2020, section 3)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.layers import ConvNorm, fill_conv_xavier, make_norm
from mask2former.modeling.pixel_decoders.pyramid import (
    NUM_LEVELS,
    mask_projection,
    projection,
    pyramid_inputs,
    upsampled,
)
from mask2former.modeling.structures import PixelFeatures

_EPSILON = 1e-4  # as in the paper


class BiFPNPixelDecoder(nn.Module):
    """Repeated top-down and bottom-up paths over all levels, whose sums are weighted with learned weights.

    The last bottom-up path ends in the levels, not in the mask features: only with a transformer decoder that reads all
    levels do its parameters get a gradient.
    """

    def __init__(
        self,
        *,
        in_channels: Mapping[str, int],
        in_strides: Mapping[str, int],
        conv_dim: int = 256,
        mask_dim: int = 256,
        norm: str = "GN",
        num_repeats: int = 3,
        common_stride: int = 4,
    ) -> None:
        """Build with random weights.

        Args:
            in_channels, in_strides: channels and stride of each input map, by name. Each map must have half the
                size of the next finer one, rounded up.
            conv_dim: channels inside and of the three output levels.
            mask_dim: channels of the mask features.
            norm: normalisation of the convolutions.
            num_repeats: how often both paths are gone.
            common_stride: stride of the mask features.

        Raises:
            ValueError: if there is no repeat, or the strides do not double from level to level.
        """
        super().__init__()
        if num_repeats < 1:
            raise ValueError(f"num_repeats must be at least 1, got {num_repeats}")
        self._inputs = pyramid_inputs(in_strides, common_stride)
        strides = [in_strides[name] for name in self._inputs]
        if any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
            raise ValueError(f"in_strides must double from level to level, got {dict(in_strides)}")
        self.input_proj = nn.ModuleList(projection(in_channels[name], conv_dim, norm) for name in self._inputs)
        self.layers = nn.ModuleList(_BiFPNLayer(len(strides), conv_dim, norm) for _ in range(num_repeats))
        self.mask_features = mask_projection(conv_dim, mask_dim)

    def forward(self, features: Mapping[str, Tensor]) -> PixelFeatures:
        """Decode.

        Args:
            features: maps (B, C, h, w) by name.

        Returns:
            Mask features at ``common_stride`` and the three coarsest levels, lowest resolution first.
        """
        levels = [project(features[name]) for name, project in zip(self._inputs, self.input_proj, strict=True)]
        for layer in self.layers:
            levels = layer(levels)
        return PixelFeatures(self.mask_features(levels[0]), levels[: -NUM_LEVELS - 1 : -1])


class _BiFPNLayer(nn.Module):
    """One top-down and one bottom-up path; lists of maps are finest first."""

    def __init__(self, num_levels: int, dim: int, norm: str) -> None:
        super().__init__()
        self.top_down = nn.ModuleList(WeightedFusion(2, dim, norm) for _ in range(num_levels - 1))
        # the coarsest level has no map of the top-down path beside its input
        counts = [3] * (num_levels - 2) + [2]
        self.bottom_up = nn.ModuleList(WeightedFusion(count, dim, norm) for count in counts)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        down = [levels[-1]]  # coarsest first
        for level, fuse in zip(levels[-2::-1], reversed(self.top_down), strict=True):
            down.append(fuse([level, upsampled(down[-1], level)]))
        down.reverse()
        outputs = [down[0]]
        for number, fuse in enumerate(self.bottom_up, 1):
            maps = [levels[number]] if number == len(levels) - 1 else [levels[number], down[number]]
            outputs.append(fuse([*maps, F.max_pool2d(outputs[-1], 3, stride=2, padding=1)]))
        return outputs


class WeightedFusion(nn.Module):
    """A weighted sum of maps and a separable convolution: fast normalised fusion (section 3.3).

    The weights are those of ``weights`` that are positive, divided by their sum.
    """

    def __init__(self, num_maps: int, dim: int, norm: str) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_maps))
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.pointwise = ConvNorm(dim, dim, 1, bias=norm == "", norm=make_norm(norm, dim), activation=F.silu)
        fill_conv_xavier(self.depthwise)
        fill_conv_xavier(self.pointwise)

    def normalised_weights(self) -> Tensor:
        """(number of maps,) that sum to one, but for the epsilon that keeps the quotient finite."""
        positive = F.relu(self.weights)
        return positive / (positive.sum() + _EPSILON)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, h, w) of one size -> (B, C, h, w)."""
        total, *others = (level * weight for level, weight in zip(maps, self.normalised_weights(), strict=True))
        for other in others:
            total = total + other
        return self.pointwise(self.depthwise(total))
