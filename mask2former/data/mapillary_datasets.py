"""Mapillary Vistas v1.2 under its published names: 65 classes, 37 of them things; and the things alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mask2former.data import catalog
from mask2former.data.catalog import Call, CatalogEntry, Category, DatasetMetadata
from mask2former.data.layouts import below_root, require, semantic_entry
from mask2former.data.records import Record, load_coco_instances, load_coco_panoptic

_FOLDERS = {"train": "training", "val": "validation"}
IGNORE_LABEL = 65
"""The 66th class, "Unlabeled"."""


@dataclass(frozen=True)
class _Paths:
    images: Path
    semantic: Path
    panoptic: Path
    panoptic_json: Path
    instances_json: Path

    @classmethod
    def of(cls, half: str) -> "_Paths":
        root = below_root("mapillary_vistas")
        part = root / _FOLDERS[half]
        return cls(
            images=part / "images",
            semantic=part / "labels",
            panoptic=part / "panoptic",
            panoptic_json=part / "panoptic" / "panoptic_2018.json",
            instances_json=root / f"mapillary_vistas_instance_{half}.json",
        )


def thing_categories() -> tuple[Category, ...]:
    """The 37 things; their ids are those of the panoptic file, their contiguous ids are new."""
    return tuple(category for category in catalog.read_categories("mapillary_vistas") if category.is_thing)


def semantic(name: str, half: str) -> CatalogEntry:
    """65 classes."""
    paths = _Paths.of(half)
    return semantic_entry(
        name, paths.images, paths.semantic, categories="mapillary_vistas", ignore_label=IGNORE_LABEL
    )


def panoptic(name: str, half: str) -> CatalogEntry:
    """65 classes; no instance annotations, as published."""
    paths = _Paths.of(half)
    metadata = DatasetMetadata(
        categories=catalog.read_categories("mapillary_vistas"), evaluator_type="mapillary_vistas_panoptic_seg",
        ignore_label=IGNORE_LABEL, image_root=paths.images, panoptic_json=paths.panoptic_json,
        panoptic_root=paths.panoptic, sem_seg_root=paths.semantic,
    )  # fmt: skip
    return CatalogEntry(name, Call(_load_panoptic, (name, paths)), metadata)


def instance(name: str, half: str) -> CatalogEntry:
    """37 things, in the COCO file that `datasets/prepare_mapillary_vistas_ins_seg.py` makes."""
    paths = _Paths.of(half)
    metadata = DatasetMetadata(
        categories=thing_categories(), evaluator_type="coco",
        image_root=paths.images, instances_json=paths.instances_json,
    )  # fmt: skip
    return CatalogEntry(name, Call(_load_instances, (name, paths)), metadata)


def register_all() -> None:
    """Registers `mapillary_vistas_{sem_seg,panoptic,instance}_{train,val}`."""
    for kind, make in {"sem_seg": semantic, "panoptic": panoptic, "instance": instance}.items():
        for half in _FOLDERS:
            name = f"mapillary_vistas_{kind}_{half}"
            catalog.register_lazily(name, Call(make, (name, half)))


def _load_panoptic(name: str, paths: _Paths) -> list[Record]:
    require(name, paths.images, paths.panoptic, paths.panoptic_json, paths.semantic)
    return load_coco_panoptic(
        paths.panoptic_json, paths.images, paths.panoptic, catalog.read_categories("mapillary_vistas"),
        paths.semantic, image_file=_image_file,
    )  # fmt: skip


def _image_file(image: Mapping[str, Any], annotation: Mapping[str, Any]) -> str:
    return str(PurePosixPath(annotation["file_name"]).with_suffix(".jpg"))


def _load_instances(name: str, paths: _Paths) -> list[Record]:
    require(name, paths.images)
    require(name, paths.instances_json, made_by="datasets/prepare_mapillary_vistas_ins_seg.py")
    return load_coco_instances(paths.instances_json, paths.images, thing_categories())
