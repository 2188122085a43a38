"""Logits and targets at every pixel of the canvas: what losses and matching on points are compared with (Table 5).

Logits are enlarged to the targets, not the other way round: so every pixel of the ground truth counts, and the memory
is what the paper compares.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.modeling.layers import at_least_float32


def whole_logits(mask_logits: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Enlarge bilinearly: (N, h, w) -> (N, H * W) of the canvas, float32 or, of float64 logits, float64."""
    with torch.autocast(mask_logits.device.type, enabled=False):
        logits = at_least_float32(mask_logits).unsqueeze(1)
        return F.interpolate(logits, canvas, mode="bilinear", align_corners=False).flatten(1)


def whole_masks(masks: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Pad binary masks with zeros, bottom and right: (N, H', W') bool or uint8 -> (N, H * W) float32."""
    height, width = masks.shape[-2:]
    padded = masks.new_zeros(len(masks), *canvas, dtype=torch.float32)
    padded[:, :height, :width] = masks
    return padded.flatten(1)
