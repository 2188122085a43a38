"""The simple feature pyramid of plain vision transformers (ViTDet, Li et al., 2022, section 3)."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation of each place of a map (B, C, H, W) over its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)  # (B, C, H, W)


class SimpleFeaturePyramid(nn.Module):
    """Maps of several strides from one map, each on its own.

    Finer maps come from 2x2 deconvolutions of stride 2, each of which halves the channels, with a normalisation and a
    GELU between two of them; coarser ones from max-pooling. Then follow a 1x1 and a 3x3 convolution, both without bias
    and with a normalisation after them. All normalisations are over channels.
    """

    def __init__(
        self, *, in_channels: int, in_stride: int, out_channels: int = 256, out_strides: Mapping[str, int]
    ) -> None:
        """Build with random weights.

        Args:
            in_channels, in_stride: of the given map.
            out_channels: of each output.
            out_strides: of each output by name; ``in_stride`` times or divided by a power of two.

        Raises:
            ValueError: if a stride is another.
        """
        super().__init__()
        self.levels = nn.ModuleDict()
        for name, stride in out_strides.items():
            finer, coarser = max(in_stride // stride, 1), max(stride // in_stride, 1)
            if finer & (finer - 1) or coarser & (coarser - 1) or in_stride * coarser != stride * finer:
                raise ValueError(
                    f"out_strides[{name!r}] must be in_stride = {in_stride} times or divided by a power of two, got "
                    f"{stride}"
                )
            resampling, channels = _finer(in_channels, finer)
            if coarser > 1:
                # a window that is cut off by the border counts, so that no map of a small image is empty
                resampling = [nn.MaxPool2d(coarser, coarser, ceil_mode=True)]
            self.levels[name] = nn.Sequential(
                *resampling,
                nn.Conv2d(channels, out_channels, 1, bias=False),
                ChannelNorm(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                ChannelNorm(out_channels),
            )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the outputs.

        Args:
            x: (B, in_channels, h, w).

        Returns:
            Maps (B, out_channels, ceil(h * in_stride / stride), ceil(w * in_stride / stride)) by name.
        """
        return {name: level(x) for name, level in self.levels.items()}


def _finer(channels: int, factor: int) -> tuple[list[nn.Module], int]:
    """Deconvolutions that enlarge a map by a power of two, and the channels after them."""
    layers: list[nn.Module] = []
    while factor > 1:
        if layers:
            layers += [ChannelNorm(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels, factor = channels // 2, factor // 2
    return layers, channels
