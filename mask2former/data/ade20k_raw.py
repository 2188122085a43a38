"""The files of the ADE20K releases as one downloads them.

Of the Places challenge (`ADEChallengeData2016`): `annotations` are 8-bit maps with 0 for "other" and 1..150 for the
classes; in `annotations_instance`, red is the class among 100 (1..100) and green the number of the object in the image
(1..255, unique among all its classes; 0 where there is none).

Of the full release (`ADE20K_2021_17_01`): `*_seg.png` has R // 10 * 256 + G as the class, 0 for none, otherwise a
position in the index's `objectnames` counted from 1.
"""

import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mask2former.data.catalog import Category, read_categories
from mask2former.data.prepared_files import PreparationError, listed, read_colors, require_values

NUM_SEMANTIC = 150
SPLIT_FOLDERS = {"train": "training", "val": "validation"}

_BROKEN_PICKLE = (pickle.UnpicklingError, AttributeError, EOFError, LookupError, MemoryError, OverflowError,
                  TypeError, ValueError)  # fmt: skip


def thing_categories() -> tuple[Category, ...]:
    """The 100 classes of `annotations_instance`, the class of value 1 first.

    They are the things among the 150 in the same order: the challenge's `categoryMapping.txt` is increasing.
    """
    return tuple(category for category in read_categories("ade20k_150") if category.is_thing)


def image_number(path: Path) -> int:
    """The number in a name such as ADE_train_00000001: the image's id in JSON files.

    Raises:
        PreparationError: the name has none.
    """
    match = re.fullmatch(r"ADE_\w+_(\d+)", path.stem)
    if match is None:
        raise PreparationError(f"{path}: must have a name like ADE_train_00000001")
    return int(match.group(1))


class Instance(NamedTuple):
    """One object.

    Attributes:
        number: its green value.
        category: its class.
        mask: (H, W) bool.
    """

    number: int
    category: Category
    mask: NDArray[np.bool_]


def read_instances(path: Path) -> tuple[tuple[int, int], list[Instance]]:
    """Reads one PNG of `annotations_instance`.

    Returns:
        (height, width), and the objects in the order of their numbers.

    Raises:
        PreparationError: the file is missing or damaged, has classes above 100, or an object of no class or several.
    """
    things = thing_categories()
    colors = read_colors(path)
    classes, numbers = colors[..., 0], colors[..., 1]
    require_values(path, classes, len(things), "classes (red)")
    instances = []
    for number in np.unique(numbers[numbers > 0]).tolist():
        mask = numbers == number
        values = np.unique(classes[mask]).tolist()
        if len(values) > 1 or values[0] == 0:
            raise PreparationError(f"{path}: object {number} (green) must have one class (red), got {listed(values)}")
        instances.append(Instance(number, things[values[0] - 1], mask))
    return (colors.shape[0], colors.shape[1]), instances


class FullIndex(NamedTuple):
    """What is used of `index_ade20k.pkl`.

    Attributes:
        files: the images, relative to the folder that holds the data sets.
        object_names: the name of class 1, 2, ...
    """

    files: tuple[Path, ...]
    object_names: tuple[str, ...]


def read_full_index(path: Path) -> FullIndex:
    """Reads `index_ade20k.pkl` without running anything in it.

    Raises:
        PreparationError: there is no such file, it is damaged, or it lacks something.
    """
    try:
        with path.open("rb") as file:
            content = _InertUnpickler(file, encoding="latin1").load()
    except FileNotFoundError as error:
        raise PreparationError(f"{path}: there is no such file") from error
    except _BROKEN_PICKLE as error:
        raise PreparationError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise PreparationError(f"{path}: must hold a dict, got {type(content).__name__}")
    folders, names, objects = (_strings(content, key, path) for key in ("folder", "filename", "objectnames"))
    if len(folders) != len(names):
        raise PreparationError(f"{path}: has {len(names)} 'filename' but {len(folders)} 'folder'")
    files = tuple(Path(folder) / name for folder, name in zip(folders, names, strict=True))
    return FullIndex(files, tuple(objects))


class _Inert:
    """Stands for every object of a class: keeps what the pickle says of it and does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        """Of a dict of another class."""

    def extend(self, values: object) -> None:
        """Of a list of another class."""

    append = extend


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        return _Inert


def _strings(content: dict[Any, Any], key: str, path: Path) -> list[str]:
    value = content.get(key)
    if isinstance(value, _Inert):
        value = _array_content(value)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise PreparationError(f"{path}: {key!r} must be a list or an array of strings")
    return value


def _array_content(array: _Inert) -> Any:
    """The elements of a pickled array of objects or of strings; None for anything else."""
    match array.state:
        case (_, (int(),), _, _, list(elements)):
            return elements
        case (_, (int(),), _Inert(arguments=(str(code), *_)), _, bytes(data)) if re.fullmatch("U[1-9][0-9]*", code):
            return np.frombuffer(data, f"<{code}").tolist()
    return None
