"""Transformer decoders: `PixelFeatures` -> a list of `MaskPrediction`, the last one final."""

from mask2former.modeling.transformer_decoders.masked_attention import MaskedAttentionDecoder

__all__ = ["MaskedAttentionDecoder"]
