"""One picture of what was proposed before the decoder and after each layer."""

from collections.abc import Iterable, Sequence
from math import ceil, sqrt
from typing import cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from mask2former.data.catalog import Category, generated_color
from mask2former.proposals.regions import Proposals

Pixels = npt.NDArray[np.uint8]
_PAPER, _INK = 250, 28  # grey levels
_GAP, _TEXT = 14, 13  # between the panels; height of a capital letter
_MOST_LABELS = 20  # more would hide the regions


def proposal_sheet(image: Pixels, layers: Iterable[Proposals], *, threshold: float = 0.0) -> Pixels:
    """The image, and beside it the proposals of each prediction over it; needs OpenCV.

    A query has one colour in all panels, and its number stands in its regions with the proposal's score, unless a
    prediction has more than twenty. Small regions lie on top of large ones.

    Args:
        image: (H, W, 3) uint8 RGB.
        layers: with masks (N, H, W).
        threshold: least score of a proposal that is drawn.

    Returns:
        (H', W', 3) uint8 RGB.
    """
    from mask2former.visualizer import Visualizer

    panels = [("picture", image)]
    for found in layers:
        kept = found.scores >= threshold
        labels, scores, masks = (part[kept].cpu().numpy() for part in (found.queries, found.scores, found.masks))
        categories = [Category(q, f"#{q}", True, generated_color(q)) for q in range(int(labels.max(initial=0)) + 1)]
        visualizer = Visualizer(categories, label_scale=float(len(found.scores) <= _MOST_LABELS))
        panels.append((found.layer, visualizer.draw_instances(image, labels, scores, masks)))
    return _arranged(panels)


def panel_picture(image: Pixels, longest: int) -> Pixels:
    """The image resized so that its longer side has so many pixels."""
    height, width = image.shape[:2]
    scale = longest / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _arranged(panels: Sequence[tuple[str, Pixels]]) -> Pixels:
    """Panels of one size in rows, each below its name."""
    from mask2former.label_drawing import text_mask

    height, width = panels[0][1].shape[:2]
    columns = min(len(panels), max(1, ceil(sqrt(len(panels) * height / width))))
    rows = ceil(len(panels) / columns)
    head = 3 * _TEXT
    step_y, step_x = head + height, width + _GAP
    page = np.full((rows * step_y + _GAP, columns * step_x + _GAP, 3), _PAPER, np.uint8)
    for place, (name, pixels) in enumerate(panels):
        y, x = place // columns * step_y, _GAP + place % columns * step_x
        ink = text_mask(name, _TEXT)[:, :width]
        strip = page[y + head - ink.shape[0] :, x:][: ink.shape[0], : ink.shape[1]]
        strip[:] = cast(Pixels, np.rint(_PAPER + (_INK - _PAPER) * (ink[..., None] / 255.0)))
        page[y + head : y + step_y, x : x + width] = pixels
    return page
