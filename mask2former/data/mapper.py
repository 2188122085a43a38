"""A record to a training sample."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mask2former.data.augmentations import Augmentation
from mask2former.data.images import ImageFormat, read_image, read_label_map, read_panoptic_ids, read_picture
from mask2former.data.targets import LabelMaps, object_masks, panoptic_segments, semantic_segments
from mask2former.modeling.structures import PackedTarget

__all__ = ["MappedSample", "SegmentationMapper", "read_image"]

Source = Literal["semantic", "panoptic", "instance"]

_VOID = -1  # in the categories that augmentations see
_KEYS_BY_SOURCE = {
    "semantic": ("sem_seg_file_name",),
    "panoptic": ("pan_seg_file_name", "segments_info"),
    "instance": ("annotations",),
}


class MappedSample(NamedTuple):
    """What a training step gets for one image.

    Attributes:
        image: (3, H, W) uint8 in the mapper's channel order.
        target: its ground truth, at the same H and W; `labels` and `masks` as in a `MaskTarget`.
    """

    image: Tensor
    target: PackedTarget


class SegmentationMapper:
    """Reads an image and its annotations, augments both alike, and makes the target.

    Crowds and void never are targets; objects that are not visible after the augmentation are dropped with
    their labels, whatever the source; a target may be empty.

    Args:
        source: which annotations of a record are read: "semantic" (`sem_seg_file_name`), "panoptic"
            (`pan_seg_file_name` and `segments_info`) or "instance" (`annotations`).
        num_classes: every category must be below it.
        augmentation: see `Augmentation`.
        image_format: channel order of the result.
        ignore_label: value of unlabelled pixels in semantic label maps.
        size_divisibility: pads images at the bottom and right (grey 128, no mask) to the next multiple, so
            that smaller ones become this size. The published code crops larger ones instead. 0 or less: off.
    """

    def __init__(
        self,
        *,
        source: Source,
        num_classes: int,
        augmentation: Augmentation,
        image_format: ImageFormat = "RGB",
        ignore_label: int = 255,
        size_divisibility: int = -1,
    ) -> None:
        if source not in _KEYS_BY_SOURCE:
            raise ValueError(f"source must be one of {', '.join(_KEYS_BY_SOURCE)}, got {source!r}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        self.source = source
        self.num_classes = num_classes
        self.augmentation = augmentation
        self.image_format = image_format
        self.ignore_label = ignore_label
        self.size_divisibility = size_divisibility

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator) -> MappedSample:
        """
        Args:
            record: see `mask2former.data.records`; not changed.
            rng: the only source of randomness.

        Raises:
            FileNotFoundError: a file of the record does not exist.
            ValueError: an unreadable file, a size that is not the record's or differs between image and
                annotations, a category outside [0, num_classes), or a record without the source's keys.
        """
        file = record["file_name"]
        if missing := [key for key in _KEYS_BY_SOURCE[self.source] if key not in record]:
            raise ValueError(f"{file}: source {self.source!r} needs {missing[0]!r}, which the record lacks")
        picture = read_picture(file)
        height, width = picture.height, picture.width
        expected = (record.get("height", height), record.get("width", width))
        _check_size(file, (height, width), expected, "its record says")
        segments = self._segments(record, height, width)

        labels = None if self.source == "instance" else partial(segments.label_map, _VOID)
        view = self.augmentation(picture, rng, labels)
        if self.size_divisibility > 0:
            view = view.pad(*(_next_multiple(edge, self.size_divisibility) for edge in view.size))
        return MappedSample(torch.from_numpy(view.planes(self.image_format)), segments.target(view))

    def _segments(self, record: Mapping[str, Any], height: int, width: int) -> LabelMaps:
        if self.source == "instance":
            file = record["file_name"]
            return object_masks(record["annotations"], height, width, self.num_classes, file)
        if self.source == "semantic":
            file = record["sem_seg_file_name"]
            label_map = read_label_map(file)
            _check_size(file, label_map.shape, (height, width), "its image has")
            return semantic_segments(label_map, self.ignore_label, self.num_classes, file)
        file = record["pan_seg_file_name"]
        ids = read_panoptic_ids(file)
        _check_size(file, ids.shape, (height, width), "its image has")
        return panoptic_segments(ids, record["segments_info"], self.num_classes, file)


def _check_size(file: str, size: tuple[int, ...], expected: tuple[int, ...], said_by: str) -> None:
    if tuple(size) != tuple(expected):
        raise ValueError(
            f"{file}: the size is {size[0]}x{size[1]} (height x width), but {said_by} {expected[0]}x{expected[1]}"
        )


def _next_multiple(edge: int, divisor: int) -> int:
    return -(-edge // divisor) * divisor
