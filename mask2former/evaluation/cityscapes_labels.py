"""What Cityscapes' evaluation knows about its classes: ids in the label files, groups, mean sizes of objects.

Facts of the data set (Cordts et al., "The Cityscapes Dataset", CVPR 2016), as its evaluation scripts have them.
"""

from collections.abc import Sequence
from typing import NamedTuple


class CityscapesClass(NamedTuple):
    """One of the 19 classes that are evaluated.

    Attributes:
        name: as in the data set.
        label_id: in `*_labelIds.png`; objects of `*_instanceIds.png` have 1000 * label_id + number.
        group: the category, in the data set's words.
        mean_size: pixels of an object in the mean; None for classes without objects.
    """

    name: str
    label_id: int
    group: str
    mean_size: float | None


CLASSES = (
    CityscapesClass("road", 7, "flat", None),
    CityscapesClass("sidewalk", 8, "flat", None),
    CityscapesClass("building", 11, "construction", None),
    CityscapesClass("wall", 12, "construction", None),
    CityscapesClass("fence", 13, "construction", None),
    CityscapesClass("pole", 17, "object", None),
    CityscapesClass("traffic light", 19, "object", None),
    CityscapesClass("traffic sign", 20, "object", None),
    CityscapesClass("vegetation", 21, "nature", None),
    CityscapesClass("terrain", 22, "nature", None),
    CityscapesClass("sky", 23, "sky", None),
    CityscapesClass("person", 24, "human", 3462.4756337644),
    CityscapesClass("rider", 25, "human", 3930.4788056518),
    CityscapesClass("car", 26, "vehicle", 12794.0202738185),
    CityscapesClass("truck", 27, "vehicle", 27855.1264367816),
    CityscapesClass("bus", 28, "vehicle", 35732.1511111111),
    CityscapesClass("train", 31, "vehicle", 67583.7075812274),
    CityscapesClass("motorcycle", 32, "vehicle", 6298.7200839748),
    CityscapesClass("bicycle", 33, "vehicle", 4672.3249222261),
)

VOID_LABEL_IDS = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
"""Ids of the classes that are not evaluated, in `*_instanceIds.png` those of their areas that are no single object."""

FIRST_OBJECT_ID = 1000
"""Smaller ids in `*_instanceIds.png` are label ids: of areas without objects, or of groups of objects."""


def cityscapes_classes(names: Sequence[str]) -> tuple[CityscapesClass, ...]:
    """The classes of these names.

    Raises:
        ValueError: if a name is not one of the 19 evaluated classes, or is given twice.
    """
    by_name = {c.name: c for c in CLASSES}
    unknown = [name for name in names if name not in by_name]
    if unknown or len(set(names)) != len(names) or not names:
        raise ValueError(f"class_names must be different classes of Cityscapes, {sorted(by_name)}, got {list(names)}")
    return tuple(by_name[name] for name in names)
