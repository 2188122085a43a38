"""Prepares the instance annotations of Mapillary Vistas v1.2: 37 classes.

Reads, below FOLDER/mapillary_vistas:
    {training,validation}/images/*.jpg
    {training,validation}/panoptic/panoptic_2018.json
    {training,validation}/panoptic/*.png              segment id = R + 256 G + 65536 B, 0 void
Writes, in COCO's format with compressed RLE:
    mapillary_vistas_instance_{train,val}.json        image and category ids are those of panoptic_2018.json
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if importlib.util.find_spec("mask2former") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mask2former.data.catalog import Category, read_categories
from mask2former.data.panoptic_raw import PanopticImage, read_panoptic_json, read_segment_map
from mask2former.data.preparation import Converted, Preparation, category_rows, instance_annotation, run
from mask2former.data.prepared_files import PreparationError, image_size, listed, require_size

SPLIT_FOLDERS = {"train": "training", "val": "validation"}


class Job(NamedTuple):
    photo: Path
    image: PanopticImage


def convert(categories: frozenset[int], job: Job) -> Converted:
    """`categories` are those of the JSON file, with "unlabelled" ones."""
    row = {**job.image.row, "file_name": job.photo.name}
    require_size(job.photo, image_size(job.photo), (row["height"], row["width"]), job.image.json_file)
    ids = np.asfortranarray(read_segment_map(job.image, categories))  # as masks are encoded
    things = {category.id for category in thing_categories()}
    annotations = [
        {
            "image_id": row["id"],
            "category_id": segment["category_id"],
            "iscrowd": int(segment.get("iscrowd", 0)),
            **instance_annotation(ids == segment["id"]),
        }
        for segment in job.image.segments
        if segment["category_id"] in things
    ]
    return Converted(row=(row, annotations))


def thing_categories() -> tuple[Category, ...]:
    return tuple(category for category in read_categories("mapillary_vistas") if category.is_thing)


def require_version(rows: list[Mapping[str, Any]], json_file: Path) -> None:
    """
    Raises:
        PreparationError: the categories are those of another version of the data set.
    """
    known = {row["id"]: bool(row["isthing"]) for row in rows}
    wrong = [c.id for c in read_categories("mapillary_vistas") if known.get(c.id) is not c.is_thing]
    if wrong:
        raise PreparationError(
            f"{json_file}: is not of v1.2: categories {listed(wrong)} are missing, or things instead of stuff, "
            "or stuff instead of things"
        )


def prepare(preparation: Preparation, split: str) -> None:
    root = preparation.root / "mapillary_vistas"
    half = root / SPLIT_FOLDERS[split]
    json_file = half / "panoptic" / "panoptic_2018.json"
    images, categories = read_panoptic_json(json_file, half / "panoptic")
    require_version(categories, json_file)
    known = frozenset(category["id"] for category in categories)
    jobs = [Job(half / "images" / f"{image.png.stem}.jpg", image) for image in images]
    rows = preparation.convert(partial(convert, known), jobs, f"Mapillary Vistas instances {split}")
    annotations = [annotation for _, of_image in rows for annotation in of_image]
    content = {
        "images": [image for image, _ in rows],
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)],
        "categories": category_rows(thing_categories()),
    }
    preparation.write_json(root / f"mapillary_vistas_instance_{split}.json", content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(__doc__, prepare, splits=tuple(SPLIT_FOLDERS), arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
