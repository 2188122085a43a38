"""Prepares the semantic label maps of the full ADE20K release with 847 classes.

Reads, below FOLDER/ADE20K_2021_17_01:
    index_ade20k.pkl
    images/ADE/{training,validation}/**/*.jpg
    images/ADE/{training,validation}/**/*_seg.png         class = R // 10 * 256 + G, 0 none
Writes:
    images_detectron2/{training,validation}/*.jpg         shorter side at most 512; links where it is so already
    annotations_detectron2/{training,validation}/*.tif    16 bits: 0..846 the classes, 65535 other
"""

import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

if importlib.util.find_spec("mask2former") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mask2former.data.ade20k_datasets import FULL_IGNORE_LABEL
from mask2former.data.ade20k_raw import SPLIT_FOLDERS, read_full_index
from mask2former.data.catalog import read_categories
from mask2former.data.geometry import nearest_indices, resize_image
from mask2former.data.preparation import Converted, Preparation, run
from mask2former.data.prepared_files import PreparationError, listed, read_colors, require_size, require_values

LONGEST_SHORTER_SIDE = 512
VALIDATION_START = "ADE_val_"


class Job(NamedTuple):
    image: Path
    annotation: Path
    output_image: Path
    output_annotation: Path


def convert(label_of_class: NDArray[np.uint16], job: Job) -> Converted:
    """`label_of_class` is that of `class_labels`."""
    pixels = read_colors(job.image)  # as stored, like the annotation; small ones too, so that damage shows
    height, width = pixels.shape[:2]
    classes = read_classes(job.annotation)
    require_size(job.annotation, classes.shape, (height, width), job.image)
    require_values(job.annotation, classes, len(label_of_class) - 1, "classes")
    labels = label_of_class[classes]
    size = smaller_size(height, width)
    if size == (height, width):
        return Converted(images={job.output_annotation: labels}, links={job.output_image: job.image})
    rows, columns = nearest_indices(height, size[0]), nearest_indices(width, size[1])
    return Converted(
        images={job.output_annotation: labels[np.ix_(rows, columns)], job.output_image: resize_image(pixels, *size)}
    )


def read_classes(path: Path) -> NDArray[np.uint16]:
    """The class numbers in a *_seg.png, (H, W)."""
    colors = read_colors(path).astype(np.uint16)
    return colors[..., 0] // 10 * 256 + colors[..., 1]


def smaller_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of the same proportions whose shorter side is at most 512."""
    shorter = min(height, width)
    if shorter <= LONGEST_SHORTER_SIDE:
        return height, width
    return round(height * LONGEST_SHORTER_SIDE / shorter), round(width * LONGEST_SHORTER_SIDE / shorter)


def class_labels(object_names: Sequence[str], index_file: Path) -> NDArray[np.uint16]:
    """The label of each class number, from that of 0 (none) to that of the last of the names.

    Raises:
        PreparationError: a category has no class of its name.
    """
    label_of_name = {_comparable(c.name): label for label, c in enumerate(read_categories("ade20k_full"))}
    names = [_comparable(name) for name in object_names]
    if missing := [name for name in label_of_name if name not in names]:
        raise PreparationError(
            f"{index_file}: 'objectnames' lacks {len(missing)} of the {len(label_of_name)} classes: {listed(missing)}"
        )
    return np.array([FULL_IGNORE_LABEL, *(label_of_name.get(name, FULL_IGNORE_LABEL) for name in names)], np.uint16)


def _comparable(name: str) -> str:
    return name.strip().casefold()


def prepare(preparation: Preparation, split: str) -> None:
    root, half = preparation.root / "ADE20K_2021_17_01", SPLIT_FOLDERS[split]
    index_file = root / "index_ade20k.pkl"
    index = read_full_index(index_file)
    label_of_class = class_labels(index.object_names, index_file)
    images = [
        preparation.root / file for file in index.files if file.name.startswith(VALIDATION_START) == (split == "val")
    ]
    if not images:
        raise PreparationError(f"{index_file}: lists no image of the split {split}")
    jobs = [
        Job(
            image=image,
            annotation=image.with_name(f"{image.stem}_seg.png"),
            output_image=root / "images_detectron2" / half / image.name,
            output_annotation=root / "annotations_detectron2" / half / f"{image.stem}.tif",
        )
        for image in images
    ]
    preparation.convert(partial(convert, label_of_class), jobs, f"ADE20K full semantic {split}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(__doc__, prepare, splits=tuple(SPLIT_FOLDERS), arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
