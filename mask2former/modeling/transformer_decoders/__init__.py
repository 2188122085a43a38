"""Transformer decoders: `PixelFeatures` -> a list of `MaskPrediction`, the last one final."""

from mask2former.modeling.transformer_decoders.masked_attention import MaskedAttentionDecoder
from mask2former.modeling.transformer_decoders.standard import StandardDecoder

__all__ = ["MaskedAttentionDecoder", "StandardDecoder"]
