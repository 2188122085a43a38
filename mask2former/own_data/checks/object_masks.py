"""Folders with one binary mask for each object."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mask2former.data.images import read_binary_mask
from mask2former.data.records import IMAGE_SUFFIXES
from mask2former.own_data.checks import masks
from mask2former.own_data.checks.instances import overlap_findings
from mask2former.own_data.checks.plan import Plan, files_below, scan_image, size_text
from mask2former.own_data.classes import categories_of
from mask2former.own_data.findings import Finding, ImageScan, ObjectSize, fault, note, warning
from mask2former.own_data.object_masks import ObjectFolder, ObjectMask, object_folders
from mask2former.own_data.source import Source


@dataclass(frozen=True)
class ImageJob:
    """The look at one image's folder.

    Attributes:
        folder: of the image and its masks.
        class_names: by contiguous id.
        forbids_overlaps: whether shared pixels are a fault.
    """

    folder: ObjectFolder
    class_names: Sequence[str]
    forbids_overlaps: bool

    def __call__(self) -> ImageScan:
        scan = scan_image(str(self.folder.images[0]))
        if not self.folder.masks:
            scan.findings.append(warning("no-objects", self.folder.images[0], "there is no mask for this image"))
        found = [mask for part in self.folder.masks if (mask := self._mask(scan, part)) is not None]
        scan.findings += [*masks.duplicates(found), *overlap_findings(found, forbidden=self.forbids_overlaps)]
        return scan

    def _mask(self, scan: ImageScan, part: ObjectMask) -> masks.CheckedMask | None:
        label = self._label(scan, part)
        try:
            pixels = read_binary_mask(part.path)
        except ValueError as error:
            scan.findings.append(fault("unreadable-mask", part.path, str(error)))
            return None
        if scan.size is not None and pixels.shape != scan.size:
            message = f"the mask is {size_text(pixels.shape)} (height x width), its image {size_text(scan.size)}"
            scan.findings.append(fault("mask-size-differs", part.path, message))
            return None
        if not pixels.any():
            scan.findings.append(fault("empty-mask", part.path, "the mask covers no pixel"))
            return None
        if (values := _number_of_values(part.path)) > 2:
            message = f"the mask has {values} values; all that are not 0 are taken as one object"
            scan.findings.append(warning("mask-not-binary", part.path, message))
        mask = masks.checked(pixels, part.path.name, str(part.path))
        if label is not None:
            scan.objects.append(ObjectSize(label, mask.pixels, mask.box[3], mask.box[2]))
        return mask

    def _label(self, scan: ImageScan, part: ObjectMask) -> int | None:
        if part.class_name is None and len(self.class_names) == 1:
            return 0
        if part.class_name is not None and part.class_name in self.class_names:
            return list(self.class_names).index(part.class_name)
        message = f"the mask must lie in a folder named after its class, one of {', '.join(self.class_names)}"
        scan.findings.append(fault("unknown-category", part.path, f"{message}, got {part.class_name!r}"))
        return None


def examine(source: Source, *, forbids_overlaps: bool) -> Plan:
    """The plan for folders of masks."""
    root = source.path("object_masks")
    images_root = None if source.images is None else source.path("images")
    try:
        categories = categories_of(source)
    except (ValueError, FileNotFoundError) as error:
        return Plan(findings=[fault("bad-classes", root, str(error))])
    findings: list[Finding] = []
    jobs = []
    for folder in object_folders(root, images_root):
        if not folder.images:
            where = root / folder.name / "images" if images_root is None else images_root / f"{folder.name}.*"
            findings.append(fault("missing-image", root / folder.name, f"there is no image {where} for these masks"))
        elif len(folder.images) > 1:
            names = ", ".join(path.name for path in folder.images)
            findings.append(fault("ambiguous-name", root / folder.name, f"several images are for these masks: {names}"))
        else:
            jobs.append(ImageJob(folder, [category.name for category in categories], forbids_overlaps))
    if images_root is not None:
        names_of_folders = {path.name for path in root.iterdir() if path.is_dir()}
        others = [path for path in files_below(images_root, IMAGE_SUFFIXES) if path.stem not in names_of_folders]
        if others:
            message = f"{len(others)} images have no folder of masks and will not be used, the first is {others[0]}"
            findings.append(note("unlisted-images", images_root, message))
    return Plan(findings=findings, categories=categories, jobs=jobs)


def _number_of_values(path: Path) -> int:
    """How many values the pixels of a readable mask have."""
    with Image.open(path) as image:
        is_grey = len(image.getbands()) == 1
        return len(np.unique(np.asarray(image if is_grey else image.convert("L"))))
