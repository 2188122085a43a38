"""COCO's `segmentation` fields to masks: polygons, RLE of both kinds, bitmaps; whole, or as the patch that has them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Patch(NamedTuple):
    """An object that is cut out of the image.

    Attributes:
        top: row of the patch in the image.
        left: column.
        pixels: (h, w) bool, True inside the object; no pixel of the object is outside.
    """

    top: int
    left: int
    pixels: NDArray[np.bool_]

    @property
    def place(self) -> tuple[slice, slice]:
        """Its rows and columns in the image."""
        height, width = self.pixels.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def patch_from_segmentation(segmentation: Any, height: int, width: int) -> Patch:
    """As `mask_from_segmentation`, without the image around the object, which takes most of the time.

    Args:
        segmentation: a list of polygons, an RLE dict, or an (H, W) array.
        height: of the image.
        width: of the image.

    Raises:
        ValueError: it is none of these, malformed, or of another size.
    """
    if isinstance(segmentation, Mapping):
        return _patch_from_counts(_counts(segmentation, height, width), height)
    if _is_list(segmentation):
        return _patch_from_polygons(segmentation, height, width)
    return _cut_out(mask_from_segmentation(segmentation, height, width))


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
    if _is_list(segmentation):
        return mask_from_polygons(segmentation, height, width)
    raise ValueError(
        f"segmentation must be a list of polygons, an RLE dict or an array, got {type(segmentation).__name__}"
    )


def mask_from_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> NDArray[np.bool_]:
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
    rle = _rle_of_polygons(polygons, height, width)
    if rle is None:
        return np.zeros((height, width), dtype=np.bool_)
    from pycocotools import mask as coco_mask

    return np.asarray(coco_mask.decode(rle), dtype=np.bool_)


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
    counts = _counts(rle, height, width)
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def mask_from_bitmap(bitmap: NDArray[Any], height: int, width: int) -> NDArray[np.bool_]:
    """(height, width) of any number type, True where it is not zero.

    Raises:
        ValueError: the shape is another one.
    """
    if bitmap.shape != (height, width):
        raise ValueError(f"bitmap shape {bitmap.shape} differs from (height, width) {(height, width)}")
    return bitmap != 0


def _is_list(segmentation: Any) -> bool:
    return isinstance(segmentation, Sequence) and not isinstance(segmentation, str | bytes)


def _rle_of_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> Any:
    """The union of the polygons as pycocotools has it; None if they cover nothing."""
    outlines = [np.asarray(polygon, dtype=np.float64) for polygon in polygons]
    for outline in outlines:
        if outline.ndim != 1 or outline.size % 2 or not np.isfinite(outline).all():
            raise ValueError(
                f"a polygon must be a flat list of an even number of finite coordinates, got shape {outline.shape}"
            )
    outlines = [outline for outline in outlines if outline.size >= 6]
    if not outlines:
        return None
    from pycocotools import mask as coco_mask

    return coco_mask.merge(coco_mask.frPyObjects([outline.tolist() for outline in outlines], height, width))


def _patch_from_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> Patch:
    rle = _rle_of_polygons(polygons, height, width)
    if rle is None:
        return Patch(0, 0, np.zeros((0, 0), dtype=np.bool_))
    from pycocotools import mask as coco_mask

    left, top, cols, rows = (int(edge) for edge in coco_mask.toBbox(rle))
    return Patch(top, left, coco_mask.decode(rle)[top : top + rows, left : left + cols] != 0)


def _counts(rle: Mapping[str, Any], height: int, width: int) -> NDArray[np.int64]:
    """Lengths of the runs of 0 and 1 by turns, checked."""
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
    return counts


def _patch_from_counts(counts: NDArray[np.int64], height: int) -> Patch:
    ends = counts.cumsum()
    is_object = np.arange(len(counts)) % 2 == 1
    runs = np.flatnonzero(is_object & (counts > 0))
    if not len(runs):
        return Patch(0, 0, np.zeros((0, 0), dtype=np.bool_))
    first, last = ends[runs] - counts[runs], ends[runs] - 1  # pixel of each run, in column order
    left, right = int(first[0]) // height, int(last[-1]) // height + 1
    inside = counts.copy()[runs[0] - 1 : runs[-1] + 1]  # from the empty run before the object to its last run
    inside[0] = first[0] - left * height
    columns = np.zeros((right - left, height), dtype=np.bool_)
    filled = np.repeat(is_object[runs[0] - 1 : runs[-1] + 1], inside)
    columns.ravel()[: len(filled)] = filled
    tops, bottoms = first % height, last % height
    if (first // height < last // height).any():  # a run goes on at the top of the next column
        return Patch(0, left, columns.T)
    top, bottom = int(tops.min()), int(bottoms.max()) + 1
    return Patch(top, left, columns[:, top:bottom].T)


def _cut_out(mask: NDArray[np.bool_]) -> Patch:
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return Patch(0, 0, mask[:0, :0])
    return Patch(int(rows[0]), int(cols[0]), mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1])


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
