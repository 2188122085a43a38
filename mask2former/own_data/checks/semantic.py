"""Label maps: a PNG for each image whose values are positions in the list of classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mask2former.data.images import read_label_map
from mask2former.data.records import IMAGE_SUFFIXES
from mask2former.own_data.checks.plan import Plan, files_below, scan_image, size_text
from mask2former.own_data.classes import categories_of
from mask2former.own_data.findings import Finding, ImageScan, ObjectSize, fault, note, warning
from mask2former.own_data.object_masks import bounding_box
from mask2former.own_data.source import Source

LABEL_SUFFIX = ".png"


@dataclass(frozen=True)
class LabelMap:
    """A label map that is to be looked at.

    Attributes:
        file: of the map.
        num_classes: values must be below it,
        ignore_label: or be this.
    """

    file: str
    num_classes: int
    ignore_label: int

    def findings(self, size: tuple[int, int] | None) -> list[Finding]:
        """What is wrong with it, for an image of this (height, width); None: the image cannot be read."""
        labels = self.read(size)
        return labels if isinstance(labels, list) else self.value_findings(labels)

    def read(self, size: tuple[int, int] | None) -> NDArray[np.integer] | list[Finding]:
        """The (H, W) labels, or why they cannot be used."""
        try:
            labels: NDArray[np.integer] = read_label_map(self.file)
        except FileNotFoundError:
            return [fault("missing-label-map", self.file, "there is no such label map")]
        except ValueError as error:
            return [fault("unreadable-label-map", self.file, str(error))]
        if size is not None and labels.shape != size:
            message = f"the label map is {size_text(labels.shape)} (height x width), its image {size_text(size)}"
            return [fault("label-map-size-differs", self.file, message)]
        return labels

    def value_findings(self, labels: NDArray[np.integer]) -> list[Finding]:
        """Values that are no class, and maps without any class."""
        values, counts = np.unique(labels, return_counts=True)
        used = values != self.ignore_label
        bad = used & ((values >= self.num_classes) | (values < 0))
        found = []
        if bad.any():
            shown = ", ".join(f"{v} ({n} pixels)" for v, n in zip(values[bad][:5], counts[bad][:5], strict=True))
            rule = f"must be below {self.num_classes}, the number of classes, or {self.ignore_label} (ignored)"
            found.append(fault("label-out-of-range", self.file, f"labels {rule}, got {shown}"))
        if not used.any():
            message = f"all pixels are {self.ignore_label}, which is ignored"
            found.append(warning("no-objects", self.file, message))
        return found


@dataclass(frozen=True)
class ImageJob:
    """The look at one image and its label map."""

    file: str
    label_map: LabelMap

    def __call__(self) -> ImageScan:
        scan = scan_image(self.file)
        labels = self.label_map.read(scan.size)
        if isinstance(labels, list):
            scan.findings += labels
            return scan
        scan.findings += self.label_map.value_findings(labels)
        ignored = labels == self.label_map.ignore_label
        scan.unlabelled = int(ignored.sum())
        for value in np.unique(labels[~ignored]).tolist():
            if 0 <= value < self.label_map.num_classes:
                mask = labels == value
                box = bounding_box(mask)
                scan.objects.append(ObjectSize(value, int(mask.sum()), box[3], box[2]))
        return scan


def examine(source: Source) -> Plan:
    """The plan for label maps; images and maps are paired by their paths without suffix."""
    images_root, labels_root = source.path("images"), source.path("semantic_masks")
    try:
        categories = categories_of(source)
    except (ValueError, FileNotFoundError) as error:
        return Plan(
            findings=[fault("bad-classes", source.classes if isinstance(source.classes, str) else "", str(error))]
        )
    findings: list[Finding] = []
    images = _by_stem(images_root, IMAGE_SUFFIXES, findings)
    labels = _by_stem(labels_root, {LABEL_SUFFIX}, findings)
    for stem in sorted(images.keys() - labels.keys()):
        message = f"there is no label map {labels_root / stem}{LABEL_SUFFIX} for this image"
        findings.append(fault("missing-label-map", images[stem], message))
    for stem in sorted(labels.keys() - images.keys()):
        message = f"there is no image {images_root / stem}.* for this label map"
        findings.append(fault("missing-image", labels[stem], message))
    if source.ignore_label < len(categories):
        name = categories[source.ignore_label].name
        message = f"the ignored label {source.ignore_label} is also class {name!r}, which will not be learned"
        findings.append(note("ignored-class", labels_root, message))
    jobs = [
        ImageJob(str(images[stem]), LabelMap(str(labels[stem]), len(categories), source.ignore_label))
        for stem in sorted(images.keys() & labels.keys())
    ]
    return Plan(findings=findings, categories=categories, jobs=jobs)


def absent_background(source: Source, pixels_by_class: Sequence[int]) -> list[Finding]:
    """A warning if the first class never occurs: labels that are counted from 1 look like that."""
    if source.kind != "semantic" or source.ignore_label == 0 or not pixels_by_class:
        return []
    if pixels_by_class[0] or not any(pixels_by_class):
        return []
    message = "no pixel has the label 0: are labels counted from 1? Class 0 is the first of the list"
    return [warning("no-label-zero", source.path("semantic_masks"), message)]


def _by_stem(folder: Path, suffixes: frozenset[str] | set[str], findings: list[Finding]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files_below(folder, suffixes):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            message = (
                f"{found[stem].name} and {path.name} differ only in their suffix, so that their partner is not clear"
            )
            findings.append(fault("ambiguous-name", path, message))
        found[stem] = path
    return found
