"""Prepares the semantic label maps of ADE20K with 150 classes.

Reads, below FOLDER/ADEChallengeData2016:
    images/{training,validation}/*.jpg
    annotations/{training,validation}/*.png               8 bits: 0 other, 1..150 the classes
Writes:
    annotations_detectron2/{training,validation}/*.png    8 bits: 0..149 the classes, 255 other
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

if importlib.util.find_spec("mask2former") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mask2former.data.ade20k_raw import NUM_SEMANTIC, SPLIT_FOLDERS
from mask2former.data.preparation import Converted, Preparation, run
from mask2former.data.prepared_files import image_size, read_labels, require_size, require_values


class Job(NamedTuple):
    image: Path
    annotation: Path
    output: Path


def convert(job: Job) -> Converted:
    labels = read_labels(job.annotation)
    require_size(job.annotation, labels.shape, image_size(job.image), job.image)
    require_values(job.annotation, labels, NUM_SEMANTIC, "classes")
    # 0 wraps around to 255.
    return Converted(images={job.output: labels.astype(np.uint8) - np.uint8(1)})


def prepare(preparation: Preparation, split: str) -> None:
    root, half = preparation.root / "ADEChallengeData2016", SPLIT_FOLDERS[split]
    output = root / "annotations_detectron2" / half
    pairs = preparation.partners((root / "images" / half, ".jpg"), (root / "annotations" / half, ".png"))
    jobs = [Job(image, annotation, output / annotation.name) for image, annotation in pairs]
    preparation.convert(convert, jobs, f"ADE20K semantic {split}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(__doc__, prepare, splits=tuple(SPLIT_FOLDERS), arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
