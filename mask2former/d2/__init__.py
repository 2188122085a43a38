"""Mask2Former as a Detectron2 extension: importing this package registers its parts and its data sets."""

from mask2former.d2.backbones import D2SwinTransformer, TimmBackbone, TimmSimplePyramid
from mask2former.d2.config import add_maskformer2_config, get_config
from mask2former.d2.data import MaskFormerDatasetMapper, register_datasets
from mask2former.d2.heads import (
    MaskFormerHead,
    MultiScaleMaskedTransformerDecoder,
    PerPixelBaselineHead,
    PerPixelBaselinePlusHead,
    StandardTransformerDecoder,
)
from mask2former.d2.meta_arch import MaskFormer
from mask2former.d2.pixel_decoders import (
    BasePixelDecoder,
    BiFPNPixelDecoder,
    FaPNPixelDecoder,
    MSDeformAttnPixelDecoder,
    SemanticFPNPixelDecoder,
    TransformerEncoderPixelDecoder,
)
from mask2former.d2.predictor import export_model, predictor_from_config
from mask2former.d2.registry import TRANSFORMER_DECODER_REGISTRY
from mask2former.d2.trainer import Trainer
from mask2former.d2.tta import SemanticSegmentorWithTTA

__all__ = [
    "TRANSFORMER_DECODER_REGISTRY",
    "BasePixelDecoder",
    "BiFPNPixelDecoder",
    "D2SwinTransformer",
    "FaPNPixelDecoder",
    "MSDeformAttnPixelDecoder",
    "MaskFormer",
    "MaskFormerDatasetMapper",
    "MaskFormerHead",
    "MultiScaleMaskedTransformerDecoder",
    "PerPixelBaselineHead",
    "PerPixelBaselinePlusHead",
    "SemanticFPNPixelDecoder",
    "SemanticSegmentorWithTTA",
    "StandardTransformerDecoder",
    "TimmBackbone",
    "TimmSimplePyramid",
    "Trainer",
    "TransformerEncoderPixelDecoder",
    "add_maskformer2_config",
    "export_model",
    "get_config",
    "predictor_from_config",
]

register_datasets()
