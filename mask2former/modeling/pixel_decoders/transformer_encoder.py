"""A feature pyramid with a transformer encoder on its coarsest map (MaskFormer section 4.1)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mask2former.modeling.layers import fill_conv_xavier
from mask2former.modeling.pixel_decoders.fpn import FPNPixelDecoder
from mask2former.modeling.pixel_decoders.pyramid import NUM_LEVELS
from mask2former.modeling.structures import PixelFeatures
from mask2former.modeling.transformer_layers import TransformerEncoder, tokens_and_positions


class TransformerEncoderPixelDecoder(FPNPixelDecoder):
    """Self-attention among all cells of the coarsest map, then the pyramid from there.

    The coarsest of the output levels is what the encoder gave, before the pyramid's 3x3 convolution.
    """

    def __init__(
        self,
        *,
        in_channels: Mapping[str, int],
        in_strides: Mapping[str, int],
        conv_dim: int = 256,
        num_layers: int = 6,
        num_heads: int = 8,
        dim_feedforward: int = 2048,
        dropout: float = 0.0,
        pre_norm: bool = False,
        **pyramid: Any,
    ) -> None:
        """Build with random weights.

        Args:
            in_channels, in_strides, conv_dim: as of `FPNPixelDecoder`.
            num_layers, num_heads, dim_feedforward, dropout, pre_norm: as of `TransformerEncoder`.
            **pyramid: the other arguments of `FPNPixelDecoder`.

        Raises:
            ValueError: if there is no layer, or as `FPNPixelDecoder`.
        """
        super().__init__(in_channels=in_channels, in_strides=in_strides, conv_dim=conv_dim, **pyramid)
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.input_proj = nn.Conv2d(in_channels[self._inputs[-1]], conv_dim, 1)
        fill_conv_xavier(self.input_proj)
        self.transformer = _Transformer(
            TransformerEncoder(
                dim=conv_dim,
                num_layers=num_layers,
                num_heads=num_heads,
                dim_feedforward=dim_feedforward,
                dropout=dropout,
                pre_norm=pre_norm,
            )
        )

    def forward(self, features: Mapping[str, Tensor]) -> PixelFeatures:
        """Decode, see `FPNPixelDecoder`."""
        encoded = self.transformer(self.input_proj(features[self._inputs[-1]]))
        levels = self._pyramid(features, encoded)
        return PixelFeatures(self.mask_features(levels[-1]), [encoded, *levels[1:NUM_LEVELS]])

    def _coarsest_channels(self, in_channels: int, conv_dim: int) -> int:
        return conv_dim


class _Transformer(nn.Module):
    """Only gives the encoder its published name; a map (B, C, h, w) in, one of the same shape out."""

    def __init__(self, encoder: TransformerEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, level: Tensor) -> Tensor:
        encoded = self.encoder(*tokens_and_positions(level))  # (B, S, C)
        return encoded.transpose(1, 2).unflatten(2, level.shape[-2:])  # (B, C, h, w)
