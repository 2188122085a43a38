"""The sums that the mask costs of all predictions with all targets of an image are made of (paper section 3.3).

A PyTorch reference and a compiled kernel for float32 on CPUs (csrc/cpu/matching_kernel.h), which sums up the products
of embeddings and features in the registers, so that the logits of all predictions at all points are never in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.ops import mask_points


class PairSums(NamedTuple):
    """Sums over points, with x the logit of a prediction, p its sigmoid, and t a target.

    Attributes:
        softplus: (..., R), of softplus(x).
        predicted: (..., R), of p.
        inner: (..., R, N), of x t.
        overlap: (..., R, N), of p t.
        wanted: (..., N), of t.
    """

    softplus: Tensor
    predicted: Tensor
    inner: Tensor
    overlap: Tensor
    wanted: Tensor


def has_pair_sums(features: Tensor) -> bool:
    """Whether `pair_sums` has a kernel for features of this device, which are float32 or become it."""
    return mask_points.has_kernel(features.device, torch.promote_types(features.dtype, torch.float32))


@torch.no_grad()
def pair_sums(embeddings: Tensor, features: Tensor, points: Tensor, masks: Tensor, canvas: tuple[int, int]) -> PairSums:
    """The sums of one image, without gradient.

    Args:
        embeddings: (R, C) float32 or float64, of the predictions; features times embedding are the logits.
        features: (C, h, w), covering the canvas.
        points: (P, 2), (x, y) in [0, 1] of the canvas.
        masks: (N, H, W) bool or uint8, the upper left part of the canvas; zero elsewhere.
        canvas: (height, width).
    """
    if not mask_points.has_kernel(features.device, features.dtype):
        return pair_sums_reference(embeddings, features, points, masks, canvas)
    return PairSums(*torch.ops.mask2former.pair_sums(embeddings, features, points, masks, list(canvas)))


@torch.no_grad()
def pair_sums_reference(
    embeddings: Tensor, features: Tensor, points: Tensor, masks: Tensor, canvas: tuple[int, int]
) -> PairSums:
    """The same in plain PyTorch. Arguments as `pair_sums`."""
    logits = embeddings @ mask_points.maps_at_points(features[None], points[None])[0]  # (R, P)
    targets = mask_points.masks_at_points(masks, points, canvas).to(logits.dtype)  # (N, P)
    probability, softplus = logits.sigmoid(), F.softplus(logits).sum(-1)
    return PairSums(softplus, probability.sum(-1), logits @ targets.T, probability @ targets.T, targets.sum(-1))


def _register() -> None:
    """Tell PyTorch the shapes."""

    def shapes(
        embeddings: Tensor, features: Tensor, points: Tensor, masks: Tensor, canvas: Sequence[int]
    ) -> tuple[Tensor, ...]:
        R, N = len(embeddings), len(masks)
        return tuple(embeddings.new_empty(shape) for shape in ((R,), (R,), (R, N), (R, N), (N,)))

    torch.library.register_fake("mask2former::pair_sums", shapes)


if mask_points.has_kernels:
    _register()
