"""Average precision of instances, computed by COCOeval: the official COCO numbers."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mask2former.data.targets import mask_from_segmentation
from mask2former.evaluation.boundary import boundary_distance, mask_boundaries
from mask2former.evaluation.class_names import distinct_names
from mask2former.evaluation.coco_matching import category_precision, import_pycocotools, matching_library
from mask2former.evaluation.reporting import write_whole

logger = logging.getLogger(__name__)

IOU_TYPES = ("segm", "bbox", "boundary")
MAX_DETECTIONS = 100
FloatArray = npt.NDArray[np.float64]


class InstanceAP:
    """COCO average precision over the images given to ``update``, and no others.

    Args:
        coco_json: COCO instance annotations (polygons, RLE, crowds) with ``images``, ``annotations`` and
            ``categories``.
        category_ids: the dataset id of each contiguous category. Other categories of the file are left out.
        iou_types: any of "segm" (masks), "bbox" (boxes) and "boundary" (Cheng et al., "Boundary IoU", CVPR 2021: the
            smaller IoU of masks and of their boundary regions).

    A pickled or copied metric leaves the annotations behind, so that processes can send theirs to each other: ``merge``
    takes it, but its own ``update`` and ``compute`` raise RuntimeError.

    Attributes:
        results: one plain dict per prediction in COCO's result format, with dataset category ids; with "boundary"
            also the boundary region as RLE.
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
        iou_types: Sequence[str] = ("segm", "bbox"),
    ) -> None:
        unknown = [t for t in iou_types if t not in IOU_TYPES]
        if unknown or not iou_types:
            raise ValueError(f"iou_types must name some of {IOU_TYPES}, got {tuple(iou_types)}")
        import_pycocotools()
        self.iou_types = tuple(iou_types)
        self.category_ids = tuple(int(i) for i in category_ids)
        self.results: list[dict[str, Any]] = []
        self.image_ids: list[int | str] = []
        self._seen: set[int | str] = set()
        self._truth_boundaries: dict[int, dict[str, Any]] = {}
        self._has_annotations = True
        with Path(coco_json).open(encoding="utf-8") as file:
            content: dict[str, Any] = json.load(file)
        self._images = {image["id"]: image for image in content["images"]}
        self._annotations: dict[int | str, list[dict[str, Any]]] = {i: [] for i in self._images}
        self._read_annotations(content["annotations"])
        self._read_categories(content["categories"], os.fspath(coco_json))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": {}, "_annotations": {}, "_has_annotations": False}

    def _require_annotations(self) -> None:
        if not self._has_annotations:
            raise RuntimeError("a metric that was pickled or copied has no annotations: merge it into the original")

    def _read_annotations(self, annotations: Sequence[dict[str, Any]]) -> None:
        required = {"image_id", "category_id", "area", "bbox"}
        required |= {"segmentation"} if self._needs_masks else set()
        for number, annotation in enumerate(annotations, start=1):
            absent = sorted(required - annotation.keys())
            if absent:
                raise ValueError(f"coco_json: annotation {annotation.get('id')} lacks {absent}")
            annotation.setdefault("iscrowd", 0)
            # COCOeval takes the id 0 for "unmatched" and needs ids to be unique; nothing else reads them.
            annotation["id"] = number
            self._annotations.setdefault(annotation["image_id"], []).append(annotation)

    def _read_categories(self, categories: Sequence[Mapping[str, Any]], file: str) -> None:
        names = {category["id"]: str(category["name"]) for category in categories}
        if len(set(self.category_ids)) != len(self.category_ids) or not self.category_ids:
            raise ValueError(f"category_ids must be different ids, at least one, got {self.category_ids}")
        absent = [i for i in self.category_ids if i not in names]
        if absent:
            raise ValueError(f"category_ids must be in {file}, which lacks {absent}")
        self._names = distinct_names([names[i] for i in self.category_ids], self.category_ids)

    @property
    def _needs_masks(self) -> bool:
        return "segm" in self.iou_types or "boundary" in self.iou_types

    def update(
        self,
        image_id: int | str,
        labels: npt.ArrayLike,
        scores: npt.ArrayLike,
        masks: npt.ArrayLike | None = None,
        boxes: npt.ArrayLike | None = None,
        mask_of: npt.ArrayLike | None = None,
    ) -> None:
        """Adds the predictions of one image (N may be 0).

        Args:
            image_id: as in the annotation file.
            labels: (N,) contiguous categories.
            scores: (N,) finite.
            masks: (N, H, W) bool at the image's full size, or (M, H, W) with ``mask_of``; may be None when only
                "bbox" is evaluated.
            boxes: (N, 4) x1, y1, x2, y2 in pixels; may be None when "bbox" is not evaluated.
            mask_of: (N,) which of the M masks each prediction has, so that one of several predictions is encoded once.
                None: each has its own.

        Raises:
            TypeError: if labels or places of masks are no integers or masks are not bool.
            ValueError: if the image is unknown or was given before, or a shape or value is wrong.
        """
        self._require_annotations()
        if image_id not in self._images:
            raise ValueError(f"image_id must be an image of the annotation file, got {image_id!r}")
        if image_id in self._seen:
            raise ValueError(f"image_id: every image may be given once, got {image_id!r} twice")
        label_list = self._checked_labels(labels)
        score_array = _checked_scores(scores, len(label_list))
        score_list = score_array.tolist()
        columns: dict[str, list[Any]] = {}
        if masks is not None or self._needs_masks:
            mask_array = self._checked_masks(masks, len(label_list) if mask_of is None else None, image_id)
            places = _checked_places(mask_of, len(label_list), len(mask_array))
            encoded = encode_masks(mask_array)
            columns["segmentation"] = [encoded[place] for place in places]
        if boxes is not None or "bbox" in self.iou_types:
            columns["bbox"] = _checked_boxes(boxes, len(label_list)).tolist()
        if "boundary" in self.iou_types:
            encoded = encode_masks(mask_boundaries(mask_array, boundary_distance(mask_array.shape[1:])))
            columns["boundary"] = [encoded[place] for place in places]
            self._find_truth_boundaries(image_id, self._size(image_id, mask_array))
        self.image_ids.append(image_id)
        self._seen.add(image_id)
        for i in self._kept(score_array):
            result = {"image_id": image_id, "category_id": self.category_ids[label_list[i]], "score": score_list[i]}
            self.results.append(result | {key: values[i] for key, values in columns.items()})

    def _size(self, image_id: int | str, masks: npt.NDArray[np.bool_]) -> tuple[int, int]:
        """(height, width) as the annotation file has it, or of the masks."""
        image = self._images[image_id]
        return image.get("height", masks.shape[1]), image.get("width", masks.shape[2])

    def _find_truth_boundaries(self, image_id: int | str, size: tuple[int, int]) -> None:
        for annotation in self._annotations[image_id]:
            mask = mask_from_segmentation(annotation["segmentation"], *size)
            (rle,) = encode_masks(mask_boundaries(mask[None], boundary_distance(size)))
            self._truth_boundaries[annotation["id"]] = {"boundary": rle}

    def _kept(self, scores: FloatArray) -> Sequence[int]:
        """Which predictions of an image count at all, in order: all of them."""
        return range(len(scores))

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
        self._truth_boundaries.update(other._truth_boundaries)

    def compute(self) -> dict[str, dict[str, float]]:
        """Runs COCOeval with at most 100 predictions per image and category; the log says whose, see `coco_matching`.

        Returns:
            For each IoU type: AP, AP50, AP75, APs, APm, APl and AP-<name>, in percent; nan where there is
            no ground truth.
        """
        self._require_annotations()
        for iou_type in self.iou_types:
            logger.info("%s AP of %d images by %s", iou_type, len(self.image_ids), matching_library(iou_type).account)
        return {iou_type: self._evaluate(iou_type) for iou_type in self.iou_types}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes ``results`` as a COCO result file, without boundaries; it is complete or not there at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        plain = [{key: v for key, v in result.items() if key != "boundary"} for result in self.results]
        write_whole(target, json.dumps(plain))

    def _evaluate(self, iou_type: str) -> dict[str, float]:
        precision = self._precision(iou_type)
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        parts = (precision[..., 0], precision[:, 0, :, 0], precision[:, 5, :, 0], *np.moveaxis(precision, -1, 0)[1:])
        results = {name: mean_precision(part) for name, part in zip(names, parts, strict=True)}
        results |= self._groups(precision[..., 0])
        return results | {
            f"AP-{name}": mean_precision(p) for name, p in zip(self._names, precision[..., 0], strict=True)
        }

    def _precision(self, iou_type: str) -> FloatArray:
        """(K, T, R, A) precision by category, IoU, recall and size; -1 where there is nothing to find."""
        truth: dict[int, list[dict[str, Any]]] = {i: [] for i in self.category_ids}
        for annotation in (
            a for image_id in self._images if image_id in self._seen for a in self._annotations[image_id]
        ):
            if annotation["category_id"] in truth:
                truth[annotation["category_id"]].append(annotation | self._truth_boundaries.get(annotation["id"], {}))
        found: dict[int, list[dict[str, Any]]] = {i: [] for i in self.category_ids}
        for detection in _detections(self.results, iou_type):
            found[detection["category_id"]].append(detection)
        return np.stack([
            self._category_precision(category, truth[category], found[category], iou_type)
            for category in self.category_ids
        ])  # fmt: skip

    def _category_precision(
        self, category_id: int, truth: list[dict[str, Any]], detections: list[dict[str, Any]], iou_type: str
    ) -> FloatArray:
        return category_precision(truth, detections, self._images, iou_type=iou_type, max_detections=MAX_DETECTIONS)

    def _groups(self, precision: FloatArray) -> dict[str, float]:
        """Results of groups of categories, of which COCO has none.

        Args:
            precision: (K, T, R), for objects of all sizes.
        """
        return {}

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
        self, masks: npt.ArrayLike | None, count: int | None, image_id: int | str
    ) -> npt.NDArray[np.bool_]:
        """The masks, of which there must be so many; None: any number."""
        if masks is None:
            raise ValueError('masks must be given when "segm" is evaluated, got None')
        array = np.asarray(masks)
        if array.ndim != 3 or (count is not None and len(array) != count):
            raise ValueError(f"masks must have shape ({'M' if count is None else count}, H, W), got {array.shape}")
        if array.dtype != np.bool_:
            raise TypeError(f"masks must be bool, got dtype {array.dtype}")
        # COCOeval gives masks of another size an IoU of -1 without a word.
        size = self._size(image_id, array)
        if len(array) and array.shape[1:] != size:
            raise ValueError(f"masks must be as large as image {image_id!r}, {size}, got {array.shape[1:]}")
        return array


def encode_masks(masks: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """(N, H, W) bool -> COCO's compressed RLE with text counts, as JSON holds them: ``size`` (H, W) and ``counts``.

    COCO counts along columns. OpenCV turns them into rows some three times as fast as NumPy, and one mask at a time
    stays in the processor's cache (benchmarks/evaluation.py).
    """
    import cv2
    from pycocotools import mask as mask_api

    height, width = masks.shape[1:]
    columns = np.empty((width, height), dtype=np.uint8)
    found = []
    for mask in masks.view(np.uint8):
        cv2.transpose(mask, columns)
        (rle,) = mask_api.encode(columns.T[:, :, None])  # (H, W, 1) in Fortran order
        found.append({"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")})
    return found


def _checked_places(mask_of: npt.ArrayLike | None, count: int, masks: int) -> list[int]:
    """Which of the masks each of so many predictions has."""
    if mask_of is None:
        return list(range(count))
    array = np.asarray(mask_of)
    if array.shape != (count,):
        raise ValueError(f"mask_of must have shape ({count},) as labels, got {array.shape}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"mask_of must be integers, got dtype {array.dtype}")
    wrong = array[(array < 0) | (array >= masks)]
    if wrong.size:
        raise ValueError(f"mask_of must be in [0, {masks}), the number of masks, got {wrong[0]}")
    return array.astype(np.int64).tolist()


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


def _detections(results: Sequence[Mapping[str, Any]], iou_type: str) -> Iterator[dict[str, Any]]:
    """Predictions as annotations, with the area of the mask or of the box as pycocotools has it."""
    from pycocotools import mask as mask_api

    for number, result in enumerate(results, start=1):
        if iou_type == "bbox":
            shape = {"bbox": result["bbox"], "area": result["bbox"][2] * result["bbox"][3]}
        else:
            # one by one: pycocotools 2.0.11 fails on more than 255 masks with NumPy 2
            rle = result["segmentation"]
            shape = {"segmentation": rle, "area": float(mask_api.area(rle)), "boundary": result.get("boundary")}
        plain = {key: result[key] for key in ("image_id", "category_id", "score")}
        yield {"id": number, "iscrowd": 0, **plain, **shape}


def mean_precision(precision: FloatArray) -> float:
    """Mean in percent of what is not -1; nan if all is."""
    valid = precision[precision > -1]
    return float(valid.mean() * 100) if valid.size else float("nan")
