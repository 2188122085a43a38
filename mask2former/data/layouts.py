"""What the registrations of several data sets share: where they lie, and sets of images with label maps."""

import os
from pathlib import Path

from mask2former.data import catalog
from mask2former.data.catalog import Call, CatalogEntry, DatasetMetadata
from mask2former.data.records import Record, load_semantic_folder

ROOT_VARIABLE = "DETECTRON2_DATASETS"


def datasets_root() -> Path:
    """The folder that holds the data sets: `$DETECTRON2_DATASETS`, or `datasets` in the working folder."""
    return Path(os.environ.get(ROOT_VARIABLE) or "datasets").expanduser()


def below_root(folder: str) -> Path:
    """A data set's own folder."""
    return datasets_root() / folder


def require(name: str, *paths: Path, made_by: str | None = None) -> None:
    """
    Args:
        name: of the data set.
        paths: files and folders that it needs.
        made_by: the command that makes them, where they are not part of what one downloads.

    Raises:
        FileNotFoundError: one of the paths does not exist; the message says how to go on.
    """
    for path in paths:
        if not path.exists():
            origin = f", and which {made_by} makes" if made_by else ""
            raise FileNotFoundError(
                f"data set {name!r} needs {path}, which does not exist{origin}; set the environment variable "
                f"{ROOT_VARIABLE} to the folder that holds the data sets (now {str(datasets_root())!r}); "
                "datasets/README.md shows the expected folders"
            )


def semantic_entry(
    name: str,
    images: Path,
    labels: Path,
    *,
    categories: str,
    ignore_label: int = 255,
    suffix: str = ".png",
    made_by: str | None = None,
) -> CatalogEntry:
    """A data set of images and label maps of the same names.

    Args:
        name: of the data set.
        images: folder of the images.
        labels: folder of the label maps, whose values are positions in the table of categories.
        categories: name of that table.
        ignore_label: value of unlabelled pixels.
        suffix: of the label maps.
        made_by: the command that makes the folders, see `require`.
    """
    metadata = DatasetMetadata(
        categories=catalog.read_categories(categories), evaluator_type="sem_seg", ignore_label=ignore_label,
        image_root=images, sem_seg_root=labels,
    )  # fmt: skip
    return CatalogEntry(name, Call(_load_semantic, (name, images, labels, suffix, made_by)), metadata)


def _load_semantic(name: str, images: Path, labels: Path, suffix: str, made_by: str | None) -> list[Record]:
    require(name, images, labels, made_by=made_by)
    return load_semantic_folder(images, labels, label_suffix=suffix)
