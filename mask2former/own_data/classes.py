"""The classes of a data set of one's own: names, ids, colours."""

import colorsys
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mask2former.data.catalog import Category
from mask2former.own_data.object_masks import class_names_of_folders
from mask2former.own_data.source import Source, located

_GOLDEN_RATIO = 0.618033988749895
Color = tuple[int, int, int]


def categories_of(source: Source) -> tuple[Category, ...]:
    """The categories by contiguous id.

    COCO files: those of the file, by id or in the order of `source.classes`. Label maps: `source.classes`, whose
    positions are the values. Folders of masks: `source.classes`, else the names of the folders.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file has no usable classes, or the names differ from `source.classes`.
    """
    names = None if source.classes is None else _class_rows(source.classes)
    if source.kind in ("panoptic", "instance"):
        part = "panoptic_json" if source.kind == "panoptic" else "coco_json"
        categories = _categories_of_json(source.path(part), is_panoptic=source.kind == "panoptic")
        return categories if names is None else _in_order(categories, [n for n, _ in names], str(source.path(part)))
    if names is None:
        names = [(name, None) for name in class_names_of_folders(source.path("object_masks"))]
    first = 1 if source.kind == "object_masks" else 0
    is_thing = source.kind == "object_masks"
    return tuple(
        Category(id=first + i, name=name, is_thing=is_thing, color=color or generated_color(i))
        for i, (name, color) in enumerate(names)
    )


def generated_color(index: int) -> Color:
    """A colour for each index; neighbours differ clearly in hue."""
    hue, value = (index * _GOLDEN_RATIO) % 1, (0.95, 0.75, 0.55)[index % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, value))
    return red, green, blue


def read_class_file(path: Path) -> list[tuple[str, Color | None]]:
    """Names, and colours where there are some.

    Args:
        path: .txt with one name a line, or .json with a list of names or of {"name", "id", "color"}; the id, if
            given, must be the position.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none of these.
    """
    if not path.exists():
        raise FileNotFoundError(f"CLASSES names {path}, which does not exist")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() != ".json":
        return [(line.strip(), None) for line in text.splitlines() if line.strip()]
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of names or of {{name, id, color}}, got {type(rows).__name__}")
    return [_class_row(row, position, path) for position, row in enumerate(rows)]


def _class_row(row: Any, position: int, path: Path) -> tuple[str, Color | None]:
    if isinstance(row, str):
        return row, None
    if not isinstance(row, Mapping) or not isinstance(row.get("name"), str):
        raise ValueError(f"{path}: entry {position} must be a name or have a 'name', got {row!r}")
    if row.get("id", position) != position:
        raise ValueError(
            f"{path}: class {row['name']!r} must have the id {position}, its position, which is its value in label "
            f"maps; got {row['id']!r}"
        )
    return row["name"], _color(row.get("color"))


def _class_rows(classes: Sequence[str] | str) -> list[tuple[str, Color | None]]:
    rows: list[tuple[str, Color | None]] = [(name, None) for name in classes]
    if isinstance(classes, str):
        rows = read_class_file(located(classes))
    if not rows:
        raise ValueError(f"CLASSES must give at least one name, got none from {classes!r}")
    counts = Counter(name for name, _ in rows)
    if bad := [name for name, count in counts.items() if count > 1 or not name.strip()]:
        raise ValueError(f"CLASSES must be different names, got {bad[0]!r} {counts[bad[0]]} times")
    return rows


def _categories_of_json(path: Path, *, is_panoptic: bool) -> tuple[Category, ...]:
    state = path.stat()
    return _read_categories(path, is_panoptic, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)  # annotation files are large, and the catalog asks for the categories again and again
def _read_categories(path: Path, is_panoptic: bool, modified: int, size: int) -> tuple[Category, ...]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    rows = content.get("categories") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} is no COCO file: it has no 'categories'")
    required = ("id", "name", "isthing") if is_panoptic else ("id", "name")
    for row in rows:
        if missing := [key for key in required if not isinstance(row, Mapping) or key not in row]:
            raise ValueError(f"{path}: each of the 'categories' must have {missing[0]!r}, got {row!r}")
    ids = Counter(row["id"] for row in rows)
    if repeated := [number for number, count in ids.items() if count > 1]:
        raise ValueError(f"{path}: ids of 'categories' must differ, got {repeated[0]!r} twice")
    ordered = sorted(rows, key=lambda row: row["id"])
    return tuple(
        Category(
            id=row["id"],
            name=str(row["name"]),
            is_thing=bool(row["isthing"]) if is_panoptic else True,
            color=_color(row.get("color")) or generated_color(position),
        )
        for position, row in enumerate(ordered)
    )


def _in_order(categories: Sequence[Category], names: Sequence[str], file: str) -> tuple[Category, ...]:
    by_name = {category.name: category for category in categories}
    if len(by_name) != len(categories) or by_name.keys() != set(names):
        odd = sorted(by_name.keys() ^ set(names)) or [category.name for category in categories]
        raise ValueError(f"CLASSES must be the names of the categories in {file}, in any order; they differ in {odd}")
    return tuple(by_name[name] for name in names)


def _color(value: Any) -> Color | None:
    """Three numbers 0..255, or None for anything else: a colour is never worth an error."""
    if not isinstance(value, list) or len(value) != 3:
        return None
    if not all(type(part) is int and 0 <= part <= 255 for part in value):
        return None
    return value[0], value[1], value[2]
