"""Where a data set of one's own lies: its files, and which of four kinds they are."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from mask2former.data.coco_datasets import ROOT_VARIABLE, datasets_root

Kind = Literal["panoptic", "instance", "object_masks", "semantic"]

# What decides the kind, in this order; what it needs besides; what it may have besides CLASSES.
_DECIDES: dict[str, Kind] = {
    "panoptic_json": "panoptic",
    "coco_json": "instance",
    "object_masks": "object_masks",
    "semantic_masks": "semantic",
}
_NEEDS: dict[Kind, tuple[str, ...]] = {
    "panoptic": ("panoptic_png", "images"),
    "instance": ("images",),
    "object_masks": (),
    "semantic": ("images", "classes"),
}
_MAY_HAVE: dict[Kind, tuple[str, ...]] = {
    "panoptic": ("coco_json", "semantic_masks", "ignore_label"),
    "instance": (),
    "object_masks": ("images",),
    "semantic": ("ignore_label",),
}
DEFAULT_IGNORE_LABEL = 255


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of one data set, as the user names them; nothing is read.

    One of four kinds: `panoptic_json` with `panoptic_png` and `images` (perhaps `coco_json` for the evaluation of
    instances, `semantic_masks` for that of classes); `coco_json` with `images`; `object_masks`, a folder for each
    image with one binary mask for each object, perhaps with `images`; `semantic_masks` with `images` and `classes`.

    Attributes:
        images: folder of the images.
        coco_json: COCO instance annotations.
        panoptic_json: COCO panoptic annotations.
        panoptic_png: folder of their PNGs.
        semantic_masks: folder of label maps, whose values are positions in the list of classes.
        object_masks: folder of folders of masks, see `mask2former.own_data.object_masks`.
        classes: names, or a .txt or .json file with them. With a COCO file: its names in the order of the
            contiguous ids, by default that of the ids in the file.
        ignore_label: value of unlabelled pixels in `semantic_masks`.

    Raises:
        ValueError: none or several of the kinds, or a part that is missing or of no use.
    """

    images: str | None = None
    coco_json: str | None = None
    panoptic_json: str | None = None
    panoptic_png: str | None = None
    semantic_masks: str | None = None
    object_masks: str | None = None
    classes: tuple[str, ...] | str | None = None
    ignore_label: int = DEFAULT_IGNORE_LABEL

    def __post_init__(self) -> None:
        kind = self.kind
        given = self._given()
        if missing := [part for part in _NEEDS[kind] if part not in given]:
            raise ValueError(f"{_decider(kind)} needs {missing[0].upper()}, which is not given")
        known = {_decider(kind).lower(), "classes", *_NEEDS[kind], *_MAY_HAVE[kind]}
        if useless := [part for part in given if part not in known]:
            rule = f"must not stand beside {_decider(kind)}: a data set has one kind of annotations"
            raise ValueError(f"{useless[0].upper()} {rule}")

    @property
    def kind(self) -> Kind:
        """Which of the four."""
        for part, kind in _DECIDES.items():
            if getattr(self, part) is not None:
                return kind
        raise ValueError(f"one of {', '.join(part.upper() for part in _DECIDES)} must be given, got none of them")

    def _given(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "Source":
        """From the keys of a config: the attributes' names in capitals.

        Raises:
            ValueError: a key is unknown, a value has the wrong type, or as for the class.
        """
        known = {field.name.upper(): field.name for field in fields(cls)}
        if unknown := [str(key) for key in mapping if key not in known]:
            raise ValueError(f"{unknown[0]} is no key; the keys are {', '.join(known)}")
        return cls(**{known[key]: _checked(key, value) for key, value in mapping.items() if value is not None})

    def to_mapping(self) -> dict[str, Any]:
        """What `from_mapping` takes, without defaults."""
        given = {name: getattr(self, name) for name in self._given()}
        return {name.upper(): list(v) if isinstance(v, tuple) else v for name, v in given.items()}

    def path(self, part: str) -> Path:
        """The file or folder of a part, found as `located` does.

        Raises:
            FileNotFoundError: it does not exist.
        """
        text = getattr(self, part)
        found = located(text)
        if not found.exists():
            raise FileNotFoundError(
                f"{part.upper()} names {text}, which does not exist in the working folder {Path.cwd()} nor in "
                f"{str(datasets_root())!r}, the folder of the data sets ({ROOT_VARIABLE})"
            )
        return found


def located(text: str) -> Path:
    """A path as the user wrote it: absolute, else below the working folder if it is there, else below
    `datasets_root()`.
    """
    path = Path(text).expanduser()
    return path if path.is_absolute() or path.exists() else datasets_root() / path


def _decider(kind: Kind) -> str:
    return next(part for part, decided in _DECIDES.items() if decided == kind).upper()


def _checked(key: str, value: Any) -> Any:
    if key == "IGNORE_LABEL":
        if type(value) is not int or value < 0:
            raise ValueError(f"IGNORE_LABEL must be a whole number from 0, got {value!r}")
        return value
    if key == "CLASSES" and isinstance(value, list | tuple):
        if not value or not all(isinstance(name, str) for name in value):
            raise ValueError(f"CLASSES must be a list of names or a file with them, got {value!r}")
        return tuple(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be the name of a file or folder, got {value!r}")
    return value
