"""Masks of a large raster as runs of pixels, and COCO's run-length encoding of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Runs(NamedTuple):
    """A mask as runs of pixels, counted down the columns of the whole raster: pixel (y, x) is number x * H + y.

    Attributes:
        starts, stops: (N,) int64 first pixel of each run, and the one after its last.
    """

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]


def runs_of(mask: NDArray[np.bool_], top: int, left: int, raster_height: int) -> Runs:
    """The runs of a mask (h, w) whose upper left pixel is (top, left) of the raster."""
    padded = np.zeros((mask.shape[1], mask.shape[0] + 2), np.int8)  # (w, h + 2)
    padded[:, 1:-1] = mask.T
    steps = np.diff(padded, axis=1)  # (w, h + 1)
    edges = []
    for step in (1, -1):
        x, y = np.nonzero(steps == step)
        edges.append((left + x.astype(np.int64)) * raster_height + top + y)
    return Runs(*edges)


def joined(parts: Sequence[Runs]) -> Runs:
    """The runs of masks without common pixels, in order; those that touch become one."""
    starts = np.concatenate([part.starts for part in parts])
    stops = np.concatenate([part.stops for part in parts])
    order = starts.argsort(kind="stable")
    starts, stops = starts[order], stops[order]
    is_first = np.ones(len(starts), bool)
    is_first[1:] = starts[1:] != stops[:-1]
    is_last = np.append(is_first[1:], True)[: len(stops)]
    return Runs(starts[is_first], stops[is_last])


def coco_counts(runs: Runs, pixels: int) -> str:
    """COCO's compressed run lengths of a mask in a raster of so many pixels."""
    edges = np.stack([runs.starts, runs.stops], axis=1).ravel()  # (2 N,)
    counts = np.diff(edges, prepend=0, append=pixels)
    if counts[-1] == 0:
        counts = counts[:-1]
    numbers = counts.copy()
    numbers[3:] -= counts[1:-2]  # from the fourth on, the difference to the last but one
    return "".join(map(_characters, numbers.tolist()))


def _characters(number: int) -> str:
    """Five bits a character, the lowest first; the sixth bit says that more follow."""
    text = ""
    while True:
        bits, number = number & 31, number >> 5
        is_last = number == (-1 if bits & 16 else 0)
        text += chr(48 + (bits if is_last else bits | 32))
        if is_last:
            return text
