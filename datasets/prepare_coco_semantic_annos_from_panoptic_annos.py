"""Prepares the semantic label maps of COCO with 133 classes from the panoptic annotations.

Reads, below FOLDER/coco:
    annotations/panoptic_{train,val}2017.json
    panoptic_{train,val}2017/*.png           segment id = R + 256 G + 65536 B, 0 void
Writes:
    panoptic_semseg_{train,val}2017/*.png    8 bits: position of the category (0..132), 255 void
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

if importlib.util.find_spec("mask2former") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mask2former.data.catalog import contiguous_ids, read_categories
from mask2former.data.panoptic_raw import PanopticImage, read_panoptic_json, read_segment_map
from mask2former.data.preparation import Converted, Preparation, run
from mask2former.data.prepared_files import PreparationError, listed

SPLITS = ("train", "val")
IGNORE_LABEL = 255


class Job(NamedTuple):
    image: PanopticImage
    output: Path


def convert(job: Job) -> Converted:
    positions = contiguous_ids(read_categories("coco_panoptic"))
    ids = read_segment_map(job.image, positions)
    labels = {segment["id"]: positions[segment["category_id"]] for segment in job.image.segments} | {0: IGNORE_LABEL}
    found, place = np.unique(ids, return_inverse=True)
    if unlisted := set(found.tolist()) - labels.keys():
        raise PreparationError(
            f"{job.image.png}: has segments that {job.image.json_file} has not: {listed(sorted(unlisted))}"
        )
    label_of_place = np.array([labels[segment] for segment in found.tolist()], np.uint8)
    return Converted(images={job.output: label_of_place[place.reshape(ids.shape)]})


def prepare(preparation: Preparation, split: str) -> None:
    root = preparation.root / "coco"
    json_file = root / "annotations" / f"panoptic_{split}2017.json"
    images, _ = read_panoptic_json(json_file, root / f"panoptic_{split}2017")
    output = root / f"panoptic_semseg_{split}2017"
    preparation.convert(convert, [Job(image, output / image.png.name) for image in images], f"COCO semantic {split}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(__doc__, prepare, splits=SPLITS, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
