"""Segmentation of rasters larger than a model takes, or than memory holds, tile by tile; docs/huge_images.md."""

from mask2former.tiling.grid import Window
from mask2former.tiling.large import segment_large
from mask2former.tiling.results import LargeInstance, LargeInstances, LargePanoptic, LargeSegment, LargeSemantic
from mask2former.tiling.sources import RasterSource

__all__ = [
    "LargeInstance",
    "LargeInstances",
    "LargePanoptic",
    "LargeSegment",
    "LargeSemantic",
    "RasterSource",
    "Window",
    "segment_large",
]
