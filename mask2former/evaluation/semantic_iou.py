"""Semantic segmentation metrics from one confusion matrix, defined as in Detectron2's SemSegEvaluator."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mask2former.evaluation.class_names import checked_names

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class SemanticIoU:
    """Mean IoU and its relatives over all pixels whose ground truth is not ``ignore_label``.

    Means are over the classes that occur in the ground truth: a class that is only predicted lowers the
    IoU of others but has none of its own. Boundary IoU, which newer Detectron2 adds, is not computed.

    Args:
        class_names: one name per class, all different.
        ignore_label: pixels with this ground truth do not count; None if every pixel does.

    Attributes:
        counts: (K, K) int64, [predicted, target] pixels. The sum of the ``counts`` of several processes is
            the ``counts`` of all their images.

    Raises:
        ValueError: if there is no name, or one occurs twice.
    """

    def __init__(self, *, class_names: Sequence[str], ignore_label: int | None = 255) -> None:
        self.class_names = checked_names(class_names)
        self.ignore_label = ignore_label
        self.counts: IntArray = np.zeros((len(self.class_names),) * 2, dtype=np.int64)

    def update(self, predicted: npt.ArrayLike, target: npt.ArrayLike) -> None:
        """Adds one image.

        Args:
            predicted: (H, W) integers in [0, K).
            target: (H, W) integers in [0, K), or ``ignore_label``.

        Raises:
            TypeError: if a map does not hold integers.
            ValueError: if the shapes differ or a label is out of range.
        """
        predicted_map, target_map = _checked_map("predicted", predicted), _checked_map("target", target)
        if predicted_map.shape != target_map.shape:
            raise ValueError(
                f"predicted and target must have one shape, got {predicted_map.shape} and {target_map.shape}"
            )
        k = len(self.class_names)
        _check_range("predicted", predicted_map, k, "")
        counted = slice(None) if self.ignore_label is None else target_map != self.ignore_label
        labels = target_map[counted]
        allowed = "" if self.ignore_label is None else f" or the ignore label {self.ignore_label}"
        _check_range("target", labels, k, allowed)
        # uint8 labels would overflow in the product.
        cells = predicted_map[counted].astype(np.int64) * k + labels
        self.counts += np.bincount(cells.reshape(-1), minlength=k * k).reshape(k, k)

    def merge(self, other: "SemanticIoU") -> None:
        """Adds the images that ``other`` has seen.

        Raises:
            ValueError: if the two have different classes or ignore labels.
        """
        if (self.class_names, self.ignore_label) != (other.class_names, other.ignore_label):
            raise ValueError("other must have the same class_names and ignore_label as this metric")
        self.counts = self.counts + other.counts

    def per_category(self) -> FloatArray:
        """Returns (K, 2) IoU and accuracy in percent; nan for a class without ground truth."""
        hit, target, predicted = self._totals()
        present = target > 0
        values = np.full((len(hit), 2), np.nan)
        values[present, 0] = hit[present] / (target + predicted - hit)[present]
        values[present, 1] = hit[present] / target[present]
        return 100 * values

    def compute(self) -> dict[str, float]:
        """Returns mIoU, fwIoU, IoU-<name>, mACC, pACC and ACC-<name> in percent; nan without ground truth."""
        values = self.per_category()
        hit, target, _ = self._totals()
        present = target > 0
        iou, accuracy = values[present].T
        some = bool(present.any())
        results = {
            "mIoU": float(iou.mean()) if some else float("nan"),
            "fwIoU": float((iou * target[present]).sum() / target.sum()) if some else float("nan"),
        }
        results.update(self._named("IoU", values[:, 0]))
        results["mACC"] = float(accuracy.mean()) if some else float("nan")
        results["pACC"] = float(100 * hit.sum() / target.sum()) if some else float("nan")
        results.update(self._named("ACC", values[:, 1]))
        return results

    def _named(self, prefix: str, values: FloatArray) -> dict[str, float]:
        return {f"{prefix}-{name}": v for name, v in zip(self.class_names, values.tolist(), strict=True)}

    def _totals(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Per class: pixels that are right, pixels of the ground truth, pixels predicted."""
        counts = self.counts.astype(np.float64)
        return counts.diagonal(), counts.sum(0), counts.sum(1)


def _checked_map(name: str, labels: npt.ArrayLike) -> npt.NDArray[np.integer]:
    array = np.asarray(labels)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got dtype {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape (H, W), got {array.shape}")
    return array


def _check_range(name: str, labels: npt.NDArray[np.integer], num_classes: int, allowed: str) -> None:
    if labels.size == 0:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(f"{name}: labels must be in [0, {num_classes}){allowed}, got {wrong}")
