"""Annotations of one image, from any source, to a `MaskTarget` in any view of the image.

Two forms: `SegmentMap` where segments do not overlap (panoptic, semantic), one map for all of them;
`ObjectMasks` where they may (instances), one mask each. Both drop objects that a view does not show.

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
from mask2former.modeling.structures import MaskTarget

NO_SEGMENT = -1
"""In a `SegmentMap`: void, ignored or padding."""


@dataclass(frozen=True)
class SegmentMap:
    """Segments that do not overlap.

    Attributes:
        index: (H, W) int32, position of the pixel's segment in `labels`, or `NO_SEGMENT`.
        labels: (S,) int64 category of each segment.
        is_crowd: (S,) bool; crowd segments are never a target.
    """

    index: NDArray[np.int32]
    labels: NDArray[np.int64]
    is_crowd: NDArray[np.bool_]

    def target(self, view: View) -> MaskTarget:
        """The segments that are visible in the view, at its size, in the order of `labels`."""
        index = view.gather(self.index, fill=NO_SEGMENT)
        pixels = np.bincount(index.ravel() + 1, minlength=len(self.labels) + 1)[1:]
        kept = np.flatnonzero((pixels > 0) & ~self.is_crowd)
        masks = index[None] == kept.astype(np.int32)[:, None, None]  # (N, h, w)
        return MaskTarget(torch.from_numpy(self.labels[kept]), torch.from_numpy(masks))

    def label_map(self, void: int) -> NDArray[np.int32]:
        """(H, W) category of each pixel, crowds included; `void` where there is no segment."""
        return np.append(self.labels, void).astype(np.int32)[self.index]


@dataclass(frozen=True)
class ObjectMasks:
    """Objects that may overlap.

    Attributes:
        labels: (N,) int64 category of each object.
        masks: N times (H, W) bool.
    """

    labels: NDArray[np.int64]
    masks: Sequence[NDArray[np.bool_]]

    def target(self, view: View) -> MaskTarget:
        """The objects that are visible in the view, at its size, in the order of `labels`."""
        visible = [(n, patch) for n, mask in enumerate(self.masks) if (patch := _visible_patch(mask, view))]
        masks = np.zeros((len(visible), *view.size), dtype=np.bool_)
        for mask, (_, (rows, cols, pixels)) in zip(masks, visible, strict=True):
            mask[rows, cols] = pixels
        kept = np.array([n for n, _ in visible], dtype=np.int64)
        return MaskTarget(torch.from_numpy(self.labels[kept]), torch.from_numpy(masks))


def panoptic_segments(
    panoptic: NDArray[Any], segments_info: Sequence[Mapping[str, Any]], num_classes: int, file: str
) -> SegmentMap:
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
    return SegmentMap(_positions(ids, ranked, order), np.array(labels, dtype=np.int64), crowd)


def semantic_segments(
    label_map: NDArray[Any], ignore_label: int, num_classes: int, file: str
) -> SegmentMap:
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
    position = np.full(max([*present, 0]) + 2, NO_SEGMENT, dtype=np.int32)
    position[present] = np.arange(len(present))
    # ignore_label may be any number: everything above the classes goes to the last, empty entry.
    within = np.where(label_map == ignore_label, np.int64(len(position) - 1), label_map)
    return SegmentMap(
        position[within], np.array(present, dtype=np.int64), np.zeros(len(present), dtype=np.bool_)
    )


def object_masks(
    annotations: Sequence[Mapping[str, Any]], height: int, width: int, num_classes: int, file: str
) -> ObjectMasks:
    """Masks of a record's annotations, without the crowds.

    Args:
        annotations: {"category_id" (contiguous), "segmentation", "iscrowd"} of each object.
        height: of the image.
        width: of the image.
        num_classes: categories must be below it.
        file: named in errors.

    Raises:
        ValueError: a category is outside [0, num_classes), or a segmentation is missing or malformed.
    """
    labels, masks = [], []
    for number, annotation in enumerate(annotations):
        if annotation.get("iscrowd", 0):
            continue
        where = f"{file}: annotation {number}"
        check_label(annotation["category_id"], num_classes, where)
        if "segmentation" not in annotation:
            raise ValueError(f"{where} has no segmentation")
        try:
            masks.append(mask_from_segmentation(annotation["segmentation"], height, width))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        labels.append(annotation["category_id"])
    return ObjectMasks(np.array(labels, dtype=np.int64), masks)


def mask_from_segmentation(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """One COCO `segmentation` field to (height, width) bool.

    Args:
        segmentation: a list of polygons, an RLE dict, or an (H, W) array.
        height: of the image.
        width: of the image.

    Raises:
        ValueError: it is none of these, malformed, or of another size.
    """
    if isinstance(segmentation, Mapping):
        return mask_from_rle(segmentation, height, width)
    if isinstance(segmentation, np.ndarray):
        return mask_from_bitmap(segmentation, height, width)
    if isinstance(segmentation, Sequence) and not isinstance(segmentation, str | bytes):
        return mask_from_polygons(segmentation, height, width)
    raise ValueError(
        f"segmentation must be a list of polygons, an RLE dict or an array, got {type(segmentation).__name__}"
    )


def mask_from_polygons(
    polygons: Sequence[Sequence[float]], height: int, width: int
) -> NDArray[np.bool_]:
    """The union of the polygons, rasterised by pycocotools at the size of the image.

    Args:
        polygons: each [x0, y0, x1, y1, ...] in pixels. One with fewer than three points covers nothing.
        height: of the image.
        width: of the image.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: a polygon has an odd number of coordinates or one that is not finite.
    """
    outlines = [np.asarray(polygon, dtype=np.float64) for polygon in polygons]
    for outline in outlines:
        if outline.ndim != 1 or outline.size % 2 or not np.isfinite(outline).all():
            raise ValueError(
                "a polygon must be a flat list of an even number of finite coordinates, "
                f"got shape {outline.shape}"
            )
    outlines = [outline for outline in outlines if outline.size >= 6]
    if not outlines:
        return np.zeros((height, width), dtype=np.bool_)
    from pycocotools import mask as coco_mask

    parts = coco_mask.frPyObjects([outline.tolist() for outline in outlines], height, width)
    return np.asarray(coco_mask.decode(coco_mask.merge(parts)), dtype=np.bool_)


def mask_from_rle(rle: Mapping[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    """
    Args:
        rle: {"size": [height, width], "counts"}, runs of 0 and 1 in column order; counts are a list
            (uncompressed) or str or bytes (compressed).
        height: of the image.
        width: of the image.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: the size is not that of the image, or the counts do not add up to it.
    """
    if missing := {"size", "counts"} - rle.keys():
        raise ValueError(f"an RLE needs 'size' and 'counts', it lacks {min(missing)!r}")
    size = tuple(rle["size"])
    if size != (height, width):
        raise ValueError(f"RLE size {size} differs from the image's (height, width) {(height, width)}")
    counts = rle["counts"]
    if isinstance(counts, str | bytes):
        counts = _decompress_counts(counts.encode() if isinstance(counts, str) else counts)
    counts = np.asarray(counts, dtype=np.int64)
    if (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(
            f"RLE counts must be >= 0 and add up to {height * width} pixels, "
            f"got {counts.sum()} from {len(counts)} counts"
        )
    is_object = np.arange(len(counts)) % 2 == 1
    return np.repeat(is_object, counts).reshape(width, height).T


def mask_from_bitmap(bitmap: NDArray[Any], height: int, width: int) -> NDArray[np.bool_]:
    """(height, width) of any number type, True where it is not zero.

    Raises:
        ValueError: the shape is another one.
    """
    if bitmap.shape != (height, width):
        raise ValueError(f"bitmap shape {bitmap.shape} differs from (height, width) {(height, width)}")
    return bitmap != 0


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


def _visible_patch(mask: NDArray[np.bool_], view: View) -> tuple[slice, slice, NDArray[np.bool_]] | None:
    """The mask's bounding box in the view: rows, columns and pixels; None if none of its pixels shows.

    Objects are mostly much smaller than the image, so that this spares most of the work.
    """
    rows = _window(view.rows, np.flatnonzero(mask.any(axis=1)))
    cols = _window(view.cols, np.flatnonzero(mask.any(axis=0)))
    pixels = mask[view.rows[rows]].take(view.cols[cols], axis=1)
    return (rows, cols, pixels) if pixels.any() else None


def _window(source: NDArray[np.int64], occupied: NDArray[np.int64]) -> slice:
    """The run of a view's rows (or columns) that come from between the first and last occupied ones."""
    if not len(occupied):
        return slice(0, 0)
    inside = np.flatnonzero((source >= occupied[0]) & (source <= occupied[-1]))
    return slice(inside[0], inside[-1] + 1) if len(inside) else slice(0, 0)


def _positions(
    ids: NDArray[Any], ranked: NDArray[np.int64], order: NDArray[np.int64]
) -> NDArray[np.int32]:
    """For each id its position before sorting, `NO_SEGMENT` for ids that are not among the sorted ones."""
    if not len(ranked):
        return np.full(ids.shape, NO_SEGMENT, dtype=np.int32)
    place = np.minimum(np.searchsorted(ranked, ids), len(ranked) - 1)
    return np.where(ranked[place] == ids, order[place], NO_SEGMENT).astype(np.int32)


def _values(label_map: NDArray[Any]) -> list[int]:
    """The distinct values in ascending order; counting is much faster than sorting for 8 and 16 bits."""
    if label_map.dtype in (np.uint8, np.uint16):
        return [int(value) for value in np.flatnonzero(np.bincount(label_map.ravel()))]
    return [int(value) for value in np.unique(label_map)]


def _decompress_counts(text: bytes) -> NDArray[np.int64]:
    """COCO's compressed counts: numbers of 5 bits a character, lowest bits first, bit 5 set on all but the
    last character of a number, the sign in bit 4 of the last one. From the fourth on, a number is the
    difference to the one two places before.

    pycocotools is not asked because it gives uninitialised pixels when the counts fall short of the image.
    """
    characters = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    is_last = (characters & 32) == 0
    if len(characters) and (characters.min() < 0 or characters.max() > 63 or not is_last[-1]):
        raise ValueError(f"RLE counts are damaged: {text[:20]!r}...")
    starts = np.flatnonzero(np.append(True, is_last[:-1])) if len(characters) else np.empty(0, np.int64)
    lengths = np.diff(np.append(starts, len(characters)))
    if (lengths > 7).any():
        raise ValueError(f"RLE counts are damaged: a number of {lengths.max()} characters")
    shifts = 5 * (np.arange(len(characters)) - np.repeat(starts, lengths))
    sums = np.add.reduceat((characters & 31) << shifts, starts) if len(starts) else starts
    is_negative = (characters[is_last] & 16) != 0
    counts = sums - (is_negative << (5 * lengths))
    counts[1::2] = counts[1::2].cumsum()
    counts[2::2] = counts[2::2].cumsum()
    return counts
