"""Panoptic results of tiles, put together."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mask2former.data.catalog import Category
from mask2former.tiling.grid import Tile, TileGrid, Window
from mask2former.tiling.maps import BLOCK, LabelMap, RowBuffer
from mask2former.tiling.results import Box, LargeSegment
from mask2former.tiling.seams import PartTable, matched_ids, seam


class PanopticMerger:
    """Takes tiles in the order of the grid, and writes the map of parts; things are joined where tiles overlap.

    In memory are a row of tiles, what it has in common with the next one, and a table of all parts.
    """

    def __init__(
        self, grid: TileGrid, categories: Sequence[Category], parts_map: LabelMap, match_iou: float
    ) -> None:
        """Set up.

        Args:
            grid: of the tiles.
            categories: by contiguous id.
            parts_map: uint32, to be written to; `finish` turns its numbers into ids.
            match_iou: see `mask2former.tiling.segment_large`.
        """
        self._categories = categories
        self._grid = grid
        self._map = parts_map
        self._buffer = RowBuffer(parts_map, grid.size[1], np.uint32)
        self._match_iou = match_iou
        self._table = PartTable()
        self._stuff: dict[int, int] = {}
        self._left: tuple[Window, NDArray[np.uint32]] | None = None
        self._above: list[tuple[Window, NDArray[np.uint32]]] = []  # of the last row of tiles: its lowest rows

    def add(self, tile: Tile, picture: Any) -> None:
        """Add a tile's result: ``ids`` (h, w) and ``segments``."""
        numbers = np.zeros(max([s.id for s in picture.segments], default=0) + 1, np.uint32)
        for segment in picture.segments:
            numbers[segment.id] = self._part_of(segment)
        parts = numbers[picture.ids]  # (h, w)
        if tile.column:
            assert self._left is not None
            self._join(*self._left, tile.window, parts)
        if tile.row:
            self._join(*self._above[tile.column], tile.window, parts)
        own = tile.own.within(tile.window).slices
        self._grow(tile, picture, picture.ids[own], numbers)
        self._buffer.put(tile.own, parts[own])
        self._remember(tile, parts)
        if tile.column == len(self._grid.columns) - 1:
            self._buffer.flush()

    def finish(self, ids_map: LabelMap) -> tuple[LargeSegment, ...]:
        """Write the ids of all segments, which may go to the map that the parts are in.

        Args:
            ids_map: uint32.
        """
        self._buffer.flush(all_rows=True)
        ids, found = self._table.segments()
        for top in range(0, self._grid.size[0], BLOCK):
            height = min(BLOCK, self._grid.size[0] - top)
            ids_map.write(top, ids[self._map.read(top, height)])
        return tuple(
            LargeSegment(
                place + 1, label, self._categories[label].name, self._categories[label].is_thing, score, area, box
            )
            for place, (label, score, area, box) in enumerate(found)
        )

    def _part_of(self, segment: Any) -> int:
        if segment.is_thing:
            return self._table.add(segment.category_id, segment.score)
        if segment.category_id not in self._stuff:
            self._stuff[segment.category_id] = self._table.add(segment.category_id, segment.score)
        return self._stuff[segment.category_id]

    def _join(
        self, first: Window, first_parts: NDArray[np.uint32], second: Window, second_parts: NDArray[np.uint32]
    ) -> None:
        """Join things of two windows; of the first, some lower or right part may be all that there is."""
        zone = seam(first, second)
        a = first_parts[zone.first.within(first).slices]
        b = second_parts[zone.second.within(second).slices]
        if not a.any() or not b.any():
            return
        for m, n in matched_ids(a, b, self._thing_class, self._match_iou):
            self._table.join(m, n)

    def _thing_class(self, part: int) -> int:
        label = self._table.labels[part]
        return label if part and self._categories[label].is_thing else -1

    def _grow(self, tile: Tile, picture: Any, own_ids: NDArray[Any], numbers: NDArray[np.uint32]) -> None:
        areas = np.bincount(own_ids.ravel(), minlength=len(numbers))
        boxes = ndimage.find_objects(own_ids, len(numbers) - 1)
        for segment in picture.segments:
            if areas[segment.id]:
                rows, columns = boxes[segment.id - 1]
                top, left = tile.own.top, tile.own.left
                box = Box(left + columns.start, top + rows.start, left + columns.stop, top + rows.stop)
                self._table.grow(int(numbers[segment.id]), int(areas[segment.id]), box, segment.score)

    def _remember(self, tile: Tile, parts: NDArray[np.uint32]) -> None:
        """Keep what the next tile and the next row of tiles will look at."""
        self._left = (tile.window, parts)
        lowest = self._grid.shared_below(tile)
        strip = (lowest, parts[lowest.within(tile.window).slices].copy())
        if tile.row == 0:
            self._above.append(strip)
        else:
            self._above[tile.column] = strip
