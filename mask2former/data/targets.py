"""Annotations of one image, from any source, to a `PackedTarget` in any view of the image.

All sources become label maps at the image's own size, where objects that overlap are in different maps; a view's
target is gathered from these, without the objects that the view does not show.

One object gives the same target whether it was stored as polygon, RLE or bitmap. For that, polygons are
rasterised once, at the image's own size, and then treated as a bitmap; the published code transforms the
polygon's corners and rasterises afterwards, which differs in pixels on the outline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mask2former.data.geometry import View
from mask2former.data.segmentations import (
    Patch,
    mask_from_bitmap,
    mask_from_polygons,
    mask_from_rle,
    mask_from_segmentation,
    patch_from_segmentation,
)
from mask2former.modeling.structures import PackedTarget

__all__ = [
    "LabelMaps",
    "check_label",
    "mask_from_bitmap",
    "mask_from_polygons",
    "mask_from_rle",
    "mask_from_segmentation",
    "object_masks",
    "panoptic_ids",
    "panoptic_segments",
    "semantic_segments",
    "stacked",
]

_LAST_VALUE = 255  # of a pixel of a map; 0 is no object


@dataclass(frozen=True)
class LabelMaps:
    """The objects or segments of one image.

    Attributes:
        maps: (L, H, W) uint8, at least one map.
        objects: (N, 3) int64: category, number of the map, value of the object's pixels in that map.
        is_crowd: (N,) bool; crowds are never a target.
    """

    maps: Sequence[NDArray[np.uint8]]
    objects: NDArray[np.int64]
    is_crowd: NDArray[np.bool_]

    def target(self, view: View) -> PackedTarget:
        """The objects that are visible in the view, at its size, in their order."""
        visible = [view.visible(one) for one in self.maps]
        counts = np.stack([np.bincount(one.ravel(), minlength=_LAST_VALUE + 1) for one in visible])  # (L, 256)
        _, number, value = self.objects.T
        kept = self.objects[(counts[number, value] > 0) & ~self.is_crowd]
        numbers = np.unique(kept[:, 1]) if len(kept) else np.zeros(1, dtype=np.int64)
        kept[:, 1] = np.searchsorted(numbers, kept[:, 1])
        maps = np.stack([view.spread(visible[n], fill=0) for n in numbers])
        return PackedTarget(torch.from_numpy(kept), torch.from_numpy(maps))

    def label_map(self, void: int) -> NDArray[np.int32]:
        """(H, W) category of each pixel, crowds included; `void` where there is no object. Only if none overlap."""
        categories = np.full((len(self.maps), _LAST_VALUE + 1), void, dtype=np.int32)
        label, number, value = self.objects.T
        categories[number, value] = label
        result = categories[0][self.maps[0]]
        for lookup, one in zip(categories[1:], self.maps[1:], strict=True):
            result = np.where(one == 0, result, lookup[one])
        return result


def panoptic_segments(
    panoptic: NDArray[Any], segments_info: Sequence[Mapping[str, Any]], num_classes: int, file: str
) -> LabelMaps:
    """
    Args:
        panoptic: (H, W, 3) uint8, the id being R + 256 G + 65536 B; or (H, W) integer ids.
        segments_info: {"id", "category_id" (contiguous), "iscrowd"} of each segment. Pixels of any other id
            are void.
        num_classes: categories must be below it.
        file: named in errors.

    Raises:
        ValueError: a category is outside [0, num_classes), or two segments have the same id.
    """
    ids = panoptic_ids(panoptic) if panoptic.ndim == 3 else panoptic
    labels = [int(segment["category_id"]) for segment in segments_info]
    for segment, label in zip(segments_info, labels, strict=True):
        check_label(label, num_classes, f"{file}: segment {segment['id']}")
    known = np.array([segment["id"] for segment in segments_info], dtype=np.int64)
    order = np.argsort(known)
    ranked = known[order]
    if repeated := ranked[1:][ranked[1:] == ranked[:-1]].tolist():
        raise ValueError(f"{file}: segments_info lists segment {repeated[0]} twice")
    crowd = np.array([bool(segment.get("iscrowd", 0)) for segment in segments_info], dtype=np.bool_)
    return _label_maps(_positions(ids, ranked, order), np.array(labels, dtype=np.int64), crowd)


def semantic_segments(label_map: NDArray[Any], ignore_label: int, num_classes: int, file: str) -> LabelMaps:
    """One segment for each class that is present, in the order of the classes.

    Args:
        label_map: (H, W) integer classes.
        ignore_label: value of pixels that belong to no class.
        num_classes: all other values must be below it.
        file: named in errors.

    Raises:
        ValueError: a value is neither `ignore_label` nor in [0, num_classes).
    """
    present = [value for value in _values(label_map) if value != ignore_label]
    for value in present:
        check_label(value, num_classes, file)
    place = np.full(max([*present, 0]) + 2, -1, dtype=np.int32)
    place[present] = np.arange(len(present))
    # ignore_label may be any number: everything above the classes goes to the last, empty entry.
    within = np.where(label_map == ignore_label, np.int64(len(place) - 1), label_map)
    return _label_maps(place[within], np.array(present, dtype=np.int64), np.zeros(len(present), dtype=np.bool_))


def object_masks(
    annotations: Sequence[Mapping[str, Any]], height: int, width: int, num_classes: int, file: str
) -> LabelMaps:
    """A record's annotations, without the crowds.

    Args:
        annotations: {"category_id" (contiguous), "segmentation", "iscrowd"} of each object.
        height: of the image.
        width: of the image.
        num_classes: categories must be below it.
        file: named in errors.

    Raises:
        ValueError: a category is outside [0, num_classes), or a segmentation is missing or malformed.
    """
    labels, patches = [], []
    for number, annotation in enumerate(annotations):
        if annotation.get("iscrowd", 0):
            continue
        where = f"{file}: annotation {number}"
        check_label(annotation["category_id"], num_classes, where)
        if "segmentation" not in annotation:
            raise ValueError(f"{where} has no segmentation")
        try:
            patches.append(patch_from_segmentation(annotation["segmentation"], height, width))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        labels.append(annotation["category_id"])
    return stacked(labels, patches, height, width)


def stacked(labels: Sequence[int], patches: Sequence[Patch], height: int, width: int) -> LabelMaps:
    """Objects that may overlap, each in the first map that has room for it.

    Args:
        labels: N categories.
        patches: N places and pixels.
        height: of the image.
        width: of the image.
    """
    maps: list[NDArray[np.uint8]] = []
    used: list[int] = []
    objects = np.zeros((len(patches), 3), dtype=np.int64)
    for row, label, patch in zip(objects, labels, patches, strict=True):
        place, pixels = patch.place, patch.pixels.view(np.uint8)
        for number, one in enumerate(maps):
            if used[number] < _LAST_VALUE and not (one[place] * pixels).any():
                break
        else:
            number = len(maps)
            # The columns of an RLE are in one piece, and so they are here.
            maps.append(np.zeros((height, width), dtype=np.uint8, order="F"))
            used.append(0)
        used[number] += 1
        maps[number][place] += pixels * np.uint8(used[number])
        row[:] = label, number, used[number]
    empty = np.zeros((height, width), dtype=np.uint8)
    return LabelMaps([np.ascontiguousarray(one) for one in maps] or [empty], objects, np.zeros(len(objects), np.bool_))


def panoptic_ids(rgb: NDArray[np.uint8]) -> NDArray[np.int32]:
    """COCO's panoptic colours (H, W, 3) uint8 to segment ids (H, W): R + 256 G + 65536 B."""
    red, green, blue = (rgb[..., channel].astype(np.int32) for channel in range(3))
    return red + (green << 8) + (blue << 16)


def check_label(label: int, num_classes: int, where: str) -> None:
    """
    Raises:
        ValueError: `label` is outside [0, num_classes).
    """
    if not 0 <= label < num_classes:
        raise ValueError(f"{where}: category id {label} is outside [0, {num_classes}), the number of classes")


def _label_maps(place: NDArray[np.int32], labels: NDArray[np.int64], is_crowd: NDArray[np.bool_]) -> LabelMaps:
    """From the position of each pixel's segment in `labels`, (H, W), -1 for none."""
    number, value = np.divmod(np.arange(len(labels)), _LAST_VALUE)
    objects = np.stack([labels, number, value + 1], axis=1)  # (N, 3)
    if len(labels) <= _LAST_VALUE:
        return LabelMaps([(place + 1).astype(np.uint8)], objects, is_crowd)
    maps = []
    for first in range(0, len(labels), _LAST_VALUE):
        inside = (place >= first) & (place < first + _LAST_VALUE)
        maps.append(np.where(inside, place - first + 1, 0).astype(np.uint8))
    return LabelMaps(maps, objects, is_crowd)


def _positions(ids: NDArray[Any], ranked: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int32]:
    """For each id its position before sorting, -1 for ids that are not among the sorted ones."""
    if not len(ranked) or not ids.size:
        return np.full(ids.shape, -1, dtype=np.int32)
    # Neighbours are mostly of one segment, so that only the first of each run is looked up.
    flat = ids.ravel()
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
    wanted = flat[starts]
    place = np.minimum(np.searchsorted(ranked, wanted), len(ranked) - 1)
    found = np.where(ranked[place] == wanted, order[place], -1).astype(np.int32)
    return np.repeat(found, np.diff(starts, append=flat.size)).reshape(ids.shape)


def _values(label_map: NDArray[Any]) -> list[int]:
    """The distinct values in ascending order; counting is much faster than sorting for 8 and 16 bits."""
    if label_map.dtype in (np.uint8, np.uint16):
        return [int(value) for value in np.flatnonzero(np.bincount(label_map.ravel()))]
    return [int(value) for value in np.unique(label_map)]
