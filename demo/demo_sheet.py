"""Contact sheets: many small pictures with their names on one page."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from demo_inputs import CommandError
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from numpy.typing import NDArray

PER_PAGE = 20
_WIDTH = 400  # of a cell, in pixels
_LARGEST_HEIGHT = 560
_GAP, _MARGIN = 22, 30
_HEADING, _NAME, _CAPTION = 22, 16, 13  # heights of the texts
_BELOW = 52  # room for name and caption
_PAPER, _INK, _PALE = (250, 250, 248), (28, 28, 30), (110, 110, 115)


class _Entry(NamedTuple):
    picture: Image.Image
    name: str
    caption: str


class ContactSheet:
    """Collects small copies of pictures and writes them page by page, so that any number fits into memory.

    Args:
        heading: at the top of each page.
        next_path: gives the path of the next page.
        per_page: pictures on a page.
    """

    def __init__(self, heading: str, next_path: Callable[[], Path], per_page: int = PER_PAGE) -> None:
        self._pages: list[Path] = []
        self._heading, self._next_path, self._per_page = heading, next_path, per_page
        self._entries: list[_Entry] = []

    def add(self, pixels: NDArray[np.uint8], name: str, caption: str) -> None:
        """Add a picture; a page that is full is written once there is a picture for the next one.

        Raises:
            CommandError: if the page cannot be written.
        """
        if len(self._entries) == self._per_page:
            self._write()
        picture = Image.fromarray(pixels)
        picture.thumbnail((_WIDTH, _LARGEST_HEIGHT), Image.Resampling.LANCZOS)
        self._entries.append(_Entry(picture, name, caption))

    def close(self) -> list[Path]:
        """Write the last page; returns all pages. A single picture needs no sheet.

        Raises:
            CommandError: if the page cannot be written.
        """
        if self._pages or len(self._entries) > 1:
            self._write()
        return self._pages

    def _write(self) -> None:
        from mask2former.checkpoint import write_atomically

        heading, columns = self._heading, _columns(len(self._entries))
        if self._pages or len(self._entries) == self._per_page:  # all pages alike
            heading, columns = f"{heading}, page {len(self._pages) + 1}", _columns(self._per_page)
        path, buffer = self._next_path(), io.BytesIO()
        _page(self._entries, heading, columns).save(buffer, format="PNG")
        try:
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            raise CommandError(f"cannot write the contact sheet {path}: {error.strerror}") from error
        self._pages.append(path)
        self._entries = []


def _page(entries: Sequence[_Entry], heading: str, columns: int) -> Image.Image:
    rows = -(-len(entries) // columns)
    # Cells of the usual shape of the pictures leave the least empty.
    shape = float(np.median([entry.picture.width / entry.picture.height for entry in entries]))
    height = round(_WIDTH / min(max(shape, _WIDTH / _LARGEST_HEIGHT), 1.8))
    top = _MARGIN + 2 * _HEADING
    size = (
        2 * _MARGIN + columns * _WIDTH + (columns - 1) * _GAP,
        top + rows * (height + _BELOW) + (rows - 1) * _GAP + _MARGIN // 2,
    )
    page = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(page)
    _write_text(draw, (_MARGIN, _MARGIN - 6), heading, _HEADING, _INK, size[0] - 2 * _MARGIN)
    for i, entry in enumerate(entries):
        x = _MARGIN + i % columns * (_WIDTH + _GAP)
        y = top + i // columns * (height + _BELOW + _GAP)
        _paste(page, entry.picture, (x, y), height)
        _write_text(draw, (x, y + height + 8), entry.name, _NAME, _INK, _WIDTH)
        _write_text(draw, (x, y + height + 30), entry.caption, _CAPTION, _PALE, _WIDTH)
    return page


def _columns(count: int) -> int:
    """Few enough that pages stay readable: 2 x 2, 3 x 2, 3 x 3, 4 x 5."""
    return 2 if count in (2, 4) else 3 if count in (3, 5, 6, 9) else 4


def _paste(page: Image.Image, picture: Image.Image, corner: tuple[int, int], height: int) -> None:
    """Put a picture into the lower left of a cell of this height, as large as it goes but not above twice its size."""
    scale = min(_WIDTH / picture.width, height / picture.height, 2.0)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    fitted = picture.resize(size, Image.Resampling.LANCZOS)
    page.paste(fitted, (corner[0], corner[1] + height - size[1]))


def _write_text(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, size: int, color: tuple[int, int, int], room: int
) -> None:
    """Write a line, shortened to the room in pixels."""
    try:
        font = ImageFont.load_default(size)
    except (TypeError, ImportError):  # Pillow before 10.1, or built without FreeType: a small Latin font
        font = ImageFont.load_default()
        text = text.encode("latin-1", "replace").decode("latin-1")
    if draw.textlength(text, font) > room:
        lengths = range(len(text))
        fitting = bisect_right(lengths, float(room), key=lambda n: draw.textlength(f"{text[:n]}...", font))
        text = text[: max(0, fitting - 1)].rstrip(" ,:") + "..."
    draw.text(corner, text, fill=color, font=font)
