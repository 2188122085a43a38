"""Average precision of instances, computed by pycocotools' COCOeval: the official COCO numbers."""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IOU_TYPES = ("segm", "bbox")
MAX_DETECTIONS = 100
FloatArray = npt.NDArray[np.float64]


class InstanceAP:
    """COCO average precision over the images given to ``update``, and no others.

    Args:
        coco_json: COCO instance annotations (polygons, RLE, crowds) with ``images``, ``annotations`` and
            ``categories``.
        category_ids: the dataset id of each contiguous category. Other categories of the file are left out.
        iou_types: any of "segm" (masks) and "bbox" (boxes).

    Attributes:
        results: one plain dict per prediction in COCO's result format, with dataset category ids. To join
            several processes, gather ``results`` and ``image_ids``, or use ``merge``.
        image_ids: the images seen, in order.

    Raises:
        ImportError: if pycocotools is not installed.
        ValueError: if an IoU type is unknown, a category id is given twice or not in the file, or an
            annotation lacks a field that COCO's evaluation reads.
    """

    def __init__(
        self,
        *,
        coco_json: str | os.PathLike[str],
        category_ids: Sequence[int],
        iou_types: Sequence[str] = IOU_TYPES,
    ) -> None:
        unknown = [t for t in iou_types if t not in IOU_TYPES]
        if unknown or not iou_types:
            raise ValueError(f"iou_types must name some of {IOU_TYPES}, got {tuple(iou_types)}")
        _import_pycocotools()
        self.iou_types = tuple(iou_types)
        self.category_ids = tuple(int(i) for i in category_ids)
        self.results: list[dict[str, Any]] = []
        self.image_ids: list[int | str] = []
        self._seen: set[int | str] = set()
        with Path(coco_json).open(encoding="utf-8") as file:
            self._ground_truth: dict[str, Any] = json.load(file)
        self._prepare_annotations()
        self._images = {image["id"]: image for image in self._ground_truth["images"]}
        self._names = self._read_names(coco_json)

    def _prepare_annotations(self) -> None:
        required = {"image_id", "category_id", "area", "bbox"}
        required |= {"segmentation"} if "segm" in self.iou_types else set()
        for number, annotation in enumerate(self._ground_truth["annotations"], start=1):
            absent = sorted(required - annotation.keys())
            if absent:
                raise ValueError(f"coco_json: annotation {annotation.get('id')} lacks {absent}")
            annotation.setdefault("iscrowd", 0)
            # COCOeval takes the id 0 for "unmatched" and needs ids to be unique; nothing else reads them.
            annotation["id"] = number

    def _read_names(self, coco_json: str | os.PathLike[str]) -> list[str]:
        names = {category["id"]: str(category["name"]) for category in self._ground_truth["categories"]}
        if len(set(self.category_ids)) != len(self.category_ids) or not self.category_ids:
            raise ValueError(f"category_ids must be different ids, at least one, got {self.category_ids}")
        absent = [i for i in self.category_ids if i not in names]
        if absent:
            raise ValueError(f"category_ids must be in {os.fspath(coco_json)}, which lacks {absent}")
        return [names[i] for i in self.category_ids]

    def update(
        self,
        image_id: int | str,
        labels: npt.ArrayLike,
        scores: npt.ArrayLike,
        masks: npt.ArrayLike | None = None,
        boxes: npt.ArrayLike | None = None,
    ) -> None:
        """Adds the predictions of one image (N may be 0).

        Args:
            image_id: as in the annotation file.
            labels: (N,) contiguous categories.
            scores: (N,) finite.
            masks: (N, H, W) bool at the image's full size; may be None when "segm" is not evaluated.
            boxes: (N, 4) x1, y1, x2, y2 in pixels; may be None when "bbox" is not evaluated.

        Raises:
            TypeError: if labels are no integers or masks are not bool.
            ValueError: if the image is unknown or was given before, or a shape or value is wrong.
        """
        if image_id not in self._images:
            raise ValueError(f"image_id must be an image of the annotation file, got {image_id!r}")
        if image_id in self._seen:
            raise ValueError(f"image_id: every image may be given once, got {image_id!r} twice")
        label_list = self._checked_labels(labels)
        score_array = _checked_scores(scores, len(label_list))
        columns: dict[str, list[Any]] = {}
        if masks is not None or "segm" in self.iou_types:
            columns["segmentation"] = _encode(self._checked_masks(masks, len(label_list), image_id))
        if boxes is not None or "bbox" in self.iou_types:
            columns["bbox"] = _checked_boxes(boxes, len(label_list)).tolist()
        self.image_ids.append(image_id)
        self._seen.add(image_id)
        for i, (label, score) in enumerate(zip(label_list, score_array.tolist(), strict=True)):
            result = {"image_id": image_id, "category_id": self.category_ids[label], "score": score}
            self.results.append(result | {key: values[i] for key, values in columns.items()})

    def merge(self, other: "InstanceAP") -> None:
        """Adds the images that ``other`` has seen.

        Raises:
            ValueError: if the two differ in categories or IoU types, or have seen a same image.
        """
        if (self.category_ids, self.iou_types) != (other.category_ids, other.iou_types):
            raise ValueError("other must have the same category_ids and iou_types as this metric")
        common = set(self.image_ids) & set(other.image_ids)
        if common:
            raise ValueError(f"other must have seen other images, but both have {sorted(common)[:10]}")
        self.image_ids.extend(other.image_ids)
        self._seen.update(other.image_ids)
        self.results.extend(other.results)

    def compute(self) -> dict[str, dict[str, float]]:
        """Runs COCOeval with at most 100 predictions per image and category.

        Returns:
            For each IoU type: AP, AP50, AP75, APs, APm, APl and AP-<name>, in percent; nan where there is
            no ground truth.
        """
        return {iou_type: self._evaluate(iou_type) for iou_type in self.iou_types}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes ``results`` as a COCO result file; the file is complete or not there at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.results), encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def _evaluate(self, iou_type: str) -> dict[str, float]:
        coco_class, eval_class = _import_pycocotools()
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            truth = _coco(coco_class, self._ground_truth, self._ground_truth["annotations"])
            predictions = _coco(coco_class, self._ground_truth, list(_annotations(self.results, iou_type)))
            evaluation = eval_class(truth, predictions, iou_type)
            evaluation.params.imgIds = list(self.image_ids)
            evaluation.params.catIds = list(self.category_ids)
            evaluation.params.maxDets = [1, 10, MAX_DETECTIONS]
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"][..., -1]  # (T, R, K, A), -1 without ground truth
        results = {
            "AP": _mean(precision[..., 0]),
            "AP50": _mean(precision[0, ..., 0]),
            "AP75": _mean(precision[5, ..., 0]),
            "APs": _mean(precision[..., 1]),
            "APm": _mean(precision[..., 2]),
            "APl": _mean(precision[..., 3]),
        }
        column = {category_id: k for k, category_id in enumerate(sorted(self.category_ids))}
        for category_id, name in zip(self.category_ids, self._names, strict=True):
            results[f"AP-{name}"] = _mean(precision[:, :, column[category_id], 0])
        return results

    def _checked_labels(self, labels: npt.ArrayLike) -> list[int]:
        array = np.asarray(labels)
        if array.ndim != 1:
            raise ValueError(f"labels must have shape (N,), got {array.shape}")
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"labels must be integers, got dtype {array.dtype}")
        wrong = array[(array < 0) | (array >= len(self.category_ids))]
        if wrong.size:
            raise ValueError(f"labels must be in [0, {len(self.category_ids)}), got {wrong[0]}")
        return array.astype(np.int64).tolist()

    def _checked_masks(
        self, masks: npt.ArrayLike | None, count: int, image_id: int | str
    ) -> npt.NDArray[np.bool_]:
        if masks is None:
            raise ValueError('masks must be given when "segm" is evaluated, got None')
        array = np.asarray(masks)
        if array.ndim != 3 or len(array) != count:
            raise ValueError(f"masks must have shape ({count}, H, W), got {array.shape}")
        if array.dtype != np.bool_:
            raise TypeError(f"masks must be bool, got dtype {array.dtype}")
        image = self._images[image_id]
        # COCOeval gives masks of another size an IoU of -1 without a word.
        size = (image.get("height", array.shape[1]), image.get("width", array.shape[2]))
        if count and array.shape[1:] != size:
            raise ValueError(f"masks must be as large as image {image_id!r}, {size}, got {array.shape[1:]}")
        return array


def _import_pycocotools() -> tuple[Any, Any]:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError("instance AP needs pycocotools: pip install pycocotools") from error
    return COCO, COCOeval


def _encode(masks: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """(N, H, W) bool -> COCO's compressed RLE with text counts, as JSON holds them."""
    from pycocotools import mask as mask_api

    if len(masks) == 0:
        return []
    columns = np.ascontiguousarray(masks.view(np.uint8).transpose(0, 2, 1))  # (N, W, H)
    encoded = mask_api.encode(columns.transpose(2, 1, 0))  # (H, W, N) in Fortran order
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in encoded]


def _checked_scores(scores: npt.ArrayLike, count: int) -> FloatArray:
    array = np.asarray(scores, dtype=np.float64)
    if array.shape != (count,):
        raise ValueError(f"scores must have shape ({count},) as labels, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"scores must be finite, got {array[~np.isfinite(array)][0]}")
    return array


def _checked_boxes(boxes: npt.ArrayLike | None, count: int) -> FloatArray:
    """(N, 4) x1, y1, x2, y2 -> (N, 4) x, y, width, height."""
    if boxes is None:
        raise ValueError('boxes must be given when "bbox" is evaluated, got None')
    array = np.array(boxes, dtype=np.float64)
    if array.shape != (count, 4) and not (count == 0 and array.size == 0):
        raise ValueError(f"boxes must have shape ({count}, 4), got {array.shape}")
    array = array.reshape(count, 4)
    if not np.isfinite(array).all():
        raise ValueError(f"boxes must be finite, got {array[~np.isfinite(array)][0]}")
    array[:, 2:] -= array[:, :2]
    return array


def _annotations(results: Sequence[Mapping[str, Any]], iou_type: str) -> Iterator[dict[str, Any]]:
    """Predictions as annotations, with the area of the mask or of the box as pycocotools has it."""
    if iou_type == "segm":
        from pycocotools import mask as mask_api

        # one by one: pycocotools 2.0.11 fails on more than 255 masks with NumPy 2
        areas = [float(mask_api.area(result["segmentation"])) for result in results]
        field = "segmentation"
    else:
        areas = [result["bbox"][2] * result["bbox"][3] for result in results]
        field = "bbox"
    for number, (result, area) in enumerate(zip(results, areas, strict=True), start=1):
        yield {
            "id": number,
            "image_id": result["image_id"],
            "category_id": result["category_id"],
            "score": result["score"],
            "iscrowd": 0,
            "area": area,
            field: result[field],
        }


def _coco(coco_class: Any, ground_truth: Mapping[str, Any], annotations: list[dict[str, Any]]) -> Any:
    """A pycocotools COCO over the images and categories of the ground truth, without a copy."""
    coco = coco_class()
    coco.dataset = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _mean(precision: FloatArray) -> float:
    valid = precision[precision > -1]
    return float(valid.mean() * 100) if valid.size else float("nan")
