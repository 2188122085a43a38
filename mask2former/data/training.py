"""What every engine's loaders are made of: the records of a training, their order, and the mapping of images."""

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mask2former.data.augmentations import LargeScaleJitter, ResizeCropColor, ResizeShortestEdge
from mask2former.data.images import ImageFormat, read_image
from mask2former.data.mapper import SegmentationMapper
from mask2former.data.records import Record, filter_empty
from mask2former.data.sampling import TrainingBatchSampler

_RECIPES = {"lsj": LargeScaleJitter, "resize_crop_color": ResizeCropColor}


def training_mapper(*, recipe: str, augmentation: Mapping[str, Any], **arguments: Any) -> SegmentationMapper:
    """The mapper that `mask2former.config.mapper_arguments` describes."""
    return SegmentationMapper(augmentation=_RECIPES[recipe](**augmentation), **arguments)


def training_records(records: Sequence[Record], names: Sequence[str], *, without_empty: bool) -> list[Record]:
    """The records to train on.

    Args:
        records: of all data sets.
        names: of the data sets, for the message.
        without_empty: leaves out images without annotations, where records have such.

    Raises:
        ValueError: if none is left.
    """
    if without_empty and records and "annotations" in records[0]:
        records = filter_empty(records)
    if not records:
        raise ValueError(f"DATASETS.TRAIN must give at least one image, got none from {tuple(names)}")
    return list(records)


def batch_sampler(
    records: Sequence[Record], *, group_by_aspect_ratio: bool, **arguments: Any
) -> TrainingBatchSampler:
    """The order of the images; grouped only if every record has a size.

    Args:
        records: to train on.
        group_by_aspect_ratio: no batch has both wide and tall images.
        arguments: of `TrainingBatchSampler`.
    """
    ratios = None
    if group_by_aspect_ratio and all("width" in r and "height" in r for r in records):
        ratios = [r["width"] / r["height"] for r in records]
    return TrainingBatchSampler(num_records=len(records), aspect_ratios=ratios, **arguments)


class TestImage:
    """Reads and resizes the image of a test record."""

    __test__ = False  # the name is no test class

    def __init__(self, *, shortest: int, longest: int, image_format: ImageFormat) -> None:
        self.image_format = image_format
        self.resize = ResizeShortestEdge(shortest=shortest, longest=longest)

    def __call__(self, record: Mapping[str, Any]) -> tuple[Tensor, tuple[int, int]]:
        """(3, h, w) uint8 in the model's channel order, and the (height, width) of the image in the file."""
        image = read_image(record["file_name"], self.image_format)
        resized = np.ascontiguousarray(self.resize(image).transpose(2, 0, 1))  # (3, h, w)
        return torch.from_numpy(resized), (image.shape[0], image.shape[1])


class PackedRecords(Sequence[Record]):
    """Records as one array of bytes, which worker processes share: Python objects would be copied into each."""

    def __init__(self, records: Sequence[Record]) -> None:
        parts = [np.frombuffer(pickle.dumps(record, protocol=-1), dtype=np.uint8) for record in records]
        self._ends: NDArray[np.int64] = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._bytes = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index]
        if isinstance(place, range):
            return [self[i] for i in place]
        start = self._ends[place - 1] if place else 0
        return pickle.loads(self._bytes[start : self._ends[place]].data)
