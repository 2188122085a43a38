"""Points to match and to compute losses at, instead of whole masks (paper section 3.3; PointRend section 3.1)."""

import torch
from torch import Tensor

from mask2former.modeling.layers import at_least_float32
from mask2former.ops.mask_points import drawn_points, has_kernel, maps_at_points, masks_at_points, uncertain_points

_CPU_CANDIDATES = 1 << 19  # at a time; the same numbers come out of the generator, and stay in the cache

sample_masks = masks_at_points


def sample_logits(maps: Tensor, points: Tensor) -> Tensor:
    """Sample maps bilinearly, zero outside, in float32 or, if the maps are float64, in float64.

    Args:
        maps: (N, C, H, W).
        points: (N, P, 2), (x, y) in [0, 1] from the outer border of the first to that of the last pixel.

    Returns:
        (N, C, P) float32 or float64.
    """
    with torch.autocast(maps.device.type, enabled=False):
        return maps_at_points(at_least_float32(maps), points)


@torch.no_grad()
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
        (T, P, 2), (x, y) in [0, 1]. The compiled kernel for CPUs draws them by itself, from a seed that the generator
        gives; other points than without the kernel, with the same distribution.
    """
    T, device = len(mask_logits), mask_logits.device
    num_candidates = int(num_points * oversample_ratio)
    num_uncertain = int(num_points * importance_sample_ratio)
    if has_kernel(device, torch.promote_types(mask_logits.dtype, torch.float32)):
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        numbers = {"candidates": num_candidates, "uncertain": num_uncertain, "others": num_points - num_uncertain}
        return drawn_points(at_least_float32(mask_logits), seed, **numbers)
    step = max(1, _CPU_CANDIDATES // num_candidates) if device.type == "cpu" else max(1, T)
    points = torch.empty(T, num_points, 2, device=device)
    for start in range(0, T, step):
        maps = mask_logits[start : start + step]
        candidates = torch.rand(len(maps), num_candidates, 2, device=device, generator=generator)
        with torch.autocast(device.type, enabled=False):
            chosen = uncertain_points(at_least_float32(maps), candidates, num_uncertain)
        points[start : start + step, :num_uncertain] = chosen
    points[:, num_uncertain:] = torch.rand(T, num_points - num_uncertain, 2, device=device, generator=generator)
    return points
