"""What the segmentation of a large raster gives."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Box(NamedTuple):
    """Pixels from (x0, y0) up to, but without, (x1, y1)."""

    x0: int
    y0: int
    x1: int
    y1: int


@dataclass(frozen=True)
class LargeSegment:
    """One segment of the raster.

    Attributes:
        id: its value in the id map, from 1.
        category_id: contiguous class index.
        name: of the category.
        is_thing: a countable object; otherwise all stuff of its class.
        score: of a thing the mean of its parts' scores, weighted by pixels; of stuff likewise.
        area: pixels.
        box: around it.
    """

    id: int
    category_id: int
    name: str
    is_thing: bool
    score: float
    area: int
    box: Box


@dataclass(frozen=True, eq=False)
class LargePanoptic:
    """Panoptic segmentation.

    Attributes:
        ids: (H, W) uint32, 0 where nothing is; None if it was written to a file.
        segments: in order of their ids.
    """

    ids: NDArray[np.uint32] | None
    segments: tuple[LargeSegment, ...]


@dataclass(frozen=True)
class LargeInstance:
    """One instance.

    Attributes:
        category_id: contiguous class index.
        name: of the category.
        score: mean of its parts' scores, weighted by pixels.
        area: pixels.
        box: around it.
        counts: the mask as a COCO run-length encoding of the whole raster, compressed.
    """

    category_id: int
    name: str
    score: float
    area: int
    box: Box
    counts: str


@dataclass(frozen=True)
class LargeInstances:
    """Instance segmentation.

    Attributes:
        size: (height, width) of the raster.
        count: number of instances.
        instances: best score first; None if they were written to a file.
    """

    size: tuple[int, int]
    count: int
    instances: tuple[LargeInstance, ...] | None


@dataclass(frozen=True, eq=False)
class LargeSemantic:
    """Semantic segmentation.

    Attributes:
        labels: (H, W) uint8, or uint16 for more than 256 classes: contiguous class index; None if it was written to a
            file.
        areas: (K,) pixels of each class.
        names: of all K classes.
    """

    labels: NDArray[np.uint8 | np.uint16] | None
    areas: tuple[int, ...]
    names: tuple[str, ...]
