"""Bilinear resizing of maps in bands of rows: any rows of the result, from the few source rows that they need.

A pixel is the same number in any band, as its source places and weights come from its place in the whole result. The
arithmetic is that of ``F.interpolate(..., mode="bilinear", align_corners=False)``: places in float32, columns before
rows, and one of the two products of a sum unrounded (a fused multiply-add). So it has that function's very bits on x86
processors, but for results of height + width <= 128 and for three maps: for these PyTorch has another kernel, which
differs in the last bit. On other devices the two are the same up to rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.modeling.layers import to_device
from mask2former.ops.pixels import Axis, blend

CHUNK_PIXELS = 1 << 26  # numbers made at a time on an accelerator: 256 MiB in float32
CPU_CHUNK_PIXELS = 1 << 18  # on a CPU; more do not stay in its cache, which takes up to three times as long
MIN_ROWS = 8  # of a band; source rows at its edge are made for both bands


class Resize(NamedTuple):
    """One bilinear resize.

    Attributes:
        source: (height, width) before.
        target: (height, width) after.
        kept: (height, width) of the upper left part of the target that is wanted.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    kept: tuple[int, int]


class BandResizer:
    """Resizes one after the other, for any rows of the last one's result."""

    def __init__(self, resizes: Sequence[Resize], device: torch.device) -> None:
        """Set up.

        Args:
            resizes: at least one; the ``kept`` of each is the ``source`` of the next.
            device: of the maps.
        """
        self._steps = [_Step(resize, device) for resize in resizes]
        self.size = resizes[-1].kept
        self._pixels = CPU_CHUNK_PIXELS if device.type == "cpu" else CHUNK_PIXELS
        rows = self.size[0]
        # numbers that one row of the result of one map needs at a time, about
        self._pixels_per_row = max(-(-r.kept[0] // rows) * max(r.kept[1], self.size[1]) for r in resizes)

    def source_rows(self, rows: slice) -> slice:
        """Rows of the maps that some rows of the result are made of."""
        for step in reversed(self._steps):
            rows = step.source_rows(rows)
        return rows

    def __call__(self, maps: Tensor, rows: slice) -> Tensor:
        """Resize.

        Args:
            maps: (N, r, w) float, only the rows that `source_rows` names.
            rows: of the result.

        Returns:
            (N, number of rows, kept width); may be ``maps`` itself.
        """
        wanted = [rows]
        for step in reversed(self._steps[1:]):
            wanted.append(step.source_rows(wanted[-1]))
        for step in self._steps:
            maps = step(maps, wanted.pop())
        return maps

    def bands(self, maps: int) -> Iterator[slice]:
        """Bands of rows which together are the result; so high that all maps fit into a chunk, but see `MIN_ROWS`.

        Args:
            maps: how many maps there are.
        """
        step = max(MIN_ROWS, self._pixels // (max(1, maps) * self._pixels_per_row))
        for start in range(0, self.size[0], step):
            yield slice(start, min(start + step, self.size[0]))

    def chunks(self, maps: Tensor, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of the result, a few maps at a time.

        Args:
            maps: (N, h, w), whole.
            rows: of the result.

        Yields:
            Which maps, and (n, number of rows, kept width) float32, which the caller may change.
        """
        step = max(1, self._pixels // ((rows.stop - rows.start) * self._pixels_per_row))
        for start in range(0, len(maps), step):
            chunk = slice(start, min(start + step, len(maps)))
            yield chunk, self.band(maps[chunk], rows)

    def band(self, maps: Tensor, rows: slice) -> Tensor:
        """Some rows of the result: (N, number of rows, kept width) float32, which the caller may change.

        Args:
            maps: (N, h, w), whole.
            rows: of the result.
        """
        # copied, as without any resize the caller would get, and might change, the maps themselves
        return self(maps[:, self.source_rows(rows)].to(torch.float32, copy=True), rows)


@dataclass(frozen=True)
class MaskGeometry:
    """How the mask logits of an image get to the output: canvas, crop, output, both resizes bilinear.

    Attributes:
        canvas: (height, width) of the padded batch, which the mask logits cover.
        image_size: (height, width) of the image on the canvas, its upper left part.
        output_size: (height, width) of the result.
    """

    canvas: tuple[int, int]
    image_size: tuple[int, int]
    output_size: tuple[int, int]

    def resize(self, maps: Tensor) -> Tensor:
        """(N, h, w) of the canvas -> (N, *output_size), all at once."""
        return self.from_canvas(_resize(maps, self.canvas))

    def from_canvas(self, maps: Tensor) -> Tensor:
        """(N, *canvas) -> (N, *output_size), all at once."""
        return _resize(maps[:, : self.image_size[0], : self.image_size[1]], self.output_size)

    def bands(self, maps: Tensor) -> BandResizer:
        """What does `resize` for any rows; ``maps`` (N, h, w) are only looked at."""
        return BandResizer([self._to_canvas(maps), self._from_canvas()], maps.device)

    def canvas_bands(self, maps: Tensor) -> tuple[BandResizer, BandResizer]:
        """What does the two halves of `resize` for any rows: up to the image on the canvas, and from there."""
        return BandResizer([self._to_canvas(maps)], maps.device), BandResizer([self._from_canvas()], maps.device)

    def _to_canvas(self, maps: Tensor) -> Resize:
        return Resize((maps.shape[1], maps.shape[2]), self.canvas, self.image_size)

    def _from_canvas(self) -> Resize:
        return Resize(self.image_size, self.output_size, self.output_size)


class _Step:
    """One resize, for any rows."""

    def __init__(self, resize: Resize, device: torch.device) -> None:
        (height, width), (target_height, target_width), (kept_height, kept_width) = resize
        self._width = kept_width
        self._device = device
        self._columns = None if width == target_width else _axis(width, target_width, kept_width)
        self._rows = None if height == target_height else _axis(height, target_height, kept_height)
        self._first_row = [] if self._rows is None else self._rows.first.tolist()
        self._last_row = [] if self._rows is None else self._rows.second.tolist()
        self._is_moved = False

    def source_rows(self, rows: slice) -> slice:
        if self._rows is None:
            return rows
        return slice(self._first_row[rows.start], self._last_row[rows.stop - 1] + 1)

    def _move(self) -> None:
        """Copy the places to the device, before their first use: who asks for bands only needs none of them there."""
        self._is_moved = True
        if self._columns is not None:
            self._columns = _moved(self._columns, self._device)
        if self._rows is not None:
            self._rows = _moved(self._rows, self._device)

    def __call__(self, maps: Tensor, rows: slice) -> Tensor:
        if not self._is_moved:
            self._move()
        if self._rows is None:
            return blend(maps, self._columns, None, self._width)  # (N, R, W)
        offset = self._first_row[rows.start]
        first, second, first_weight, second_weight = (part[rows] for part in self._rows)
        part = Axis(first - offset, second - offset, first_weight, second_weight)
        return blend(maps, self._columns, part, self._width)  # (N, R, W)


def _axis(source: int, target: int, kept: int) -> Axis:
    scale = torch.tensor(float(source), dtype=torch.float32) / target
    places = torch.arange(kept, dtype=torch.float64) + 0.5
    positions = (scale.double() * places - 0.5).float().clamp_min(0)  # exact in float64, then rounded once
    first = positions.floor().long().clamp_max(source - 1)
    weight = (positions - first).clamp(0, 1)
    return Axis(first, (first + 1).clamp_max(source - 1), 1 - weight, weight)


def _moved(axis: Axis, device: torch.device) -> Axis:
    """In two copies."""
    places = to_device(torch.stack([axis.first, axis.second]), device)  # (2, n)
    weights = to_device(torch.stack([axis.first_weight, axis.second_weight]), device)  # (2, n)
    return Axis(*places, *weights)


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[1:] == size:
        return maps
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
