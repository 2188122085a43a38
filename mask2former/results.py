"""What a predictor finds in a picture, and its ways into JSON, PNG and drawings.

All three kinds are frozen and tell ``names``, ``areas``, ``dataset_category_ids`` and masks as RLE. Wherever a class
is a number, it is the contiguous index, its place in ``categories``; only `to_coco_json` and ``dataset_category_ids``
speak the data set's own ids. What is a property is computed at every access.
"""

import io
import operator
import os
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mask2former.checkpoint import write_atomically
from mask2former.data.catalog import Category
from mask2former.data.images import Picture, as_rgb
from mask2former.evaluation.average_precision import encode_masks
from mask2former.modeling.postprocessing import InstanceResult, PanopticResult

_PNG_ID_LIMIT = 1 << 24


class Rle(TypedDict):
    """COCO's compressed run-length encoding of a mask, as its JSON files hold it.

    Attributes:
        size: [height, width].
        counts: text for `pycocotools.mask.decode`.
    """

    size: list[int]
    counts: str


@dataclass(frozen=True)
class Segment:
    """One segment of a panoptic result.

    Attributes:
        id: its value in the id map, from 1.
        category_id: contiguous class index.
        name: of the category.
        is_thing: a countable object; otherwise stuff.
        score: class probability in [0, 1].
        area: pixels.
    """

    id: int
    category_id: int
    name: str
    is_thing: bool
    score: float
    area: int


@dataclass(frozen=True, eq=False)
class PanopticPicture:
    """Panoptic segmentation.

    Attributes:
        ids: (H, W) int32, 0 where nothing is.
        segments: N, in the order of the ids.
        categories: of all K classes, in the order of the contiguous index.
        queries: the model's queries that each segment was made from, N; several only for stuff. None if not known.
    """

    ids: NDArray[np.int32]
    segments: tuple[Segment, ...]
    categories: tuple[Category, ...]
    queries: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def from_result(cls, result: PanopticResult, categories: tuple[Category, ...]) -> "PanopticPicture":
        """From what `panoptic_segmentation` gives, on any device."""
        segments = tuple(
            Segment(s.id, s.category_id, categories[s.category_id].name, s.is_thing, s.score, s.area)
            for s in result.segments
        )
        queries = None if result.queries is None else tuple(tuple(numbers) for numbers in result.queries)
        return cls(result.ids.cpu().numpy(), segments, categories, queries)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the segments' categories, N."""
        return tuple(segment.name for segment in self.segments)

    @property
    def dataset_category_ids(self) -> tuple[int, ...]:
        """The data set's category id of each segment, N."""
        return tuple(self.categories[segment.category_id].id for segment in self.segments)

    @property
    def scores(self) -> NDArray[np.float32]:
        """(N,) in [0, 1]."""
        return np.array([segment.score for segment in self.segments], np.float32)

    @property
    def areas(self) -> NDArray[np.int64]:
        """(N,) pixels."""
        return np.array([segment.area for segment in self.segments], np.int64)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(N, H, W), disjoint."""
        ids = np.array([segment.id for segment in self.segments], np.int32)
        return self.ids == ids[:, None, None]

    @property
    def boxes(self) -> NDArray[np.float32]:
        """(N, 4) x0, y0, x1, y1 in pixels, x1 and y1 exclusive; 0 for a segment that has no pixel."""
        from scipy.ndimage import find_objects

        largest = max(int(self.ids.max()), *(segment.id for segment in self.segments), 0)
        place = np.zeros(largest + 1, np.int32)  # of each id in segments, from 1
        place[[segment.id for segment in self.segments]] = np.arange(1, len(self.segments) + 1)
        boxes = np.zeros((len(self.segments), 4), np.float32)
        windows = find_objects(place[self.ids], max_label=len(boxes))
        for box, window in zip(boxes, windows, strict=True):
            if window is not None:
                rows, columns = window
                box[:] = columns.start, rows.start, columns.stop, rows.stop
        return boxes

    def rle(self) -> list[Rle]:
        """The masks of the segments, N; needs pycocotools and OpenCV."""
        return [_encoded(self.ids == segment.id) for segment in self.segments]

    def to_coco_json(self, image_id: int | str, *, file_name: str | None = None) -> dict[str, Any]:
        """One entry of ``annotations`` in a COCO panoptic file; `to_png` writes the picture that belongs to it.

        Args:
            image_id: of the picture in the data set.
            file_name: of the PNG with the ids; None: the image id with ``.png``.

        Returns:
            Plain values: ``image_id``, ``file_name``, and ``segments_info`` with ``id``, ``category_id`` (the data
            set's), ``iscrowd`` 0, ``area`` and ``bbox`` [x, y, width, height].

        Raises:
            TypeError: if ``image_id`` is neither a whole number nor text.
        """
        image_id = _plain_id(image_id)
        boxes = _xywh(self.boxes).astype(np.int64).tolist()
        columns = zip(self.segments, self.dataset_category_ids, boxes, strict=True)
        info = [
            {"id": segment.id, "category_id": category, "iscrowd": 0, "area": segment.area, "bbox": box}
            for segment, category, box in columns
        ]
        name = f"{image_id}.png" if file_name is None else file_name
        return {"image_id": image_id, "file_name": name, "segments_info": info}

    def to_png(self, path: str | os.PathLike[str]) -> None:
        """Write the ids as a COCO panoptic PNG, whole or not at all: id = R + 256 G + 65536 B, 0 where nothing is.

        Raises:
            ValueError: if an id is not below 2**24.
            OSError: if the file cannot be written.
        """
        if self.ids.max() >= _PNG_ID_LIMIT:
            raise ValueError(f"ids must be below 2**24 for a PNG, got {self.ids.max()}")
        words = np.ascontiguousarray(self.ids, "<u4")
        _write_png(path, words.view(np.uint8).reshape(*self.ids.shape, 4)[..., :3])

    def draw(self, image: Picture) -> NDArray[np.uint8]:
        """Draw the segments over the picture; needs OpenCV.

        Args:
            image: the picture that was segmented.

        Returns:
            (H, W, 3) uint8 RGB, a new array.

        Raises:
            ValueError: if the sizes differ, or the image cannot be read.
        """
        from mask2former.visualizer import Visualizer  # needs OpenCV

        return Visualizer(self.categories).draw_panoptic(as_rgb(image), self.ids, self.segments)


@dataclass(frozen=True, eq=False)
class InstancePicture:
    """Instances, best score first; they may overlap.

    Attributes:
        labels: (N,) int64 contiguous class index.
        scores: (N,) float32 in [0, 1].
        masks: (N, H, W) bool; N x H x W bytes, which a score threshold keeps small.
        boxes: (N, 4) float32 x0, y0, x1, y1 in pixels, x1 and y1 exclusive; 0 for an empty mask.
        categories: of all K classes, in the order of the contiguous index.
        queries: (N,) int64, the model's query that found each; None if not known.
    """

    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    masks: NDArray[np.bool_]
    boxes: NDArray[np.float32]
    categories: tuple[Category, ...]
    queries: NDArray[np.int64] | None = None

    @classmethod
    def from_result(cls, result: InstanceResult, categories: tuple[Category, ...]) -> "InstancePicture":
        """From what `instance_segmentation` gives, on any device."""
        return cls(
            labels=result.labels.cpu().numpy(),
            scores=result.scores.cpu().numpy(),
            masks=result.masks.cpu().numpy(),
            boxes=result.boxes.cpu().numpy(),
            categories=categories,
            queries=None if result.queries is None else result.queries.cpu().numpy(),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the instances' categories, N."""
        return tuple(self.categories[label].name for label in self.labels.tolist())

    @property
    def dataset_category_ids(self) -> tuple[int, ...]:
        """The data set's category id of each instance, N."""
        return tuple(self.categories[label].id for label in self.labels.tolist())

    @property
    def areas(self) -> NDArray[np.int64]:
        """(N,) pixels of the masks."""
        return np.array([np.count_nonzero(mask) for mask in self.masks], np.int64)

    def rle(self) -> list[Rle]:
        """The masks, N; needs pycocotools and OpenCV."""
        return [_encoded(mask) for mask in self.masks]

    def to_coco_json(self, image_id: int | str) -> list[dict[str, Any]]:
        """The instances as entries of a COCO result file, for `pycocotools.coco.COCO.loadRes`.

        pycocotools takes the area of a result from its box where it has one. So drop ``bbox`` before the mask AP of
        small, medium and large objects is computed.

        Args:
            image_id: of the picture in the data set.

        Returns:
            Plain values: ``image_id``, ``category_id`` (the data set's), ``segmentation`` (RLE), ``bbox`` [x, y,
            width, height] and ``score``.

        Raises:
            TypeError: if ``image_id`` is neither a whole number nor text.
        """
        image_id, boxes = _plain_id(image_id), _xywh(self.boxes).tolist()
        columns = zip(self.dataset_category_ids, self.rle(), boxes, self.scores.tolist(), strict=True)
        return [
            {"image_id": image_id, "category_id": category, "segmentation": rle, "bbox": box, "score": score}
            for category, rle, box, score in columns
        ]

    def to_png(self, path: str | os.PathLike[str]) -> None:
        """Write a 16-bit map, whole or not at all: n where the n-th instance is, counted from 1, 0 where none is.

        Where instances overlap, the one with the best score is on top.

        Raises:
            ValueError: if there are more than 65535 instances.
            OSError: if the file cannot be written.
        """
        count = len(self.masks)
        if count > np.iinfo(np.uint16).max:
            raise ValueError(f"at most 65535 instances go into a PNG, got {count}")
        top = np.zeros(self.masks.shape[1:], np.uint16)
        for index in reversed(range(count)):
            top[self.masks[index]] = index + 1
        _write_png(path, top)

    def draw(self, image: Picture) -> NDArray[np.uint8]:
        """Draw the instances over the picture, see `PanopticPicture.draw`."""
        from mask2former.visualizer import Visualizer

        return Visualizer(self.categories).draw_instances(as_rgb(image), self.labels, self.scores, self.masks)


@dataclass(frozen=True, eq=False)
class SemanticPicture:
    """Semantic segmentation.

    Attributes:
        labels: (H, W) int32 contiguous class index.
        categories: of all K classes, in the order of the contiguous index.
    """

    labels: NDArray[np.int32]
    categories: tuple[Category, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all classes, K."""
        return tuple(category.name for category in self.categories)

    @property
    def dataset_category_ids(self) -> tuple[int, ...]:
        """The data set's category id of each class, K."""
        return tuple(category.id for category in self.categories)

    @property
    def areas(self) -> NDArray[np.int64]:
        """(K,) pixels of each class."""
        return np.bincount(self.labels.ravel(), minlength=len(self.categories))

    def rle(self) -> dict[int, Rle]:
        """The masks of the classes that are in the picture, by contiguous index; needs pycocotools and OpenCV."""
        present = np.flatnonzero(self.areas).tolist()
        return {label: _encoded(self.labels == label) for label in present}

    def to_coco_json(self, image_id: int | str) -> list[dict[str, Any]]:
        """The classes in the picture as entries of a COCO-Stuff result file, for `pycocotools.coco.COCO.loadRes`.

        Args:
            image_id: of the picture in the data set.

        Returns:
            Plain values: ``image_id``, ``category_id`` (the data set's) and ``segmentation`` (RLE).

        Raises:
            TypeError: if ``image_id`` is neither a whole number nor text.
        """
        image_id, ids = _plain_id(image_id), self.dataset_category_ids
        return [
            {"image_id": image_id, "category_id": ids[label], "segmentation": rle} for label, rle in self.rle().items()
        ]

    def to_png(self, path: str | os.PathLike[str]) -> None:
        """Write the contiguous class indices as a label map, whole or not at all.

        With up to 255 classes it has 8 bits, of which 255 stays free as "ignore"; otherwise 16.

        Raises:
            OSError: if the file cannot be written.
        """
        _write_png(path, self.labels.astype(np.uint8 if len(self.categories) <= 255 else np.uint16))

    def draw(self, image: Picture) -> NDArray[np.uint8]:
        """Draw the classes over the picture, see `PanopticPicture.draw`."""
        from mask2former.visualizer import Visualizer

        return Visualizer(self.categories).draw_semantic(as_rgb(image), self.labels, ignore_label=-1)


PictureResult = PanopticPicture | InstancePicture | SemanticPicture


def _encoded(mask: NDArray[np.bool_]) -> Rle:
    """One at a time: encoding copies, and all masks of a large picture can be gigabytes."""
    (rle,) = encode_masks(mask[None])
    return Rle(size=rle["size"], counts=rle["counts"])


def _xywh(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, 4) x0, y0, x1, y1 -> x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _plain_id(image_id: int | str) -> int | str:
    return image_id if isinstance(image_id, str) else operator.index(image_id)


def _write_png(path: str | os.PathLike[str], pixels: NDArray[Any]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_atomically(os.fspath(path), buffer.getvalue())
