"""The JSON files beside maps, and those of instances."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from mask2former.data.catalog import Category
from mask2former.tiling.results import Box, LargeInstance, LargeSegment

IMAGE_ID = 1  # there is one image in a file


def image_entry(name: str, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's entry of the raster."""
    return {"id": IMAGE_ID, "file_name": name, "height": size[0], "width": size[1]}


def category_entries(categories: Sequence[Category]) -> list[dict[str, Any]]:
    """COCO's entries; ids are those of the data set."""
    return [
        {"id": category.id, "name": category.name, "isthing": int(category.is_thing), "color": list(category.color)}
        for category in categories
    ]


def panoptic_document(
    image: dict[str, Any], map_name: str, segments: Sequence[LargeSegment], categories: Sequence[Category]
) -> dict[str, Any]:
    """In COCO's panoptic form, but that the ids are in a TIFF, as they are, and each segment has a score."""
    infos = [
        {
            "id": segment.id,
            "category_id": categories[segment.category_id].id,
            "isthing": int(segment.is_thing),
            "iscrowd": 0,
            "area": segment.area,
            "bbox": _coco_box(segment.box),
            "score": round(segment.score, 5),
        }
        for segment in segments
    ]
    annotation = {"image_id": IMAGE_ID, "file_name": map_name, "segments_info": infos}
    return {"images": [image], "annotations": [annotation], "categories": category_entries(categories)}


def semantic_document(
    image: dict[str, Any], map_name: str, areas: Sequence[int], categories: Sequence[Category]
) -> dict[str, Any]:
    """What the labels of a map mean, and how many pixels have each."""
    labels = [
        {"label": label, **entry, "area": area}
        for label, (entry, area) in enumerate(zip(category_entries(categories), areas, strict=True))
    ]
    return {"images": [image], "file_name": map_name, "labels": labels}


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write JSON."""
    path.write_text(json.dumps(document) + "\n", "utf-8")


class InstanceDocument:
    """A COCO annotation file, written instance by instance to an open text file."""

    def __init__(self, file: IO[str], image: dict[str, Any], categories: Sequence[Category]) -> None:
        self._file = file
        self._categories = categories
        self._size = [image["height"], image["width"]]
        self.count = 0
        head = json.dumps({"images": [image], "categories": category_entries(categories)})
        file.write(f'{head[:-1]}, "annotations": [')

    def add(self, instance: LargeInstance) -> None:
        """Write an annotation; it has a score, too."""
        self._file.write(",\n" if self.count else "\n")
        self.count += 1
        annotation = {
            "id": self.count,
            "image_id": IMAGE_ID,
            "category_id": self._categories[instance.category_id].id,
            "segmentation": {"size": self._size, "counts": instance.counts},
            "area": instance.area,
            "bbox": _coco_box(instance.box),
            "iscrowd": 0,
            "score": round(instance.score, 5),
        }
        self._file.write(json.dumps(annotation))

    def finish(self) -> None:
        """Write the end."""
        self._file.write("\n]}\n")


def _coco_box(box: Box) -> list[int]:
    return [box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0]
