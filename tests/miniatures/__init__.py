"""Miniatures of the data sets in the layout that one downloads or that the scripts in `datasets/` prepare.

Every function writes below a folder that is to be `$DETECTRON2_DATASETS` and returns the scenes that it has drawn,
{"train": [Scene, Scene], "val": [Scene, Scene]}, by which results are checked. `*_raw` writes what one downloads,
`*_prepared` what the scripts make of it; the others need no script of this repository.
"""

from tests.miniatures.ade20k import (
    ade20k_full_prepared,
    ade20k_full_raw,
    ade20k_prepared,
    ade20k_raw,
)
from tests.miniatures.cityscapes import cityscapes
from tests.miniatures.coco import coco, coco_stuff_prepared, coco_stuff_raw, lvis
from tests.miniatures.mapillary import mapillary_prepared, mapillary_raw
from tests.miniatures.scene import Region, Scene

__all__ = [
    "Region",
    "Scene",
    "ade20k_full_prepared",
    "ade20k_full_raw",
    "ade20k_prepared",
    "ade20k_raw",
    "cityscapes",
    "coco",
    "coco_stuff_prepared",
    "coco_stuff_raw",
    "lvis",
    "mapillary_prepared",
    "mapillary_raw",
]
