"""Prepares COCO-Stuff 10k with 171 classes; v1.1 and v1.0 of the data set give the same.

Reads, below FOLDER/coco/coco_stuff_10k:
    images/*.jpg
    annotations/*.mat                            S: label map; names: of the classes
    imageLists/{train,test}.txt                  a name without suffix in each line
Writes:
    images_detectron2/{train,test}/*.jpg         links to the images
    annotations_detectron2/{train,test}/*.png    8 bits: 0..170 the classes, 255 unlabelled
"""

import importlib.util
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.io
from numpy.typing import NDArray
from scipy.io.matlab import MatReadError

if importlib.util.find_spec("mask2former") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mask2former.data.catalog import contiguous_ids, read_categories
from mask2former.data.preparation import Converted, Preparation, run
from mask2former.data.prepared_files import PreparationError, image_size, listed, read_lines, require_size

SPLITS = ("train", "test")
IGNORE_LABEL = 255
# What scipy.io raises for damaged files.
READ_ERRORS = (OSError, ValueError, TypeError, LookupError, EOFError, NotImplementedError, zlib.error, MatReadError)


class Job(NamedTuple):
    image: Path
    annotation: Path
    output_image: Path
    output_annotation: Path


def convert(job: Job) -> Converted:
    content = read_mat(job.annotation)
    values = np.asarray(content["S"])
    require_size(job.annotation, values.shape, image_size(job.image), job.image)
    labels = label_of_value(len(np.ravel(content["names"])), job.annotation)
    found, place = np.unique(values, return_inverse=True)
    if wrong := sorted(set(found.tolist()) - labels.keys()):
        raise PreparationError(f"{job.annotation}: has values that are no class: {listed(wrong)}")
    label_of_place = np.array([labels[value] for value in found.tolist()], np.uint8)
    pixels: NDArray[np.uint8] = label_of_place[place.reshape(values.shape)]
    return Converted(images={job.output_annotation: pixels}, links={job.output_image: job.image})


def read_mat(path: Path) -> dict[str, Any]:
    """The variables S and names.

    Raises:
        PreparationError: there is no such file, it is damaged or lacks one of them.
    """
    try:
        content: dict[str, Any] = scipy.io.loadmat(str(path), variable_names=("S", "names"))
    except FileNotFoundError as error:
        raise PreparationError(f"{path}: there is no such file") from error
    except READ_ERRORS as error:
        raise PreparationError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from error
    if missing := [name for name in ("S", "names") if name not in content]:
        raise PreparationError(f"{path}: has no variable {missing[0]}")
    return content


def label_of_value(num_names: int, path: Path) -> dict[int, int]:
    """From the values of S to labels.

    v1.1 names 182 classes, whose ids are those of COCO-Stuff, and has 0 where there is none. v1.0 names 172, the
    first of which is "unlabeled" with the value 1, and leaves out 11 classes that have no pixels.
    """
    categories = read_categories("coco_stuff")
    if num_names == 182:
        return {0: IGNORE_LABEL, **contiguous_ids(categories)}
    if num_names == 172:
        return {1: IGNORE_LABEL, **{position + 2: position for position in range(len(categories))}}
    raise PreparationError(f"{path}: must have 182 names (v1.1) or 172 (v1.0), got {num_names}")


def prepare(preparation: Preparation, split: str) -> None:
    root = preparation.root / "coco" / "coco_stuff_10k"
    jobs = [
        Job(
            image=root / "images" / f"{name}.jpg",
            annotation=root / "annotations" / f"{name}.mat",
            output_image=root / "images_detectron2" / split / f"{name}.jpg",
            output_annotation=root / "annotations_detectron2" / split / f"{name}.png",
        )
        for name in read_lines(root / "imageLists" / f"{split}.txt")
    ]
    preparation.convert(convert, jobs, f"COCO-Stuff 10k {split}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(__doc__, prepare, splits=SPLITS, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
