"""Prepares the panoptic annotations of ADE20K: 150 classes, 100 of them things.

Reads, below FOLDER/ADEChallengeData2016:
    images/{training,validation}/*.jpg
    annotations/{training,validation}/*.png             8 bits: 0 other, 1..150 the classes
    annotations_instance/{training,validation}/*.png    red: class among the 100 things; green: number of the object
Writes, in COCO's panoptic format:
    ade20k_panoptic_{train,val}/*.png                   segment id = R + 256 G + 65536 B, 0 void
    ade20k_panoptic_{train,val}.json                    category id = position among the 150 classes

A segment's id says what it is: R is the number of the object (0 for stuff), G the class (1..150). Where there is an
object, its class counts; elsewhere stuff of `annotations`. Void are "other", and things that are no object.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if importlib.util.find_spec("mask2former") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mask2former.data.ade20k_raw import NUM_SEMANTIC, SPLIT_FOLDERS, image_number, read_instances
from mask2former.data.catalog import read_categories
from mask2former.data.preparation import Converted, Preparation, category_rows, run, segment_box
from mask2former.data.prepared_files import image_size, read_labels, require_size, require_values


class Job(NamedTuple):
    image: Path
    annotation: Path
    instances: Path
    output: Path


def convert(job: Job) -> Converted:
    labels = read_labels(job.annotation)
    size = image_size(job.image)
    require_size(job.annotation, labels.shape, size, job.image)
    require_values(job.annotation, labels, NUM_SEMANTIC, "classes")
    instances_size, instances = read_instances(job.instances)
    require_size(job.instances, instances_size, size, job.image)
    ids = stuff_ids()[labels]  # (H, W)
    for instance in instances:
        ids[instance.mask] = segment_id(instance.category.id, instance.number)
    colors = np.stack([ids % 256, ids // 256, np.zeros_like(ids)], axis=-1).astype(np.uint8)  # (H, W, 3)
    number = image_number(job.image)
    image = {"id": number, "file_name": job.image.name, "height": size[0], "width": size[1]}
    annotation = {"image_id": number, "file_name": job.output.name, "segments_info": segments(ids)}
    return Converted(images={job.output: colors}, row=(image, annotation))


def segment_id(category: int, number: int) -> int:
    """The id of an object of a category (0..149), or with number 0 of stuff."""
    return number + 256 * (category + 1)


def stuff_ids() -> NDArray[np.int32]:
    """(151,) segment id for each value of `annotations`; 0 for what is no stuff."""
    ids = np.zeros(NUM_SEMANTIC + 1, np.int32)
    for category in read_categories("ade20k_150"):
        if not category.is_thing:
            ids[category.id + 1] = segment_id(category.id, 0)
    return ids


def segments(ids: NDArray[np.int32]) -> list[dict[str, Any]]:
    """The "segments_info" of a map of segment ids."""
    info = []
    for found in np.unique(ids[ids > 0]).tolist():
        mask = ids == found
        area, box = int(mask.sum()), segment_box(mask)
        info.append({"id": found, "category_id": found // 256 - 1, "iscrowd": 0, "area": area, "bbox": box})
    return info


def prepare(preparation: Preparation, split: str) -> None:
    root, half = preparation.root / "ADEChallengeData2016", SPLIT_FOLDERS[split]
    output = root / f"ade20k_panoptic_{split}"
    triples = preparation.partners(
        (root / "images" / half, ".jpg"),
        (root / "annotations" / half, ".png"),
        (root / "annotations_instance" / half, ".png"),
    )
    jobs = [Job(image, annotation, instances, output / annotation.name) for image, annotation, instances in triples]
    rows = preparation.convert(convert, jobs, f"ADE20K panoptic {split}")
    content = {
        "images": [image for image, _ in rows],
        "annotations": [annotation for _, annotation in rows],
        "categories": category_rows(read_categories("ade20k_150")),
    }
    preparation.write_json(output.with_suffix(".json"), content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(__doc__, prepare, splits=tuple(SPLIT_FOLDERS), arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
