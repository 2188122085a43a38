"""The command-line arguments that name one or two sources."""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from mask2former.own_data.source import Source

_PARTS = {
    "coco_json": "COCO instance annotations (with --images)",
    "panoptic_json": "COCO panoptic annotations (with --panoptic-png and --images)",
    "panoptic_png": "folder of the panoptic PNGs",
    "semantic_masks": "folder of label maps (with --images and --classes)",
    "object_masks": "folder with a folder for each image, which has a mask for each object",
    "images": "folder of the images",
}


class Sources(NamedTuple):
    """What was named for training and for validation."""

    train: Source
    val: Source | None

    def named(self, prefix: str) -> list[tuple[str, Source]]:
        """With the names of the data sets: `prefix` alone, or with _train and _val."""
        if self.val is None:
            return [(prefix, self.train)]
        return [(f"{prefix}_train", self.train), (f"{prefix}_val", self.val)]


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments; `sources_of` reads them."""
    group = parser.add_argument_group(
        "the data", "one kind of annotations, then perhaps --val and the same arguments for the validation data"
    )
    group.add_argument(
        "--train", action=_Section, const="train", nargs=0, help="what follows is for training (default)"
    )
    group.add_argument("--val", action=_Section, const="val", nargs=0, help="what follows is for validation")
    for part, text in _PARTS.items():
        group.add_argument(f"--{part.replace('_', '-')}", action=_Part, metavar="PATH", help=text)
    group.add_argument(
        "--classes", action=_Part, nargs="+", metavar="NAME", help="names, or one .txt or .json file; for both"
    )
    group.add_argument(
        "--ignore-label",
        action=_Part,
        type=int,
        metavar="N",
        help="unlabelled pixels in label maps, default 255; for both",
    )
    parser.set_defaults(given={}, section="train")


def sources_of(args: argparse.Namespace) -> Sources:
    """
    Raises:
        ValueError: the arguments name no source, or several.
    """
    train = _source(args.given.get("train", {}), "training data")
    if "val" not in args.given:
        return Sources(train, None)
    val = _source({"classes": train.classes, "ignore_label": train.ignore_label} | args.given["val"], "validation data")
    return Sources(train, val)


def _source(given: dict[str, Any], where: str) -> Source:
    try:
        return Source(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {_as_flags(str(error))}") from error


def _as_flags(message: str) -> str:
    """COCO_JSON -> --coco-json: the words that the user has typed."""
    for part in sorted([*_PARTS, "classes"], key=len, reverse=True):
        message = message.replace(part.upper(), f"--{part.replace('_', '-')}")
    return message


class _Section(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.section = self.const
        namespace.given = {**namespace.given, self.const: namespace.given.get(self.const, {})}


class _Part(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = dict(namespace.given.get(namespace.section, {}))
        if self.dest in given:
            parser.error(f"{option_string} is given twice for {namespace.section}; --val begins the validation data")
        given[self.dest] = _class_argument(values) if self.dest == "classes" else values
        namespace.given = {**namespace.given, namespace.section: given}


def _class_argument(values: Sequence[str]) -> str | tuple[str, ...]:
    is_file = len(values) == 1 and values[0].lower().endswith((".txt", ".json"))
    return values[0] if is_file else tuple(values)
