"""`mask2former.modeling.postprocessing` with tensors alone, at the size of the model's input.

An exported graph has no Python loop over segments, no plain numbers on the host and no chunks. These forms give what
the functions there give; tests compare them. Where a number of rows depends on the picture, one row that can win
nothing is added while masks are enlarged: runtimes refuse to enlarge no mask at all.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.modeling.matrix_nms import matrix_nms_decay

Size = tuple[int, int]


class PanopticTensors(NamedTuple):
    """Panoptic segmentation: ``ids`` (H, W), and N rows, that of segment ``id`` at ``id - 1``.

    Attributes:
        ids: (H, W) int32, 0 where nothing is.
        categories: (N,) int64 contiguous class index.
        scores: (N,) float32.
        is_thing: (N,) bool.
        areas: (N,) int64, pixels.
    """

    ids: Tensor
    categories: Tensor
    scores: Tensor
    is_thing: Tensor
    areas: Tensor


class InstanceTensors(NamedTuple):
    """Instances, best score first; see `mask2former.modeling.postprocessing.InstanceResult`.

    Attributes:
        labels: (N,) int64.
        scores: (N,) float32.
        masks: (N, H, W) bool.
        boxes: (N, 4) float32.
    """

    labels: Tensor
    scores: Tensor
    masks: Tensor
    boxes: Tensor


def semantic_labels(class_logits: Tensor, mask_logits: Tensor, canvas: Size, size: Size) -> Tensor:
    """(H, W) int32 class index: the largest score of `semantic_segmentation`.

    The order of resizing and summing does not matter here, as the output has the size of the input.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        canvas: (height, width) of the padded image, which the mask logits cover.
        size: (H, W) of the image, the upper left part of the canvas.
    """
    probability = class_logits.float().softmax(-1)[:, :-1]  # (Q, K)
    masks = _enlarged(mask_logits, canvas, size).sigmoid()  # (Q, H, W)
    return (probability.t() @ masks.flatten(1)).argmax(0).to(torch.int32).view(size)


def panoptic_tensors(
    class_logits: Tensor,
    mask_logits: Tensor,
    canvas: Size,
    size: Size,
    *,
    is_thing: Tensor,
    object_mask_threshold: float,
    overlap_threshold: float,
) -> PanopticTensors:
    """The same as `panoptic_segmentation`.

    Shares of won pixels are float32: they can be told from the threshold exactly for masks of up to 2 million pixels.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        canvas, size: as in `semantic_labels`.
        is_thing: (K,) bool.
        object_mask_threshold, overlap_threshold: as there.
    """
    num_classes = class_logits.shape[-1] - 1
    scores, labels = class_logits.float().softmax(-1).max(-1)
    kept = ((labels != num_classes) & (scores > object_mask_threshold)).nonzero().squeeze(1)
    scores, labels = F.pad(scores[kept], (0, 1)), F.pad(labels[kept], (0, 1))  # (N,), the last one wins no tie
    probability = _enlarged(_with_empty_mask(mask_logits[kept]), canvas, size).sigmoid()  # (N, H, W)

    sure = probability >= 0.5
    winner = (scores[:, None, None] * probability).argmax(0)  # (H, W), of equal values the first
    winner_is_sure = sure.gather(0, winner[None])[0]
    own_area = sure.flatten(1).sum(1)  # (N,)
    won_area = _count(winner, torch.ones_like(winner), own_area)
    sure_area = _count(winner, winner_is_sure.to(torch.int64), own_area)
    share = won_area.float() / own_area.clamp(min=1).float()
    stays = (own_area > 0) & (sure_area > 0) & (share >= overlap_threshold)  # pixels that are sure are won

    thing = is_thing[labels]
    same = _same_segment(labels, thing, stays)  # (N, N)
    first = same.to(torch.int32).argmax(1)  # (N,) the query that gave the segment its place
    begins = stays & (first == torch.arange(0, first.shape[0], device=first.device))
    numbers = torch.where(stays, begins.to(torch.int64).cumsum(0)[first], 0)
    ids = torch.where(winner_is_sure, numbers[winner], 0)
    rows = begins.nonzero().squeeze(1)
    return PanopticTensors(
        ids=ids.to(torch.int32),
        categories=labels[rows],
        scores=torch.where(same, scores[None], 0).amax(1)[rows],
        is_thing=thing[rows],
        areas=torch.where(same, sure_area[None], 0).sum(1)[rows],
    )


def instance_tensors(
    class_logits: Tensor,
    mask_logits: Tensor,
    canvas: Size,
    size: Size,
    *,
    top_k: int,
    is_thing: Tensor | None,
    score_threshold: float,
    matrix_nms_sigma: float = 0.0,
) -> InstanceTensors:
    """The same as `instance_segmentation`.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        canvas, size: as in `semantic_labels`.
        top_k, is_thing, score_threshold, matrix_nms_sigma: as there.
    """
    probability = class_logits.float().softmax(-1)[:, :-1]  # (Q, K)
    num_classes = probability.shape[1]
    class_scores, place = probability.flatten().topk(min(top_k, probability.numel()))
    query, labels = place.div(num_classes, rounding_mode="floor"), place % num_classes
    keep = class_scores >= score_threshold  # mask quality is at most 1
    if is_thing is not None:
        keep = keep & is_thing[labels]
    kept = keep.nonzero().squeeze(1)
    class_scores, query, labels = class_scores[kept], query[kept], labels[kept]

    mask_logits, labels = _with_empty_mask(mask_logits[query]), F.pad(labels, (0, 1))  # N + 1
    logits = _enlarged(mask_logits, canvas, size)  # (N + 1, H, W)
    inside = logits > 0
    total = (logits.sigmoid() * inside).flatten(1).sum(1)
    quality = total / (inside.flatten(1).sum(1) + 1e-6)
    scores = F.pad(class_scores, (0, 1), value=-1) * quality - F.pad(torch.zeros_like(class_scores), (0, 1), value=1)
    if matrix_nms_sigma > 0:
        scores = scores * matrix_nms_decay(scores, labels, mask_logits > 0, matrix_nms_sigma)
    order = _best_first(scores)
    scores = scores[order]  # the empty mask's is -1
    kept = ((scores >= score_threshold) & (scores >= 0)).nonzero().squeeze(1)
    order = order[kept]
    masks = inside[order]
    return InstanceTensors(labels[order], scores[kept], masks, _boxes(inside)[order])


def _enlarged(mask_logits: Tensor, canvas: Size, size: Size) -> Tensor:
    """(N, h, w) -> (N, *size) float32."""
    maps = F.interpolate(mask_logits.float()[None], canvas, mode="bilinear", align_corners=False)[0]
    return maps[:, : size[0], : size[1]]


def _with_empty_mask(mask_logits: Tensor) -> Tensor:
    """(N, h, w) -> (N + 1, h, w)."""
    return F.pad(mask_logits, (0, 0, 0, 0, 0, 1), value=-1.0)


def _count(winner: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    """(N,) int64: sum of the (H, W) weights of the pixels that each query won."""
    return torch.zeros_like(like).scatter_add(0, winner.flatten(), weights.flatten())


def _best_first(scores: Tensor) -> Tensor:
    """(N,) int64: the stable order, largest first; the exporter to ONNX has no form of a stable sort."""
    number = torch.arange(0, scores.shape[0], device=scores.device)
    equal_before = (scores[None] == scores[:, None]) & (number[None] < number[:, None])
    place = ((scores[None] > scores[:, None]) | equal_before).to(torch.int64).sum(1)  # (N,)
    return torch.zeros_like(place).scatter(0, place, number)


def _same_segment(labels: Tensor, thing: Tensor, stays: Tensor) -> Tensor:
    """(N, N) bool: both stay, and are the same query or stuff of one class."""
    number = torch.arange(0, labels.shape[0], device=labels.device)
    merged = (labels[:, None] == labels[None]) & ~thing[:, None]
    return ((number[:, None] == number[None]) | merged) & stays[:, None] & stays[None]


def _boxes(masks: Tensor) -> Tensor:
    """`masks_to_boxes`, also of no mask."""
    _, H, W = masks.shape
    columns, rows = masks.any(1), masks.any(2)  # (N, W), (N, H)
    across = torch.arange(1, W + 1, device=masks.device)
    down = torch.arange(1, H + 1, device=masks.device)
    x0, y0 = (W + 1 - across) * columns, (H + 1 - down) * rows  # largest at the first column or row
    boxes = [W - x0.amax(1), H - y0.amax(1), (across * columns).amax(1), (down * rows).amax(1)]
    return torch.stack(boxes, dim=1).float() * rows.any(1, keepdim=True)
