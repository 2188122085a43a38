"""Area, box and mean probability of masks, from their enlarged logits band by band."""

from typing import NamedTuple

import torch
from torch import Tensor

from mask2former.modeling.bands import MaskGeometry
from mask2former.ops.pixels import any_of, inside


class MaskMeasures(NamedTuple):
    """What is known of N binary masks when all their rows were seen.

    Attributes:
        quality: (N,) float32 mean probability inside, 0 if empty.
        areas: (N,) int64 pixels.
        boxes: (N, 4) float32, see `masks_to_boxes`.
    """

    quality: Tensor
    areas: Tensor
    boxes: Tensor


def measure_masks(mask_logits: Tensor, geometry: MaskGeometry, masks: Tensor | None = None) -> MaskMeasures:
    """Measure the masks where the enlarged logit is positive, without having them all at a time.

    Args:
        mask_logits: (N, h, w).
        geometry: how to get to the output.
        masks: (N, *output_size) bool to write them to.
    """
    count, resizer = len(mask_logits), geometry.bands(mask_logits)
    bands = list(resizer.bands(count))
    totals = mask_logits.new_zeros(len(bands), count, dtype=torch.float32)  # added up at the end, which rounds less
    areas = torch.zeros(count, dtype=torch.int64, device=mask_logits.device)
    height, width = geometry.output_size
    in_column = torch.zeros(count, width, dtype=torch.bool, device=mask_logits.device)
    in_row = torch.zeros(count, height, dtype=torch.bool, device=mask_logits.device)
    for total, rows in zip(totals, bands, strict=True):
        for chunk, logits in resizer.chunks(mask_logits, rows):
            found = inside(logits)
            if masks is not None:
                masks[chunk, rows] = found.masks
            in_column[chunk] |= found.in_column
            in_row[chunk, rows] = found.in_row
            areas[chunk] += found.areas
            total[chunk] = found.sums
    return MaskMeasures(totals.sum(0) / (areas + 1e-6), areas, _boxes(in_column, in_row))


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Boxes around masks.

    Args:
        masks: (N, H, W) bool.

    Returns:
        (N, 4) float32 x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros for an empty mask.
    """
    return _boxes(any_of(masks, 1), any_of(masks, 2))


def _boxes(in_column: Tensor, in_row: Tensor) -> Tensor:
    """Boxes of masks that have pixels in some columns (N, W) bool and rows (N, H) bool."""
    W, H = in_column.shape[1], in_row.shape[1]
    x0, y0 = in_column.int().argmax(1), in_row.int().argmax(1)  # argmax gives the first maximum
    x1, y1 = W - in_column.flip(1).int().argmax(1), H - in_row.flip(1).int().argmax(1)
    boxes = torch.stack([x0, y0, x1, y1], dim=1).float()
    return boxes * in_row.any(1, keepdim=True)
