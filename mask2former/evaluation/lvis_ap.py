"""LVIS average precision (Gupta et al., "LVIS", CVPR 2019): COCO's, where each image is annotated for some categories.

The numbers are those of the `lvis` package, whose last release does not run with NumPy 1.24 or newer.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mask2former.evaluation.average_precision import FloatArray, InstanceAP, mean_precision
from mask2former.evaluation.coco_matching import category_precision

MAX_DETECTIONS = 300
_FREQUENCIES = ("r", "c", "f")


class LvisAP(InstanceAP):
    """AP over the images given to ``update``, of which the best 300 predictions each count, whatever their category.

    Predictions count only for categories of which the image is known to have objects, or none
    (``neg_category_ids``); where the objects of a category are not all annotated
    (``not_exhaustive_category_ids``), those that match none are left out.

    Args:
        coco_json: LVIS annotations: COCO's, with the two lists above in ``images`` and ``frequency`` "r", "c" or "f"
            in ``categories``.
        category_ids, iou_types: as in `InstanceAP`.

    Raises:
        ValueError: as `InstanceAP`, and if an image or category lacks what LVIS's evaluation reads.
    """

    def __init__(
        self,
        *,
        coco_json: str | os.PathLike[str],
        category_ids: Sequence[int],
        iou_types: Sequence[str] = ("segm", "bbox"),
    ) -> None:
        super().__init__(coco_json=coco_json, category_ids=category_ids, iou_types=iou_types)
        self._negative = self._images_by_category("neg_category_ids", os.fspath(coco_json))
        self._not_exhaustive = self._images_by_category("not_exhaustive_category_ids", os.fspath(coco_json))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_negative": {}, "_not_exhaustive": {}}

    def _images_by_category(self, key: str, file: str) -> dict[int, set[Any]]:
        """Category id -> ids of the images that name it under ``key``."""
        found: dict[int, set[Any]] = defaultdict(set)
        for image in self._images.values():
            if key not in image:
                raise ValueError(f"coco_json: image {image['id']} of {file} lacks {key!r}")
            for category_id in image[key]:
                found[category_id].add(image["id"])
        return found

    def _read_categories(self, categories: Sequence[Mapping[str, Any]], file: str) -> None:
        super()._read_categories(categories, file)
        frequency = {category["id"]: category.get("frequency") for category in categories}
        self._frequency = [frequency[i] for i in self.category_ids]
        for category_id, value in zip(self.category_ids, self._frequency, strict=True):
            if value not in _FREQUENCIES:
                raise ValueError(
                    f"coco_json: frequency of category {category_id} in {file} must be one of {_FREQUENCIES}, "
                    f"got {value!r}"
                )

    def _kept(self, scores: FloatArray) -> Sequence[int]:
        if len(scores) <= MAX_DETECTIONS:
            return range(len(scores))
        best: list[int] = np.argsort(-scores, kind="stable")[:MAX_DETECTIONS].tolist()
        return best

    def _category_precision(
        self, category_id: int, truth: list[dict[str, Any]], detections: list[dict[str, Any]], iou_type: str
    ) -> FloatArray:
        judged = {annotation["image_id"] for annotation in truth} | self._negative.get(category_id, set())
        return category_precision(
            truth,
            [detection for detection in detections if detection["image_id"] in judged],
            self._images,
            iou_type=iou_type,
            max_detections=MAX_DETECTIONS,
            not_exhaustive=self._not_exhaustive.get(category_id, frozenset()),
        )

    def _groups(self, precision: FloatArray) -> dict[str, float]:
        """APr, APc and APf: of rare, common and frequent categories."""
        frequency = np.array(self._frequency)
        return {f"AP{letter}": mean_precision(precision[frequency == letter]) for letter in _FREQUENCIES}
