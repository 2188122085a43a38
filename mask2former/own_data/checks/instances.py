"""COCO instance annotations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mask2former.own_data.checks import masks
from mask2former.own_data.checks.coco import Row, category_label, crowd_finding, read_coco, unlisted_images
from mask2former.own_data.checks.plan import Plan, scan_image, size_text
from mask2former.own_data.findings import Finding, ImageScan, ObjectSize, fault, note, warning
from mask2former.own_data.source import Source


@dataclass(frozen=True)
class ImageJob:
    """The look at one image.

    Attributes:
        file: of the image.
        json_file: of the annotations.
        row: of the image, with its position.
        annotations: rows with their positions and contiguous ids; None: the category is unknown.
        forbids_overlaps: whether shared pixels are a fault.
    """

    file: str
    json_file: str
    row: tuple[int, Row]
    annotations: Sequence[tuple[int, Row, int | None]]
    forbids_overlaps: bool

    def __call__(self) -> ImageScan:
        place = ("images", self.row[0])
        scan = scan_image(self.file, self.json_file, place)
        size = (self.row[1]["height"], self.row[1]["width"])
        if scan.size is not None and scan.size != size:
            message = f"{self.file} is {size_text(scan.size)} (height x width), but its entry says {size_text(size)}"
            scan.findings.append(fault("image-size-differs", self.json_file, message, place))
        found = [
            mask
            for index, row, label in self.annotations
            if (mask := self._annotation(scan, index, row, label, size)) is not None
        ]
        if not any(not row.get("iscrowd", 0) for _, row, _ in self.annotations):
            scan.findings.append(warning("no-objects", self.json_file, f"{self.file} has no object", place))
        scan.findings += [*masks.duplicates(found), *overlap_findings(found, forbidden=self.forbids_overlaps)]
        return scan

    def _annotation(
        self, scan: ImageScan, index: int, row: Row, label: int | None, size: tuple[int, int]
    ) -> masks.CheckedMask | None:
        """Its mask, if it has one; findings and size of the object go into the scan."""
        place = ("annotations", index)
        name = f"annotation {row.get('id', f'number {index}')} of {self.row[1]['file_name']}"
        if wrong := crowd_finding(row, name, self.json_file, place):
            scan.findings.append(wrong)
        result = masks.decoded(row.get("segmentation"), size)
        if isinstance(result, list):
            scan.findings += [fault(code, self.json_file, f"{name}: {message}", place) for code, message in result]
            return None
        is_crowd = bool(row.get("iscrowd", 0))
        mask = masks.checked(result, name, self.json_file, place, is_crowd=is_crowd)
        scan.findings += masks.box_and_area(row, mask, size)
        if (beyond := masks.beyond_edge(row["segmentation"], size)) > 1:
            message = f"{name} reaches {beyond:.1f} pixels beyond the image, where it is cut off"
            scan.findings.append(warning("polygon-beyond-edge", self.json_file, message, place))
        if label is not None and not is_crowd:
            scan.objects.append(ObjectSize(label, mask.pixels, mask.box[3], mask.box[2]))
        return mask


def examine(source: Source, *, forbids_overlaps: bool) -> Plan:
    """The plan for COCO instances."""
    coco = read_coco(source.path("coco_json"), source)
    if isinstance(coco, Finding):
        return Plan(findings=[coco])
    folder = source.path("images")
    _check_ids(coco.findings, coco.path, [pair for rows in coco.annotations.values() for pair in rows])
    jobs = []
    for image_id, (image_index, image) in coco.images.items():
        annotations = []
        for index, row in coco.annotations.get(image_id, ()):
            what = f"annotation {row.get('id', f'number {index}')} of {image['file_name']}"
            annotations.append((index, row, category_label(coco, row, what, "annotations", index)))
        file = str(folder / image["file_name"])
        jobs.append(ImageJob(file, coco.path, (image_index, image), annotations, forbids_overlaps))
    findings = [*coco.findings, *unlisted_images(coco, folder)]
    return Plan(findings=findings, categories=coco.categories, jobs=jobs, documents={coco.path: coco.document})


def overlap_findings(found: Sequence[masks.CheckedMask], *, forbidden: bool) -> list[Finding]:
    """A fault for each pair that shares pixels where that is forbidden, else one note with their number."""
    pairs = masks.overlaps(found)
    if forbidden:
        return [
            fault("overlapping-masks", a.file, f"{a.name} and {b.name} share {pixels} pixels", a.place)
            for a, b, pixels in pairs
        ]
    if not pairs:
        return []
    a, b, pixels = max(pairs, key=lambda pair: pair[2])
    message = f"{len(pairs)} pairs of masks overlap, most of all {a.name} and {b.name} by {pixels} pixels"
    return [note("overlapping-masks", a.file, message, a.place)]


def _check_ids(findings: list[Finding], file: str, rows: Sequence[tuple[int, Row]]) -> None:
    """Ids of annotations must differ; nothing needs them, so they may be missing."""
    seen: dict[Any, int] = {}
    for index, row in sorted(rows, key=lambda pair: pair[0]):
        number = row.get("id")
        if not isinstance(number, int | str):
            continue
        if number in seen:
            message = f"annotation id {number!r} is given to entry {index} too, entry {seen[number]} has it"
            findings.append(fault("duplicate-annotation-id", file, message, ("annotations", index)))
        seen.setdefault(number, index)
