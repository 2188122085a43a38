"""Draws a few predictions at each evaluation."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mask2former.data import Category, read_image
from mask2former.engine.data import TestSample
from mask2former.inference import ImageResult

logger = logging.getLogger(__name__)

_COUNT = 4
_SCORE = 0.5  # instances with a lower one are not drawn


class SamplePictures:
    """Watches an evaluation and draws its first images into a folder."""

    def __init__(
        self, folder: Path, categories: Sequence[Category], show: Callable[[str, NDArray[np.uint8]], None]
    ) -> None:
        """Set up.

        Args:
            folder: for JPEG files.
            categories: of the model's classes.
            show: is also given each drawing with its name.
        """
        self._folder = folder
        self._categories = categories
        self._show = show
        self._drawn = 0

    def __call__(self, sample: TestSample, result: ImageResult) -> None:
        """Draw a result, if there are not enough yet: segments, else instances, else the semantic map."""
        if self._drawn >= _COUNT:
            return
        self._drawn += 1
        drawing = self._draw(read_image(sample.record["file_name"]), result)
        name = Path(sample.record["file_name"]).stem
        self._show(f"predictions/{name}", drawing)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawing).save(self._folder / f"{name}.jpg", quality=90)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._folder / f"{name}.jpg", error.strerror or error)

    def _draw(self, pixels: NDArray[np.uint8], result: ImageResult) -> NDArray[np.uint8]:
        from mask2former.visualizer import Visualizer  # OpenCV is needed nowhere else

        visualizer = Visualizer(self._categories)
        if result.panoptic is not None:
            return visualizer.draw_panoptic(pixels, result.panoptic.ids.cpu().numpy(), result.panoptic.segments)
        if result.instances is not None:
            found = result.instances
            keep = found.scores >= _SCORE
            labels, scores, masks = (t[keep].cpu().numpy() for t in (found.labels, found.scores, found.masks))
            return visualizer.draw_instances(pixels, labels, scores, masks)
        return visualizer.draw_semantic(pixels, result.semantic_labels().cpu().numpy(), ignore_label=-1)
