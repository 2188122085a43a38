"""Masks of the objects of one image: segmentations, boxes, areas, duplicates, overlaps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mask2former.data.targets import mask_from_segmentation
from mask2former.own_data.checks.plan import size_text
from mask2former.own_data.findings import Finding, fault
from mask2former.own_data.json_document import Place
from mask2former.own_data.object_masks import bounding_box, coco_rle

BOX_TOLERANCE_PX = 2.0
BOX_TOLERANCE = 0.05
AREA_TOLERANCE = 0.1


class CheckedMask(NamedTuple):
    """A mask that can be used.

    Attributes:
        name: for messages.
        file: that has it.
        place: in that file.
        rle: COCO's, compressed; equal for equal masks.
        pixels: that it covers.
        box: x, y, width, height.
        is_crowd: a region of many objects, which may overlap others.
    """

    name: str
    file: str
    place: Place | None
    rle: dict[str, Any]
    pixels: int
    box: list[int]
    is_crowd: bool


def decoded(segmentation: Any, size: tuple[int, int]) -> NDArray[np.bool_] | list[tuple[str, str]]:
    """The mask, or (code, message) of what is wrong with a COCO segmentation of an image of this (height, width)."""
    if isinstance(segmentation, Mapping):
        wrong = _wrong_rle(segmentation, size)
    elif isinstance(segmentation, list):
        wrong = list(_wrong_polygons(segmentation, size))
    else:
        wrong = [("bad-segmentation", f"the segmentation must be a list of polygons or an RLE, got {segmentation!r}")]
    if wrong:
        return wrong
    try:
        mask = mask_from_segmentation(segmentation, *size)
    except (ValueError, TypeError) as error:
        code = "bad-rle-counts" if isinstance(segmentation, Mapping) else "bad-segmentation"
        return [(code, str(error))]
    return mask if mask.any() else [("empty-mask", "the mask covers no pixel")]


def checked(
    mask: NDArray[np.bool_], name: str, file: str, place: Place | None = None, *, is_crowd: bool = False
) -> CheckedMask:
    """A mask with what the further checks compare."""
    return CheckedMask(name, file, place, coco_rle(mask), int(mask.sum()), bounding_box(mask), is_crowd)


def box_and_area(row: Mapping[str, Any], mask: CheckedMask, size: tuple[int, int]) -> Iterator[Finding]:
    """Whether an annotation's bbox and area are possible and agree with its mask, up to an outline of a pixel."""
    for key in ("bbox", "area"):
        if key not in row:
            yield fault("missing-key", mask.file, f"{mask.name} has no {key!r}, which the evaluation reads", mask.place)
    box, area = row.get("bbox", mask.box), row.get("area", mask.pixels)
    if problem := impossible_box(box, size):
        yield fault("bad-bbox", mask.file, f"{mask.name} has the bbox {box!r}: {problem}", mask.place)
    elif not _boxes_agree(box, mask.box, size):
        message = f"{mask.name} has the bbox {box}, but its mask has {mask.box}"
        yield fault("bbox-differs", mask.file, message, mask.place)
    if not _is_number(area) or area <= 0:
        yield fault("bad-area", mask.file, f"{mask.name} has the area {area!r}, which must be above 0", mask.place)
    elif abs(area - mask.pixels) > max(2 * (mask.box[2] + mask.box[3]), AREA_TOLERANCE * mask.pixels):
        message = f"{mask.name} has the area {area}, but its mask covers {mask.pixels} pixels"
        yield fault("area-differs", mask.file, message, mask.place)


def duplicates(masks: Sequence[CheckedMask]) -> Iterator[Finding]:
    """Masks with the same pixels as an earlier one."""
    first: dict[str, CheckedMask] = {}
    for mask in masks:
        other = first.setdefault(mask.rle["counts"], mask)
        if other is not mask:
            yield fault("duplicate-mask", mask.file, f"{mask.name} has the same mask as {other.name}", mask.place)


def overlaps(masks: Sequence[CheckedMask]) -> list[tuple[CheckedMask, CheckedMask, int]]:
    """Pairs that share pixels, with how many; crowds and duplicates do not count."""
    from pycocotools import mask as mask_api

    single = [mask for mask in masks if not mask.is_crowd]
    if len(single) < 2:
        return []
    rles = [mask.rle for mask in single]
    iou = np.asarray(mask_api.iou(rles, rles, [0] * len(rles)))  # (N, N)
    pairs = np.argwhere(np.triu(iou, k=1) > 0).tolist()
    found = []
    for a, b in pairs:
        if single[a].rle["counts"] == single[b].rle["counts"]:
            continue
        union = single[a].pixels + single[b].pixels
        found.append((single[a], single[b], round(iou[a, b] * union / (1 + iou[a, b]))))
    return found


def _wrong_rle(rle: Mapping[str, Any], size: tuple[int, int]) -> list[tuple[str, str]]:
    given = rle.get("size")
    if not isinstance(given, list) or len(given) != 2 or "counts" not in rle:
        return [("bad-segmentation", f"an RLE must have 'counts' and 'size' [height, width], got size {given!r}")]
    if tuple(given) != size:
        message = f"the RLE has the size {size_text(given)} (height x width), its image {size_text(size)}"
        return [("rle-size-differs", message)]
    return []


def _wrong_polygons(polygons: Sequence[Any], size: tuple[int, int]) -> Iterator[tuple[str, str]]:
    if not polygons:
        yield "empty-mask", "the list of polygons is empty"
    height, width = size
    for number, polygon in enumerate(polygons):
        what = f"polygon {number}"
        if not isinstance(polygon, list) or not all(_is_number(value) for value in polygon):
            yield "bad-segmentation", f"{what} must be a list of finite numbers [x0, y0, x1, y1, ...]"
        elif len(polygon) % 2:
            yield "bad-segmentation", f"{what} must have an even number of coordinates, got {len(polygon)}"
        elif len(polygon) < 6:
            yield "polygon-too-short", f"{what} must have at least 3 points, got {len(polygon) // 2}"
        elif min(_outside(polygon[0::2], width), _outside(polygon[1::2], height)) < 0:
            yield "polygon-outside", f"{what} lies outside the image of {size_text(size)} (height x width)"


def beyond_edge(segmentation: Any, size: tuple[int, int]) -> float:
    """By how many pixels polygons reach beyond the image; 0 for RLEs."""
    if not isinstance(segmentation, list):
        return 0.0
    height, width = size
    xs = [x for polygon in segmentation for x in polygon[0::2]]
    ys = [y for polygon in segmentation for y in polygon[1::2]]
    return max(0.0, -min(xs), -min(ys), max(xs) - width, max(ys) - height)


def _outside(values: Sequence[float], edge: int) -> int:
    """-1 if all coordinates are on the same side outside [0, edge], else 0."""
    return -1 if max(values) <= 0 or min(values) >= edge else 0


def impossible_box(box: Any, size: tuple[int, int]) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        return "it must be a list of four numbers x, y, width, height"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "width and height must be above 0"
    if min(x, y) < -1 or x + width > size[1] + 1 or y + height > size[0] + 1:
        return f"it reaches beyond the image of {size_text(size)} (height x width)"
    return None


def _boxes_agree(box: Sequence[float], of_mask: Sequence[int], size: tuple[int, int]) -> bool:
    for start, length, edge in ((0, 2, size[1]), (1, 3, size[0])):
        allowed = max(BOX_TOLERANCE_PX, BOX_TOLERANCE * of_mask[length])
        low, high = max(box[start], 0), min(box[start] + box[length], edge)
        if abs(low - of_mask[start]) > allowed or abs(high - of_mask[start] - of_mask[length]) > allowed:
            return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
