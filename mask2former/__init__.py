"""Mask2Former: masked-attention mask transformer for panoptic, instance and semantic segmentation.

Importing this package never imports Detectron2. `add_maskformer2_config`, which configs for Detectron2 need, and
`SemanticSegmentorWithTTA` are loaded from `mask2former.d2` when they are first asked for.
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
    "SemanticSegmentorWithTTA",
    "add_maskformer2_config",
    "build_model",
    "preset",
]


def __getattr__(name: str) -> Any:
    if name in ("SemanticSegmentorWithTTA", "add_maskformer2_config"):
        from mask2former import d2

        return getattr(d2, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
