"""The core's Swin transformer as a Detectron2 backbone."""

from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from mask2former.config import swin_arguments
from mask2former.modeling.backbones import SwinTransformer


@BACKBONE_REGISTRY.register()
class D2SwinTransformer(SwinTransformer, Backbone):
    """Registered as ``MODEL.BACKBONE.NAME: D2SwinTransformer``; reads MODEL.SWIN."""

    def __init__(self, cfg: Any, input_shape: ShapeSpec) -> None:
        super().__init__(**swin_arguments(cfg))

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
