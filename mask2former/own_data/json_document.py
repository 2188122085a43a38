"""JSON files whose parts know their line."""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

Place = tuple[str | int, ...]
"""The way to a part of a document: keys and positions in lists; () is the whole."""

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class Position(NamedTuple):
    """Line and column, both from 1."""

    line: int
    column: int


class DamagedJsonError(ValueError):
    """A file that is no JSON.

    Attributes:
        position: where reading failed.
        reason: what was expected there.
    """

    def __init__(self, path: Path, position: Position, reason: str) -> None:
        super().__init__(f"{path}:{position.line}:{position.column}: {reason}")
        self.position = position
        self.reason = reason


class JsonDocument:
    """A parsed file.

    Attributes:
        path: of the file.
        content: what it holds.

    Raises:
        DamagedJsonError: it is no JSON in UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts: dict[int, dict[str | int, int]] = {}
        raw = path.read_bytes()
        try:
            self._text = raw.decode("utf-8")
            self.content: Any = json.loads(self._text)
        except json.JSONDecodeError as error:
            raise DamagedJsonError(path, Position(error.lineno, error.colno), error.msg) from error
        except UnicodeDecodeError as error:
            before = raw[: error.start]
            position = Position(before.count(b"\n") + 1, error.start - before.rfind(b"\n"))
            raise DamagedJsonError(path, position, f"no UTF-8: {error.reason}") from error

    def position(self, place: Place) -> Position:
        """Where a part begins; of a part that does not exist, where the innermost one around it begins."""
        offset = self._skip(0)
        for step in place:
            starts = self._starts.get(offset)
            if starts is None:
                starts = self._starts[offset] = dict(self._parts(offset))
            if step not in starts:
                break
            offset = starts[step]
        line = bisect_right(self._newlines, offset - 1)
        return Position(line + 1, offset - (self._newlines[line - 1] if line else -1))

    @cached_property
    def _newlines(self) -> list[int]:
        return [found.start() for found in re.finditer("\n", self._text)]

    def _parts(self, offset: int) -> Iterator[tuple[str | int, int]]:
        """Key or number, and start, of each part of the object or list at `offset`; of anything else none."""
        opening = self._text[offset]
        if opening not in "{[":
            return
        offset, number = self._skip(offset + 1), 0
        while self._text[offset] not in "}]":
            step: str | int = number
            if opening == "{":
                step, offset = _DECODER.raw_decode(self._text, offset)
                offset = self._skip(self._skip(offset) + 1)  # the colon
            yield step, offset
            offset = self._skip(_DECODER.raw_decode(self._text, offset)[1])
            if self._text[offset] == ",":
                offset = self._skip(offset + 1)
            number += 1

    def _skip(self, offset: int) -> int:
        found = _SPACE.match(self._text, offset)
        assert found is not None  # it matches nothing at all too
        return found.end()
