"""Prepares ADE20K with 847 classes.

Reads, below FOLDER/ADE20K_2021_17_01:
    index_ade20k.pkl
    images/ADE/{training,validation}/**/*.jpg, *_seg.png    class = R // 10 * 256 + G, see the index; 0 none
Writes:
    images_detectron2/{training,validation}/*.jpg
    annotations_detectron2/{training,validation}/*.tif      16 bits: 0..846 the classes, 65535 the others

Images whose shorter side is above 512 pixels are brought to 512, as published; others are linked.
"""

import importlib.util
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

if importlib.util.find_spec("mask2former") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mask2former.data.ade20k_raw import SPLIT_FOLDERS, FullIndex, read_full_index
from mask2former.data.catalog import read_categories
from mask2former.data.preparation import Converted, Preparation, run
from mask2former.data.prepared_files import (
    PreparationError,
    image_size,
    listed,
    read_colors,
    require_size,
    require_values,
)

IGNORE_LABEL = 65535
SHORTER_SIDE = 512
read_index = cache(read_full_index)


class Job(NamedTuple):
    image: Path
    annotation: Path
    output_image: Path
    output_annotation: Path


def convert(lookup: NDArray[np.uint16], job: Job) -> Converted:
    """`lookup` has the label of each class of the release, 0 first."""
    colors = read_colors(job.annotation).astype(np.int32)
    height, width = image_size(job.image)
    require_size(job.annotation, colors.shape, (height, width), job.image)
    classes = colors[..., 0] // 10 * 256 + colors[..., 1]
    require_values(job.annotation, classes, len(lookup) - 1, "classes")
    labels = lookup[classes]  # (H, W)
    if min(height, width) <= SHORTER_SIDE:
        return Converted(images={job.output_annotation: labels}, links={job.output_image: job.image})
    size = smaller_size(height, width)[::-1]
    image = cv2.resize(read_colors(job.image), size, interpolation=cv2.INTER_LINEAR)
    labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    return Converted(images={job.output_image: image, job.output_annotation: labels})


def smaller_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) with the same proportions, whose smaller value is `SHORTER_SIDE`."""
    if height <= width:
        return SHORTER_SIDE, round(width / height * SHORTER_SIDE)
    return round(height / width * SHORTER_SIDE), SHORTER_SIDE


def label_lookup(index: FullIndex, where: Path) -> NDArray[np.uint16]:
    """The label of each class of the release, found by its name; 0 is "none"."""
    labels = {category.name: label for label, category in enumerate(read_categories("ade20k_full"))}
    if unknown := sorted(labels.keys() - set(index.object_names)):
        raise PreparationError(f"{where}: 'objectnames' lacks {len(unknown)} of the 847 classes: {listed(unknown)}")
    known = [labels.get(name, IGNORE_LABEL) for name in index.object_names]
    return np.array([IGNORE_LABEL, *known], np.uint16)


def prepare(preparation: Preparation, split: str) -> None:
    root = preparation.root / "ADE20K_2021_17_01"
    index_file = root / "index_ade20k.pkl"
    index = read_index(index_file)
    lookup = label_lookup(index, index_file)
    half = SPLIT_FOLDERS[split]
    # Names are ADE_val_*, and for training ADE_train_* and ADE_frame_*.
    files = [file for file in index.files if file.name.startswith("ADE_val_") == (split == "val")]
    if not files:
        raise PreparationError(f"{index_file}: names no image for {half}")
    jobs = [
        Job(
            image=preparation.root / file,
            annotation=preparation.root / file.with_name(f"{file.stem}_seg.png"),
            output_image=root / "images_detectron2" / half / file.name,
            output_annotation=root / "annotations_detectron2" / half / f"{file.stem}.tif",
        )
        for file in files
    ]
    preparation.convert(partial(convert, lookup), jobs, f"ADE20K full {split}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(__doc__, prepare, splits=tuple(SPLIT_FOLDERS), arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
