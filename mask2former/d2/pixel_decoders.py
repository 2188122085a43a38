"""The core's pixel decoders, from a config, in Detectron2's registry: where there are published names, under these."""

from collections.abc import Callable
from typing import Any, ClassVar

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from mask2former.config import bifpn_arguments, encoder_fpn_arguments, fpn_arguments, pixel_decoder_arguments
from mask2former.modeling import pixel_decoders as core


class _FromConfig(nn.Module):
    """Puts a core class, the next base, under Detectron2's contract for construction and the published one for use.

    Attributes:
        translate: the config's arguments of the core class.
        has_encoder: the coarsest level is the map of a transformer encoder.
    """

    translate: ClassVar[Callable[[Any], dict[str, Any]]]
    has_encoder: ClassVar[bool] = False

    @configurable
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)

    @classmethod
    def from_config(cls, cfg: Any, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = cls.translate(cfg)
        names = arguments.pop("in_features")
        arguments["in_channels"] = {n: input_shape[n].channels for n in names}
        arguments["in_strides"] = {n: input_shape[n].stride for n in names}
        return arguments

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The published contract: mask features, the encoder's coarsest map or None, and all levels."""
        mask_features, levels = self(features)
        return mask_features, levels[0] if self.has_encoder else None, levels


@SEM_SEG_HEADS_REGISTRY.register()
class MSDeformAttnPixelDecoder(_FromConfig, core.DeformablePixelDecoder):
    translate = staticmethod(pixel_decoder_arguments)
    has_encoder = True


@SEM_SEG_HEADS_REGISTRY.register()
class BasePixelDecoder(_FromConfig, core.FPNPixelDecoder):
    translate = staticmethod(fpn_arguments)


@SEM_SEG_HEADS_REGISTRY.register()
class TransformerEncoderPixelDecoder(_FromConfig, core.TransformerEncoderPixelDecoder):
    translate = staticmethod(encoder_fpn_arguments)
    has_encoder = True


@SEM_SEG_HEADS_REGISTRY.register()
class SemanticFPNPixelDecoder(_FromConfig, core.SemanticFPNPixelDecoder):
    translate = staticmethod(fpn_arguments)


@SEM_SEG_HEADS_REGISTRY.register()
class BiFPNPixelDecoder(_FromConfig, core.BiFPNPixelDecoder):
    translate = staticmethod(bifpn_arguments)


@SEM_SEG_HEADS_REGISTRY.register()
class FaPNPixelDecoder(_FromConfig, core.FaPNPixelDecoder):
    translate = staticmethod(fpn_arguments)
