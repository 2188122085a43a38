"""Semantic labels of tiles, put together."""

from typing import Any

import numpy as np

from mask2former.tiling.grid import Tile, TileGrid
from mask2former.tiling.maps import LabelMap, RowBuffer


def label_type(num_classes: int) -> Any:
    """The smallest type of numpy that holds all classes."""
    return np.uint8 if num_classes <= 256 else np.uint16


class SemanticMerger:
    """Takes tiles in the order of the grid; each pixel gets the label of the tile that decides it."""

    def __init__(self, grid: TileGrid, num_classes: int, labels_map: LabelMap) -> None:
        """Set up.

        Args:
            grid: of the tiles.
            num_classes: K.
            labels_map: of `label_type`, to be written to.
        """
        self._grid = grid
        self._buffer = RowBuffer(labels_map, grid.size[1], label_type(num_classes))
        self._areas = np.zeros(num_classes, np.int64)

    def add(self, tile: Tile, picture: Any) -> None:
        """Add a tile's result: ``labels`` (h, w)."""
        own = picture.labels[tile.own.within(tile.window).slices]
        self._areas += np.bincount(own.ravel(), minlength=len(self._areas))
        self._buffer.put(tile.own, own)
        if tile.column == len(self._grid.columns) - 1:
            self._buffer.flush()

    def finish(self) -> tuple[int, ...]:
        """Write what is left; returns the pixels of each class."""
        self._buffer.flush(all_rows=True)
        return tuple(self._areas.tolist())
