"""Precision of the detections of one category by COCOeval: matching, crowds and sizes are COCO's.

There are two: pycocotools' own, and that of faster-coco-eval, which is used where it is installed and counts the same
in a fraction of the time. MASK2FORMER_FASTER_COCO_EVAL=0 switches it off. Boundary IoU is pycocotools' in any case.

The two differ in one rounding, which is taken out, so that no number depends on what is installed. pycocotools adds
2.2e-16 to the number of detections, against division by zero: the precision of a first detection that is right comes
out as 0.9999999999999998. Of two and more detections the sum is rounded back to their number.
"""

import contextlib
import functools
import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float64]
Annotation = dict[str, Any]

_FASTER = "faster-coco-eval"
_OLDEST = (1, 8)  # the one that was compared


class MatchingLibrary(NamedTuple):
    """Who matches and ranks.

    Attributes:
        is_faster: faster-coco-eval, else pycocotools.
        account: for the log, a name and why.
    """

    is_faster: bool
    account: str


def matching_library(iou_type: str) -> MatchingLibrary:
    """The one that `category_precision` uses for an IoU type."""
    if iou_type == "boundary":
        return MatchingLibrary(False, "pycocotools")
    if os.environ.get("MASK2FORMER_FASTER_COCO_EVAL") == "0":
        return MatchingLibrary(False, f"pycocotools (MASK2FORMER_FASTER_COCO_EVAL=0 switches {_FASTER} off)")
    return _installed_library()


@functools.cache
def _installed_library() -> MatchingLibrary:
    try:
        found = version(_FASTER)
    except PackageNotFoundError:
        return MatchingLibrary(False, f"pycocotools ({_FASTER}, which is faster, is not installed)")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return MatchingLibrary(False, f"pycocotools ({_FASTER} {found} is older than {oldest})")
    return MatchingLibrary(True, f"{_FASTER} {found}")


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
    if not truth:
        return -np.ones((10, 101, 4))
    ids = {annotation["image_id"] for annotation in (*truth, *detections)}
    run = _faster_precision if matching_library(iou_type).is_faster else _plain_precision
    used = [images[i] for i in ids]
    return run(truth, detections, used, iou_type, max_detections, not_exhaustive)


def _plain_precision(
    truth: Sequence[Annotation],
    detections: Sequence[Annotation],
    images: Sequence[Mapping[str, Any]],
    iou_type: str,
    max_detections: int,
    not_exhaustive: AbstractSet[Any],
) -> FloatArray:
    """`category_precision` by pycocotools, for the images that are in truth or detections."""
    category = {"id": truth[0]["category_id"], "name": ""}
    library = import_pycocotools()[0]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = _eval_class()(
            _index(library(), images, category, truth),
            _index(library(), images, category, detections),
            "bbox" if iou_type == "bbox" else "segm",
            with_boundary=iou_type == "boundary",
            not_exhaustive=not_exhaustive,
        )
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"][:, :, 0, :, 0])
    precision[precision == 1 / (1 + np.spacing(1))] = 1  # see above
    return precision


def _faster_precision(
    truth: Sequence[Annotation],
    detections: Sequence[Annotation],
    images: Sequence[Mapping[str, Any]],
    iou_type: str,
    max_detections: int,
    not_exhaustive: AbstractSet[Any],
) -> FloatArray:
    """`category_precision` by faster-coco-eval, which needs numbers as ids of images; their order stays."""
    from faster_coco_eval import COCO, COCOeval_faster

    category_id = truth[0]["category_id"]
    number = {image_id: n for n, image_id in enumerate(sorted(image["id"] for image in images), start=1)}
    used = [
        {
            **image,
            "id": number[image["id"]],
            # LVIS's rule for these comes with the one for categories that an image is not known for: here all are.
            "not_exhaustive_category_ids": [category_id] if image["id"] in not_exhaustive else [],
            "neg_category_ids": [category_id],
        }
        for image in images
    ]
    category = {"id": category_id, "name": "", "frequency": "f"}

    def index(annotations: Sequence[Annotation]) -> Any:
        renumbered = [a | {"image_id": number[a["image_id"]]} for a in annotations]
        return _index(COCO(print_function=logger.debug), used, category, renumbered)

    evaluation = COCOeval_faster(
        index(truth), index(detections), iou_type, print_function=logger.debug, lvis_style=bool(not_exhaustive)
    )
    evaluation.params.maxDets = [max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"])[:, :, 0, :, 0]


def _index(
    coco: Any, images: Sequence[Mapping[str, Any]], category: Mapping[str, Any], annotations: Sequence[Annotation]
) -> Any:
    coco.dataset = {"images": list(images), "categories": [category], "annotations": list(annotations)}
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
