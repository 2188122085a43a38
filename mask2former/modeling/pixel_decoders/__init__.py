"""Pixel decoders: backbone maps -> `PixelFeatures`."""

from mask2former.modeling.pixel_decoders.bifpn import BiFPNPixelDecoder
from mask2former.modeling.pixel_decoders.deformable import DeformablePixelDecoder
from mask2former.modeling.pixel_decoders.fapn import FaPNPixelDecoder
from mask2former.modeling.pixel_decoders.fpn import FPNPixelDecoder
from mask2former.modeling.pixel_decoders.semantic_fpn import SemanticFPNPixelDecoder
from mask2former.modeling.pixel_decoders.transformer_encoder import TransformerEncoderPixelDecoder

__all__ = [
    "BiFPNPixelDecoder",
    "DeformablePixelDecoder",
    "FPNPixelDecoder",
    "FaPNPixelDecoder",
    "SemanticFPNPixelDecoder",
    "TransformerEncoderPixelDecoder",
]
