"""Losses on points instead of whole masks (paper section 3.3; PointRend section 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.modeling.layers import at_least_float32


def sample_logits(maps: Tensor, points: Tensor) -> Tensor:
    """Sample maps bilinearly, zero outside, in float32 or, if the maps are float64, in float64.

    Args:
        maps: (N, C, H, W).
        points: (N, P, 2), (x, y) in [0, 1] from the outer border of the first to that of the last pixel.

    Returns:
        (N, C, P) float32 or float64.
    """
    with torch.autocast(maps.device.type, enabled=False):
        maps = at_least_float32(maps)
        grid = 2 * points.to(maps.dtype).unsqueeze(1) - 1  # (N, 1, P, 2)
        return F.grid_sample(maps, grid, align_corners=False).squeeze(2)


def sample_masks(
    masks: Tensor, points: Tensor, canvas: tuple[int, int], index: Tensor | None = None
) -> Tensor:
    """Sample binary masks bilinearly on a canvas that they are padded to with zeros, without padding them.

    Only the four neighbours of each point are read, so that no mask is converted or copied.

    Args:
        masks: (N, H, W) bool or uint8, the upper left part of the canvas.
        points: (P, 2) for the same points in every mask, or (T, P, 2); (x, y) in [0, 1] of the canvas.
        canvas: (height, width) that the points refer to.
        index: (T,) int64, which mask each row of ``points`` (T, P, 2) samples.

    Returns:
        (N, P) or (T, P) float32.
    """
    height, width = masks.shape[-2:]
    scale = points.new_tensor([canvas[1], canvas[0]])
    position_px = points * scale - 0.5  # (..., P, 2), pixel centres are whole numbers
    corner = position_px.floor()
    fraction_x, fraction_y = (position_px - corner).unbind(-1)  # (..., P)
    left, top = corner.long().unbind(-1)
    flat = masks.flatten()
    offset = torch.arange(len(masks), device=masks.device) if index is None else index  # (N,) or (T,)
    offset = offset[:, None] * (height * width)
    total = torch.zeros((), device=masks.device)
    for dy, weight_y in ((0, 1 - fraction_y), (1, fraction_y)):
        for dx, weight_x in ((0, 1 - fraction_x), (1, fraction_x)):
            x, y = left + dx, top + dy
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            cell = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)  # (..., P)
            value = flat[offset + cell].to(torch.float32)  # (N, P) or (T, P)
            total = total + value * (weight_x * weight_y * inside)
    return total


def sample_uncertain_points(
    mask_logits: Tensor,
    *,
    num_points: int,
    oversample_ratio: float,
    importance_sample_ratio: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw points mostly where a prediction is uncertain (PointRend, section 3.1).

    Args:
        mask_logits: (T, H, W).
        num_points: P, points a mask.
        oversample_ratio: uniform candidates over P, at least 1.
        importance_sample_ratio: share of the P points that are the candidates with the logit closest to 0;
            the rest is uniform.
        generator: source of randomness on the device of ``mask_logits``.

    Returns:
        (T, P, 2), (x, y) in [0, 1].
    """
    T, device = len(mask_logits), mask_logits.device
    num_candidates = int(num_points * oversample_ratio)
    num_uncertain = int(num_points * importance_sample_ratio)
    candidates = torch.rand(T, num_candidates, 2, device=device, generator=generator)
    # The logits are sampled first and compared then. Taking the uncertainty of whole pixels and interpolating
    # it would be wrong: between logits -1 and 1 lies a 0, the most uncertain point of all, but both pixels
    # have the same certainty 1.
    certainty = sample_logits(mask_logits.unsqueeze(1), candidates).squeeze(1).abs()  # (T, candidates)
    chosen = certainty.topk(num_uncertain, largest=False, sorted=False).indices  # (T, uncertain)
    uncertain = candidates.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2))
    uniform = torch.rand(T, num_points - num_uncertain, 2, device=device, generator=generator)
    return torch.cat([uncertain, uniform], dim=1)
