"""From a picture to its panoptic, instance or semantic segmentation.

    predictor = Predictor.from_file("model.safetensors", device="cuda", precision="fast")
    result = predictor("street.jpg", "panoptic")
    for segment in result.segments:
        print(segment.id, segment.name, segment.score, segment.area)
    result.to_png("street.png")
    entry = result.to_coco_json(image_id=7, file_name="street.png")
    drawing = result.draw("street.jpg")

    several = predictor.batch(["a.jpg", "b.png"], "instance", threshold=0.5)
    everything = predictor.all_tasks("street.jpg")  # {"panoptic": ..., "instance": ..., "semantic": ...}
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mask2former.checkpoint import TASKS, PredictionSettings, Task, check_threshold, load_model_file
from mask2former.cuda_graphs import GraphedModel
from mask2former.data.augmentations import ResizeShortestEdge
from mask2former.data.catalog import Category
from mask2former.data.images import Picture, as_rgb
from mask2former.devices import device_problem
from mask2former.inference import Forward, predict_image_with_queries, predict_images
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.postprocessing import (
    MaskGeometry,
    instance_segmentation,
    panoptic_segmentation,
    semantic_labels,
)
from mask2former.modeling.precision import Precision, check_dtype
from mask2former.modeling.structures import MaskPrediction
from mask2former.modeling.transformer_decoders import MaskedAttentionDecoder
from mask2former.results import InstancePicture, PanopticPicture, PictureResult, Segment, SemanticPicture

__all__ = [
    "BATCH_PIXELS",
    "InstancePicture",
    "PanopticPicture",
    "Picture",
    "PictureResult",
    "Predictor",
    "Segment",
    "SemanticPicture",
    "as_rgb",
]

BATCH_PIXELS = 1 << 22
"""What `Predictor.batch` gives the model at a time, as it sees it: four pictures of 1024 x 1024."""


class _Resized(NamedTuple):
    """A picture on its way into the model: its place in the batch, (3, h, w) uint8, and its own (height, width)."""

    place: int
    planes: Tensor
    size: tuple[int, int]


class Predictor:
    """Segments pictures. It never changes after it was made: threads may share one.

    Every call is without gradients and in the predictor's own ``precision`` or ``dtype``, also where the caller has
    switched on gradients or autocast; the caller's modes stay as they are.

    Attributes:
        precision: the model's numerical mode; None if ``dtype`` decides.
        dtype: of most products.
    """

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
        dtype: torch.dtype = torch.float32,
        precision: Precision | None = None,
        compile: bool = False,
        cuda_graphs: int = 0,
        num_test_layers: int | None = None,
        object_mask_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        top_k: int = 100,
        score_threshold: float = 0.0,
        matrix_nms_sigma: float = 0.0,
        semantic_resize_first: bool = True,
    ) -> None:
        """Set up.

        Args:
            model: moved to the device and put into evaluation mode.
            categories: of the K classes, in the order of the contiguous ids.
            image_format: channel order that the model takes, "RGB" or "BGR".
            device: where to compute.
            dtype: the published choice: `torch.float32`; or `torch.bfloat16` or `torch.float16`, in which the products
                of backbone and transformer decoder run (autocast). Weights, the pixel decoder and post-processing stay
                float32. A CPU without float16 instructions takes many times as long in float16.
            precision: "strict", "tf32" or "fast", see `mask2former.modeling.precision`. It decides alone, ``dtype``
                must be float32. None: as the model is set up, by default none of them. It is a setting of the model,
                which others may share. docs/predictor.md has measured differences of all.
            compile: the model with PyTorch's compiler, at the first picture, which takes minutes; later ones of any
                size use what it made. It is a setting of the model, too.
            cuda_graphs: so many CUDA graphs are kept, one for each size and number of pictures as the model sees them,
                padded: all kernels of a forward pass in one launch, with the same results, which is faster for one
                picture at a time. The first picture of a size takes several times as long. 0: none; above, on a CUDA
                device only. For what they do to a model that changes see `mask2former.cuda_graphs.GraphedModel`.
            num_test_layers: so many layers of the masked decoder run, the first ones, which is faster and less
                accurate; None: as the model is set up. It is a setting of the model, which others may share.
            tasks, shortest, longest, object_mask_threshold, overlap_threshold, top_k, score_threshold,
                matrix_nms_sigma, semantic_resize_first: see `PredictionSettings`.

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
        check_dtype(dtype, model.precision if precision is None else precision)
        if problem := device_problem(device):
            raise ValueError(f"device must be one that can be used here, got {device}: {problem}")
        if cuda_graphs < 0 or (cuda_graphs > 0 and torch.device(device).type != "cuda"):
            raise ValueError(
                "cuda_graphs must be at least 0, and 0 on a device that is no CUDA device, "
                f"got {cuda_graphs} on {device}"
            )
        if num_test_layers is not None:
            decoder = model.sem_seg_head.predictor
            if not isinstance(decoder, MaskedAttentionDecoder):
                raise ValueError(f"num_test_layers must be None with {type(decoder).__name__}, got {num_test_layers}")
            decoder.num_test_layers = num_test_layers
        self.categories = tuple(categories)
        self.image_format = image_format
        if precision is not None:
            model.precision = precision
        self.precision = model.precision
        self.dtype = torch.bfloat16 if self.precision == "fast" else dtype
        self.settings = PredictionSettings(
            tasks=tuple(tasks),
            shortest=shortest,
            longest=longest,
            object_mask_threshold=object_mask_threshold,
            overlap_threshold=overlap_threshold,
            top_k=top_k,
            score_threshold=score_threshold,
            matrix_nms_sigma=matrix_nms_sigma,
            semantic_resize_first=semantic_resize_first,
        )
        self.model = model.to(device).eval()
        if compile:
            model.compile(dynamic=True)
        self._forward: Forward = GraphedModel(self.model, cuda_graphs) if cuda_graphs else self.model
        self._resize = ResizeShortestEdge(shortest=shortest, longest=longest)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
        precision: Precision | None = None,
        compile: bool = False,
        cuda_graphs: int = 0,
        num_test_layers: int | None = None,
        **overrides: Any,
    ) -> "Predictor":
        """From a model file, see `mask2former.checkpoint.save_model_file`.

        Args:
            path: the file.
            device, dtype, precision, compile, cuda_graphs, num_test_layers: where and how to compute, see `Predictor`.
            **overrides: of the file's `PredictionSettings`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no model file, or a value is out of its range.
            TypeError: if there is no such setting.
        """
        model, description = load_model_file(path)
        settings = replace(description.settings, **overrides)
        return cls(
            model,
            categories=description.categories,
            image_format=description.image_format,
            device=device,
            dtype=dtype,
            precision=precision,
            compile=compile,
            cuda_graphs=cuda_graphs,
            num_test_layers=num_test_layers,
            **vars(settings),
        )

    def __call__(
        self, image: Picture, task: Task | None = None, *, threshold: float | None = None
    ) -> PictureResult:
        """Segment one picture.

        Args:
            image: of any size, in any form that `as_rgb` takes.
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
        task = self._checked_task(task, threshold)
        with self._own_modes():
            return self._result(*self._predict_one(image), task, threshold)

    def all_tasks(self, image: Picture) -> dict[Task, PictureResult]:
        """Segment one picture for all tasks of the model, which runs once.

        Args:
            image: as in a call.

        Returns:
            What a call gives for each of ``settings.tasks``, in their order.

        Raises:
            FileNotFoundError, ValueError: as a call.
        """
        with self._own_modes():
            prediction, geometry = self._predict_one(image)
            return {task: self._result(prediction, geometry, task, None) for task in self.settings.tasks}

    def batch(
        self, images: Iterable[Picture], task: Task | None = None, *, threshold: float | None = None
    ) -> list[PictureResult]:
        """Segment several pictures, of any sizes.

        Pictures go through the model together where they have one size after the resize, at most `BATCH_PIXELS` at a
        time. So none is padded because of another, and each result is that of a call alone: of the same shape, with
        numbers that differ by rounding. Rounding may decide a pixel, or whether a segment is kept, where the model is
        undecided.

        Args:
            images: read one after the other, so that an iterator may hold more than fits into memory; an array if it
                is (N, H, W, C).
            task, threshold: as in a call, of all pictures.

        Returns:
            The results, in the order of the pictures.

        Raises:
            FileNotFoundError: if a picture names no file.
            ValueError: as in a call; or if ``images`` is a single picture. Says which picture it is.
        """
        one = isinstance(images, str) or (isinstance(images, np.ndarray) and images.ndim < 4)
        if one or not isinstance(images, Iterable):
            raise ValueError(f"images must be several pictures, such as a list, got one {type(images).__name__}")
        task = self._checked_task(task, threshold)
        results: dict[int, PictureResult] = {}
        for group in _groups_of_one_size(self._resized(images)):
            with self._own_modes():
                for picture, prediction in zip(group, self._predict(group), strict=True):
                    results[picture.place] = self._result(*prediction, task, threshold)
        return [results[place] for place in sorted(results)]

    def with_queries(
        self, image: Picture, task: Task | None = None, *, threshold: float | None = None
    ) -> tuple[PictureResult, NDArray[np.float32]]:
        """Segment one picture, and tell by what each segment can be found again in another one.

        Args:
            image, task, threshold: as in a call.

        Returns:
            What a call gives, and the features (Q, C) of all queries, see `Mask2Former.predict_with_queries`; the
            result's ``queries`` are their rows.

        Raises:
            FileNotFoundError, ValueError: as a call.
        """
        task = self._checked_task(task, threshold)
        with self._own_modes():
            picture = self._resize_picture(0, image)
            with self._precision():
                prediction, geometry, queries = predict_image_with_queries(self._forward, picture.planes, picture.size)
            return self._result(prediction, geometry, task, threshold), queries.float().cpu().numpy()

    def draw(self, image: Picture, result: PictureResult) -> NDArray[np.uint8]:
        """Draw a result over its picture, as ``result.draw(image)`` does; needs OpenCV.

        Args:
            image: the picture that was segmented.
            result: from a call of this predictor.

        Returns:
            (H, W, 3) uint8 RGB, a new array.

        Raises:
            ValueError: if the sizes differ.
        """
        return result.draw(image)

    def model_input(self, image: Picture) -> tuple[Tensor, tuple[int, int]]:
        """A picture, in any form that `as_rgb` takes, as the model sees it: (3, h, w) uint8; and its own size."""
        pixels = as_rgb(image)
        resized = self._resize(pixels)
        channels = resized if self.image_format == "RGB" else resized[..., ::-1]
        planes = torch.from_numpy(channels.transpose(2, 0, 1).copy())  # (3, h, w)
        return planes, (pixels.shape[0], pixels.shape[1])

    def _checked_task(self, task: Task | None, threshold: float | None) -> Task:
        task = self.settings.tasks[0] if task is None else task
        if task not in self.settings.tasks:
            raise ValueError(f"task must be one of {', '.join(self.settings.tasks)}, got {task!r}")
        if threshold is not None:
            check_threshold("threshold", threshold)
            if task == "semantic":
                raise ValueError(f"threshold must be None for semantic segmentation, got {threshold}")
        return task

    @contextmanager
    def _own_modes(self) -> Iterator[None]:
        """Both are of the thread alone."""
        with torch.inference_mode(), torch.autocast(self.model.device.type, enabled=False):
            yield

    def _predict_one(self, image: Picture) -> tuple[MaskPrediction, MaskGeometry]:
        return self._predict([self._resize_picture(0, image)])[0]

    def _predict(self, pictures: Sequence[_Resized]) -> list[tuple[MaskPrediction, MaskGeometry]]:
        """Class logits (Q, K + 1) and mask logits (Q, h, w) of pictures of one size, and the way back to their own."""
        images, sizes = [picture.planes for picture in pictures], [picture.size for picture in pictures]
        with self._precision():
            return predict_images(self._forward, images, sizes)

    def _precision(self) -> AbstractContextManager[None]:
        """What the model runs in, unless it sees to that itself."""
        if self.precision is not None or self.dtype is torch.float32:
            return nullcontext()
        # the cache of converted weights is one for all threads, and each weight is used about once
        return torch.autocast(self.model.device.type, dtype=self.dtype, cache_enabled=False)

    def _resized(self, images: Iterable[Picture]) -> Iterator[_Resized]:
        for place, image in enumerate(images):
            try:
                picture = self._resize_picture(place, image)
            except ValueError as error:
                raise ValueError(f"images[{place}]: {error}") from error
            yield picture

    def _resize_picture(self, place: int, image: Picture) -> _Resized:
        return _Resized(place, *self.model_input(image))

    def _result(
        self, prediction: MaskPrediction, geometry: MaskGeometry, task: Task, threshold: float | None
    ) -> PictureResult:
        settings = self.settings
        if task == "semantic":
            labels = semantic_labels(*prediction, geometry, resize_first=settings.semantic_resize_first)
            return SemanticPicture(labels.cpu().numpy(), self.categories)
        is_thing = torch.tensor([category.is_thing for category in self.categories])  # (K,)
        if task == "instance":
            instances = instance_segmentation(
                *prediction,
                geometry,
                top_k=settings.top_k,
                is_thing=is_thing,
                score_threshold=settings.score_threshold if threshold is None else threshold,
                matrix_nms_sigma=settings.matrix_nms_sigma,
            )
            return InstancePicture.from_result(instances, self.categories)
        segments = panoptic_segmentation(
            *prediction,
            geometry,
            is_thing=is_thing,
            object_mask_threshold=settings.object_mask_threshold if threshold is None else threshold,
            overlap_threshold=settings.overlap_threshold,
        )
        return PanopticPicture.from_result(segments, self.categories)


def _groups_of_one_size(pictures: Iterable[_Resized]) -> Iterator[list[_Resized]]:
    """Pictures that the model sees in one size, together; no more than `BATCH_PIXELS` wait for others of their size."""
    waiting: dict[tuple[int, ...], list[_Resized]] = {}
    room = BATCH_PIXELS
    for picture in pictures:
        pixels = picture.planes[0].numel()
        while waiting and pixels > room:
            shape = max(waiting, key=lambda shape: len(waiting[shape]) * shape[1] * shape[2])
            group = waiting.pop(shape)
            room += len(group) * shape[1] * shape[2]
            yield group
        waiting.setdefault(tuple(picture.planes.shape), []).append(picture)
        room -= pixels
    yield from waiting.values()
