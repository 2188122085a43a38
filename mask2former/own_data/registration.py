"""`DATASETS.CUSTOM` to entries of the catalog."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mask2former.data import catalog
from mask2former.data.catalog import CatalogEntry, Category, DatasetMetadata
from mask2former.data.records import load_coco_instances, load_coco_panoptic, load_semantic_folder
from mask2former.own_data.classes import categories_of
from mask2former.own_data.object_masks import coco_json_of
from mask2former.own_data.source import Source


@dataclass(frozen=True)
class CustomDataset:
    """A name and its files; called, it gives the catalog's entry and reads the classes for that."""

    name: str
    source: Source

    def __call__(self) -> CatalogEntry:
        """
        Raises:
            FileNotFoundError: a file or folder does not exist; the message has the data set's name.
            ValueError: the classes cannot be read.
        """
        try:
            return _ENTRIES[self.source.kind](self.name, self.source, categories_of(self.source))
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"data set {self.name!r} of DATASETS.CUSTOM: {error}") from error


def custom_dataset(row: Mapping[str, Any], where: str = "DATASETS.CUSTOM") -> CustomDataset:
    """One mapping of the list: NAME and the keys of `Source`.

    Raises:
        ValueError: it is no such mapping; the message begins with `where`.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must be mappings of keys, got {row!r}")
    name = row.get("NAME")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: NAME must be the data set's name, got {name!r} in {dict(row)}")
    try:
        source = Source.from_mapping({key: value for key, value in row.items() if key != "NAME"})
    except ValueError as error:
        raise ValueError(f"{where}: data set {name!r}: {error}") from error
    return CustomDataset(name, source)


def register_custom_datasets(
    *, datasets: Sequence[Mapping[str, Any]], trained: Sequence[str] = (), ignore_value: int | None = None
) -> None:
    """Put data sets into the core's catalog; their files are looked at when an entry is asked for.

    Args:
        datasets: see `custom_dataset`.
        trained: names of those that are trained on.
        ignore_value: of the training, with which the label maps of `trained` must agree; None: not compared.

    Raises:
        ValueError: a mapping is wrong, its name belongs to another data set, or the ignored values differ.
    """
    for number, row in enumerate(datasets):
        dataset = custom_dataset(row, f"DATASETS.CUSTOM[{number}]")
        label = dataset.source.ignore_label
        if dataset.source.kind == "semantic" and dataset.name in trained and ignore_value not in (None, label):
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE must be {label}, the IGNORE_LABEL of data set {dataset.name!r}, got "
                f"{ignore_value}"
            )
        catalog.register_lazily(dataset.name, dataset)


def _instance_entry(name: str, source: Source, categories: tuple[Category, ...]) -> CatalogEntry:
    json_file, images = source.path("coco_json"), source.path("images")
    metadata = DatasetMetadata(
        categories=categories, evaluator_type="coco", image_root=images, instances_json=json_file
    )
    return CatalogEntry(name, partial(load_coco_instances, json_file, images, categories), metadata)


def _object_masks_entry(name: str, source: Source, categories: tuple[Category, ...]) -> CatalogEntry:
    images = None if source.images is None else source.path("images")
    json_file = coco_json_of(source.path("object_masks"), images, tuple(category.name for category in categories))
    root = images or source.path("object_masks")
    metadata = DatasetMetadata(categories=categories, evaluator_type="coco", image_root=root, instances_json=json_file)
    return CatalogEntry(name, partial(load_coco_instances, json_file, root, categories), metadata)


def _panoptic_entry(name: str, source: Source, categories: tuple[Category, ...]) -> CatalogEntry:
    json_file, images, pngs = (source.path(part) for part in ("panoptic_json", "images", "panoptic_png"))
    semantic = None if source.semantic_masks is None else source.path("semantic_masks")
    metadata = DatasetMetadata(
        categories=categories,
        evaluator_type="coco_panoptic_seg",
        ignore_label=source.ignore_label,
        image_root=images,
        instances_json=None if source.coco_json is None else source.path("coco_json"),
        panoptic_json=json_file,
        panoptic_root=pngs,
        sem_seg_root=semantic,
    )
    return CatalogEntry(name, partial(load_coco_panoptic, json_file, images, pngs, categories, semantic), metadata)


def _semantic_entry(name: str, source: Source, categories: tuple[Category, ...]) -> CatalogEntry:
    images, labels = source.path("images"), source.path("semantic_masks")
    metadata = DatasetMetadata(
        categories=categories,
        evaluator_type="sem_seg",
        ignore_label=source.ignore_label,
        image_root=images,
        sem_seg_root=labels,
    )
    return CatalogEntry(name, partial(load_semantic_folder, images, labels), metadata)


_ENTRIES = {
    "instance": _instance_entry,
    "object_masks": _object_masks_entry,
    "panoptic": _panoptic_entry,
    "semantic": _semantic_entry,
}
