"""Segments a raster tile by tile."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mask2former.checkpoint import TASKS, Task, check_threshold
from mask2former.data.catalog import Category
from mask2former.tiling.documents import (
    InstanceDocument,
    image_entry,
    panoptic_document,
    semantic_document,
    write_document,
)
from mask2former.tiling.grid import Tile, TileGrid
from mask2former.tiling.instances import InstanceMerger
from mask2former.tiling.maps import ArrayMap, tiff_map
from mask2former.tiling.panoptic import PanopticMerger
from mask2former.tiling.results import LargeInstance, LargeInstances, LargePanoptic, LargeSemantic
from mask2former.tiling.semantic import SemanticMerger, label_type
from mask2former.tiling.sources import RasterSource, SelectedBands, TiffSource, opened
from mask2former.tiling.staging import staged

LargeResult = LargePanoptic | LargeInstances | LargeSemantic
Progress = Callable[[int, int], None]
"""Called with the number of tiles done, and that of all."""


class PicturePredictor(Protocol):
    """What is needed of `mask2former.predictor.Predictor`."""

    categories: tuple[Category, ...]

    def __call__(self, image: NDArray[Any], task: Task, *, threshold: float | None = None) -> Any:
        """Segment one picture."""


class _Merger(Protocol):
    def add(self, tile: Tile, picture: Any) -> None: ...


def segment_large(
    predictor: PicturePredictor,
    source: NDArray[Any] | str | Path | RasterSource,
    task: Task = "panoptic",
    *,
    output: str | Path | None = None,
    tile: int = 1024,
    overlap: int = 128,
    threshold: float | None = None,
    match_iou: float = 0.5,
    bands: Sequence[int] | None = None,
    value_range: tuple[float, float] | None = None,
    progress: Progress = lambda done, count: None,
) -> LargeResult:
    """Segment a raster of any size, tile by tile.

    A pixel is decided by the tile whose centre is nearest. Things and instances of one class that reach over a seam are
    one if their masks, where both tiles look, overlap enough; each is paired with at most one other. Stuff of a class
    is one segment. With ``output`` nothing of the raster's size is in memory, only a row of tiles.

    Args:
        predictor: segments a tile.
        source: an array (H, W), (H, W, bands); a file that GDAL reads, such as a TIFF (needs rasterio); or a
            `RasterSource`.
        task: "panoptic", "instance" or "semantic".
        output: file to write: a ``.tif`` of ids or labels, beside which a ``.json`` says what they are, or for
            instances a ``.json`` in COCO's form. Older ones are replaced when all is done. None: the result is in
            memory.
        tile: height and width of a tile; a smaller raster is one tile.
        overlap: pixels that neighbouring tiles share at least.
        threshold: given to the predictor; None: its own.
        match_iou: least intersection over union of two parts of one thing, in (0, 1].
        bands: see `SelectedBands`.
        value_range: see `SelectedBands`.
        progress: called after each tile.

    Raises:
        FileNotFoundError: if the source or the folder of the output does not exist.
        ValueError: if the source cannot be read, or a value is out of its range.
        OSError: if the output cannot be written.
        ModuleNotFoundError: if a file is to be read or written, and rasterio is not installed.
    """
    _check(task, threshold, match_iou)
    files = None if output is None else _files(Path(output), task)
    with opened(source) as raster:
        pixels = SelectedBands(raster, bands, value_range)
        job = _Job(predictor, pixels, TileGrid(pixels.size, tile, overlap), task, threshold, match_iou, progress)
        if files is None:
            return _in_memory(job)
        name = Path(source).name if isinstance(source, str | Path) else ""
        georeference = raster.georeference if isinstance(raster, TiffSource) else {}
        with staged(files) as folder:
            return _to_files(job, [folder / file.name for file in files], name, georeference)


@dataclass(frozen=True)
class _Job:
    """What is to be done."""

    predictor: PicturePredictor
    pixels: SelectedBands
    grid: TileGrid
    task: Task
    threshold: float | None
    match_iou: float
    progress: Progress

    def run(self, merger: _Merger) -> None:
        """Segment all tiles."""
        options = {} if self.threshold is None else {"threshold": self.threshold}
        for number, tile in enumerate(self.grid, 1):
            merger.add(tile, self.predictor(self.pixels.read(tile.window), self.task, **options))
            self.progress(number, len(self.grid))


def _check(task: Task, threshold: float | None, match_iou: float) -> None:
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if threshold is not None:
        check_threshold("threshold", threshold)
    if not 0 < match_iou <= 1:
        raise ValueError(f"match_iou must be above 0 and at most 1, got {match_iou}")


def _files(output: Path, task: Task) -> list[Path]:
    """What will be written, in the order in which it appears: the JSON last, as the sign that all is there."""
    suffixes = (".json",) if task == "instance" else (".tif", ".tiff")
    if output.suffix.lower() not in suffixes:
        raise ValueError(f"output must end with {' or '.join(suffixes)} for the {task} task, got {output}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} for the output")
    return [output] if task == "instance" else [output, output.with_suffix(".json")]


def _in_memory(job: _Job) -> LargeResult:
    grid, categories = job.grid, job.predictor.categories
    if job.task == "panoptic":
        ids = ArrayMap(grid.size, np.uint32)
        panoptic = PanopticMerger(grid, categories, ids, job.match_iou)
        job.run(panoptic)
        return LargePanoptic(segments=panoptic.finish(ids), ids=ids.array)
    if job.task == "instance":
        found: list[LargeInstance] = []
        instances = InstanceMerger(grid, categories, found.append, job.match_iou)
        job.run(instances)
        instances.finish()
        found.sort(key=lambda instance: -instance.score)
        return LargeInstances(grid.size, len(found), tuple(found))
    labels = ArrayMap(grid.size, label_type(len(categories)))
    semantic = SemanticMerger(grid, len(categories), labels)
    job.run(semantic)
    return LargeSemantic(areas=semantic.finish(), labels=labels.array, names=_names(categories))


def _to_files(job: _Job, files: list[Path], name: str, georeference: Mapping[str, Any]) -> LargeResult:
    grid, categories, image = job.grid, job.predictor.categories, image_entry(name, job.grid.size)
    if job.task == "instance":
        return _instances_to_file(job, files[0], image)
    map_file, document_file = files
    with ExitStack() as stack:
        if job.task == "semantic":
            labels = stack.enter_context(tiff_map(map_file, grid.size, label_type(len(categories)), georeference))
            semantic = SemanticMerger(grid, len(categories), labels)
            job.run(semantic)
            areas = semantic.finish()
            write_document(document_file, semantic_document(image, map_file.name, areas, categories))
            return LargeSemantic(None, areas, _names(categories))
        parts_file = map_file.with_name("parts.tif")  # what belongs together is known at the end only
        parts = stack.enter_context(tiff_map(parts_file, grid.size, np.uint32, {}))
        panoptic = PanopticMerger(grid, categories, parts, job.match_iou)
        job.run(panoptic)
        segments = panoptic.finish(stack.enter_context(tiff_map(map_file, grid.size, np.uint32, georeference)))
        write_document(document_file, panoptic_document(image, map_file.name, segments, categories))
        return LargePanoptic(None, segments)


def _instances_to_file(job: _Job, file: Path, image: dict[str, Any]) -> LargeInstances:
    with file.open("w", encoding="utf-8") as stream:
        document = InstanceDocument(stream, image, job.predictor.categories)
        merger = InstanceMerger(job.grid, job.predictor.categories, document.add, job.match_iou)
        job.run(merger)
        merger.finish()
        document.finish()
    return LargeInstances(job.grid.size, document.count, None)


def _names(categories: Sequence[Category]) -> tuple[str, ...]:
    return tuple(category.name for category in categories)
