"""Precision of the detections of one category, by pycocotools' COCOeval: matching, crowds and sizes are COCO's."""

import contextlib
import functools
import io
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Annotation = dict[str, Any]


def import_pycocotools() -> tuple[Any, Any]:
    """COCO and COCOeval.

    Raises:
        ImportError: if pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError("instance AP needs pycocotools: pip install pycocotools") from error
    return COCO, COCOeval


def category_precision(
    truth: Sequence[Annotation],
    detections: Sequence[Annotation],
    images: Mapping[Any, Mapping[str, Any]],
    *,
    iou_type: str,
    max_detections: int,
    not_exhaustive: AbstractSet[Any] = frozenset(),
) -> FloatArray:
    """Matches and ranks the detections of one category.

    Args:
        truth: its annotations in COCO's form, ids above 0.
        detections: the same, with ``score``. Masks are RLE, and "boundary" needs their boundary regions as RLE
            under ``boundary`` in both.
        images: of the annotation file, by id.
        iou_type: "segm", "bbox", or "boundary", the smaller IoU of masks and of boundary regions.
        max_detections: an image, the best ones.
        not_exhaustive: ids of images in which not all objects of the category are annotated; detections there
            that match none are neither right nor wrong.

    Returns:
        (T, R, A) precision in [0, 1] at the IoUs 0.5, 0.55, ... 0.95, the recalls 0, 0.01, ... 1 and the sizes
        all, small, medium and large; -1 where there is nothing to find.
    """
    kind = _eval_class()
    if not truth:
        return -np.ones((10, 101, 4))
    ids = {annotation["image_id"] for annotation in (*truth, *detections)}
    used = [images[i] for i in ids]
    category = {"id": truth[0]["category_id"], "name": ""}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = kind(
            _coco(used, category, truth),
            _coco(used, category, detections),
            "bbox" if iou_type == "bbox" else "segm",
            with_boundary=iou_type == "boundary",
            not_exhaustive=not_exhaustive,
        )
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"][:, :, 0, :, -1])


def _coco(images: Sequence[Any], category: Mapping[str, Any], annotations: Sequence[Annotation]) -> Any:
    coco = import_pycocotools()[0]()
    coco.dataset = {"images": images, "categories": [category], "annotations": list(annotations)}
    coco.createIndex()
    return coco


@functools.cache
def _eval_class() -> Any:
    """COCOeval with the boundary IoU and with LVIS's rule for images that are not annotated exhaustively."""
    from pycocotools import mask as mask_api

    class Evaluation(import_pycocotools()[1]):  # type: ignore[misc]
        def __init__(
            self, truth: Any, detections: Any, kind: str, *, with_boundary: bool, not_exhaustive: AbstractSet[Any]
        ) -> None:
            super().__init__(truth, detections, kind)
            self.with_boundary = with_boundary
            self.not_exhaustive = not_exhaustive

        def computeIoU(self, image_id: Any, category_id: Any) -> Any:  # noqa: N802
            ious = super().computeIoU(image_id, category_id)
            if not self.with_boundary or len(ious) == 0:
                return ious
            truth, detections = self._gts[image_id, category_id], self._dts[image_id, category_id]
            order = np.argsort([-d["score"] for d in detections], kind="mergesort")[: self.params.maxDets[-1]]
            rims = mask_api.iou(
                [detections[i]["boundary"] for i in order],
                [annotation["boundary"] for annotation in truth],
                [int(annotation["iscrowd"]) for annotation in truth],
            )
            return np.minimum(ious, rims)

        def evaluateImg(self, image_id: Any, category_id: Any, area: Any, most: Any) -> Any:  # noqa: N802
            found = super().evaluateImg(image_id, category_id, area, most)
            if found is not None and image_id in self.not_exhaustive:
                found["dtIgnore"] |= found["dtMatches"] == 0
            return found

    return Evaluation
