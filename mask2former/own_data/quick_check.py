"""Whether a data set can be trained on at all: every file is there, and a few images give targets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from mask2former.data.augmentations import whole_image
from mask2former.data.catalog import CatalogEntry
from mask2former.data.mapper import SegmentationMapper
from mask2former.data.records import Record
from mask2former.own_data.registration import CustomDataset
from mask2former.own_data.source import Kind

MAPPED = 8
_FILES = ("file_name", "pan_seg_file_name", "sem_seg_file_name")
_TARGETS: dict[Kind, Literal["semantic", "panoptic", "instance"]] = {
    "panoptic": "panoptic",
    "instance": "instance",
    "object_masks": "instance",
    "semantic": "semantic",
}


def quick_check(dataset: CustomDataset) -> str:
    """Loads all records, looks whether their files are there, and maps a few, evenly spread.

    Returns:
        a sentence with the numbers of images and classes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is no image, or something cannot be read or does not fit.
    """
    entry = dataset()
    records = entry.load()
    if not records:
        raise ValueError(f"data set {dataset.name!r} must have at least one image, got none")
    for record in records:
        for key in _FILES:
            if key in record and not Path(record[key]).is_file():
                raise FileNotFoundError(f"data set {dataset.name!r}: there is no file {record[key]}")
    objects = _map(entry, records[:: -(-len(records) // MAPPED)], dataset)
    return f"{len(records)} images, {entry.metadata.num_classes} classes, {objects}"


def _map(entry: CatalogEntry, records: Sequence[Record], dataset: CustomDataset) -> str:
    mapper = SegmentationMapper(
        source=_TARGETS[dataset.source.kind],
        num_classes=entry.metadata.num_classes,
        ignore_label=entry.metadata.ignore_label,
        augmentation=whole_image,
    )
    counts = [len(mapper(record, np.random.default_rng(0)).target.labels) for record in records]
    what = "classes" if dataset.source.kind == "semantic" else "objects"
    return f"{sum(counts) / len(counts):.1f} {what} an image in {len(counts)} that were looked at"
