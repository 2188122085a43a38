"""From a picture to its panoptic, instance or semantic segmentation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mask2former.checkpoint import TASKS, PredictionSettings, Task, check_threshold, load_model_file
from mask2former.data.augmentations import ResizeShortestEdge
from mask2former.data.catalog import Category
from mask2former.data.images import read_image
from mask2former.inference import predict_image
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.postprocessing import (
    MaskGeometry,
    instance_segmentation,
    panoptic_segmentation,
    semantic_segmentation,
)
from mask2former.modeling.structures import MaskPrediction

Picture = NDArray[Any] | Image.Image | str | Path
"""Array (H, W, 3) RGB, (H, W) or (H, W, 1) grey, (H, W, 4) with alpha, uint8 or uint16; image; or its file."""


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
    """Panoptic segmentation: ``ids`` (H, W) int32, 0 where nothing is; ``segments`` in order of the ids."""

    ids: NDArray[np.int32]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, eq=False)
class InstancePicture:
    """Instances, best score first.

    Attributes:
        labels: (N,) int64 contiguous class index.
        names: of the categories, N.
        scores: (N,) float32 in [0, 1].
        masks: (N, H, W) bool.
        boxes: (N, 4) float32 x0, y0, x1, y1 in pixels, x1 and y1 exclusive; 0 for an empty mask.
    """

    labels: NDArray[np.int64]
    names: tuple[str, ...]
    scores: NDArray[np.float32]
    masks: NDArray[np.bool_]
    boxes: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SemanticPicture:
    """Semantic segmentation: ``labels`` (H, W) int32 contiguous class index; ``names`` of all K classes."""

    labels: NDArray[np.int32]
    names: tuple[str, ...]


PictureResult = PanopticPicture | InstancePicture | SemanticPicture


class Predictor:
    """Segments pictures one by one. It never changes after it was made: threads may share one."""

    def __init__(
        self,
        model: Mask2Former,
        *,
        categories: Sequence[Category],
        tasks: Sequence[Task] = TASKS,
        shortest: int = 800,
        longest: int = 1333,
        image_format: str = "RGB",
        device: str | torch.device = "cpu",
        object_mask_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        top_k: int = 100,
        score_threshold: float = 0.0,
        semantic_resize_first: bool = True,
    ) -> None:
        """Set up.

        Args:
            model: moved to the device and put into evaluation mode.
            categories: of the K classes, in the order of the contiguous ids.
            image_format: channel order that the model takes, "RGB" or "BGR".
            device: where to compute.
            tasks, shortest, longest, object_mask_threshold, overlap_threshold, top_k, score_threshold,
                semantic_resize_first: see `PredictionSettings`.

        Raises:
            ValueError: if there is not one category a class, or a value is out of its range.
        """
        num_classes = model.criterion.num_classes
        if len(categories) != num_classes:
            raise ValueError(
                f"categories must hold one category for each of the model's {num_classes} classes, "
                f"got {len(categories)}"
            )
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        self.categories = tuple(categories)
        self.image_format = image_format
        self.settings = PredictionSettings(
            tasks=tuple(tasks),
            shortest=shortest,
            longest=longest,
            object_mask_threshold=object_mask_threshold,
            overlap_threshold=overlap_threshold,
            top_k=top_k,
            score_threshold=score_threshold,
            semantic_resize_first=semantic_resize_first,
        )
        self.model = model.to(device).eval()
        self._resize = ResizeShortestEdge(shortest=shortest, longest=longest)

    @classmethod
    def from_file(cls, path: str | Path, device: str | torch.device = "cpu", **overrides: Any) -> "Predictor":
        """From a model file, see `mask2former.checkpoint.save_model_file`.

        Args:
            path: the file.
            device: where to compute.
            **overrides: of the file's `PredictionSettings`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no model file, or a value is out of its range.
            TypeError: if there is no such setting.
        """
        model, description = load_model_file(path, device)
        settings = replace(description.settings, **overrides)
        return cls(
            model,
            categories=description.categories,
            image_format=description.image_format,
            device=device,
            **vars(settings),
        )

    def __call__(
        self, image: Picture, task: Task | None = None, *, threshold: float | None = None
    ) -> PictureResult:
        """Segment one picture.

        Args:
            image: of any size, see `Picture`.
            task: "panoptic", "instance" or "semantic"; None: the first of ``settings.tasks``. Instances are
                things only, also of a model that knows stuff.
            threshold: in [0, 1]; instead of the settings' object mask threshold (panoptic) or score threshold
                (instance).

        Returns:
            The result of the task, at the picture's own size.

        Raises:
            FileNotFoundError: if ``image`` names no file.
            ValueError: if the image cannot be read, the model is not for the task, or the threshold is out of
                range or given for semantic segmentation, which has none.
        """
        task = self.settings.tasks[0] if task is None else task
        if task not in self.settings.tasks:
            raise ValueError(f"task must be one of {', '.join(self.settings.tasks)}, got {task!r}")
        if threshold is not None:
            check_threshold("threshold", threshold)
            if task == "semantic":
                raise ValueError(f"threshold must be None for semantic segmentation, got {threshold}")
        prediction, geometry = self._predict(as_rgb(image))
        with torch.inference_mode():
            if task == "panoptic":
                return self._panoptic(prediction, geometry, threshold)
            if task == "instance":
                return self._instance(prediction, geometry, threshold)
            return self._semantic(prediction, geometry)

    def draw(self, image: Picture, result: PictureResult) -> NDArray[np.uint8]:
        """Draw a result over its picture; needs OpenCV.

        Args:
            image: the picture that was segmented.
            result: from a call of this predictor.

        Returns:
            (H, W, 3) uint8 RGB, a new array.

        Raises:
            ValueError: if the sizes differ.
        """
        from mask2former.visualizer import Visualizer  # OpenCV is needed nowhere else

        visualizer, pixels = Visualizer(self.categories), as_rgb(image)
        if isinstance(result, PanopticPicture):
            return visualizer.draw_panoptic(pixels, result.ids, result.segments)
        if isinstance(result, InstancePicture):
            return visualizer.draw_instances(pixels, result.labels, result.scores, result.masks)
        return visualizer.draw_semantic(pixels, result.labels, ignore_label=-1)

    @torch.inference_mode()
    def _predict(self, pixels: NDArray[np.uint8]) -> tuple[MaskPrediction, MaskGeometry]:
        """Class logits (Q, K + 1) and mask logits (Q, h, w) of the image, and the way back to its size."""
        resized = self._resize(pixels)
        channels = resized if self.image_format == "RGB" else resized[..., ::-1]
        planes = torch.from_numpy(channels.transpose(2, 0, 1).copy())  # (3, h, w)
        return predict_image(self.model, planes, (pixels.shape[0], pixels.shape[1]))

    def _panoptic(
        self, prediction: MaskPrediction, geometry: MaskGeometry, threshold: float | None
    ) -> PanopticPicture:
        settings = self.settings
        result = panoptic_segmentation(
            *prediction,
            geometry,
            is_thing=self._is_thing(),
            object_mask_threshold=settings.object_mask_threshold if threshold is None else threshold,
            overlap_threshold=settings.overlap_threshold,
        )
        segments = tuple(
            Segment(s.id, s.category_id, self.categories[s.category_id].name, s.is_thing, s.score, s.area)
            for s in result.segments
        )
        return PanopticPicture(result.ids.cpu().numpy(), segments)

    def _instance(
        self, prediction: MaskPrediction, geometry: MaskGeometry, threshold: float | None
    ) -> InstancePicture:
        result = instance_segmentation(
            *prediction,
            geometry,
            top_k=self.settings.top_k,
            is_thing=self._is_thing(),
            score_threshold=self.settings.score_threshold if threshold is None else threshold,
        )
        labels = result.labels.cpu().numpy()
        return InstancePicture(
            labels=labels,
            names=tuple(self.categories[label].name for label in labels.tolist()),
            scores=result.scores.cpu().numpy(),
            masks=result.masks.cpu().numpy(),
            boxes=result.boxes.cpu().numpy(),
        )

    def _semantic(self, prediction: MaskPrediction, geometry: MaskGeometry) -> SemanticPicture:
        first = self.settings.semantic_resize_first
        scores = semantic_segmentation(*prediction, geometry, resize_first=first)  # (K, H, W)
        labels = scores.argmax(0).to(torch.int32).cpu().numpy()
        return SemanticPicture(labels, tuple(category.name for category in self.categories))

    def _is_thing(self) -> torch.Tensor:
        return torch.tensor([category.is_thing for category in self.categories])  # (K,)


def as_rgb(image: Picture) -> NDArray[np.uint8]:
    """A picture in any accepted form as (H, W, 3) uint8 RGB.

    Grey becomes three equal channels, transparency is dropped, 16 bits are scaled to 8, images and files are
    turned upright as their EXIF data say.

    Raises:
        FileNotFoundError: if ``image`` names no file.
        ValueError: if the file is no image, or shape or type are others.
    """
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        image = np.asarray(image if image.mode.startswith(("I", "F")) else image.convert("RGB"))
    if not isinstance(image, np.ndarray) or image.dtype.kind != "u" or image.dtype.itemsize > 2:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image must be a uint8 or uint16 array, a PIL image or a path, got {kind}")
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or pixels.size == 0:
        raise ValueError(f"image must be (H, W) or (H, W, C) with C of 1, 3 or 4, got shape {image.shape}")
    if pixels.dtype.itemsize == 2:
        pixels = (pixels.astype(np.uint32) * 255 + 32767) // 65535  # rounded, as `read_image` does
    pixels = pixels[..., :3].astype(np.uint8)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
