"""Annotation files to records: one plain dict per image, in Detectron2's standard data-set form.

Keys: `file_name`, `image_id`, `height`, `width`, and, depending on the loader, `annotations`,
`pan_seg_file_name` with `segments_info`, or `sem_seg_file_name`. Category ids in records are contiguous.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from mask2former.data.catalog import Category, contiguous_ids

Record = dict[str, Any]
"""One image and its annotations."""

XYWH_ABS = 1
"""`bbox_mode` of (x, y, width, height) in pixels, as Detectron2 counts."""

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_logger = logging.getLogger(__name__)


def load_coco_instances(
    json_file: str | Path,
    image_dir: str | Path,
    categories: Sequence[Category],
    *,
    image_file: Callable[[Mapping[str, Any]], str] | None = None,
    image_keys: Sequence[str] = (),
) -> list[Record]:
    """Reads a COCO instance file.

    Images without annotations are kept, with an empty list. Segmentations stay as they are in the file:
    polygons, compressed RLE or uncompressed RLE.

    Args:
        json_file: the file.
        image_dir: folder of the images.
        categories: that the file may use.
        image_file: path of an image below `image_dir`; None: its "file_name".
        image_keys: what else of an image its record keeps.

    Returns:
        records in the order of the image ids.

    Raises:
        ValueError: a category id is not among `categories`, an annotation is of an unknown image, or the
            file lacks something.
    """
    content = _read_json(json_file)
    lookup = contiguous_ids(categories)
    images = _images_by_id(content, json_file, needs_file_name=image_file is None)
    annotations: dict[Any, list[Record]] = defaultdict(list)
    for annotation in content.get("annotations", []):
        where = f"{json_file}: annotation {annotation.get('id')} of image {annotation.get('image_id')}"
        _require_keys(annotation, ("image_id", "category_id"), where)
        if annotation["image_id"] not in images:
            raise ValueError(f"{where}: the file has no such image")
        category = _contiguous(annotation["category_id"], lookup, where)
        annotations[annotation["image_id"]].append(_instance(annotation, category))
    records = []
    for image_id in sorted(images):
        image = images[image_id]
        record = _image_record(image, image_dir, image_file(image) if image_file else image["file_name"])
        record |= {key: image[key] for key in image_keys if key in image}
        records.append(record | {"annotations": annotations[image_id]})
    return records


def load_coco_panoptic(
    json_file: str | Path,
    image_dir: str | Path,
    panoptic_dir: str | Path,
    categories: Sequence[Category],
    semantic_dir: str | Path | None = None,
    *,
    image_file: Callable[[Mapping[str, Any], Mapping[str, Any]], str] | None = None,
    semantic_file: Callable[[Mapping[str, Any]], str] | None = None,
) -> list[Record]:
    """Reads a COCO panoptic file.

    Images whose `segments_info` is empty are kept.

    Args:
        json_file: the file.
        image_dir: folder of the images.
        panoptic_dir: folder of the panoptic PNGs.
        categories: that the file may use.
        semantic_dir: folder of label maps; with it, records have `sem_seg_file_name` too.
        image_file: path below `image_dir`, from the file's image and annotation; None: the image's "file_name".
        semantic_file: path below `semantic_dir`, from the annotation; None: its "file_name".

    Returns:
        records in the order of the annotations.

    Raises:
        ValueError: a category id is not among `categories`, an annotation is of an unknown image, or the
            file lacks something.
    """
    content = _read_json(json_file)
    lookup = contiguous_ids(categories)
    images = _images_by_id(content, json_file, needs_file_name=image_file is None)
    records = []
    for annotation in content.get("annotations", []):
        image_id = annotation.get("image_id")
        where = f"{json_file}: annotation of image {image_id}"
        _require_keys(annotation, ("image_id", "file_name", "segments_info"), where)
        if image_id not in images:
            raise ValueError(f"{where}: the file has no such image")
        segments = []
        for segment in annotation["segments_info"]:
            where = f"{json_file}: segment {segment.get('id')} of image {image_id}"
            _require_keys(segment, ("id", "category_id"), where)
            category = _contiguous(segment["category_id"], lookup, where)
            segments.append(_segment(segment, category, categories[category].is_thing))
        image = images[image_id]
        path = image_file(image, annotation) if image_file else image["file_name"]
        record = _image_record(image, image_dir, path)
        record["pan_seg_file_name"] = str(Path(panoptic_dir) / annotation["file_name"])
        record["segments_info"] = segments
        if semantic_dir is not None:
            path = semantic_file(annotation) if semantic_file else annotation["file_name"]
            record["sem_seg_file_name"] = str(Path(semantic_dir) / path)
        records.append(record)
    return records


def load_semantic_folder(
    image_dir: str | Path, label_dir: str | Path, *, label_suffix: str = ".png"
) -> list[Record]:
    """Pairs images with label maps that have the same path below their folder, but for the suffix.

    An image without a label map, or the other way round, is left out with a warning. Sizes are those in
    the label maps' headers.

    Returns:
        records in the order of the paths; `image_id` is the path below `image_dir` without suffix.

    Raises:
        FileNotFoundError: there is no pair at all.
        ValueError: two images have the same path but for the suffix.
    """
    images = _files_by_stem(Path(image_dir), IMAGE_SUFFIXES)
    labels = _files_by_stem(Path(label_dir), {label_suffix.lower()})
    both = sorted(images.keys() & labels.keys())
    if not both:
        raise FileNotFoundError(
            f"no image in {image_dir} ({len(images)} images) has a label map of the same name "
            f"in {label_dir} ({len(labels)} files *{label_suffix})"
        )
    if lonely := sorted(images.keys() ^ labels.keys()):
        _logger.warning(
            "%s and %s: %d files have no partner and are left out, the first is %s",
            image_dir, label_dir, len(lonely), lonely[0],
        )  # fmt: skip
    records = []
    for stem in both:
        with Image.open(labels[stem]) as label_map:
            width, height = label_map.size
        records.append({
            "file_name": str(images[stem]), "image_id": stem, "height": height, "width": width,
            "sem_seg_file_name": str(labels[stem]),
        })  # fmt: skip
    return records


def filter_empty(records: Iterable[Record]) -> list[Record]:
    """Drops records that have no annotation or only crowd annotations, as Detectron2's
    `DATALOADER.FILTER_EMPTY_ANNOTATIONS` does. Records without the key `annotations` (panoptic and
    semantic ones) stay.
    """
    everything = list(records)
    if all(isinstance(record.get("annotations", []), list) for record in everything):
        return [record for record in everything if _has_object(record)]
    _logger.info("Reading the annotations of %d images to find those without objects", len(everything))
    with ThreadPoolExecutor() as pool:  # annotations that are read from a file at each pass
        return [record for record, kept in zip(everything, pool.map(_has_object, everything), strict=True) if kept]


def _has_object(record: Record) -> bool:
    return "annotations" not in record or any(not a.get("iscrowd", 0) for a in record["annotations"])


def _read_json(json_file: str | Path) -> Any:
    try:
        return json.loads(Path(json_file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{json_file} is not valid JSON: {error}") from error


def _images_by_id(content: Any, json_file: str | Path, *, needs_file_name: bool) -> dict[Any, Mapping[str, Any]]:
    if not isinstance(content, dict) or "images" not in content:
        raise ValueError(f"{json_file} is no COCO file: it has no 'images'")
    needed = ("id", "height", "width", "file_name")[: None if needs_file_name else -1]
    for image in content["images"]:
        _require_keys(image, needed, f"{json_file}: image {image.get('id')}")
    return {image["id"]: image for image in content["images"]}


def _require_keys(row: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    if missing := [key for key in keys if key not in row]:
        raise ValueError(f"{where} has no {missing[0]!r}")


def _contiguous(category_id: int, lookup: Mapping[int, int], where: str) -> int:
    if category_id not in lookup:
        raise ValueError(f"{where}: category_id {category_id} is not one of the {len(lookup)} classes")
    return lookup[category_id]


def _image_record(image: Mapping[str, Any], image_dir: str | Path, path: str) -> Record:
    return {
        "file_name": str(Path(image_dir) / path),
        "image_id": image["id"],
        "height": image["height"],
        "width": image["width"],
    }


def _instance(annotation: Mapping[str, Any], category: int) -> Record:
    kept = {key: annotation[key] for key in ("bbox", "segmentation") if key in annotation}
    if "bbox" in kept:
        kept["bbox_mode"] = XYWH_ABS
    return {**kept, "category_id": category, "iscrowd": annotation.get("iscrowd", 0)}


def _segment(segment: Mapping[str, Any], category: int, is_thing: bool) -> Record:
    iscrowd = segment.get("iscrowd", 0)
    return {**segment, "category_id": category, "iscrowd": iscrowd, "isthing": is_thing}


def _files_by_stem(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """Files below the folder by their relative path without suffix, with forward slashes."""
    allowed = set(suffixes)
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in allowed:
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise ValueError(f"{found[stem]} and {path} differ only in their suffix")
        found[stem] = path
    return found
