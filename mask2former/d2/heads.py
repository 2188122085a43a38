"""The core's decoders under their published names in Detectron2's registries."""

from typing import Any

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor

from mask2former.config import pixel_decoder_arguments, transformer_decoder_arguments
from mask2former.d2.registry import (
    TRANSFORMER_DECODER_REGISTRY,
    build_pixel_decoder,
    build_transformer_decoder,
)
from mask2former.modeling.mask2former import SegmentationHead
from mask2former.modeling.pixel_decoders import DeformablePixelDecoder
from mask2former.modeling.structures import PixelFeatures
from mask2former.modeling.transformer_decoders import MaskedAttentionDecoder


@SEM_SEG_HEADS_REGISTRY.register()
class MSDeformAttnPixelDecoder(DeformablePixelDecoder):
    """`DeformablePixelDecoder` from a config."""

    @configurable
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)

    @classmethod
    def from_config(cls, cfg: Any, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = pixel_decoder_arguments(cfg)
        names = arguments.pop("in_features")
        arguments["in_channels"] = {n: input_shape[n].channels for n in names}
        arguments["in_strides"] = {n: input_shape[n].stride for n in names}
        return arguments

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The published contract: mask features, the encoder's coarsest map, and all levels."""
        mask_features, levels = self(features)
        return mask_features, levels[0], levels


@TRANSFORMER_DECODER_REGISTRY.register()
class MultiScaleMaskedTransformerDecoder(MaskedAttentionDecoder):
    """`MaskedAttentionDecoder` from a config."""

    @configurable
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)

    @classmethod
    def from_config(cls, cfg: Any, in_channels: int, mask_classification: bool = True) -> dict[str, Any]:
        if not mask_classification:
            raise ValueError("mask_classification must be True for this decoder, got False")
        return transformer_decoder_arguments(cfg) | {"in_channels": in_channels}


@SEM_SEG_HEADS_REGISTRY.register()
class MaskFormerHead(SegmentationHead):
    """Pixel decoder and transformer decoder, each from its registry.

    Pixel decoders are called through ``forward_features``, so that those written for the published project
    work as they are.
    """

    @configurable
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)

    @classmethod
    def from_config(cls, cfg: Any, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        names = cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES
        missing = [n for n in names if n not in input_shape]
        if missing:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES must be among the backbone's outputs {sorted(input_shape)}, "
                f"got {missing}"
            )
        return {
            "pixel_decoder": build_pixel_decoder(cfg, {n: input_shape[n] for n in names}),
            "predictor": build_transformer_decoder(cfg, cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM),
        }

    def pixel_features(self, features: dict[str, Tensor]) -> PixelFeatures:
        mask_features, _, levels = self.pixel_decoder.forward_features(features)
        return PixelFeatures(mask_features, levels)
