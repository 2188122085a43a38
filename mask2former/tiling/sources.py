"""Rasters that are read window by window."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mask2former.tiling.grid import Window

CACHE_BYTES = 64 << 20  # of decoded blocks that GDAL keeps; otherwise it takes a twentieth of the machine's memory


class RasterSource(Protocol):
    """Anything that can be read in windows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width) or (height, width, bands)."""

    def read(self, window: Window) -> NDArray[Any]:
        """(h, w) or (h, w, bands)."""


class ArraySource:
    """An array, which may be a `numpy.memmap`."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        self.shape = array.shape

    def read(self, window: Window) -> NDArray[Any]:
        return self._array[window.slices]


class TiffSource:
    """An open file that GDAL reads: GeoTIFF, BigTIFF, JPEG 2000 and others."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.shape = (dataset.height, dataset.width, dataset.count)

    def read(self, window: Window) -> NDArray[Any]:
        from rasterio.windows import Window as GdalWindow

        gdal_window = GdalWindow(window.left, window.top, window.width, window.height)
        planes: NDArray[Any] = self._dataset.read(window=gdal_window)  # (bands, h, w)
        return planes.transpose(1, 2, 0)

    @property
    def georeference(self) -> dict[str, Any]:
        """Coordinate system and transform, as `rasterio.open` takes them; empty if the file has none."""
        if self._dataset.crs is None and self._dataset.transform.is_identity:
            return {}
        return {"crs": self._dataset.crs, "transform": self._dataset.transform}


class SelectedBands:
    """The bands of a source that a model is to see."""

    def __init__(
        self, source: RasterSource, bands: Sequence[int] | None, value_range: tuple[float, float] | None
    ) -> None:
        """Set up.

        Args:
            source: to read from.
            bands: one (grey) or three (red, green, blue), counted from 1. None: the first three; the first one if
                there are fewer.
            value_range: what becomes 0 and 255; None: 8 and 16 bits as they are.

        Raises:
            ValueError: if there are no such bands, or the range is empty.
        """
        count = source.shape[2] if len(source.shape) == 3 else 1
        if len(source.shape) not in (2, 3) or count < 1:
            raise ValueError(f"the raster must be (height, width) or (height, width, bands), got {source.shape}")
        bands = ((1, 2, 3) if count >= 3 else (1,)) if bands is None else tuple(bands)
        if len(bands) not in (1, 3) or not all(1 <= band <= count for band in bands):
            raise ValueError(f"bands must be one or three of 1 to {count}, got {', '.join(map(str, bands))}")
        if value_range is not None and not value_range[0] < value_range[1]:
            raise ValueError(f"value_range must be two increasing numbers, got {value_range[0]}, {value_range[1]}")
        self._source, self._bands, self._range = source, bands, value_range
        self.size = (source.shape[0], source.shape[1])

    def read(self, window: Window) -> NDArray[Any]:
        """(h, w, 1 or 3) uint8 or uint16.

        Raises:
            ValueError: if the pixels are others, or not as many as asked for.
        """
        pixels = np.asarray(self._source.read(window))
        if pixels.shape[:2] != (window.height, window.width):
            raise ValueError(f"the source must give {window.height} x {window.width} pixels, got shape {pixels.shape}")
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        pixels = pixels[..., [band - 1 for band in self._bands]]
        if self._range is not None:
            low, high = self._range
            scaled = (np.nan_to_num(pixels.astype(np.float32), nan=low) - low) * (255 / (high - low))
            return np.rint(scaled.clip(0, 255)).astype(np.uint8)
        if pixels.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"value_range must be given for pixels that are not uint8 or uint16, got {pixels.dtype}")
        return pixels


@contextmanager
def opened(source: NDArray[Any] | str | Path | RasterSource) -> Iterator[RasterSource]:
    """A source to read from.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if GDAL cannot read it.
        ModuleNotFoundError: if rasterio, which reads files, is not installed.
    """
    if isinstance(source, np.ndarray):
        yield ArraySource(source)
        return
    if not isinstance(source, str | Path):
        yield source
        return
    if not Path(source).is_file():
        raise FileNotFoundError(f"there is no file {source}")
    rasterio = import_rasterio()
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES), quiet():
        try:
            dataset = rasterio.open(source)
        except rasterio.errors.RasterioIOError as error:
            raise ValueError(f"cannot read the raster {source}: {error}") from error
        with dataset:
            yield TiffSource(dataset)


def import_rasterio() -> Any:
    """The module.

    Raises:
        ModuleNotFoundError: with what to install, if it is not there.
    """
    try:
        import rasterio
        import rasterio.errors
    except ModuleNotFoundError as error:
        message = f"files of large rasters need {error.name}: pip install 'mask2former[large]' or pip install rasterio"
        raise ModuleNotFoundError(message, name=error.name) from error
    return rasterio


@contextmanager
def quiet() -> Iterator[None]:
    """Without rasterio's warning about files that have no georeference."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dataset has no geotransform")
        yield
