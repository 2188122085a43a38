"""Backbones: image (B, 3, H, W) -> dict of feature maps "res2" .. "res5" at strides 4, 8, 16 and 32."""

from mask2former.modeling.backbones.resnet import ResNet
from mask2former.modeling.backbones.swin import SwinTransformer

__all__ = ["ResNet", "SwinTransformer"]
