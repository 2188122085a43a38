"""An image on its way through geometric steps, and where each of its pixels comes from.

Flips, resizes, crops and paddings act on rows and columns separately. So the whole chain is two index
vectors, and a mask or label map of the source image follows with one gather instead of one copy per step.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGE_PAD_VALUE = 128
"""Grey that published trainings pad images with in the data loader."""


@dataclass(frozen=True)
class View:
    """A transformed image. Steps give a new view and leave the old one as it is.

    Attributes:
        image: (h, w, 3) uint8.
        rows: (h,) source row of each row, -1 for padding; monotone apart from padding at the ends.
        cols: (w,) the same for columns.
    """

    image: NDArray[np.uint8]
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]

    @classmethod
    def of(cls, image: NDArray[np.uint8]) -> "View":
        """The untransformed image (H, W, 3) uint8."""
        height, width = image.shape[:2]
        return cls(image, np.arange(height), np.arange(width))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return len(self.rows), len(self.cols)

    def flip_horizontal(self) -> "View":
        return replace(self, image=self.image[:, ::-1], cols=self.cols[::-1])

    def flip_vertical(self) -> "View":
        return replace(self, image=self.image[::-1], rows=self.rows[::-1])

    def resize(self, height: int, width: int) -> "View":
        """Bilinear for the image, nearest for everything else, both exactly as Pillow does."""
        return View(
            resize_image(self.image, height, width),
            self.rows[nearest_indices(len(self.rows), height)],
            self.cols[nearest_indices(len(self.cols), width)],
        )

    def crop(self, top: int, left: int, height: int, width: int) -> "View":
        """The part of that window that lies inside the image; `top` and `left` are not negative."""
        rows, cols = slice(top, top + height), slice(left, left + width)
        return View(self.image[rows, cols], self.rows[rows], self.cols[cols])

    def pad(self, height: int, width: int) -> "View":
        """Pads at the bottom and the right to at least that size."""
        below, right = max(height - len(self.rows), 0), max(width - len(self.cols), 0)
        if not below and not right:
            return self
        return View(
            np.pad(self.image, ((0, below), (0, right), (0, 0)), constant_values=IMAGE_PAD_VALUE),
            np.pad(self.rows, (0, below), constant_values=-1),
            np.pad(self.cols, (0, right), constant_values=-1),
        )

    def gather(self, source: NDArray[Any], fill: int) -> NDArray[Any]:
        """Brings a map of the source image into this view, by nearest neighbours.

        Args:
            source: (H, W) of any type.
            fill: the value of padding.

        Returns:
            (h, w) of the same type; a copy.
        """
        by_row = source.take(self.rows, axis=0, mode="clip")
        result: NDArray[Any] = by_row.take(self.cols, axis=1, mode="clip")
        result[self.rows < 0] = fill
        result[:, self.cols < 0] = fill
        return result


def resize_image(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Bilinear with Pillow (antialiased when shrinking): (H, W, 3) uint8 -> (height, width, 3) uint8."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def nearest_indices(old: int, new: int) -> NDArray[np.int64]:
    """Which of `old` positions Pillow's nearest-neighbour resize takes for each of `new` ones: (new,).

    Pillow is asked instead of a formula: it adds up a step in floating point, so that a closed form differs
    from it in a few positions.
    """
    ruler = Image.fromarray(np.arange(old, dtype=np.int32)[None])
    return np.asarray(ruler.resize((new, 1), Image.Resampling.NEAREST))[0].astype(np.int64)
