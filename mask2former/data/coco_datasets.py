"""The COCO data sets under their published names, two small sets of the same layout, and COCO-Stuff-10k.

One folder layout serves all but the last: `{train,val}2017/`, `panoptic_{train,val}2017/`,
`panoptic_semseg_{train,val}2017/`, `annotations/{instances,panoptic}_{train,val}2017.json`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mask2former.data import catalog
from mask2former.data.catalog import Call, CatalogEntry, Category, DatasetMetadata
from mask2former.data.layouts import ROOT_VARIABLE, below_root, datasets_root, require, semantic_entry
from mask2former.data.records import Record, load_coco_instances, load_coco_panoptic

__all__ = [
    "ROOT_VARIABLE",
    "CocoSplit",
    "coco_instance_categories",
    "coco_panoptic_categories",
    "datasets_root",
    "register_all",
    "register_coco_family",
    "sample_root",
    "stuff_10k",
]

_CHECKOUT_SAMPLE = Path(__file__).resolve().parents[2] / "datasets" / "sample"


def sample_root() -> Path:
    """The sample set in the repository, or the copy below `datasets_root()` outside a checkout."""
    return _CHECKOUT_SAMPLE if _CHECKOUT_SAMPLE.is_dir() else datasets_root() / "sample"


def coco_panoptic_categories() -> tuple[Category, ...]:
    """COCO's 80 things and 53 stuff classes, in this order."""
    return catalog.read_categories("coco_panoptic")


@cache
def coco_instance_categories() -> tuple[Category, ...]:
    """COCO's 80 things; each has the same contiguous id as among the panoptic categories."""
    return tuple(category for category in coco_panoptic_categories() if category.is_thing)


@dataclass(frozen=True, kw_only=True)
class CocoSplit:
    """One split of a data set in COCO's layout.

    Attributes:
        root: gives the folder; asked anew each time.
        split: "train" or "val".
        first: keep the first so many images of the panoptic file; None keeps all.
    """

    root: Callable[[], Path]
    split: str
    first: int | None = None

    def instances(self, name: str) -> CatalogEntry:
        """80 classes, one mask per object."""
        paths = _Paths.of(self.root(), self.split)
        metadata = DatasetMetadata(
            categories=coco_instance_categories(), evaluator_type="coco",
            image_root=paths.images, instances_json=paths.instances_json,
        )  # fmt: skip
        return CatalogEntry(name, Call(_load_instances, (name, paths, self.first)), metadata)

    def panoptic(self, name: str, *, with_semantic: bool) -> CatalogEntry:
        """133 classes; `with_semantic` adds the semantic label maps."""
        paths = _Paths.of(self.root(), self.split)
        metadata = DatasetMetadata(
            categories=coco_panoptic_categories(), evaluator_type="coco_panoptic_seg",
            image_root=paths.images, instances_json=paths.instances_json, panoptic_json=paths.panoptic_json,
            panoptic_root=paths.panoptic, sem_seg_root=paths.semantic if with_semantic else None,
        )  # fmt: skip
        return CatalogEntry(name, Call(_load_panoptic, (name, paths, self.first, with_semantic)), metadata)

    def semantic(self, name: str) -> CatalogEntry:
        """133 classes, semantic label maps alone."""
        paths = _Paths.of(self.root(), self.split)
        metadata = DatasetMetadata(
            categories=coco_panoptic_categories(), evaluator_type="sem_seg",
            image_root=paths.images, sem_seg_root=paths.semantic,
        )  # fmt: skip
        return CatalogEntry(name, Call(_load_semantic, (name, paths, self.first)), metadata)


def register_coco_family(
    prefix: str,
    *,
    root: Callable[[], Path],
    splits: dict[str, tuple[str, int | None]],
    panoptic: bool = False,
    semantic: bool = False,
) -> None:
    """Registers `<prefix>_<key>` and `<prefix>_<key>_panoptic_with_sem_seg` for each split.

    Args:
        prefix: start of the names.
        root: gives the folder with COCO's layout; asked when an entry is fetched.
        splits: key in the name -> (split in the files' names, number of images or None for all).
        panoptic: also registers `<prefix>_<key>_panoptic`, without semantic label maps.
        semantic: also registers `<prefix>_<key>_sem_seg`, the semantic label maps alone.
    """
    for key, (split, first) in splits.items():
        name = f"{prefix}_{key}"
        part = CocoSplit(root=root, split=split, first=first)
        _register(CocoSplit.instances, part, name)
        _register(_panoptic_with_semantic, part, f"{name}_panoptic_with_sem_seg")
        if panoptic:
            _register(_panoptic_alone, part, f"{name}_panoptic")
        if semantic:
            _register(CocoSplit.semantic, part, f"{name}_sem_seg")


def register_all() -> None:
    """Registers `coco_2017_*`, `coco_mini_*`, `coco_sample_*` and `coco_2017_{train,test}_stuff_10k_sem_seg`."""
    halves: dict[str, tuple[str, int | None]] = {"train": ("train", None), "val": ("val", None)}
    register_coco_family("coco_2017", root=Call(below_root, ("coco",)), splits=halves, panoptic=True)
    mini = {**halves, "train16": ("train", 16)}
    register_coco_family("coco_mini", root=Call(below_root, ("coco_panoptic_mini",)), splits=mini, semantic=True)
    sample = {**halves, "train8": ("train", 8)}
    register_coco_family("coco_sample", root=sample_root, splits=sample, semantic=True)
    for part in ("train", "test"):
        name = f"coco_2017_{part}_stuff_10k_sem_seg"
        catalog.register_lazily(name, Call(stuff_10k, (name, part)))


def stuff_10k(name: str, part: str) -> CatalogEntry:
    """COCO-Stuff-10k: 80 things and 91 stuff classes, semantic label maps."""
    root = below_root("coco") / "coco_stuff_10k"
    return semantic_entry(
        name,
        root / "images_detectron2" / part,
        root / "annotations_detectron2" / part,
        categories="coco_stuff",
        made_by="datasets/prepare_coco_stuff_10k_sem_seg.py",
    )


@dataclass(frozen=True)
class _Paths:
    images: Path
    panoptic: Path
    semantic: Path
    instances_json: Path
    panoptic_json: Path

    @classmethod
    def of(cls, root: Path, split: str) -> "_Paths":
        return cls(
            images=root / f"{split}2017",
            panoptic=root / f"panoptic_{split}2017",
            semantic=root / f"panoptic_semseg_{split}2017",
            instances_json=root / "annotations" / f"instances_{split}2017.json",
            panoptic_json=root / "annotations" / f"panoptic_{split}2017.json",
        )


def _register(make: Callable[[CocoSplit, str], CatalogEntry], part: CocoSplit, name: str) -> None:
    catalog.register_lazily(name, Call(make, (part, name)))


def _panoptic_with_semantic(part: CocoSplit, name: str) -> CatalogEntry:
    return part.panoptic(name, with_semantic=True)


def _panoptic_alone(part: CocoSplit, name: str) -> CatalogEntry:
    return part.panoptic(name, with_semantic=False)


def _load_instances(name: str, paths: _Paths, first: int | None) -> list[Record]:
    require(name, paths.images, paths.instances_json)
    records = load_coco_instances(paths.instances_json, paths.images, coco_instance_categories())
    if first is None:
        return records
    # "The first images" are those of the panoptic file, so that every task of a subset has the same images.
    chosen = [record["image_id"] for record in _load_panoptic(name, paths, first, with_semantic=False)]
    by_id = {record["image_id"]: record for record in records}
    return [by_id[image_id] for image_id in chosen]


def _load_panoptic(name: str, paths: _Paths, first: int | None, with_semantic: bool) -> list[Record]:
    require(name, paths.images, paths.panoptic_json, paths.panoptic)
    if with_semantic:
        require(name, paths.semantic)
    semantic = paths.semantic if with_semantic else None
    records = load_coco_panoptic(
        paths.panoptic_json, paths.images, paths.panoptic, coco_panoptic_categories(), semantic
    )
    return records[:first]


def _load_semantic(name: str, paths: _Paths, first: int | None) -> list[Record]:
    # The panoptic file says which images there are and how large; its PNGs are not needed.
    require(name, paths.images, paths.panoptic_json, paths.semantic)
    records = load_coco_panoptic(
        paths.panoptic_json, paths.images, paths.panoptic, coco_panoptic_categories(), paths.semantic
    )
    panoptic_only = ("pan_seg_file_name", "segments_info")
    return [{k: v for k, v in record.items() if k not in panoptic_only} for record in records[:first]]
