"""The core's decoders and heads under their published names in Detectron2's registries."""

from typing import Any

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor

from mask2former.config import (
    pixel_classifier_arguments,
    standard_decoder_arguments,
    transformer_decoder_arguments,
)
from mask2former.config_values import one_of
from mask2former.d2.registry import (
    TRANSFORMER_DECODER_REGISTRY,
    build_pixel_decoder,
    build_transformer_decoder,
)
from mask2former.modeling.mask2former import ALL_LEVELS, ENCODED, PIXEL_EMBEDDING, SegmentationHead
from mask2former.modeling.per_pixel import PixelClassifier
from mask2former.modeling.structures import PixelFeatures
from mask2former.modeling.transformer_decoders import MaskedAttentionDecoder, StandardDecoder


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


@TRANSFORMER_DECODER_REGISTRY.register()
class StandardTransformerDecoder(StandardDecoder):
    """`StandardDecoder` from a config."""

    @configurable
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)

    @classmethod
    def from_config(cls, cfg: Any, in_channels: int, mask_classification: bool = True) -> dict[str, Any]:
        arguments = standard_decoder_arguments(cfg)
        arguments.pop("in_feature")
        return arguments | {"in_channels": in_channels, "mask_classification": mask_classification}


@SEM_SEG_HEADS_REGISTRY.register()
class MaskFormerHead(SegmentationHead):
    """Pixel decoder and transformer decoder, each from its registry.

    Pixel decoders are called through ``forward_features``, so that those written for the published project
    work as they are.
    """

    classifies_masks = True

    @configurable
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)

    @classmethod
    def from_config(cls, cfg: Any, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        channels = {
            **{name: shape.channels for name, shape in input_shape.items()},
            ALL_LEVELS: head.CONVS_DIM,
            ENCODED: head.CONVS_DIM,
            PIXEL_EMBEDDING: head.MASK_DIM,
        }
        in_feature = one_of(cfg, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", channels)
        return {
            "pixel_decoder": _pixel_decoder(cfg, input_shape),
            "predictor": build_transformer_decoder(cfg, channels[in_feature], cls.classifies_masks),
            "in_feature": in_feature,
        }

    def pixel_features(self, features: dict[str, Tensor]) -> PixelFeatures:
        mask_features, encoded, levels = self.pixel_decoder.forward_features(features)
        if self.in_feature == ENCODED:
            if encoded is None:
                raise ValueError(
                    f"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE must be a map that there is, got {ENCODED!r}: "
                    f"{type(self.pixel_decoder).__name__} has no transformer encoder"
                )
            levels = [encoded]
        return self._attended(PixelFeatures(mask_features, levels), features)


@SEM_SEG_HEADS_REGISTRY.register()
class PerPixelBaselinePlusHead(MaskFormerHead):
    """`MaskFormerHead` whose queries are the classes of pixels."""

    classifies_masks = False


@SEM_SEG_HEADS_REGISTRY.register()
class PerPixelBaselineHead(MaskFormerHead):
    """A pixel decoder and a linear classifier of pixels."""

    @classmethod
    def from_config(cls, cfg: Any, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        return {
            "pixel_decoder": _pixel_decoder(cfg, input_shape),
            "predictor": PixelClassifier(**pixel_classifier_arguments(cfg)),
        }


def _pixel_decoder(cfg: Any, input_shape: dict[str, ShapeSpec]) -> Any:
    names = cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES
    missing = [n for n in names if n not in input_shape]
    if missing:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES must be among the backbone's outputs {sorted(input_shape)}, got {missing}"
        )
    return build_pixel_decoder(cfg, {n: input_shape[n] for n in names})
