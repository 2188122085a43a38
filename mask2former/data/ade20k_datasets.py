"""ADE20K under its published names: 150 classes semantic and panoptic, 100 things, and all 847 classes.

`ADEChallengeData2016` is the Places challenge's release, `ADE20K_2021_17_01` the full one; both are prepared by
the scripts in `datasets/`.
"""

from dataclasses import dataclass
from pathlib import Path

from mask2former.data import catalog
from mask2former.data.catalog import Call, CatalogEntry, DatasetMetadata
from mask2former.data.layouts import below_root, require, semantic_entry
from mask2former.data.records import Record, load_coco_instances, load_coco_panoptic

_FOLDERS = {"train": "training", "val": "validation"}
_SEMANTIC_SCRIPT = "datasets/prepare_ade20k_sem_seg.py"
FULL_IGNORE_LABEL = 65535


@dataclass(frozen=True)
class _Paths:
    images: Path
    semantic: Path
    panoptic: Path
    panoptic_json: Path
    instances_json: Path

    @classmethod
    def of(cls, half: str) -> "_Paths":
        root = below_root("ADEChallengeData2016")
        return cls(
            images=root / "images" / _FOLDERS[half],
            semantic=root / "annotations_detectron2" / _FOLDERS[half],
            panoptic=root / f"ade20k_panoptic_{half}",
            panoptic_json=root / f"ade20k_panoptic_{half}.json",
            instances_json=root / f"ade20k_instance_{half}.json",
        )


def semantic(name: str, half: str) -> CatalogEntry:
    """150 classes."""
    paths = _Paths.of(half)
    return semantic_entry(name, paths.images, paths.semantic, categories="ade20k_150", made_by=_SEMANTIC_SCRIPT)


def full_semantic(name: str, half: str) -> CatalogEntry:
    """847 classes, in label maps of 16 bits."""
    root = below_root("ADE20K_2021_17_01")
    return semantic_entry(
        name,
        root / "images_detectron2" / _FOLDERS[half],
        root / "annotations_detectron2" / _FOLDERS[half],
        categories="ade20k_full",
        ignore_label=FULL_IGNORE_LABEL,
        suffix=".tif",
        made_by="datasets/prepare_ade20k_full_sem_seg.py",
    )


def panoptic(name: str, half: str) -> CatalogEntry:
    """150 classes, 100 of them things, with all three kinds of annotations."""
    paths = _Paths.of(half)
    metadata = DatasetMetadata(
        categories=catalog.read_categories("ade20k_150"), evaluator_type="ade20k_panoptic_seg",
        image_root=paths.images, instances_json=paths.instances_json, panoptic_json=paths.panoptic_json,
        panoptic_root=paths.panoptic, sem_seg_root=paths.semantic,
    )  # fmt: skip
    return CatalogEntry(name, Call(_load_panoptic, (name, paths)), metadata)


def instance(name: str, half: str) -> CatalogEntry:
    """100 things; a category's id is its position among the 150 classes."""
    paths = _Paths.of(half)
    metadata = DatasetMetadata(
        categories=catalog.read_categories("ade20k_instance"), evaluator_type="coco",
        image_root=paths.images, instances_json=paths.instances_json,
    )  # fmt: skip
    return CatalogEntry(name, Call(_load_instances, (name, paths)), metadata)


def register_all() -> None:
    """Registers `ade20k_{sem_seg,panoptic,instance,full_sem_seg}_{train,val}`."""
    kinds = {"sem_seg": semantic, "panoptic": panoptic, "instance": instance, "full_sem_seg": full_semantic}
    for kind, make in kinds.items():
        for half in _FOLDERS:
            name = f"ade20k_{kind}_{half}"
            catalog.register_lazily(name, Call(make, (name, half)))


def _load_panoptic(name: str, paths: _Paths) -> list[Record]:
    require(name, paths.images)
    require(name, paths.panoptic_json, paths.panoptic, made_by="datasets/prepare_ade20k_pan_seg.py")
    require(name, paths.semantic, made_by=_SEMANTIC_SCRIPT)
    categories = catalog.read_categories("ade20k_150")
    return load_coco_panoptic(paths.panoptic_json, paths.images, paths.panoptic, categories, paths.semantic)


def _load_instances(name: str, paths: _Paths) -> list[Record]:
    require(name, paths.images)
    require(name, paths.instances_json, made_by="datasets/prepare_ade20k_ins_seg.py")
    return load_coco_instances(paths.instances_json, paths.images, catalog.read_categories("ade20k_instance"))
