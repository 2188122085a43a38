"""Cityscapes' fine annotations under Detectron2's names: 19 classes semantic and panoptic, 8 things.

Every record has `instance_ids_file_name`, the PNG from which the instance metrics of Cityscapes read their truth.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mask2former.data import catalog
from mask2former.data.catalog import Call, CatalogEntry, Category, DatasetMetadata
from mask2former.data.images import read_label_map
from mask2former.data.layouts import below_root, require
from mask2former.data.records import XYWH_ABS, Record, load_coco_panoptic

_IMAGE_END = "_leftImg8bit.png"
_LABELS_BY = "cityscapesScripts' csCreateTrainIdLabelImgs"
_PANOPTIC_BY = "cityscapesScripts' csCreatePanopticImgs"
_FIRST_INSTANCE = 1000
"""From it on, a value of `*_instanceIds.png` is 1000 * id of the category + number of the object; below it, the id
of a category without objects, or of a group of objects."""


@dataclass(frozen=True)
class _Paths:
    images: Path
    labels: Path
    panoptic: Path
    panoptic_json: Path

    @classmethod
    def of(cls, half: str) -> "_Paths":
        root = below_root("cityscapes")
        panoptic = root / "gtFine" / f"cityscapes_panoptic_{half}"
        return cls(
            images=root / "leftImg8bit" / half,
            labels=root / "gtFine" / half,
            panoptic=panoptic,
            panoptic_json=panoptic.with_suffix(".json"),
        )


def thing_categories() -> tuple[Category, ...]:
    """The 8 classes with objects; their contiguous ids are not those of the 19 classes."""
    return tuple(category for category in catalog.read_categories("cityscapes") if category.is_thing)


def semantic(name: str, half: str) -> CatalogEntry:
    """19 classes."""
    paths = _Paths.of(half)
    metadata = DatasetMetadata(
        categories=catalog.read_categories("cityscapes"), evaluator_type="cityscapes_sem_seg",
        image_root=paths.images, sem_seg_root=paths.labels,
    )  # fmt: skip
    return CatalogEntry(name, Call(_load_semantic, (name, paths)), metadata)


def panoptic(name: str, half: str) -> CatalogEntry:
    """19 classes, 8 of them things."""
    paths = _Paths.of(half)
    metadata = DatasetMetadata(
        categories=catalog.read_categories("cityscapes"), evaluator_type="cityscapes_panoptic_seg",
        image_root=paths.images, panoptic_json=paths.panoptic_json, panoptic_root=paths.panoptic,
        sem_seg_root=paths.labels,
    )  # fmt: skip
    return CatalogEntry(name, Call(_load_panoptic, (name, paths)), metadata)


def instance(name: str, half: str) -> CatalogEntry:
    """8 things."""
    paths = _Paths.of(half)
    metadata = DatasetMetadata(
        categories=thing_categories(), evaluator_type="cityscapes_instance", image_root=paths.images
    )
    return CatalogEntry(name, Call(_load_instances, (name, paths)), metadata)


def register_all() -> None:
    """Registers `cityscapes_fine_{sem_seg,panoptic,instance_seg}_{train,val}`."""
    for kind, make in {"sem_seg": semantic, "panoptic": panoptic, "instance_seg": instance}.items():
        for half in ("train", "val"):
            name = f"cityscapes_fine_{kind}_{half}"
            catalog.register_lazily(name, Call(make, (name, half)))


class InstanceIdAnnotations(Sequence[Record]):
    """The objects of one `*_gtFine_instanceIds.png` as annotations, in the order of their values.

    The file is read by each pass over them and not before: the annotations of all images together would take
    minutes and gigabytes. A group of objects, which has a category's id as its value, is a crowd. Segmentations are
    boolean arrays (H, W), exact to the pixel.
    """

    def __init__(self, file: str) -> None:
        self.file = file

    def __iter__(self) -> Iterator[Record]:
        ids, values = self._read()
        return (_annotation(ids, value) for value in values)

    def __len__(self) -> int:
        return len(self._read()[1])

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        ids, values = self._read()
        if isinstance(index, slice):
            return [_annotation(ids, value) for value in values[index]]
        return _annotation(ids, values[index])

    def _read(self) -> tuple[NDArray[Any], list[int]]:
        ids = read_label_map(self.file)
        present = np.flatnonzero(np.bincount(ids.ravel())).tolist()
        return ids, [value for value in present if _category_id(value) in _thing_positions()]


def _annotation(ids: NDArray[Any], value: int) -> Record:
    mask = ids == value
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "category_id": _thing_positions()[_category_id(value)],
        "iscrowd": int(value < _FIRST_INSTANCE),
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "bbox_mode": XYWH_ABS,
        "segmentation": mask,
    }


def _category_id(value: int) -> int:
    return value if value < _FIRST_INSTANCE else value // _FIRST_INSTANCE


def _thing_positions() -> dict[int, int]:
    return catalog.contiguous_ids(thing_categories())


def _load_semantic(name: str, paths: _Paths) -> list[Record]:
    records = []
    for image in _images(name, paths):
        labels = _label_file(name, paths, image, "labelTrainIds", _LABELS_BY)
        records.append(_record(name, paths, image) | {"sem_seg_file_name": labels})
    return records


def _load_instances(name: str, paths: _Paths) -> list[Record]:
    records = [_record(name, paths, image) for image in _images(name, paths)]
    return [r | {"annotations": InstanceIdAnnotations(r["instance_ids_file_name"])} for r in records]


def _load_panoptic(name: str, paths: _Paths) -> list[Record]:
    require(name, paths.images, paths.labels)
    require(name, paths.panoptic_json, paths.panoptic, made_by=_PANOPTIC_BY)
    records = load_coco_panoptic(
        paths.panoptic_json, paths.images, paths.panoptic, catalog.read_categories("cityscapes"), paths.labels,
        image_file=_panoptic_image_file, semantic_file=_panoptic_label_file,
    )  # fmt: skip
    for record in records:
        require(name, Path(record["sem_seg_file_name"]), made_by=_LABELS_BY)
        instance_ids = record["sem_seg_file_name"].replace("_labelTrainIds.png", "_instanceIds.png")
        record["instance_ids_file_name"] = instance_ids
    return records


def _panoptic_image_file(image: Mapping[str, Any], annotation: Mapping[str, Any]) -> str:
    """The file's "file_name" is no path that exists, so that the id must tell."""
    return f"{_city(annotation['image_id'])}/{annotation['image_id']}{_IMAGE_END}"


def _panoptic_label_file(annotation: Mapping[str, Any]) -> str:
    return f"{_city(annotation['image_id'])}/{annotation['image_id']}_gtFine_labelTrainIds.png"


def _city(image_id: str) -> str:
    return image_id.split("_", 1)[0]


def _images(name: str, paths: _Paths) -> list[Path]:
    require(name, paths.images, paths.labels)
    images = sorted(paths.images.glob(f"*/*{_IMAGE_END}"))
    if not images:
        raise FileNotFoundError(f"data set {name!r}: there is no */*{_IMAGE_END} in {paths.images}")
    return images


def _record(name: str, paths: _Paths, image: Path) -> Record:
    with Image.open(image) as opened:
        width, height = opened.size
    return {
        "file_name": str(image),
        "image_id": image.name.removesuffix(_IMAGE_END),
        "height": height,
        "width": width,
        "instance_ids_file_name": _label_file(name, paths, image, "instanceIds"),
    }


def _label_file(name: str, paths: _Paths, image: Path, kind: str, made_by: str | None = None) -> str:
    stem = image.name.removesuffix(_IMAGE_END)
    file = paths.labels / image.parent.name / f"{stem}_gtFine_{kind}.png"
    require(name, file, made_by=made_by)
    return str(file)
