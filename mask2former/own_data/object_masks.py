"""A folder for each image with one binary mask for each object, as COCO instances.

`<object_masks>/<image>/masks/*.png`, or without the folder `masks`; folders among the masks are classes:
`<object_masks>/<image>/masks/<class>/*.png`. The image is the only one in `<object_masks>/<image>/images/`, or,
where a folder of images is given, the one in it that is called `<image>` but for the suffix. Pixels that are not 0
belong to the object.

Training and evaluation need COCO JSON, which is made once, in the folder of `cache_folder()`, and again when a
file changes.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from mask2former.data.images import read_binary_mask
from mask2former.data.records import IMAGE_SUFFIXES

CACHE_VARIABLE = "MASK2FORMER_CACHE"
ONLY_CLASS = "object"
"""Name of the class where no folder names one."""


class ObjectMask(NamedTuple):
    """A mask file and the name of the folder that is its class; None: it lies in no such folder."""

    path: Path
    class_name: str | None


class ObjectFolder(NamedTuple):
    """One image with its masks.

    Attributes:
        name: of the folder.
        images: the files that may be its image; exactly one if all is well.
        masks: in the order of their paths.
    """

    name: str
    images: tuple[Path, ...]
    masks: tuple[ObjectMask, ...]


def object_folders(masks_root: Path, images_root: Path | None = None) -> list[ObjectFolder]:
    """Every image's folder in the order of the names; nothing is opened."""
    named: dict[str, list[Path]] = {}
    if images_root is not None:
        for path in _images_in(images_root):
            named.setdefault(path.stem, []).append(path)
    folders = []
    for folder in sorted(path for path in masks_root.iterdir() if path.is_dir()):
        images = _images_in(folder / "images") if images_root is None else named.get(folder.name, [])
        folders.append(ObjectFolder(folder.name, tuple(images), tuple(_masks_of(folder))))
    return folders


def class_names_of_folders(masks_root: Path) -> list[str]:
    """The names of all folders of classes in alphabetical order, `ONLY_CLASS` if there are none."""
    found = {mask.class_name for folder in object_folders(masks_root) for mask in folder.masks}
    return sorted(name for name in found if name is not None) or [ONLY_CLASS]


def cache_folder() -> Path:
    """`$MASK2FORMER_CACHE`, else `mask2former` below `$XDG_CACHE_HOME` or `~/.cache`."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mask2former"


@lru_cache(maxsize=64)
def coco_json_of(masks_root: Path, images_root: Path | None, class_names: tuple[str, ...]) -> Path:
    """The COCO instance file made of the folders; `file_name` is absolute.

    Raises:
        ValueError: a folder has no image or several, a class is unknown, or a mask is empty, unreadable or of
            another size than its image; `python -m mask2former data check` lists all such faults.
    """
    masks_root = masks_root.resolve()
    folders = object_folders(masks_root, images_root.resolve() if images_root else None)
    path = cache_folder() / "object_masks" / f"{masks_root.name}_{_fingerprint(folders, class_names)}.json"
    if not path.exists():
        content = _coco_content(folders, class_names)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")  # several processes may do this at once
        unfinished.write_text(json.dumps(content), encoding="utf-8")
        unfinished.replace(path)
    return path


def coco_rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """(H, W) -> COCO's compressed RLE with text counts."""
    from pycocotools import mask as mask_api

    encoded = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(edge) for edge in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def bounding_box(mask: NDArray[np.bool_]) -> list[int]:
    """x, y, width, height of the pixels that are True; all 0 if there are none."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return [0, 0, 0, 0]
    return [int(cols[0]), int(rows[0]), int(cols[-1] - cols[0] + 1), int(rows[-1] - rows[0] + 1)]


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _masks_of(folder: Path) -> list[ObjectMask]:
    root = folder / "masks" if (folder / "masks").is_dir() else folder
    masks = [ObjectMask(path, None) for path in _images_in(root)]
    for inner in sorted(path for path in root.iterdir() if path.is_dir()):
        if root == folder and inner.name == "images":
            continue
        masks += [ObjectMask(path, inner.name) for path in _images_in(inner)]
    return masks


def _fingerprint(folders: Sequence[ObjectFolder], class_names: Sequence[str]) -> str:
    digest = hashlib.sha256(repr(tuple(class_names)).encode())
    for folder in folders:
        for path in (*folder.images, *(mask.path for mask in folder.masks)):
            state = path.stat()
            digest.update(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _coco_content(folders: Sequence[ObjectFolder], class_names: tuple[str, ...]) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for folder in tqdm(folders, desc="reading the masks", unit="image", leave=False, disable=None):
        if len(folder.images) != 1:
            raise ValueError(
                f"{folder.name}: there must be one image for this folder of masks, got {len(folder.images)}"
            )
        with Image.open(folder.images[0]) as image:
            width, height = image.size
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": str(folder.images[0]), "height": height, "width": width})
        for mask in folder.masks:
            annotation = _annotation(mask, (height, width), class_names)
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    categories = [{"id": i, "name": name} for i, name in enumerate(class_names, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotation(mask: ObjectMask, size: tuple[int, int], class_names: tuple[str, ...]) -> dict[str, Any]:
    name = class_names[0] if mask.class_name is None and len(class_names) == 1 else mask.class_name
    if name not in class_names:
        raise ValueError(f"{mask.path}: the mask must lie in a folder named after one of {class_names}, got {name!r}")
    pixels = read_binary_mask(mask.path)
    if pixels.shape != size or not pixels.any():
        rule = f"must be of its image's size {size[0]}x{size[1]} (height x width) and not empty"
        raise ValueError(
            f"{mask.path}: the mask {rule}, got {pixels.shape[0]}x{pixels.shape[1]}, {pixels.sum()} pixels"
        )
    return {
        "category_id": class_names.index(name) + 1,
        "segmentation": coco_rle(pixels),
        "area": int(pixels.sum()),
        "bbox": bounding_box(pixels),
        "iscrowd": 0,
    }
