"""Mask2Former: masked-attention mask transformer for panoptic, instance and semantic segmentation.

Importing this package never imports Detectron2. `add_maskformer2_config`, which configs for Detectron2 need,
is loaded from `mask2former.d2` when it is first asked for.
"""

from typing import Any

from mask2former.build import build_model, preset
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.structures import MaskPrediction, MaskTarget, PixelFeatures

__version__ = "0.1.0"

__all__ = [
    "Mask2Former",
    "MaskPrediction",
    "MaskTarget",
    "PixelFeatures",
    "add_maskformer2_config",
    "build_model",
    "preset",
]


def __getattr__(name: str) -> Any:
    if name == "add_maskformer2_config":
        from mask2former.d2 import add_maskformer2_config

        return add_maskformer2_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
