"""Where tiles lie, and which of them decides a pixel."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple


class Window(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def within(self, other: "Window") -> "Window":
        """The same pixels, counted from the corner of another window."""
        return Window(self.top - other.top, self.left - other.left, self.height, self.width)


class Span(NamedTuple):
    """A tile along one axis: it covers [start, stop), and decides [own_start, own_stop)."""

    start: int
    stop: int
    own_start: int
    own_stop: int


class Tile(NamedTuple):
    """One tile.

    Attributes:
        row, column: its place in the grid.
        window: what it covers.
        own: the part of the window whose pixels it decides. These parts of all tiles are the raster, without overlap.
    """

    row: int
    column: int
    window: Window
    own: Window


class TileGrid:
    """Tiles of one size over a raster, row by row. Two neighbours meet in the middle of what both cover."""

    def __init__(self, size: tuple[int, int], tile: int, overlap: int) -> None:
        """Set up.

        Args:
            size: (height, width) of the raster.
            tile: height and width of a tile; a smaller raster has smaller ones.
            overlap: pixels that neighbours share at least. They share more where the raster's size asks for it.

        Raises:
            ValueError: if the raster is empty, or the overlap is not in [0, tile).
        """
        if min(size) < 1:
            raise ValueError(f"the raster must have at least one pixel, got {size[0]} x {size[1]}")
        if tile < 1:
            raise ValueError(f"tile must be at least 1, got {tile}")
        if not 0 <= overlap < tile:
            raise ValueError(f"overlap must be at least 0 and less than tile = {tile}, got {overlap}")
        self.size = size
        self.rows = spans(size[0], tile, overlap)
        self.columns = spans(size[1], tile, overlap)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def shared_below(self, tile: Tile) -> Window:
        """The rows of a tile that the row of tiles below covers, too; its last row if there are none, or no such tiles.

        This is all of it that `mask2former.tiling.seams.seam` looks at later.
        """
        bottom = tile.window.top + tile.window.height
        following = self.rows[tile.row + 1].start if tile.row + 1 < len(self.rows) else bottom
        top = min(following, bottom - 1)
        return tile.window._replace(top=top, height=bottom - top)

    def __iter__(self) -> Iterator[Tile]:
        for row, y in enumerate(self.rows):
            for column, x in enumerate(self.columns):
                window = Window(y.start, x.start, y.stop - y.start, x.stop - x.start)
                own = Window(y.own_start, x.own_start, y.own_stop - y.own_start, x.own_stop - x.own_start)
                yield Tile(row, column, window, own)


def spans(size: int, tile: int, overlap: int) -> list[Span]:
    """As few tiles as cover an axis, evenly spread; all of them have the full size if the axis is long enough."""
    if size <= tile:
        return [Span(0, size, 0, size)]
    count = -(-(size - overlap) // (tile - overlap))
    starts = [place * (size - tile) // (count - 1) for place in range(count)]
    cuts = [(start + tile + following) // 2 for start, following in pairwise(starts)]
    return [
        Span(start, start + tile, own_start, own_stop)
        for start, own_start, own_stop in zip(starts, [0, *cuts], [*cuts, size], strict=True)
    ]
