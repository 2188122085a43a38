"""COCO panoptic annotations: a PNG for each image, and the list of its segments."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mask2former.data.images import read_panoptic_colors
from mask2former.data.targets import panoptic_ids
from mask2former.own_data.checks import masks, semantic
from mask2former.own_data.checks.coco import (
    CocoFile,
    Row,
    category_label,
    crowd_finding,
    read_coco,
    unlisted_images,
)
from mask2former.own_data.checks.plan import Plan, scan_image, size_text
from mask2former.own_data.findings import Finding, ImageScan, ObjectSize, fault, warning
from mask2former.own_data.json_document import Place
from mask2former.own_data.object_masks import bounding_box
from mask2former.own_data.source import Source

_LARGEST_ID = 256**3 - 1


@dataclass(frozen=True)
class ImageJob:
    """The look at one image and its PNG.

    Attributes:
        file: of the image.
        png: of the segments.
        json_file: of the annotations.
        row: of the image, with its position.
        annotation: its row, with its position.
        labels: contiguous id of each segment, None where the category is unknown.
        is_thing: by contiguous id; empty if the categories have faults.
        label_map: of the semantic evaluation, None without one.
    """

    file: str
    png: str
    json_file: str
    row: tuple[int, Row]
    annotation: tuple[int, Row]
    labels: Sequence[int | None]
    is_thing: Sequence[bool]
    label_map: semantic.LabelMap | None

    def __call__(self) -> ImageScan:
        place = ("images", self.row[0])
        scan = scan_image(self.file, self.json_file, place)
        size = (self.row[1]["height"], self.row[1]["width"])
        if scan.size is not None and scan.size != size:
            message = f"{self.file} is {size_text(scan.size)} (height x width), but its entry says {size_text(size)}"
            scan.findings.append(fault("image-size-differs", self.json_file, message, place))
        segments = self.annotation[1]["segments_info"]
        if not segments:
            scan.findings.append(warning("no-objects", self.json_file, f"{self.file} has no segment", self._place()))
        ids = self._ids(scan, size)
        if ids is not None:
            self._compare(scan, ids, segments)
        if self.label_map is not None:
            scan.findings += self.label_map.findings(size)
        return scan

    def _place(self, *inner: str | int) -> Place:
        return ("annotations", self.annotation[0], *inner)

    def _ids(self, scan: ImageScan, size: tuple[int, int]) -> NDArray[np.int32] | None:
        try:
            colors = read_panoptic_colors(self.png)
        except FileNotFoundError:
            message = f"there is no panoptic PNG {self.png}"
            scan.findings.append(fault("missing-png", self.json_file, message, self._place()))
            return None
        except ValueError as error:
            scan.findings.append(fault("unreadable-png", self.png, str(error)))
            return None
        if colors.shape[:2] != size:
            message = f"the PNG is {size_text(colors.shape)} (height x width), its image {size_text(size)}"
            scan.findings.append(fault("png-size-differs", self.png, message))
            return None
        return panoptic_ids(colors)

    def _compare(self, scan: ImageScan, ids: NDArray[np.int32], segments: Sequence[Row]) -> None:
        values, counts = np.unique(ids, return_counts=True)
        pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
        scan.unlabelled = pixels.pop(0, 0)
        listed = {segment["id"] for segment in segments}
        for number in sorted(pixels.keys() - listed):
            message = f"segment {number} of {self.png} ({pixels[number]} pixels) is not in segments_info"
            scan.findings.append(fault("segment-not-in-json", self.json_file, message, self._place("segments_info")))
        stuff: set[int] = set()
        for index, segment in enumerate(segments):
            place = self._place("segments_info", index)
            name = f"segment {segment['id']} of {self.row[1]['file_name']}"
            if segment["id"] not in pixels:
                message = f"{name} has no pixel in {self.png}"
                scan.findings.append(fault("segment-not-in-png", self.json_file, message, place))
                continue
            scan.findings += _area_and_box(segment, name, self.json_file, place, ids)
            label = self.labels[index]
            if label is None or segment.get("iscrowd", 0):
                continue
            if label in stuff:
                message = f"{name} is a second segment of the stuff category {segment['category_id']}"
                scan.findings.append(warning("stuff-in-several-segments", self.json_file, message, place))
            if label < len(self.is_thing) and not self.is_thing[label]:
                stuff.add(label)
            box = bounding_box(ids == segment["id"])
            scan.objects.append(ObjectSize(label, pixels[segment["id"]], box[3], box[2]))


def examine(source: Source) -> Plan:
    """The plan for COCO panoptic annotations, with the label maps of the semantic evaluation if there are any."""
    coco = read_coco(source.path("panoptic_json"), source)
    if isinstance(coco, Finding):
        return Plan(findings=[coco])
    folder, pngs = source.path("images"), source.path("panoptic_png")
    jobs = []
    for image_id, (image_index, image) in coco.images.items():
        annotation = _annotation_of(coco, image_id, image_index, image)
        if annotation is None:
            continue
        index, row = annotation
        labels = [_check_segment(coco, segment, image, ("annotations", index, "segments_info", n))
                  for n, segment in enumerate(row["segments_info"])]  # fmt: skip
        _check_ids(coco, row, image, index)
        jobs.append(
            ImageJob(
                file=str(folder / image["file_name"]),
                png=str(pngs / row["file_name"]),
                json_file=coco.path,
                row=(image_index, image),
                annotation=annotation,
                labels=labels,
                is_thing=[category.is_thing for category in coco.categories],
                label_map=_label_map(source, row["file_name"], len(coco.categories)),
            )
        )
    findings = [*coco.findings, *unlisted_images(coco, folder)]
    return Plan(findings=findings, categories=coco.categories, jobs=jobs, documents={coco.path: coco.document})


def _annotation_of(coco: CocoFile, image_id: Any, image_index: int, image: Row) -> tuple[int, Row] | None:
    """The annotation of an image, if there is one that can be used."""
    found = coco.annotations.get(image_id, [])
    if not found:
        message = f"{image['file_name']} (id {image_id!r}) has no annotation and will not be used"
        coco.findings.append(warning("no-annotation", coco.path, message, ("images", image_index)))
        return None
    for index, row in found[1:]:
        message = f"{image['file_name']} has a second annotation (id {row.get('id', index)!r})"
        coco.fault("duplicate-annotation", message, "annotations", index)
    index, row = found[0]
    segments = row.get("segments_info")
    if not isinstance(row.get("file_name"), str) or not isinstance(segments, list):
        message = f"the annotation of {image['file_name']} must have a file_name and a list segments_info"
        coco.fault("missing-key", message, "annotations", index)
        return None
    for number, segment in enumerate(segments):
        if not isinstance(segment, dict) or type(segment.get("id")) is not int:
            message = f"a segment of {image['file_name']} must have a whole number as its id, got {segment!r}"
            coco.fault("bad-segment-id", message, "annotations", index, "segments_info", number)
            return None
    return index, row


def _check_segment(coco: CocoFile, segment: Row, image: Row, place: Place) -> int | None:
    name = f"segment {segment['id']} of {image['file_name']}"
    if not 0 < segment["id"] <= _LARGEST_ID:
        message = f"{name} has an id outside 1..{_LARGEST_ID}; 0 is void"
        coco.fault("bad-segment-id", message, *place)
    if wrong := crowd_finding(segment, name, coco.path, place):
        coco.findings.append(wrong)
    return category_label(coco, segment, name, *place)


def _check_ids(coco: CocoFile, row: Row, image: Row, index: int) -> None:
    seen: set[int] = set()
    for number, segment in enumerate(row["segments_info"]):
        if segment["id"] in seen:
            message = f"segment {segment['id']} of {image['file_name']} is listed twice"
            coco.fault("duplicate-segment-id", message, "annotations", index, "segments_info", number)
        seen.add(segment["id"])


def _label_map(source: Source, file_name: str, num_classes: int) -> semantic.LabelMap | None:
    if source.semantic_masks is None:
        return None
    return semantic.LabelMap(str(Path(source.path("semantic_masks")) / file_name), num_classes, source.ignore_label)


def _area_and_box(segment: Row, name: str, file: str, place: Place, ids: NDArray[np.int32]) -> list[Finding]:
    """Whether area and bbox, where they are given, are those of the PNG."""
    mask = ids == segment["id"]
    found, area, box = [], int(mask.sum()), bounding_box(mask)
    if segment.get("area", area) != area:
        message = f"{name} has the area {segment['area']!r}, but {area} pixels in the PNG"
        found.append(fault("area-differs", file, message, place))
    given = segment.get("bbox", box)
    if problem := masks.impossible_box(given, mask.shape):
        found.append(fault("bad-bbox", file, f"{name} has the bbox {given!r}: {problem}", place))
    elif max(abs(a - b) for a, b in zip(given, box, strict=True)) > 1:
        found.append(fault("bbox-differs", file, f"{name} has the bbox {given}, but {box} in the PNG", place))
    return found
