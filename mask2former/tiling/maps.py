"""Maps of labels or ids that are written and read in bands of rows: in memory, or as a TIFF."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mask2former.tiling.grid import Window
from mask2former.tiling.sources import CACHE_BYTES, import_rasterio, quiet

BLOCK = 256  # height and width of the blocks of a TIFF; bands of whole blocks are compressed once


class LabelMap(Protocol):
    """A map (H, W) of unsigned integers."""

    def write(self, top: int, rows: NDArray[Any]) -> None:
        """Write rows of the full width."""

    def read(self, top: int, height: int) -> NDArray[Any]:
        """Rows of the full width that were written."""


class ArrayMap:
    """A map in memory."""

    def __init__(self, size: tuple[int, int], dtype: Any) -> None:
        self.array: NDArray[Any] = np.zeros(size, dtype)

    def write(self, top: int, rows: NDArray[Any]) -> None:
        self.array[top : top + len(rows)] = rows

    def read(self, top: int, height: int) -> NDArray[Any]:
        return self.array[top : top + height]


class TiffMap:
    """A map in an open file."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def write(self, top: int, rows: NDArray[Any]) -> None:
        self._dataset.write(rows, 1, window=self._window(top, len(rows)))

    def read(self, top: int, height: int) -> NDArray[Any]:
        rows: NDArray[Any] = self._dataset.read(1, window=self._window(top, height))
        return rows

    def _window(self, top: int, height: int) -> Any:
        from rasterio.windows import Window as GdalWindow

        return GdalWindow(0, top, self._dataset.width, height)


@contextmanager
def tiff_map(path: Path, size: tuple[int, int], dtype: Any, georeference: Mapping[str, Any]) -> Iterator[TiffMap]:
    """A new tiled and compressed TIFF, BigTIFF where it may be large.

    Raises:
        OSError: if it cannot be written.
        ModuleNotFoundError: if rasterio is not installed.
    """
    rasterio = import_rasterio()
    layout = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", "zlevel": 1}
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES), quiet(), rasterio.open(
        path,
        "w+",
        driver="GTiff",
        height=size[0],
        width=size[1],
        count=1,
        dtype=np.dtype(dtype).name,
        BIGTIFF="IF_SAFER",
        **layout,
        **georeference,
    ) as dataset:
        yield TiffMap(dataset)


class RowBuffer:
    """Takes windows in any order within a row of tiles, and writes bands of whole blocks."""

    def __init__(self, target: LabelMap, width: int, dtype: Any) -> None:
        self._target = target
        self._top = 0
        self._rows: NDArray[Any] = np.zeros((0, width), dtype)

    def put(self, window: Window, pixels: NDArray[Any]) -> None:
        """Keep the pixels of a window, no row of which has been flushed."""
        missing = window.top + window.height - self._top - len(self._rows)
        if missing > 0:
            new_rows = np.zeros((missing, self._rows.shape[1]), self._rows.dtype)
            self._rows = np.concatenate([self._rows, new_rows])
        self._rows[window._replace(top=window.top - self._top).slices] = pixels

    def flush(self, *, all_rows: bool = False) -> None:
        """Write what is complete: bands of whole blocks, or everything."""
        count = len(self._rows) if all_rows else len(self._rows) // BLOCK * BLOCK
        for start in range(0, count, BLOCK):
            self._target.write(self._top + start, self._rows[start : min(start + BLOCK, count)])
        self._top, self._rows = self._top + count, self._rows[count:].copy()
