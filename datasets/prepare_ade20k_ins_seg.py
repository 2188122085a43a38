"""Prepares the instance annotations of ADE20K: 100 classes.

Reads, below FOLDER/ADEChallengeData2016:
    images/{training,validation}/*.jpg
    annotations_instance/{training,validation}/*.png    red: class among the 100 things; green: number of the object
Writes, in COCO's format with compressed RLE:
    ade20k_instance_{train,val}.json                    category id = position among the 150 classes
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if importlib.util.find_spec("mask2former") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mask2former.data.ade20k_raw import SPLIT_FOLDERS, image_number, read_instances, thing_categories
from mask2former.data.preparation import Converted, Preparation, category_rows, instance_annotation, run
from mask2former.data.prepared_files import image_size, require_size


class Job(NamedTuple):
    image: Path
    instances: Path


def convert(job: Job) -> Converted:
    size, instances = read_instances(job.instances)
    require_size(job.instances, size, image_size(job.image), job.image)
    number = image_number(job.image)
    image = {"id": number, "file_name": job.image.name, "height": size[0], "width": size[1]}
    annotations = [
        {"image_id": number, "category_id": instance.category.id, "iscrowd": 0, **instance_annotation(instance.mask)}
        for instance in instances
    ]
    return Converted(row=(image, annotations))


def prepare(preparation: Preparation, split: str) -> None:
    root, half = preparation.root / "ADEChallengeData2016", SPLIT_FOLDERS[split]
    pairs = preparation.partners((root / "images" / half, ".jpg"), (root / "annotations_instance" / half, ".png"))
    rows = preparation.convert(convert, [Job(*pair) for pair in pairs], f"ADE20K instances {split}")
    annotations = [annotation for _, of_image in rows for annotation in of_image]
    content = {
        "images": [image for image, _ in rows],
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)],
        "categories": category_rows(thing_categories()),
    }
    preparation.write_json(root / f"ade20k_instance_{split}.json", content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(__doc__, prepare, splits=tuple(SPLIT_FOLDERS), arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
