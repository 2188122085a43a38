"""An image on its way through geometric steps, and where each of its pixels comes from.

Flips, resizes, crops and paddings act on rows and columns separately. So the whole chain is two index
vectors, and a mask or label map of the source image follows with one gather instead of one copy per step.
The image itself waits: a resize is done when pixels are asked for, and of it only what later crops have left.
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGE_PAD_VALUE = 128
"""Grey that published trainings pad images with in the data loader."""


class Window(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class View:
    """A transformed image. Steps give a new view and leave the old one as it is; `View.of` makes the first one.

    Attributes:
        rows: (h,) source row of each row, -1 for padding; monotone apart from padding at the ends.
        cols: (w,) the same for columns.
        source: RGB; what the image is made of.
        resized: (height, width) that the source is to be resized to.
        window: what is left of that. The rest of the view, below and to the right, is padding.
    """

    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    source: Image.Image
    resized: tuple[int, int]
    window: Window

    @classmethod
    def of(cls, image: NDArray[np.uint8] | Image.Image) -> "View":
        """The untransformed image, (H, W, 3) uint8 RGB or of Pillow's mode RGB."""
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        return cls._whole(picture, np.arange(picture.height), np.arange(picture.width))

    @classmethod
    def _whole(cls, picture: Image.Image, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> "View":
        size = picture.height, picture.width
        return cls(rows, cols, picture, size, Window(0, 0, *size))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return len(self.rows), len(self.cols)

    @cached_property
    def picture(self) -> Image.Image:
        """The image without the padding below and to the right."""
        top, _, height, width = self.window
        columns = self._columns
        return columns if columns.height == height else columns.crop((0, top, width, top + height))

    @cached_property
    def _columns(self) -> Image.Image:
        return resize_columns(self.source, *self.resized, self.window)

    @property
    def image(self) -> NDArray[np.uint8]:
        """The image, (h, w, 3) uint8 RGB; not to be changed."""
        pixels = np.asarray(self.picture)
        if self.window[2:] == self.size:
            return pixels
        image = np.full((*self.size, 3), IMAGE_PAD_VALUE, dtype=np.uint8)
        image[: self.window.height, : self.window.width] = pixels
        return image

    def planes(self, order: Literal["RGB", "BGR"]) -> NDArray[np.uint8]:
        """The image with the channels first and in that order, (3, h, w) uint8; a new array."""
        top, _, height, width = self.window
        columns = self._columns
        planes = np.empty((3, *self.size), dtype=np.uint8)
        for plane, channel in zip(planes, order, strict=True):
            data = columns.tobytes("raw", channel)
            pixels = np.frombuffer(data, dtype=np.uint8).reshape(columns.height, width)
            plane[:height, :width] = pixels[top : top + height] if columns.height > height else pixels
        planes[:, height:] = planes[:, :, width:] = IMAGE_PAD_VALUE
        return planes

    def with_image(self, image: NDArray[np.uint8]) -> "View":
        """The same places with other pixels, (h, w, 3) uint8 RGB."""
        return self._whole(Image.fromarray(image), self.rows, self.cols)

    def flip_horizontal(self) -> "View":
        flipped = self._padded_picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._whole(flipped, self.rows, self.cols[::-1])

    def flip_vertical(self) -> "View":
        flipped = self._padded_picture().transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return self._whole(flipped, self.rows[::-1], self.cols)

    def resize(self, height: int, width: int) -> "View":
        """Bilinear for the image, nearest for everything else, both exactly as Pillow does."""
        rows = self.rows[nearest_indices(len(self.rows), height)]
        cols = self.cols[nearest_indices(len(self.cols), width)]
        return View(rows, cols, self._padded_picture(), (height, width), Window(0, 0, height, width))

    def crop(self, top: int, left: int, height: int, width: int) -> "View":
        """The part of that window that lies inside the image; `top` and `left` are not negative."""
        old = self.window
        window = Window(
            old.top + top,
            old.left + left,
            max(min(height, old.height - top), 0),
            max(min(width, old.width - left), 0),
        )
        rows, cols = self.rows[top : top + height], self.cols[left : left + width]
        return View(rows, cols, self.source, self.resized, window)

    def pad(self, height: int, width: int) -> "View":
        """Pads at the bottom and the right to at least that size."""
        below, right = max(height - len(self.rows), 0), max(width - len(self.cols), 0)
        rows = np.pad(self.rows, (0, below), constant_values=-1)
        cols = np.pad(self.cols, (0, right), constant_values=-1)
        return View(rows, cols, self.source, self.resized, self.window)

    def gather(self, source: NDArray[Any], fill: int) -> NDArray[Any]:
        """Brings a map of the source image into this view, by nearest neighbours.

        Args:
            source: (H, W) of any type.
            fill: the value of padding.

        Returns:
            (h, w) of the same type; a copy.
        """
        return self.spread(self.visible(source), fill)

    def visible(self, source: NDArray[Any]) -> NDArray[Any]:
        """The rows and columns of a map of the source image that this view shows, each once: never larger than
        either of them.
        """
        rows, cols = self._axes
        return source.take(rows.shown, axis=0).take(cols.shown, axis=1)

    def spread(self, visible: NDArray[Any], fill: int) -> NDArray[Any]:
        """The (h, w) map in this view of what `visible` gave; `fill` is the value of padding."""
        rows, cols = self._axes
        # Columns first: where a view enlarges, there are fewer rows before than after.
        if len(cols.turns) > len(cols.shown):
            visible = visible.take(cols.turns, axis=1)
        if len(rows.turns) > len(rows.shown):
            visible = visible.take(rows.turns, axis=0)
        if visible.shape == self.size:
            return visible
        result = np.full(self.size, fill, dtype=visible.dtype)
        result[rows.place, cols.place] = visible
        return result

    @cached_property
    def _axes(self) -> "tuple[_Axis, _Axis]":
        return _axis(self.rows), _axis(self.cols)

    def _padded_picture(self) -> Image.Image:
        return self.picture if self.window[2:] == self.size else Image.fromarray(self.image)


class _Axis(NamedTuple):
    """The rows, or columns, of a view.

    Attributes:
        place: of those that are not padding.
        shown: (n,) their source rows, each once, in their order.
        turns: index into `shown` of each.
    """

    place: slice
    shown: NDArray[np.int64]
    turns: NDArray[np.int64]


def _axis(index: NDArray[np.int64]) -> _Axis:
    inside = np.flatnonzero(index >= 0)
    place = slice(inside[0], inside[-1] + 1) if len(inside) else slice(0, 0)
    sources = index[place]
    is_new = np.append(True, sources[1:] != sources[:-1])[: len(sources)]
    return _Axis(place, sources[is_new], np.cumsum(is_new) - 1)


def resize_image(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Bilinear with Pillow (antialiased when shrinking): (H, W, 3) uint8 -> (height, width, 3) uint8."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resize_columns(image: Image.Image, height: int, width: int, window: Window) -> Image.Image:
    """The columns of a window of what Pillow's bilinear resize gives, the same to the last bit.

    Pillow resizes along the rows, rounds to 8 bits, and resizes along the columns; what the window does not need is
    left out between the two. Newer versions may start with the columns where the height shrinks, so that only
    enlarging is taken apart. (The `box` of `Image.resize` would leave out more, but gives other pixels: it is rounded
    to float32.)

    Args:
        image: RGB.
        height: of the whole result.
        width: of the whole result.
        window: inside of it.

    Returns:
        As wide as the window; all rows, or those of the window.
    """
    top, left, rows, cols = window
    bilinear = Image.Resampling.BILINEAR
    if not rows or not cols:
        return Image.new("RGB", (cols, rows))
    if image.size == (width, height):
        return image if (rows, cols) == (height, width) else image.crop((left, top, left + cols, top + rows))
    if cols == width or height < image.height:
        whole = image.resize((width, height), bilinear)
        return whole if cols == width else whole.crop((left, top, left + cols, top + rows))
    first, last = _needed(image.height, height, top, rows)
    strip = image.crop((0, first, image.width, last)).resize((width, last - first), bilinear)
    strip = strip.crop((left, 0, left + cols, last - first))
    return _on_blank(strip, first, image.height).resize((cols, height), bilinear)


def nearest_indices(old: int, new: int) -> NDArray[np.int64]:
    """Which of `old` positions Pillow's nearest-neighbour resize takes for each of `new` ones: (new,).

    Pillow is asked instead of a formula: it adds up a step in floating point, so that a closed form differs
    from it in a few positions.
    """
    ruler = Image.fromarray(np.arange(old, dtype=np.int32)[None])
    return np.asarray(ruler.resize((new, 1), Image.Resampling.NEAREST))[0].astype(np.int64)


def _needed(old: int, new: int, first: int, count: int) -> tuple[int, int]:
    """Start and end of the rows, out of `old` ones, that these of `new` ones are made of; a row more on each side."""
    step = old / new
    reach = max(step, 1.0) + 1.0
    return max(floor(first * step - reach), 0), min(ceil((first + count) * step + reach), old)


def _on_blank(strip: Image.Image, top: int, height: int) -> Image.Image:
    """The strip at its place in an image of that height; the resize along the columns depends on both."""
    if strip.height == height:
        return strip
    whole = Image.new("RGB", (strip.width, height))
    whole.paste(strip, (0, top))
    return whole
