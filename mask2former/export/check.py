"""Compares an exported file with the model it was made from."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mask2former.checkpoint import ModelDescription, Task
from mask2former.export.files import Run
from mask2former.export.graph import OUTPUTS
from mask2former.inference import predict_image
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.postprocessing import instance_segmentation, panoptic_segmentation, semantic_segmentation

SMALLEST_IOU = 0.999
LARGEST_SCORE_DIFFERENCE = 1e-3
SIZES = ((240, 317), (389, 262), (288, 288))  # (height, width): wide, tall, square


@dataclass(frozen=True)
class Comparison:
    """What was found at one size.

    Attributes:
        size: (height, width).
        compared: segments, instances or classes of the model's own result.
        iou: the smallest of them; 0 if one is missing or one too many was found.
        score_difference: the largest; 0 for semantic segmentation, which has no scores.
        seconds: of the model and of the exported file.
    """

    size: tuple[int, int]
    compared: int
    iou: float
    score_difference: float
    seconds: tuple[float, float]

    @property
    def agrees(self) -> bool:
        """Whether the file may be used in place of the model."""
        return self.iou >= SMALLEST_IOU and self.score_difference <= LARGEST_SCORE_DIFFERENCE

    def __str__(self) -> str:
        return (
            f"{self.size[0]} x {self.size[1]}: {self.compared} compared, smallest IoU {self.iou:.5f}, largest "
            f"difference of scores {self.score_difference:.1e}, model {self.seconds[0]:.2f} s, file "
            f"{self.seconds[1]:.2f} s"
        )


def compare(
    run: Run, network: Mask2Former, description: ModelDescription, task: Task, picture: NDArray[np.uint8]
) -> Iterator[Comparison]:
    """Run the file and the model on a picture in three sizes.

    Args:
        run: the exported file.
        network: the model, in evaluation mode.
        description: of the model.
        task: that was exported.
        picture: (H, W, 3) uint8 RGB, which is stretched to each size.

    Yields:
        What was found at each size.
    """
    for height, width in SIZES:
        resized = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
        image = np.ascontiguousarray(resized.transpose(2, 0, 1)[None], dtype=np.float32)  # (1, 3, H, W)
        start = time.perf_counter()
        expected = reference(network, description, task, image)
        middle = time.perf_counter()
        found = run(image)
        end = time.perf_counter()
        ious, differences = agreement(task, found, expected)
        yield Comparison(
            size=(height, width),
            compared=len(ious),
            iou=min(ious, default=1.0),
            score_difference=max(differences, default=0.0),
            seconds=(middle - start, end - middle),
        )


def reference(
    network: Mask2Former, description: ModelDescription, task: Task, image: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    """What the model and `mask2former.modeling.postprocessing` give, under the names of the exported outputs.

    Args:
        network: in evaluation mode.
        description: of the model.
        task: one of the model's.
        image: (1, 3, H, W) RGB in 0..255.
    """
    planes = torch.from_numpy(image[0])
    planes = planes if description.image_format == "RGB" else planes.flip(0)
    settings = description.settings
    is_thing = torch.tensor([category.is_thing for category in description.categories])
    with torch.inference_mode():
        prediction, geometry = predict_image(network, planes, (planes.shape[1], planes.shape[2]))
        if task == "semantic":
            return {"labels": semantic_segmentation(*prediction, geometry).argmax(0).numpy()}
        if task == "instance":
            instances = instance_segmentation(
                *prediction,
                geometry,
                top_k=settings.top_k,
                is_thing=is_thing,
                score_threshold=settings.score_threshold,
                matrix_nms_sigma=settings.matrix_nms_sigma,
            )
            return {name: getattr(instances, name).numpy() for name in OUTPUTS["instance"]}
        panoptic = panoptic_segmentation(
            *prediction,
            geometry,
            is_thing=is_thing,
            object_mask_threshold=settings.object_mask_threshold,
            overlap_threshold=settings.overlap_threshold,
        )
    segments = panoptic.segments
    return {
        "ids": panoptic.ids.numpy(),
        "categories": np.array([s.category_id for s in segments], dtype=np.int64),
        "scores": np.array([s.score for s in segments], dtype=np.float32),
        "is_thing": np.array([s.is_thing for s in segments], dtype=np.bool_),
        "areas": np.array([s.area for s in segments], dtype=np.int64),
    }


def agreement(
    task: Task, found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]
) -> tuple[list[float], list[float]]:
    """IoU and difference of scores of each segment, instance or class that was expected.

    One that was not found, and one that was found and not expected, has IoU 0. Instances are matched by class and
    largest IoU, because the order of equal scores is free.
    """
    if task == "semantic":
        classes = np.union1d(found["labels"], expected["labels"])
        return [_iou(found["labels"] == c, expected["labels"] == c) for c in classes], []
    if task == "panoptic":
        masks = [[r["ids"] == i + 1 for i in range(len(r["scores"]))] for r in (found, expected)]
        labels = [r["categories"] for r in (found, expected)]
    else:
        masks = [list(r["masks"]) for r in (found, expected)]
        labels = [r["labels"] for r in (found, expected)]
    return _matched(masks, labels, [found["scores"], expected["scores"]])


def _matched(
    masks: list[list[NDArray[np.bool_]]], labels: list[NDArray[Any]], scores: list[NDArray[Any]]
) -> tuple[list[float], list[float]]:
    """Each list holds what was found and what was expected."""
    free = set(range(len(masks[0])))
    ious, differences = [], []
    for mask, label, score in zip(masks[1], labels[1], scores[1], strict=True):
        candidates = [i for i in free if labels[0][i] == label]
        if not candidates:
            ious.append(0.0)
            continue
        values = {i: _iou(masks[0][i], mask) for i in candidates}
        best = max(candidates, key=lambda i: (values[i], -abs(float(scores[0][i]) - float(score))))
        free.remove(best)
        ious.append(values[best])
        differences.append(abs(float(scores[0][best]) - float(score)))
    return ious + [0.0] * len(free), differences


def _iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Of two empty masks 1."""
    if a.shape != b.shape:
        return 0.0
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def made_up_picture() -> NDArray[np.uint8]:
    """(288, 384, 3) uint8: smooth colours with rectangles and discs, always the same."""
    rng = np.random.default_rng(7)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    pixels = np.array(small.resize((384, 288), Image.Resampling.BICUBIC))
    y, x = np.mgrid[:288, :384]
    for _ in range(6):
        cy, cx, radius = rng.integers(20, 268), rng.integers(20, 364), rng.integers(15, 60)
        pixels[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = rng.integers(0, 256, 3)
    return pixels
