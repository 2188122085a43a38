"""What post-processing does with each pixel of many masks: resize, compare, sum over queries, measure.

Each function has a PyTorch reference and a compiled kernel for float32 on CPUs with AVX2 (csrc/cpu/pixels_kernel.h),
which passes once over the memory. `blend` and `largest` give the same bits with it; where probabilities are added up,
the last bits differ.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mask2former.ops import _extension


class Axis(NamedTuple):
    """Where each place along an axis of a result comes from: two places of the source and their weights, (n,) each.

    Attributes:
        first, second: int64.
        first_weight, second_weight: float32.
    """

    first: Tensor
    second: Tensor
    first_weight: Tensor
    second_weight: Tensor


class Inside(NamedTuple):
    """Binary masks where logits are positive, and what is known of them.

    Attributes:
        masks: (N, R, W) bool.
        in_column, in_row: (N, W) and (N, R) bool, whether the mask has pixels there.
        areas: (N,) int64 pixels.
        sums: (N,) float32 of the mask probabilities inside.
    """

    masks: Tensor
    in_column: Tensor
    in_row: Tensor
    areas: Tensor
    sums: Tensor


def blend(maps: Tensor, columns: Axis | None, rows: Axis | None, width: int) -> Tensor:
    """Resize maps bilinearly, columns before rows.

    Args:
        maps: (N, h, w) float32.
        columns, rows: of the result; None: as they are.
        width: how many columns are kept where ``columns`` is None.

    Returns:
        (N, H, W); without both it may be ``maps`` or share its memory.
    """
    if (columns is not None or rows is not None) and has_kernel(maps):
        return _kernels.blend(maps, columns or (), rows or (), width)
    return blend_reference(maps, columns, rows, width)


def blend_reference(maps: Tensor, columns: Axis | None, rows: Axis | None, width: int) -> Tensor:
    """The same in plain PyTorch. Arguments as `blend`."""
    if columns is None:
        maps = maps[..., :width]
    else:
        shape = (*maps.shape[:2], len(columns.first))  # gather is four times as fast as index_select here
        first, second = (maps.gather(2, places.expand(shape)) for places in columns[:2])  # (N, h, W)
        maps = _weighted_sum(first, second, columns.first_weight, columns.second_weight)
    if rows is None:
        return maps
    first, second = (maps.index_select(1, places) for places in rows[:2])  # (N, H, W)
    return _weighted_sum(first, second, rows.first_weight[:, None], rows.second_weight[:, None])


def _weighted_sum(first: Tensor, second: Tensor, first_weight: Tensor, second_weight: Tensor) -> Tensor:
    # rounded as the compiled loop of F.interpolate: addcmul is a fused multiply-add, too
    return second.mul_(second_weight).addcmul_(first, first_weight)


def largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of each pixel, and the first place that has it: (N, R, W) -> (R, W) and (R, W) int64."""
    if scores.device.type != "cpu":
        return scores.max(0)
    if has_kernel(scores):
        values, places = _kernels.largest(scores.flatten(1))
        return values.view(scores.shape[1:]), places.view(scores.shape[1:])
    return largest_reference(scores)


def largest_reference(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch on a CPU."""
    # On a CPU max looks at one number at a time, which takes four times as long. Ranks fall from N, so that the first
    # place has the largest one; where nothing equals the maximum, as that is no number, it is the last place.
    count = len(scores)
    ranks = torch.arange(count, 0, -1, dtype=torch.int16).view(-1, 1, 1)
    values = scores.amax(0)
    best = (scores == values).mul(ranks).amax(0)
    return values, (count - best.long()).clamp_(max=count - 1)


def class_scores(mask_logits: Tensor, probability: Tensor) -> Tensor:
    """Of each pixel and class, the sum over queries of mask probability times class probability.

    Args:
        mask_logits: (Q, R, W) float32; they may be changed.
        probability: (Q, K) float32.

    Returns:
        (K, R, W) float32.
    """
    if has_kernel(mask_logits):
        return _kernels.class_scores(mask_logits.flatten(1), probability, False).unflatten(1, mask_logits.shape[1:])
    return class_scores_reference(mask_logits, probability)


def class_scores_reference(mask_logits: Tensor, probability: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    scores = mask_logits.new_empty(probability.shape[1], mask_logits.shape[1] * mask_logits.shape[2])
    scores.addmm_(probability.t(), mask_logits.sigmoid_().flatten(1), beta=0)  # in place: autocast leaves it alone
    return scores.unflatten(1, mask_logits.shape[1:])


def class_labels(mask_logits: Tensor, probability: Tensor) -> Tensor:
    """The class with the largest of `class_scores`, the first of equal ones: (R, W) int32. Arguments as there."""
    if has_kernel(mask_logits):
        return _kernels.class_scores(mask_logits.flatten(1), probability, True).view(mask_logits.shape[1:])
    return largest(class_scores_reference(mask_logits, probability))[1].int()


def inside(mask_logits: Tensor) -> Inside:
    """Masks where the logits (N, R, W) float32 are positive, and their measures; the logits may be changed."""
    if has_kernel(mask_logits):
        return Inside(*_kernels.inside(mask_logits))
    return inside_reference(mask_logits)


def inside_reference(mask_logits: Tensor) -> Inside:
    """The same in plain PyTorch."""
    masks = mask_logits > 0
    sums = mask_logits.sigmoid_().mul_(masks).flatten(1).sum(1)
    return Inside(masks, any_of(masks, 1), any_of(masks, 2), areas_of(masks), sums)


def areas_of(masks: Tensor) -> Tensor:
    """(N, H, W) bool -> (N,) int64."""
    return masks.view(torch.uint8).flatten(1).sum(1)  # as numbers more than twice as fast as bool


def any_of(masks: Tensor, dim: int) -> Tensor:
    """What ``masks.any(dim)`` gives, of numbers and so on a CPU fifty times as fast."""
    return masks.view(torch.uint8).amax(dim).bool()


_kernels: Any = torch.ops.mask2former
_has_kernels = _extension.has_kernels("pixel", "class_scores", "inside")


def has_kernel(x: Tensor) -> bool:
    """Whether the compiled kernels take a tensor."""
    return (
        _has_kernels
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and _extension.kernel_applies(x.device, x.dtype)
    )
