"""Which masks of two neighbouring tiles are one object, and the table of the parts that belong together."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from mask2former.tiling.grid import Window
from mask2former.tiling.results import Box


class Seam(NamedTuple):
    """What two neighbours compare.

    Attributes:
        first: pixels of the upper or left tile.
        second: pixels of the other one; the same place, or, without an overlap, the line next to that of the first.
    """

    first: Window
    second: Window


def seam(first: Window, second: Window) -> Seam:
    """Of two neighbours: the pixels that both cover, or the two lines along their border if there are none."""
    top, left = max(first.top, second.top), max(first.left, second.left)
    bottom = min(first.top + first.height, second.top + second.height)
    right = min(first.left + first.width, second.left + second.width)
    if bottom > top and right > left:
        both = Window(top, left, bottom - top, right - left)
        return Seam(both, both)
    if bottom == top:
        return Seam(Window(top - 1, left, 1, right - left), Window(top, left, 1, right - left))
    return Seam(Window(top, left - 1, bottom - top, 1), Window(top, left, bottom - top, 1))


def one_to_one(
    intersections: NDArray[np.int64],
    first_areas: NDArray[np.int64],
    second_areas: NDArray[np.int64],
    threshold: float,
) -> list[tuple[int, int]]:
    """Pairs of masks that are one object.

    Args:
        intersections: (M, N) pixels that masks of two tiles have in common; 0 for those that must not be paired.
        first_areas: (M,) pixels of the masks of the first tile, where both tiles look.
        second_areas: (N,) likewise.
        threshold: least intersection over union, above 0.

    Returns:
        (m, n), each m and each n at most once: of all such pairings the one with the largest sum.
    """
    unions = first_areas[:, None] + second_areas[None] - intersections
    overlap = intersections / np.maximum(unions, 1)  # (M, N)
    overlap[overlap < threshold] = 0
    pairs = zip(*linear_sum_assignment(overlap, maximize=True), strict=True)
    return [(int(m), int(n)) for m, n in pairs if overlap[m, n] > 0]


def matched_ids(
    first: NDArray[np.uint32], second: NDArray[np.uint32], class_of: Callable[[int], int], threshold: float
) -> list[tuple[int, int]]:
    """Pairs of ids in two id maps that are one object.

    Args:
        first, second: (h, w) ids of the same place, 0 where nothing is.
        class_of: gives the class of an id; below 0 for what is not to be paired.
        threshold: see `one_to_one`.
    """
    a, first_place = np.unique(first, return_inverse=True)
    b, second_place = np.unique(second, return_inverse=True)
    counts = np.bincount(first_place.ravel() * len(b) + second_place.ravel(), minlength=len(a) * len(b))
    counts = counts.reshape(len(a), len(b))
    class_a, class_b = (np.array([class_of(i) for i in ids.tolist()], np.int64) for ids in (a, b))
    may_pair = (class_a[:, None] == class_b[None]) & (class_a[:, None] >= 0)
    pairs = one_to_one(counts * may_pair, counts.sum(1), counts.sum(0), threshold)
    return [(int(a[m]), int(b[n])) for m, n in pairs]


class PartTable:
    """Parts of segments, each from one tile, and which of them belong together (a union-find). Part 0 is nothing."""

    def __init__(self) -> None:
        self.labels = [-1]
        self.scores = [0.0]
        self._parents = [0]
        self._areas = [0]
        self._boxes: list[Box | None] = [None]

    def add(self, label: int, score: float) -> int:
        """A new part; returns its number."""
        self.labels.append(label)
        self.scores.append(score)
        self._parents.append(len(self._parents))
        self._areas.append(0)
        self._boxes.append(None)
        return len(self._parents) - 1

    def root(self, part: int) -> int:
        """The part that stands for all that were joined with this one: the earliest."""
        while self._parents[part] != part:
            self._parents[part] = self._parents[self._parents[part]]  # halves the way of the next search
            part = self._parents[part]
        return part

    def join(self, first: int, second: int) -> None:
        """Two parts are of one segment."""
        low, high = sorted((self.root(first), self.root(second)))
        self._parents[high] = low

    def grow(self, part: int, area: int, box: Box, score: float) -> None:
        """Add pixels to a part; its score is the mean over its pixels."""
        old = self._areas[part]
        self.scores[part] = (self.scores[part] * old + score * area) / (old + area)
        self._areas[part] = old + area
        mine = self._boxes[part]
        self._boxes[part] = box if mine is None else around(mine, box)

    def segments(self) -> tuple[NDArray[np.uint32], list[tuple[int, float, int, Box]]]:
        """
        Returns:
            The id of each part (0 without pixels), dense from 1 in the order of the parts; label, score, area and
            box of each id.
        """
        for part in range(len(self._parents) - 1, 0, -1):
            root, box = self.root(part), self._boxes[part]
            if root != part and box is not None:
                self.grow(root, self._areas[part], box, self.scores[part])
        ids = np.zeros(len(self._parents), np.uint32)
        found = []
        for part in range(1, len(ids)):
            root, box = self.root(part), self._boxes[part]
            if root == part and box is not None:
                found.append((self.labels[part], self.scores[part], self._areas[part], box))
                ids[part] = len(found)
            else:
                ids[part] = ids[root]  # an earlier one, or none
        return ids, found


def around(first: Box, second: Box) -> Box:
    """The smallest box that holds both."""
    return Box(
        min(first.x0, second.x0), min(first.y0, second.y0), max(first.x1, second.x1), max(first.y1, second.y1)
    )
