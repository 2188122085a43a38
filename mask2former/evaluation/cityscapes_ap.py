"""Cityscapes' average precision of instances.

The numbers are those of cityscapesscripts' `evalInstanceLevelSemanticLabeling`: IoU above 0.5, 0.55, ... 0.95,
objects of at least 100 pixels, no limit on the number of predictions. Unlike COCO's, a prediction that fits several
times to an object, or to none, is left out where it lies mostly on void, groups and small objects, and precision is
not smoothed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mask2former.evaluation.cityscapes_labels import FIRST_OBJECT_ID, VOID_LABEL_IDS, cityscapes_classes

OVERLAPS = np.arange(0.5, 1.0, 0.05)
MIN_OBJECT_SIZE = 100
_ID_LIMIT = 1 << 16
IntArray = npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


class _Areas(NamedTuple):
    """What the predictions and the true areas of one class in one image have in common.

    Attributes:
        shared: (N, G) pixels of both.
        predicted: (N,) pixels of the predictions.
        true: (G,) pixels of the areas.
        is_object: (G,) True for single objects, False for groups.
        on_void: (N,) pixels of the predictions on void.
    """

    shared: IntArray
    predicted: IntArray
    true: IntArray
    is_object: BoolArray
    on_void: IntArray


class CityscapesAP:
    """Average precision over the images given to ``update``, and no others.

    Args:
        class_names: names of classes of Cityscapes that have objects, in the order of the labels.

    Raises:
        ValueError: if a name is no such class.
    """

    def __init__(self, *, class_names: Sequence[str]) -> None:
        self.classes = cityscapes_classes(class_names)
        wrong = [c.name for c in self.classes if c.mean_size is None]
        if wrong:
            raise ValueError(f"class_names must be classes of Cityscapes that have objects, got {wrong}")
        k, t = len(self.classes), len(OVERLAPS)
        self._found = np.zeros(k, dtype=np.bool_)  # any prediction, whether it counts or not
        self._objects = np.zeros(k, dtype=np.int64)
        self._missed = np.zeros((k, t), dtype=np.int64)
        # (score, whether right) of every prediction that counts
        self._ranked: list[list[list[FloatArray]]] = [[[] for _ in range(t)] for _ in range(k)]

    def update(
        self, labels: npt.ArrayLike, scores: npt.ArrayLike, masks: npt.ArrayLike, instance_ids: npt.ArrayLike
    ) -> None:
        """Adds one image (N may be 0).

        Args:
            labels: (N,) integers, positions in ``class_names``.
            scores: (N,) finite.
            masks: (N, H, W) bool.
            instance_ids: (H, W) integers as in `*_instanceIds.png`.

        Raises:
            TypeError: if labels or ids are no integers or masks are not bool.
            ValueError: if a shape or value is wrong.
        """
        label_array, score_array, mask_array = np.asarray(labels), np.asarray(scores, np.float64), np.asarray(masks)
        ids = np.asarray(instance_ids)
        self._check(label_array, score_array, mask_array, ids)
        sizes = np.bincount(ids.reshape(-1))
        values = np.flatnonzero(sizes)  # (V,)
        shared = _shared_pixels(mask_array, ids, len(sizes))[:, values]
        sizes = sizes[values]
        label_ids = np.where(values >= FIRST_OBJECT_ID, values // FIRST_OBJECT_ID, values)
        predicted, on_void = shared.sum(1), shared[:, np.isin(values, VOID_LABEL_IDS)].sum(1)
        for k, c in enumerate(self.classes):
            rows, columns = (label_array == k) & (predicted > 0), label_ids == c.label_id
            areas = _Areas(
                shared[rows][:, columns],
                predicted[rows],
                sizes[columns],
                values[columns] >= FIRST_OBJECT_ID,
                on_void[rows],
            )
            self._count(k, areas, score_array[rows])

    def merge(self, other: "CityscapesAP") -> None:
        """Adds the images that ``other`` has seen.

        Raises:
            ValueError: if the two have different classes.
        """
        if self.classes != other.classes:
            raise ValueError("other must have the same class_names as this metric")
        self._found |= other._found
        self._objects += other._objects
        self._missed += other._missed
        for own, more in zip(self._ranked, other._ranked, strict=True):
            for mine, theirs in zip(own, more, strict=True):
                mine.extend(theirs)

    def compute(self) -> dict[str, float]:
        """Averages over the classes of which there are objects.

        Returns:
            AP, AP50 and, of each class, AP-<name>, in percent; nan where there is nothing to find.
        """
        precision = np.full((len(self.classes), len(OVERLAPS)), np.nan)
        for k, t in np.ndindex(*precision.shape):
            if self._objects[k]:
                precision[k, t] = 100 * self._average_precision(k, t)
        seen = precision[self._objects > 0]
        results = {
            "AP": float(seen.mean()) if seen.size else float("nan"),
            "AP50": float(seen[:, 0].mean()) if seen.size else float("nan"),
        }
        return results | {f"AP-{c.name}": float(row.mean()) for c, row in zip(self.classes, precision, strict=True)}

    def _count(self, k: int, areas: _Areas, scores: FloatArray) -> None:
        """Adds the predictions of one class in one image."""
        is_small = areas.true < MIN_OBJECT_SIZE
        counts = areas.is_object & ~is_small
        iou = areas.shared / (areas.true + areas.predicted[:, None] - areas.shared)  # (N, G)
        # a small group is both, and is counted twice
        on_ignored = areas.on_void + areas.shared @ (~areas.is_object).astype(int) + areas.shared @ is_small.astype(int)
        self._found[k] |= len(scores) > 0
        self._objects[k] += counts.sum()
        for t, overlap in enumerate(OVERLAPS):
            fits = iou > overlap  # a prediction fits to one area at most, an area to one or more predictions
            is_wrong = ~fits.any(1) & (on_ignored / areas.predicted <= overlap)
            ranked = [(score, 0.0) for score in scores[is_wrong]]
            for fitting in fits[:, counts].T:
                best_first = np.sort(scores[fitting])[::-1]
                ranked += [(score, float(place == 0)) for place, score in enumerate(best_first)]
            self._missed[k, t] += (~fits[:, counts].any(0)).sum()
            self._ranked[k][t].append(np.array(ranked, dtype=np.float64).reshape(-1, 2))

    def _average_precision(self, k: int, t: int) -> float:
        """Area under precision over recall of one class at one overlap, where there are objects."""
        if not self._found[k]:
            return 0.0
        scores, is_right = np.concatenate(self._ranked[k][t]).T
        order = np.argsort(scores)
        _, first = np.unique(scores[order], return_index=True)  # one point for each score
        right_below = np.append(0.0, np.cumsum(is_right[order]))
        right = right_below[-1] - right_below[first]
        precision = np.append(right / (len(scores) - first), 1.0)
        recall = np.append(right / (right_below[-1] + self._missed[k, t]), 0.0)
        around = np.concatenate((recall[:1], recall, [0.0]))
        return float(precision @ ((around[:-2] - around[2:]) / 2))

    def _check(self, labels: IntArray, scores: FloatArray, masks: BoolArray, ids: IntArray) -> None:
        for name, array in (("labels", labels), ("instance_ids", ids)):
            if array.size and array.dtype.kind not in "iu":
                raise TypeError(f"{name} must hold integers, got dtype {array.dtype}")
        if masks.dtype != np.bool_:
            raise TypeError(f"masks must be bool, got dtype {masks.dtype}")
        count = len(labels)
        if ids.ndim != 2:
            raise ValueError(f"instance_ids must have shape (H, W), got {ids.shape}")
        if masks.shape != (count, *ids.shape) or scores.shape != (count,) or labels.ndim != 1:
            raise ValueError(
                f"labels, scores and masks must have shapes (N,), (N,) and (N, {ids.shape[0]}, {ids.shape[1]}), got "
                f"{labels.shape}, {scores.shape} and {masks.shape}"
            )
        if not np.isfinite(scores).all():
            raise ValueError(f"scores must be finite, got {scores[~np.isfinite(scores)][0]}")
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < _ID_LIMIT:
            raise ValueError(f"instance_ids must be in [0, {_ID_LIMIT}), got {ids.min()} to {ids.max()}")
        wrong = labels[(labels < 0) | (labels >= len(self.classes))]
        if wrong.size:
            raise ValueError(f"labels must be in [0, {len(self.classes)}), got {wrong[0]}")


def _shared_pixels(masks: BoolArray, ids: IntArray, count: int) -> IntArray:
    """Pixels of each mask (N, H, W) on each id (H, W) in [0, count): (N, count)."""
    shared = np.zeros((len(masks), count), dtype=np.int64)
    for row, mask in zip(shared, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if rows.size:
            box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            row[:] = np.bincount(ids[box][mask[box]], minlength=count)
    return shared
