"""LVIS v1 under Detectron2's names: 1203 things on COCO's images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mask2former.data import catalog
from mask2former.data.catalog import Call, CatalogEntry, DatasetMetadata
from mask2former.data.layouts import below_root, require
from mask2former.data.records import Record, load_coco_instances


def instance(name: str, half: str) -> CatalogEntry:
    """1203 things. Records also have `neg_category_ids` and `not_exhaustive_category_ids` with the file's own ids."""
    images, json_file = below_root("coco"), below_root("lvis") / f"lvis_v1_{half}.json"
    metadata = DatasetMetadata(
        categories=catalog.read_categories("lvis_v1"), evaluator_type="lvis",
        image_root=images, instances_json=json_file,
    )  # fmt: skip
    return CatalogEntry(name, Call(_load, (name, images, json_file)), metadata)


def register_all() -> None:
    """Registers `lvis_v1_{train,val}`."""
    for half in ("train", "val"):
        name = f"lvis_v1_{half}"
        catalog.register_lazily(name, Call(instance, (name, half)))


def _load(name: str, images: Path, json_file: Path) -> list[Record]:
    require(name, images, json_file)
    return load_coco_instances(
        json_file, images, catalog.read_categories("lvis_v1"),
        image_file=_image_file, image_keys=("neg_category_ids", "not_exhaustive_category_ids"),
    )  # fmt: skip


def _image_file(image: Mapping[str, Any]) -> str:
    """The validation images come from both of COCO's folders; only the address tells which one."""
    folder, file_name = image["coco_url"].split("/")[-2:]
    return f"{folder}/{file_name}"
