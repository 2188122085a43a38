"""What post-processing does with each pixel of many masks: resize, compare.

Two functions, each with a PyTorch reference and a compiled kernel for float32 on CPUs with AVX2 (csrc/cpu/
pixels_kernel.h),
which passes once over the memory and gives the same bits.
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


def blend(maps: Tensor, columns: Axis | None, rows: Axis | None, width: int) -> Tensor:
    """Resize maps bilinearly, columns before rows.

    Args:
        maps: (N, h, w) float32.
        columns, rows: of the result; None: as they are.
        width: how many columns are kept where ``columns`` is None.

    Returns:
        (N, H, W); without both it may be ``maps`` or share its memory.
    """
    if (columns is not None or rows is not None) and _use_kernel(maps):
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
    if _use_kernel(scores):
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


_kernels: Any = torch.ops.mask2former
_has_kernels = _extension.has_kernels("pixel")


def _use_kernel(x: Tensor) -> bool:
    return (
        _has_kernels
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and _extension.kernel_applies(x.device, x.dtype)
    )
