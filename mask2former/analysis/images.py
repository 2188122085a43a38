"""Which images are analysed: those of a config's test set, or one of a fixed size."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mask2former import config
from mask2former.data import Record, catalog
from mask2former.data.augmentations import ResizeShortestEdge
from mask2former.data.training import TestImage

_WITHOUT_DATA = "--size H W and --use-fixed-input-size need no data"


class AnalysedImage(NamedTuple):
    """An image, of which nothing may be known but its size.

    Attributes:
        size: (height, width) as the model takes it, before padding; at least 1.
        own_size: (height, width) in the file, that of results.
        record: of the data set; None: made up.
    """

    size: tuple[int, int]
    own_size: tuple[int, int]
    record: Record | None = None

    def pixels(self, cfg: Any) -> Tensor:
        """(3, h, w) uint8 in the model's channel order: the file's, or random numbers.

        Raises:
            OSError, ValueError: if the file cannot be read.
        """
        if self.record is None:
            generator = torch.Generator().manual_seed(0)
            return torch.randint(0, 256, (3, *self.size), dtype=torch.uint8, generator=generator)
        image_format = config.input_arguments(cfg)["image_format"]
        return TestImage(image_format=image_format, **config.test_resize_arguments(cfg))(self.record)[0]


def fixed_input_size(cfg: Any) -> tuple[int, int]:
    """(height, width) of --use-fixed-input-size: the square that the config trains on.

    Raises:
        ValueError: if the config trains on images of several sizes.
    """
    mapper = config.mapper_arguments(cfg)
    if mapper["recipe"] == "lsj":
        side = mapper["augmentation"]["image_size"]
    elif mapper["augmentation"]["crop_size"] is not None and mapper["augmentation"]["crop_type"] == "absolute":
        side = mapper["augmentation"]["crop_size"][0]
    else:
        raise ValueError("--use-fixed-input-size needs crops of one size, INPUT.CROP.TYPE 'absolute'; use --size H W")
    return side, side


def images_of_test_set(cfg: Any, count: int) -> tuple[str, list[AnalysedImage]]:
    """The name of the first data set of DATASETS.TEST, and its first images, with the size of a test.

    Args:
        cfg: config.
        count: how many at most, at least 1.

    Raises:
        ValueError: if there is no such data set, it has no image, or its files are missing or damaged.
    """
    if not cfg.DATASETS.TEST:
        raise ValueError(f"DATASETS.TEST must name a data set to take images from, got none; {_WITHOUT_DATA}")
    name = cfg.DATASETS.TEST[0]
    try:
        records = catalog.get(name).load()[:count]
    except (catalog.UnknownDatasetError, OSError) as error:
        raise ValueError(f"DATASETS.TEST: {error}; {_WITHOUT_DATA}") from error
    if not records:
        raise ValueError(f"DATASETS.TEST: {name} has no image; {_WITHOUT_DATA}")
    resize = ResizeShortestEdge(**config.test_resize_arguments(cfg))
    sizes = [(record["height"], record["width"]) for record in records]
    resized = [resize.output_size(*size) for size in sizes]
    return name, [AnalysedImage(*image) for image in zip(resized, sizes, records, strict=True)]


def padded(size: tuple[int, int], divisibility: int) -> tuple[int, int]:
    """The size after padding to multiples."""
    height, width = (-(-side // divisibility) * divisibility for side in size)
    return height, width
