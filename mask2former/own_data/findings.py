"""What a check finds."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from mask2former.own_data.json_document import JsonDocument, Place, Position

Level = Literal["fault", "warning", "note"]
LEVELS: tuple[Level, ...] = ("fault", "warning", "note")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        level: "fault": training or evaluation would fail or be wrong. "warning": probably not meant so. "note".
        code: names the kind of finding; docs/custom_dataset.md lists them.
        file: the file that has to be changed.
        message: what is the matter, with the value.
        place: in a JSON file, the part.
        position: its line and column, once they were looked up.
    """

    level: Level
    code: str
    file: str
    message: str
    place: Place | None = None
    position: Position | None = None

    def located(self, documents: Mapping[str, JsonDocument]) -> "Finding":
        """With the position, if it has a place in one of these documents."""
        if self.place is None or self.position is not None or self.file not in documents:
            return self
        return replace(self, position=documents[self.file].position(self.place))

    def where(self) -> str:
        """file:line:column, as editors understand it."""
        return self.file if self.position is None else f"{self.file}:{self.position.line}:{self.position.column}"


def fault(code: str, file: object, message: str, place: Place | None = None) -> Finding:
    return Finding(level="fault", code=code, file=str(file), message=message, place=place)


def warning(code: str, file: object, message: str, place: Place | None = None) -> Finding:
    return Finding(level="warning", code=code, file=str(file), message=message, place=place)


def note(code: str, file: object, message: str, place: Place | None = None) -> Finding:
    return Finding(level="note", code=code, file=str(file), message=message, place=place)


class ObjectSize(NamedTuple):
    """One object, segment, or class in a label map.

    Attributes:
        category: position in the list of classes.
        pixels: that it covers.
        height: of its bounding box.
        width: of its bounding box.
    """

    category: int
    pixels: int
    height: int
    width: int


@dataclass(kw_only=True)
class ImageScan:
    """What the look at one image and its annotations gave.

    Attributes:
        file: of the image.
        findings: all of them.
        size: (height, width), None if the image cannot be read.
        objects: without crowds.
        unlabelled: pixels that belong to no class: void or ignored.
        digest: the same for images with the same pixels.
    """

    file: str
    findings: list[Finding] = field(default_factory=list)
    size: tuple[int, int] | None = None
    objects: list[ObjectSize] = field(default_factory=list)
    unlabelled: int = 0
    digest: str | None = None
