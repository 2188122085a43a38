"""The transformer-decoder registry, and how the head builds its two decoders from a config."""

from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.utils.registry import Registry
from torch import nn

TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_MODULE")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """
Transformer decoders: ``cls(cfg, in_channels, mask_classification=True)``, and
``forward(PixelFeatures, all_layers) -> list[MaskPrediction]``. See docs/extending.md.
"""


def build_pixel_decoder(cfg: Any, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """The pixel decoder that MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME names.

    Raises:
        ValueError: if its class has no ``forward_features``, the published contract.
    """
    name = cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME
    decoder = SEM_SEG_HEADS_REGISTRY.get(name)(cfg, input_shape)
    if not callable(getattr(decoder, "forward_features", None)):
        raise ValueError(
            "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME must name a class with a method forward_features(features) -> "
            f"(mask_features, encoder_features, multi_scale_features), got {name!r}"
        )
    return decoder


def build_transformer_decoder(cfg: Any, in_channels: int, mask_classification: bool = True) -> nn.Module:
    """The transformer decoder that MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME names."""
    name = cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME
    return TRANSFORMER_DECODER_REGISTRY.get(name)(cfg, in_channels, mask_classification)
