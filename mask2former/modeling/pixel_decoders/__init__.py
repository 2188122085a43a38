"""Pixel decoders: backbone maps -> `PixelFeatures`."""

from mask2former.modeling.pixel_decoders.deformable import DeformablePixelDecoder

__all__ = ["DeformablePixelDecoder"]
