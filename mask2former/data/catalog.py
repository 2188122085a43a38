"""Data sets by name: how to load the records, and what an evaluator must know about them."""

import colorsys
import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mask2former.data.records import Record

_CATEGORY_FOLDER = Path(__file__).parent / "categories"


class Category(NamedTuple):
    """One category; its contiguous id is its position in the tuple that holds it.

    Attributes:
        id: the id in the data set's own files.
        name: for people.
        is_thing: True for countable objects, False for stuff.
        color: (red, green, blue), each 0..255.
    """

    id: int
    name: str
    is_thing: bool
    color: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class DatasetMetadata:
    """What is known about a data set without reading it.

    Attributes:
        categories: all categories; the position is the contiguous id.
        evaluator_type: a published name such as "coco" or "ade20k_panoptic_seg"; decides which metrics are computed.
        ignore_label: value of unlabelled pixels in semantic label maps.
        label_divisor: a segment's id in Detectron2's panoptic form is category * label_divisor + its number.
        image_root: folder of the images.
        instances_json: COCO instance annotations, where the data set has them.
        panoptic_json: COCO panoptic annotations.
        panoptic_root: folder of the panoptic PNGs.
        sem_seg_root: folder of the semantic label maps.
    """

    categories: tuple[Category, ...]
    evaluator_type: str
    ignore_label: int = 255
    label_divisor: int = 1000
    image_root: Path | None = None
    instances_json: Path | None = None
    panoptic_json: Path | None = None
    panoptic_root: Path | None = None
    sem_seg_root: Path | None = None

    @property
    def num_classes(self) -> int:
        return len(self.categories)

    @cached_property
    def contiguous_ids(self) -> dict[int, int]:
        """From the data set's category ids to contiguous ids."""
        return contiguous_ids(self.categories)


@dataclass(frozen=True)
class CatalogEntry:
    """A data set.

    Attributes:
        name: the name that configs use.
        load: reads the records; nothing is read from disk before it is called.
        metadata: known without reading anything.
    """

    name: str
    load: Callable[[], list["Record"]]
    metadata: DatasetMetadata


@dataclass(frozen=True)
class Call:
    """A function and its arguments, to be called later.

    Unlike those of functools.partial, two with the same content are equal, so that `register` and
    `register_lazily` see that something is registered a second time.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()

    def __call__(self) -> Any:
        return self.function(*self.arguments)


_factories: dict[str, Callable[[], CatalogEntry]] = {}
_entries: dict[str, CatalogEntry] = {}


def register(entry: CatalogEntry) -> None:
    """Adds an entry.

    Raises:
        ValueError: another entry has that name. Registering an equal entry again does nothing.
    """
    if _entries.get(entry.name) == entry:
        return
    _refuse_known(entry.name)
    _entries[entry.name] = entry


def register_lazily(name: str, factory: Callable[[], CatalogEntry]) -> None:
    """Adds an entry that is made anew by each `get`, so that it follows the environment of that moment.

    Raises:
        ValueError: another entry has that name.
    """
    if _factories.get(name) == factory:
        return
    _refuse_known(name)
    _factories[name] = factory


def remove(name: str) -> None:
    """Takes back a registration; an unknown name is no error."""
    _entries.pop(name, None)
    _factories.pop(name, None)


def get(name: str) -> CatalogEntry:
    """
    Raises:
        KeyError: the name is unknown; the message lists similar names.
    """
    if name in _entries:
        return _entries[name]
    if name in _factories:
        return _factories[name]()
    near = difflib.get_close_matches(name, names(), n=6, cutoff=0.5)
    hint = f"similar names: {', '.join(near)}" if near else f"known names: {', '.join(names())}"
    raise UnknownDatasetError(f"no data set is registered as {name!r}; {hint}")


def names() -> list[str]:
    """All registered names in alphabetical order."""
    return sorted({*_entries, *_factories})


class UnknownDatasetError(KeyError):
    """A KeyError whose message is shown as written (KeyError shows its repr)."""

    def __str__(self) -> str:
        return str(self.args[0])


def contiguous_ids(categories: Sequence[Category]) -> dict[int, int]:
    """From the data set's category ids to positions in `categories`."""
    return {category.id: position for position, category in enumerate(categories)}


@cache
def read_categories(name: str) -> tuple[Category, ...]:
    """Reads `categories/<name>.json`, a list of {"id", "name", "isthing", "color"}.

    A category has no "color" where the data set gives it none; it then gets `generated_color` of its position.
    """
    rows = json.loads((_CATEGORY_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return tuple(
        Category(
            id=row["id"],
            name=row["name"],
            is_thing=bool(row["isthing"]),
            color=tuple(row.get("color") or generated_color(position)),
        )
        for position, row in enumerate(rows)
    )


def generated_color(position: int) -> tuple[int, int, int]:
    """A color (r, g, b) for the category at a position: neighbours differ much, thousands differ at all."""
    golden_ratio = 0.618033988749895  # its multiples modulo 1 keep the largest distance
    hue = position * golden_ratio % 1
    saturation, value = (0.85, 0.55, 0.7)[position % 3], (0.95, 0.8, 0.65, 0.5)[position % 4]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def _refuse_known(name: str) -> None:
    if name in _entries or name in _factories:
        raise ValueError(f"a different data set is already registered as {name!r}; choose another name")
