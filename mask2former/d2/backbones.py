"""The core's backbones that Detectron2 does not have, as its backbones."""

from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from mask2former.config import swin_arguments, timm_arguments, timm_pyramid_arguments
from mask2former.modeling import backbones
from mask2former.modeling.backbones import SwinTransformer


class _CoreBackbone(Backbone):
    """What Detectron2 asks of a backbone that tells its channels and strides."""

    out_channels: dict[str, int]
    out_strides: dict[str, int]

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output."""
        return {
            name: ShapeSpec(channels=channels, stride=self.out_strides[name])
            for name, channels in self.out_channels.items()
        }

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of the largest stride."""
        return 32


@BACKBONE_REGISTRY.register()
class D2SwinTransformer(SwinTransformer, _CoreBackbone):
    """Registered as ``MODEL.BACKBONE.NAME: D2SwinTransformer``; reads MODEL.SWIN."""

    def __init__(self, cfg: Any, input_shape: ShapeSpec) -> None:
        super().__init__(**swin_arguments(cfg))


@BACKBONE_REGISTRY.register()
class TimmBackbone(backbones.TimmBackbone, _CoreBackbone):
    """Registered as ``MODEL.BACKBONE.NAME: TimmBackbone``; reads MODEL.TIMM."""

    def __init__(self, cfg: Any, input_shape: ShapeSpec) -> None:
        super().__init__(**timm_arguments(cfg))


@BACKBONE_REGISTRY.register()
class TimmSimplePyramid(backbones.TimmPyramid, _CoreBackbone):
    """Registered as ``MODEL.BACKBONE.NAME: TimmSimplePyramid``; reads MODEL.TIMM."""

    def __init__(self, cfg: Any, input_shape: ShapeSpec) -> None:
        super().__init__(**timm_pyramid_arguments(cfg))
