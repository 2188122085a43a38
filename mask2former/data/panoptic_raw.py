"""Annotations in COCO's panoptic format as one downloads them: a JSON file and a PNG for each image."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mask2former.data.prepared_files import (
    PreparationError,
    listed,
    read_json,
    read_segment_ids,
    require_size,
)

_IMAGE_KEYS = ("id", "file_name", "height", "width")


class PanopticImage(NamedTuple):
    """One image of a panoptic JSON file.

    Attributes:
        row: its id, file_name, height and width.
        png: its segment ids.
        segments: its "segments_info".
        json_file: for messages.
    """

    row: Mapping[str, Any]
    png: Path
    segments: list[Mapping[str, Any]]
    json_file: Path


def read_panoptic_json(path: Path, png_folder: Path) -> tuple[list[PanopticImage], list[Mapping[str, Any]]]:
    """
    Args:
        path: the JSON file.
        png_folder: where its PNGs are.

    Returns:
        the images in the order of the annotations, and the categories.

    Raises:
        PreparationError: the file is missing, damaged or lacks something.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise PreparationError(f"{path}: is no panoptic JSON file, it holds a {type(content).__name__}")
    images, annotations, categories = (_rows(content, key, path) for key in ("images", "annotations", "categories"))
    for category in categories:
        _require_keys(category, ("id", "isthing"), path)
    for image in images:
        _require_keys(image, _IMAGE_KEYS, path)
    by_id = {image["id"]: {key: image[key] for key in _IMAGE_KEYS} for image in images}
    found = []
    for annotation in annotations:
        _require_keys(annotation, ("image_id", "file_name", "segments_info"), path)
        if annotation["image_id"] not in by_id:
            raise PreparationError(f"{path}: has an annotation of image {annotation['image_id']}, but no such image")
        row = by_id[annotation["image_id"]]
        segments = _rows(annotation, "segments_info", path)
        found.append(PanopticImage(row, png_folder / annotation["file_name"], segments, path))
    return found, categories


def read_segment_map(image: PanopticImage, categories: Collection[int]) -> NDArray[np.int32]:
    """The segment ids of an image, (H, W).

    Args:
        image: the image.
        categories: ids that its segments' categories may have.

    Raises:
        PreparationError: the PNG is missing, damaged or not as large as the JSON file says, or the segments of the
            JSON file have an id twice, an unknown category, or no pixel.
    """
    ids = read_segment_ids(image.png)
    require_size(image.png, ids.shape, (image.row["height"], image.row["width"]), image.json_file)
    where = f"{image.json_file}: the annotation of {image.png.name}"
    for segment in image.segments:
        _require_keys(segment, ("id", "category_id"), where)
    unknown = {segment["category_id"] for segment in image.segments} - set(categories)
    if unknown:
        raise PreparationError(f"{where} has segments of unknown categories: {listed(sorted(unknown))}")
    named = [segment["id"] for segment in image.segments]
    if len(set(named)) < len(named):
        raise PreparationError(f"{where} has two segments with one id")
    if absent := sorted(set(named) - set(np.unique(ids).tolist())):
        raise PreparationError(f"{image.png}: has no pixel of segments that {image.json_file} has: {listed(absent)}")
    return ids


def _rows(content: Mapping[str, Any], key: str, path: Path) -> list[Mapping[str, Any]]:
    rows = content.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise PreparationError(f"{path}: {key!r} must be a list of objects")
    return rows


def _require_keys(row: Mapping[str, Any], keys: tuple[str, ...], where: object) -> None:
    if missing := [key for key in keys if key not in row]:
        raise PreparationError(f"{where}: {missing[0]!r} is missing in {str(dict(row))[:80]}")
