"""Instances of tiles, put together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mask2former.data.catalog import Category
from mask2former.tiling.grid import Tile, TileGrid, Window
from mask2former.tiling.results import Box, LargeInstance
from mask2former.tiling.runs import Runs, coco_counts, joined, runs_of
from mask2former.tiling.seams import around, one_to_one, seam


@dataclass(eq=False)
class _Open:
    """An instance that may go on in tiles to come.

    Attributes:
        label: contiguous class index.
        row: the last row of tiles that has a part of it.
        weighted_score: sum of score times pixels.
        joined_with: the instance that it is a part of, once it is known.
    """

    label: int
    row: int
    area: int = 0
    weighted_score: float = 0.0
    box: Box | None = None
    runs: list[Runs] = field(default_factory=list)
    joined_with: "_Open | None" = None

    def whole(self) -> "_Open":
        """The instance that this is a part of."""
        instance = self
        while instance.joined_with is not None:
            instance = instance.joined_with
        return instance

    def take(self, other: "_Open") -> None:
        """Become one with another one."""
        self.row = max(self.row, other.row)
        self.area += other.area
        self.weighted_score += other.weighted_score
        if other.box is not None:
            self.box = other.box if self.box is None else around(self.box, other.box)
        self.runs += other.runs
        other.runs, other.joined_with = [], self


class _Strip(NamedTuple):
    """Masks of a tile where its neighbours look, too.

    Attributes:
        window: what the masks cover.
        instances: N.
        masks: (N, h, w) bool.
    """

    window: Window
    instances: list[_Open]
    masks: NDArray[np.bool_]

    def cut(self, window: Window) -> "_Strip":
        """A part of it, with the instances that have pixels there."""
        masks = self.masks[(slice(None), *window.within(self.window).slices)]
        places = np.flatnonzero(np.any(masks, axis=(1, 2)))
        return _Strip(window, [self.instances[place] for place in places], masks[places])


class _PackedStrip(NamedTuple):
    """A strip in an eighth of the memory."""

    window: Window
    instances: list[_Open]
    bits: NDArray[np.uint8]

    @classmethod
    def of(cls, strip: _Strip) -> "_PackedStrip":
        return cls(strip.window, strip.instances, np.packbits(strip.masks, axis=2))

    def unpacked(self) -> _Strip:
        masks = np.unpackbits(self.bits, axis=2, count=self.window.width).view(np.bool_)
        return _Strip(self.window, self.instances, masks)


class InstanceMerger:
    """Takes tiles in the order of the grid and gives each instance away as soon as no tile to come can add to it.

    In memory are two rows of tiles' strips and the runs of open instances.
    """

    def __init__(
        self,
        grid: TileGrid,
        categories: Sequence[Category],
        emit: Callable[[LargeInstance], None],
        match_iou: float,
    ) -> None:
        """Set up.

        Args:
            grid: of the tiles.
            categories: by contiguous id.
            emit: takes each instance.
            match_iou: see `mask2former.tiling.segment_large`.
        """
        self._grid = grid
        self._categories = categories
        self._emit = emit
        self._match_iou = match_iou
        self._open: list[_Open] = []
        self._left: _Strip | None = None
        self._above: list[_PackedStrip] = []

    def add(self, tile: Tile, picture: Any) -> None:
        """Add a tile's result: ``labels`` (N,), ``scores`` (N,) and ``masks`` (N, h, w) bool."""
        instances = [
            self._part(tile, int(label), float(score), mask)
            for label, score, mask in zip(picture.labels, picture.scores, picture.masks, strict=True)
        ]
        self._open += instances
        strip = _Strip(tile.window, instances, picture.masks)
        if tile.column:
            assert self._left is not None
            self._join(self._left, strip)
        if tile.row:
            self._join(self._above[tile.column].unpacked(), strip)
        self._left = strip
        lowest = _PackedStrip.of(strip.cut(self._grid.shared_below(tile)))
        if tile.row == 0:
            self._above.append(lowest)
        else:
            self._above[tile.column] = lowest
        if tile.column == len(self._grid.columns) - 1:
            self._close(before_row=tile.row)

    def finish(self) -> None:
        """Give away what is left."""
        self._close(before_row=len(self._grid.rows))

    def _part(self, tile: Tile, label: int, score: float, mask: NDArray[np.bool_]) -> _Open:
        """An instance of the pixels that the tile decides."""
        own: NDArray[np.bool_] = mask[tile.own.within(tile.window).slices]
        instance = _Open(label, tile.row)
        columns, rows = np.flatnonzero(own.any(0)), np.flatnonzero(own.any(1))
        if len(rows) == 0:
            return instance
        x0, x1, y0, y1 = int(columns[0]), int(columns[-1]) + 1, int(rows[0]), int(rows[-1]) + 1
        top, left = tile.own.top + y0, tile.own.left + x0
        instance.area = int(np.count_nonzero(own))
        instance.weighted_score = score * instance.area
        instance.box = Box(left, top, left + x1 - x0, top + y1 - y0)
        instance.runs = [runs_of(own[y0:y1, x0:x1], top, left, self._grid.size[0])]
        return instance

    def _join(self, first: _Strip, second: _Strip) -> None:
        zone = seam(first.window, second.window)
        a, b = first.cut(zone.first), second.cut(zone.second)
        if not a.instances or not b.instances:
            return
        for m, n in one_to_one(*_overlaps(a, b), self._match_iou):
            one, other = a.instances[m].whole(), b.instances[n].whole()
            if one is not other:
                one.take(other)

    def _close(self, *, before_row: int) -> None:
        """Give away instances without a part in this row of tiles or a later one."""
        still_open = []
        for instance in self._open:
            if instance.joined_with is not None:
                continue
            if instance.row >= before_row:
                still_open.append(instance)
            elif instance.box is not None:
                self._emit(self._result(instance, instance.box))
        self._open = still_open

    def _result(self, instance: _Open, box: Box) -> LargeInstance:
        height, width = self._grid.size
        return LargeInstance(
            category_id=instance.label,
            name=self._categories[instance.label].name,
            score=instance.weighted_score / instance.area,
            area=instance.area,
            box=box,
            counts=coco_counts(joined(instance.runs), height * width),
        )


def _overlaps(
    a: _Strip, b: _Strip
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Common pixels (M, N), 0 for different classes, and pixels (M,), (N,) of the masks."""
    flat_a, flat_b = a.masks.reshape(len(a.masks), -1), b.masks.reshape(len(b.masks), -1)
    labels = np.array([instance.label for instance in a.instances])
    common = np.zeros((len(flat_a), len(flat_b)), np.int64)
    for n, instance in enumerate(b.instances):
        same, pixels = np.flatnonzero(labels == instance.label), np.flatnonzero(flat_b[n])
        common[same, n] = np.count_nonzero(flat_a[np.ix_(same, pixels)], axis=1)
    return common, np.count_nonzero(flat_a, axis=1), np.count_nonzero(flat_b, axis=1)
