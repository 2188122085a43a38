"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4) with COCO's rules.

The numbers are those of panopticapi. Two things are stricter or wider here: ids of the ground truth that
its segment list lacks are refused, and all crowd segments of a category count as one crowd region
(panopticapi looks at the last one only; official annotations never have two).

Boundary PQ (Cheng et al., "Boundary IoU", CVPR 2021) is the same with another IoU.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mask2former.evaluation.boundary import boundary_distance, segment_boundaries
from mask2former.evaluation.class_names import checked_names

VOID = 0
_ID_LIMIT = 1 << 31
IdMap = npt.NDArray[np.integer]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class SegmentLike(Protocol):
    """Anything that names a segment of an id map, such as ``PanopticSegment``."""

    @property
    def id(self) -> int: ...
    @property
    def category_id(self) -> int: ...


class _Segments(NamedTuple):
    """The segments of one image. Entry 0 is void: category -1 and no crowd.

    Attributes:
        ids: (N + 1,) int64, ascending.
        categories: (N + 1,) int64.
        is_crowd: (N + 1,) bool.
    """

    ids: IntArray
    categories: IntArray
    is_crowd: npt.NDArray[np.bool_]


class PanopticQuality:
    """Counts matched, missed and invented segments per category, and averages over categories.

    A predicted and a true segment match when they have one category and IoU > 0.5, where pixels of void
    do not count for the union. Crowd segments are neither matched nor missed. An unmatched prediction of
    which more than half lies on void or on crowd of its own category is ignored.

    Args:
        is_thing: for each contiguous category, True for things and False for stuff.
        class_names: one name per category, all different; None leaves single categories out of the results.
        dilation_ratio: None, or the width of boundary regions as a part of the image's diagonal: then the IoU is
            the smaller one of masks and of boundary regions, everywhere (boundary PQ).

    Attributes:
        counts: (4, K) float64, rows are the sum of matched IoUs, true positives, false positives, false
            negatives. The sum of the ``counts`` of several processes is the ``counts`` of all their images.

    Raises:
        ValueError: if ``is_thing`` is empty, or the names do not fit it or each other.
    """

    def __init__(
        self,
        *,
        is_thing: Sequence[bool],
        class_names: Sequence[str] | None = None,
        dilation_ratio: float | None = None,
    ) -> None:
        if len(is_thing) == 0:
            raise ValueError("is_thing must name at least one category, got an empty sequence")
        self.class_names = () if class_names is None else checked_names(class_names)
        if class_names is not None and len(class_names) != len(is_thing):
            raise ValueError(f"class_names must be {len(is_thing)} names, as is_thing, got {len(class_names)}")
        self.dilation_ratio = dilation_ratio
        self.is_thing: npt.NDArray[np.bool_] = np.array([bool(flag) for flag in is_thing])
        self.counts: FloatArray = np.zeros((4, len(is_thing)))

    def update(
        self,
        predicted_ids: npt.ArrayLike,
        predicted_segments: Sequence[Mapping[str, Any] | SegmentLike],
        target_ids: npt.ArrayLike,
        target_segments: Sequence[Mapping[str, Any]],
    ) -> None:
        """Adds one image.

        Args:
            predicted_ids: (H, W) integers, 0 is void.
            predicted_segments: mappings or objects with ``id`` and ``category_id`` (contiguous).
            target_ids: (H, W) integers, 0 is void.
            target_segments: mappings with ``id``, ``category_id`` (contiguous) and ``iscrowd`` (0 if absent).

        Raises:
            TypeError: if an id map does not hold integers.
            ValueError: if the maps differ in shape, a map holds an id that its segments lack, a predicted
                segment has no pixel, an id is 0 or listed twice, or a category is out of range.
        """
        predicted_map = _checked_map("predicted_ids", predicted_ids)
        target_map = _checked_map("target_ids", target_ids)
        if predicted_map.shape != target_map.shape:
            shapes = f"{predicted_map.shape} and {target_map.shape}"
            raise ValueError(f"predicted_ids and target_ids must have one shape, got {shapes}")
        predicted = self._read_segments("predicted_segments", predicted_segments)
        target = self._read_segments("target_segments", target_segments)
        maps = target_map.reshape(-1), predicted_map.reshape(-1)
        overlap = _joint_histogram(maps[0], target.ids, maps[1], predicted.ids)
        absent = np.flatnonzero(overlap[:, 1:].sum(0) == 0)
        if absent.size:
            raise ValueError(
                "every predicted segment must have a pixel in predicted_ids, but these ids have none: "
                f"{predicted.ids[1:][absent].tolist()}"
            )
        iou = _iou(overlap)
        if self.dilation_ratio is not None:
            iou = np.minimum(iou, self._boundary_iou(target_map, target.ids, predicted_map, predicted.ids))
        self._count(overlap, iou, target, predicted)

    def merge(self, other: "PanopticQuality") -> None:
        """Adds the images that ``other`` has seen.

        Raises:
            ValueError: if the two have different categories or another IoU.
        """
        if not np.array_equal(self.is_thing, other.is_thing) or self.class_names != other.class_names:
            raise ValueError("other must have the same is_thing and class_names as this metric")
        if self.dilation_ratio != other.dilation_ratio:
            raise ValueError(f"other must have dilation_ratio {self.dilation_ratio}, got {other.dilation_ratio}")
        self.counts = self.counts + other.counts

    def per_category(self) -> FloatArray:
        """Returns (K, 3) PQ, SQ and RQ in percent; nan for a category that occurs nowhere."""
        iou, tp, fp, fn = self.counts
        weight = tp + 0.5 * fp + 0.5 * fn
        seen = weight > 0
        quality = np.full((len(weight), 3), np.nan)
        quality[seen, 0] = iou[seen] / weight[seen]
        quality[seen, 1] = iou[seen] / np.maximum(tp[seen], 1)  # no match: 0 / 1
        quality[seen, 2] = tp[seen] / weight[seen]
        return 100 * quality

    def compute(self) -> dict[str, float]:
        """Averages over the categories that occur in ground truth or prediction.

        Returns:
            PQ, SQ, RQ of all categories, with suffix ``_th`` of things and ``_st`` of stuff, and with class names
            PQ-<name>, in percent. A group of which no category occurs is nan, and so is such a category.
        """
        quality = self.per_category()
        seen = ~np.isnan(quality[:, 0])
        results = {}
        for suffix, group in (("", seen), ("_th", seen & self.is_thing), ("_st", seen & ~self.is_thing)):
            means = quality[group].mean(0) if group.any() else np.full(3, np.nan)
            for name, mean in zip(("PQ", "SQ", "RQ"), means.tolist(), strict=True):
                results[f"{name}{suffix}"] = mean
        if self.class_names:
            results |= {f"PQ-{n}": pq for n, pq in zip(self.class_names, quality[:, 0].tolist(), strict=True)}
        return results

    def _read_segments(self, name: str, segments: Sequence[Mapping[str, Any] | SegmentLike]) -> _Segments:
        rows = {VOID: (-1, False)}
        for segment in segments:
            info = segment if isinstance(segment, Mapping) else _fields(segment)
            segment_id, category = int(info["id"]), int(info["category_id"])
            if not 0 < segment_id < _ID_LIMIT:
                raise ValueError(f"{name}: ids must be in [1, 2**31) since 0 is void, got {segment_id}")
            if segment_id in rows:
                raise ValueError(f"{name}: every id may be listed once, got {segment_id} twice")
            if not 0 <= category < len(self.is_thing):
                got = f"got {category} of id {segment_id}"
                raise ValueError(f"{name}: category_id must be in [0, {len(self.is_thing)}), {got}")
            rows[segment_id] = (category, bool(info.get("iscrowd", 0)))
        ids = sorted(rows)
        categories = np.array([rows[i][0] for i in ids], dtype=np.int64)
        return _Segments(np.array(ids, dtype=np.int64), categories, np.array([rows[i][1] for i in ids]))

    def _boundary_iou(
        self, target_map: IdMap, target_ids: IntArray, predicted_map: IdMap, predicted_ids: IntArray
    ) -> FloatArray:
        """IoU of the boundary regions of each pair, (T + 1, N + 1), where pixels of true void do not count."""
        assert self.dilation_ratio is not None
        distance = boundary_distance(target_map.shape, self.dilation_ratio)
        on_target, on_predicted = (segment_boundaries(ids, distance) for ids in (target_map, predicted_map))

        def histogram(pixels: npt.NDArray[np.bool_]) -> IntArray:
            return _joint_histogram(target_map[pixels], target_ids, predicted_map[pixels], predicted_ids)

        target_area = histogram(on_target).sum(1)
        predicted_area = histogram(on_predicted)[1:].sum(0)
        overlap = histogram(on_target & on_predicted)
        union = target_area[:, None] + predicted_area - overlap
        return np.divide(overlap, union, out=np.zeros(overlap.shape), where=union > 0)

    def _count(self, overlap: IntArray, iou: FloatArray, target: _Segments, predicted: _Segments) -> None:
        """Adds one image.

        Args:
            overlap: (T + 1, N + 1), the pixels that each true and each predicted segment share.
            iou: (T + 1, N + 1), of any pair.
            target: T + 1 segments.
            predicted: N + 1 segments.
        """
        same = target.categories[:, None] == predicted.categories  # (T + 1, N + 1)
        is_crowd = same & target.is_crowd[:, None]
        # Segments are disjoint, so with IoU > 0.5 each has at most one partner. Void has category -1 on both sides.
        matched = same & ~is_crowd & (iou > 0.5)
        matched[VOID] = False
        on_ignored = overlap[VOID] + (overlap * is_crowd).sum(0)
        missed = ~matched.any(1) & ~target.is_crowd
        invented = ~matched.any(0) & ~(2 * on_ignored > overlap.sum(0))
        partner = predicted.categories[np.nonzero(matched)[1]]
        k = len(self.is_thing)
        self.counts[0] += np.bincount(partner, weights=iou[matched], minlength=k)
        self.counts[1] += np.bincount(partner, minlength=k)
        self.counts[2] += np.bincount(predicted.categories[1:][invented[1:]], minlength=k)
        self.counts[3] += np.bincount(target.categories[1:][missed[1:]], minlength=k)


def _iou(overlap: IntArray) -> FloatArray:
    """IoU of each pair of segments, where pixels of true void do not count."""
    union = overlap.sum(1)[:, None] + overlap.sum(0) - overlap - overlap[VOID]
    return np.divide(overlap, union, out=np.zeros(overlap.shape), where=union > 0)


def _fields(segment: SegmentLike) -> dict[str, Any]:
    """The two fields that PQ reads of a segment object, as a dict."""
    return {"id": segment.id, "category_id": segment.category_id}


def _checked_map(name: str, ids: npt.ArrayLike) -> IdMap:
    array = np.asarray(ids)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got dtype {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape (H, W), got {array.shape}")
    return array


def _joint_histogram(target: IdMap, target_ids: IntArray, predicted: IdMap, predicted_ids: IntArray) -> IntArray:
    """Counts the pixels of each pair of ids.

    Args:
        target: (P,) ids of pixels in any order.
        target_ids: (T + 1,) ascending.
        predicted: (P,) ids of the same pixels.
        predicted_ids: (N + 1,) ascending.

    Returns:
        (T + 1, N + 1) int64 in the order of ``target_ids`` and ``predicted_ids``.

    Raises:
        ValueError: if an id is not listed.
    """
    # Looking at the starts of runs instead of at all pixels is some twenty times faster.
    is_start = np.ones(target.size, dtype=np.bool_)
    np.logical_or(target[1:] != target[:-1], predicted[1:] != predicted[:-1], out=is_start[1:])
    starts = np.flatnonzero(is_start)
    lengths = np.diff(np.append(starts, target.size))
    rows = _positions("target_ids", target[starts], target_ids)
    columns = _positions("predicted_ids", predicted[starts], predicted_ids)
    size = len(target_ids) * len(predicted_ids)
    # The weights are exact: float64 holds every integer below 2**53.
    counts = np.bincount(rows * len(predicted_ids) + columns, weights=lengths, minlength=size)
    return counts.astype(np.int64).reshape(len(target_ids), len(predicted_ids))


def _positions(name: str, values: IdMap, listed: IntArray) -> IntArray:
    """Where each value stands in the ascending ``listed``; refuses values that are not in it."""
    if values.size and (int(values.min()) < 0 or int(values.max()) >= _ID_LIMIT):
        raise ValueError(f"{name}: ids must be in [0, 2**31), got {values.min()} to {values.max()}")
    positions = np.minimum(np.searchsorted(listed, values.astype(np.int64)), len(listed) - 1)
    unknown = values[listed[positions] != values]
    if unknown.size:
        segments = name.replace("_ids", "_segments")
        raise ValueError(f"{name} has ids that {segments} lacks: {np.unique(unknown)[:10].tolist()}")
    return positions
