"""What COCO's instance and panoptic files share: the lists of images, categories and annotations."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mask2former.data.catalog import Category
from mask2former.data.records import IMAGE_SUFFIXES
from mask2former.own_data.checks.plan import files_below
from mask2former.own_data.classes import categories_of
from mask2former.own_data.findings import Finding, fault, note, warning
from mask2former.own_data.json_document import DamagedJsonError, JsonDocument, Place
from mask2former.own_data.source import Source

Row = Mapping[str, Any]


@dataclass(kw_only=True)
class CocoFile:
    """The usable rows of a file, with their positions in its lists.

    Attributes:
        document: the file.
        findings: what is wrong with the others.
        categories: by contiguous id.
        labels: contiguous id by the file's category id.
        images: by id.
        annotations: with a known image, by its id.
    """

    document: JsonDocument
    findings: list[Finding] = field(default_factory=list)
    categories: tuple[Category, ...] = ()
    labels: dict[Any, int] = field(default_factory=dict)
    images: dict[Any, tuple[int, Row]] = field(default_factory=dict)
    annotations: dict[Any, list[tuple[int, Row]]] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return str(self.document.path)

    def fault(self, code: str, message: str, *place: str | int) -> None:
        self.findings.append(fault(code, self.path, message, place))


def read_coco(path: Path, source: Source) -> CocoFile | Finding:
    """Reads and checks the three lists; a file that is no COCO file at all is one finding."""
    try:
        document = JsonDocument(path)
    except DamagedJsonError as error:
        damaged = fault("json-syntax", path, f"this is no JSON: {error.reason}")
        return Finding(**{**vars(damaged), "position": error.position})
    if not isinstance(document.content, dict):
        message = "the file must hold an object with images, annotations and categories"
        return fault("json-structure", path, message, ()).located({str(path): document})
    coco = CocoFile(document=document)
    _read_categories(coco, source)
    _read_images(coco)
    for index, row in _rows(coco, "annotations", ("image_id",)):
        if not isinstance(row["image_id"], int | str) or row["image_id"] not in coco.images:
            message = f"annotation {row.get('id', index)} is of image {row['image_id']!r}, which the file does not list"
            coco.fault("unknown-image", message, "annotations", index)
        else:
            coco.annotations.setdefault(row["image_id"], []).append((index, row))
    return coco


def category_label(coco: CocoFile, row: Row, what: str, *place: str | int) -> int | None:
    """The contiguous id of an annotation's category; None, with a fault, if the file does not list it."""
    category = row.get("category_id")
    if isinstance(category, bool | int | str) and category in coco.labels:
        return coco.labels[category]
    known = f"the {len(coco.labels)} ids of the file's categories"
    coco.fault("unknown-category", f"{what} has category_id {category!r}, which is none of {known}", *place)
    return None


def crowd_finding(row: Row, what: str, file: str, place: Place) -> Finding | None:
    """A fault if iscrowd is there and neither 0 nor 1."""
    value = row.get("iscrowd", 0)
    if value in (0, 1):
        return None
    return fault("bad-iscrowd", file, f"{what} has iscrowd {value!r}, which must be 0 or 1", place)


def unlisted_images(coco: CocoFile, folder: Path) -> list[Finding]:
    """A note if the folder has images that the file does not name."""
    listed = {(folder / row["file_name"]).resolve() for _, row in coco.images.values()}
    others = [path for path in files_below(folder, IMAGE_SUFFIXES) if path.resolve() not in listed]
    if not others:
        return []
    message = f"{len(others)} images are not in {coco.path} and will not be used, the first is {others[0]}"
    return [note("unlisted-images", folder, message)]


def _read_categories(coco: CocoFile, source: Source) -> None:
    is_panoptic = source.kind == "panoptic"
    before = len(coco.findings)
    ids: list[Any] = []
    names: list[Any] = []
    for index, row in _rows(coco, "categories", ("id", "name", "isthing") if is_panoptic else ("id", "name")):
        _check_category(coco, row, ids, names, ("categories", index))
        if is_panoptic and row["isthing"] not in (0, 1):
            message = f"category {row['name']!r} has isthing {row['isthing']!r}, which must be 0 or 1"
            coco.fault("bad-isthing", message, "categories", index)
        ids.append(row["id"])
        names.append(row["name"])
    if not ids and len(coco.findings) == before:
        coco.fault("no-categories", "the list of categories is empty", "categories")
    if len(coco.findings) > before:
        coco.labels = _any_labels(coco)
        return
    try:
        coco.categories = categories_of(source)
    except (ValueError, FileNotFoundError) as error:
        coco.fault("bad-classes", str(error), "categories")
        coco.labels = _any_labels(coco)
        return
    coco.labels = {category.id: label for label, category in enumerate(coco.categories)}
    _note_gaps(coco, sorted(ids))


def _any_labels(coco: CocoFile) -> dict[Any, int]:
    """Ids of categories that have faults themselves, so that their annotations are not called faulty too."""
    rows = coco.document.content.get("categories")
    ids = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {number: label for label, number in enumerate(ids) if isinstance(number, int | str)}


def _check_category(coco: CocoFile, row: Row, ids: Sequence[Any], names: Sequence[Any], place: Place) -> None:
    number, name = row["id"], row["name"]
    if type(number) is not int or number < 0:
        coco.fault("bad-category-id", f"category {name!r} has the id {number!r}, no whole number from 0", *place)
    elif number in ids:
        coco.fault("duplicate-category-id", f"category id {number} is given to {name!r} too", *place)
    if not isinstance(name, str) or not name.strip():
        coco.fault("empty-category-name", f"category {number!r} has the name {name!r}", *place)
    elif name in names:
        coco.fault("duplicate-category-name", f"two categories have the name {name!r}", *place)


def _note_gaps(coco: CocoFile, ids: Sequence[int]) -> None:
    if ids[-1] - ids[0] + 1 != len(ids) or ids[0] > 1:
        message = (
            f"the {len(ids)} category ids from {ids[0]} to {ids[-1]} have gaps or do not begin at 0 or 1, which is fine"
        )
        coco.findings.append(note("category-id-gaps", coco.path, message, ("categories",)))


def _read_images(coco: CocoFile) -> None:
    files: dict[str, Any] = {}
    for index, row in _rows(coco, "images", ("id", "file_name", "height", "width")):
        place, size = ("images", index), (row["height"], row["width"])
        if any(type(edge) is not int or edge < 1 for edge in size):
            message = (
                f"image {row['id']!r} has height {size[0]!r} and width {size[1]!r}, which must be whole numbers from 1"
            )
            coco.fault("bad-image-size", message, *place)
            continue
        if not isinstance(row["file_name"], str) or not isinstance(row["id"], int | str):
            message = f"id and file_name must be a number and a text, got {row['id']!r} and {row['file_name']!r}"
            coco.fault("bad-image-row", message, *place)
            continue
        if row["id"] in coco.images:
            other = coco.images[row["id"]][1]["file_name"]
            coco.fault("duplicate-image-id", f"{row['file_name']} has the id {row['id']!r} of {other}", *place)
            continue
        if row["file_name"] in files:
            message = f"{row['file_name']} is listed twice, as image {files[row['file_name']]!r} and {row['id']!r}"
            coco.fault("duplicate-file-name", message, *place)
        files.setdefault(row["file_name"], row["id"])
        coco.images[row["id"]] = (index, row)
    if not coco.images:
        coco.findings.append(warning("no-images", coco.path, "there is no image that can be used", ("images",)))


def _rows(coco: CocoFile, key: str, required: Sequence[str]) -> Iterator[tuple[int, Row]]:
    """The rows of a list that are objects with these keys; faults for the others."""
    rows = coco.document.content.get(key)
    if not isinstance(rows, list):
        coco.fault("json-structure", f"the file must have a list {key!r}, got {type(rows).__name__}")
        return
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            coco.fault("json-structure", f"entry {index} of {key} must be an object, got {row!r}", key, index)
        elif missing := [name for name in required if name not in row]:
            what = f"entry {index} of {key} (id {row.get('id')!r})"
            coco.fault("missing-key", f"{what} has no {missing[0]!r}", key, index)
        else:
            yield index, row
