"""Backbones: image (B, 3, H, W) -> dict of feature maps "res2" .. "res5" at strides 4, 8, 16 and 32."""

from mask2former.modeling.backbones.resnet import ResNet
from mask2former.modeling.backbones.swin import SwinTransformer
from mask2former.modeling.backbones.timm_backbone import TimmBackbone, TimmPyramid

__all__ = ["ResNet", "SwinTransformer", "TimmBackbone", "TimmPyramid"]
