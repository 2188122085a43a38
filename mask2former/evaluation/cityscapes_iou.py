"""Cityscapes' semantic metrics: IoU and object-weighted IoU (iIoU) of classes and of groups of classes.

The numbers are those of cityscapesscripts' `evalPixelLevelSemanticLabeling`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mask2former.evaluation.cityscapes_labels import FIRST_OBJECT_ID, cityscapes_classes
from mask2former.evaluation.semantic_iou import SemanticIoU

IntArray = npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.float64]


class CityscapesIoU:
    """IoU and iIoU = wTP / (wTP + FP + wFN), where each object's pixels weigh mean size of its class / its own size.

    Args:
        class_names: names of Cityscapes' evaluated classes, in the order of the labels.
        ignore_label: pixels with this ground truth do not count.

    Attributes:
        pixels: counts of all pixels.
        weighted: (2, 2, K) float64: weighted true positives and false negatives, of classes and of groups, by the
            class of the object. The sum over processes is that of all their images, as of ``pixels.counts``.

    Raises:
        ValueError: if a name is no class of Cityscapes.
    """

    def __init__(self, *, class_names: Sequence[str], ignore_label: int = 255) -> None:
        self.classes = cityscapes_classes(class_names)
        self.pixels = SemanticIoU(class_names=class_names, ignore_label=ignore_label)
        self.weighted: FloatArray = np.zeros((2, 2, len(self.classes)))
        self._has_objects = np.array([c.mean_size is not None for c in self.classes])
        self._group_names = list(dict.fromkeys(c.group for c in self.classes))
        self._groups = np.array([self._group_names.index(c.group) for c in self.classes])  # (K,)

    def update(self, predicted: npt.ArrayLike, target: npt.ArrayLike, instance_ids: npt.ArrayLike) -> None:
        """Adds one image.

        Args:
            predicted: (H, W) integers in [0, K).
            target: (H, W) integers in [0, K), or ``ignore_label``.
            instance_ids: (H, W) integers as in `*_instanceIds.png`.

        Raises:
            TypeError: if a map does not hold integers.
            ValueError: if the shapes differ or a label is out of range.
        """
        id_map, labels = np.asarray(instance_ids), np.asarray(predicted)
        if id_map.dtype.kind not in "iu":
            raise TypeError(f"instance_ids must hold integers, got dtype {id_map.dtype}")
        if id_map.shape != labels.shape:
            raise ValueError(f"instance_ids must have the shape of predicted, {labels.shape}, got {id_map.shape}")
        self.pixels.update(labels, target)
        self._count_objects(labels.reshape(-1), id_map.reshape(-1))

    def _count_objects(self, labels: IntArray, ids: IntArray) -> None:
        """Adds the weighted pixels of the objects, (P,) each."""
        place = np.full(256, -1)  # label id -> class with objects
        for index, c in enumerate(self.classes):
            place[c.label_id] = index if c.mean_size is not None else -1
        on_object = (ids > FIRST_OBJECT_ID) & (ids < len(place) * FIRST_OBJECT_ID)
        ids, labels = ids[on_object].astype(np.int64), labels[on_object]
        true_class = place[ids // FIRST_OBJECT_ID]
        hits = (true_class == labels, self._groups[true_class] == self._groups[labels])
        sizes = np.bincount(ids)
        objects = np.flatnonzero(sizes)
        objects = objects[place[objects // FIRST_OBJECT_ID] >= 0]
        sizes, classes = sizes[objects], place[objects // FIRST_OBJECT_ID]
        weights = np.array([c.mean_size or 0.0 for c in self.classes])[classes] / sizes
        for row, hit in enumerate(hits):
            hit_sizes = np.bincount(ids[hit], minlength=ids.max(initial=0) + 1)[objects]
            for part, area in enumerate((hit_sizes, sizes - hit_sizes)):
                self.weighted[part, row] += np.bincount(classes, area * weights, minlength=len(self.classes))

    def merge(self, other: "CityscapesIoU") -> None:
        """Adds the images that ``other`` has seen.

        Raises:
            ValueError: if the two have different classes or ignore labels.
        """
        self.pixels.merge(other.pixels)
        self.weighted = self.weighted + other.weighted

    def compute(self) -> dict[str, float]:
        """Averages over what occurs in ground truth or prediction.

        Returns:
            IoU and iIoU of classes, IoU_sup and iIoU_sup of groups, and each of these with -<name>, in percent;
            nan for what does not occur. Only classes of objects, and groups of nothing else, have an iIoU.
        """
        results: dict[str, float] = {}
        single: dict[str, float] = {}
        in_group = np.eye(len(self._group_names))[self._groups].T  # (G, K)
        names = [c.name for c in self.classes]
        for row, (suffix, keys, members) in enumerate(
            (("", names, np.eye(len(names))), ("_sup", self._group_names, in_group))
        ):
            iou, weighted = self._ratios(members, self.weighted[:, row])
            has_objects = members @ ~self._has_objects == 0
            for name, values, is_kept in (("IoU", iou, has_objects | True), ("iIoU", weighted, has_objects)):
                seen = values[is_kept & ~np.isnan(values)]
                results[f"{name}{suffix}"] = float(seen.mean()) if seen.size else float("nan")
                single |= {f"{name}{suffix}-{keys[i]}": float(values[i]) for i in np.flatnonzero(is_kept)}
        return results | single

    def _ratios(self, members: FloatArray, weighted: FloatArray) -> tuple[FloatArray, FloatArray]:
        """IoU and iIoU in percent of groups of classes.

        Args:
            members: (G, K) 1 where a class belongs to a group.
            weighted: (2, K) true positives and false negatives.
        """
        counts = self.pixels.counts.astype(np.float64)  # predicted, target
        hits = np.einsum("gi,ij,gj->g", members, counts, members)
        target, predicted = members @ counts.sum(0), members @ counts.sum(1)
        wrong = predicted - hits
        weighted_hits, weighted_misses = members @ weighted[0], members @ weighted[1]
        return _percent(hits, target + wrong), _percent(weighted_hits, weighted_hits + weighted_misses + wrong)


def _percent(part: FloatArray, whole: FloatArray) -> FloatArray:
    return 100 * np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
