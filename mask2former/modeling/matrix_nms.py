"""Matrix NMS: lowers the scores of masks that lie over better ones of their class (SOLOv2 section 3.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def matrix_nms_decay(scores: Tensor, labels: Tensor, masks: Tensor, sigma: float) -> Tensor:
    """Factors for the scores of masks, 1 where nothing better of the same class overlaps.

    The factor of a mask is the smallest, over the better masks of its class, of
    ``exp(-sigma * iou ** 2) / exp(-sigma * worst ** 2)``: iou is that of the two, worst the largest iou of the better
    mask with one still better, so that a mask which is itself suppressed suppresses little.

    Args:
        scores: (N,), any order; of equal scores the first is the better one.
        labels: (N,) class of each mask.
        masks: (N, h, w) bool.
        sigma: above 0; the larger, the lower fall the scores. SOLOv2 has 2.

    Returns:
        (N,) float32 in (0, 1].

    Raises:
        ValueError: if sigma is not above 0.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    number = torch.arange(0, scores.shape[0], device=scores.device)
    better = scores[:, None] > scores  # (N, N) row: the better one
    better = better | ((scores[:, None] == scores) & (number[:, None] < number))
    better = better & (labels[:, None] == labels)
    pixels = masks.flatten(1).float()  # (N, h * w)
    common = pixels @ pixels.t()  # (N, N) exact: counts below 2 ** 24
    area = common.diagonal()
    iou = torch.where(better, common / (area[:, None] + area - common).clamp(min=1), 0)
    worst = F.pad(iou, (0, 0, 0, 1)).amax(0)  # (N,); a row of zeros, for no masks
    decay = (-sigma * (iou.square() - worst.square()[:, None])).exp()
    # at most 1: the best of a class has no worst
    return F.pad(torch.where(better, decay, 1), (0, 0, 0, 1), value=1.0).amin(0)
