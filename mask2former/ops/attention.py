"""Attention in plain inference on CPUs in float32, by this project's kernels (csrc/cpu/attention_kernel.h).

They read queries, keys and values where linear maps have put them, and write where the next one reads: nothing is
re-ordered, padded or copied around them, and neither scores nor masks of windows are ever in memory. Where there are no
kernels, and in all that is not plain inference, models use `torch.nn.functional.scaled_dot_product_attention`, which
gives the same up to rounding.
"""

from typing import Any

import torch
from torch import Tensor

from mask2former.ops import _extension, fused

_kernels: Any = torch.ops.mask2former
_has_kernels = _extension.has_kernels("attention")


def has_kernels(x: Tensor) -> bool:
    """Whether the functions of this file take an input now: where `fused.fuses`, on processors with AVX2."""
    return _has_kernels and fused.fuses(x) and _extension.kernel_applies(x.device, x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, blocked: Tensor | None = None) -> Tensor:
    """Multi-head attention, softmax(q k^T / sqrt(C / heads)) v for each head; only where `has_kernels`.

    Args:
        q: (B, Q, C) float32; a head has C / num_heads channels side by side.
        k, v: (B, S, C) float32, S at least 1.
        num_heads: divides C.
        blocked: (B, Q, S) bool, True where a query must not look. The result of a row that is all True is not defined.

    Returns:
        (B, Q, C).

    Raises:
        ValueError: if a shape or type is another.
    """
    return _kernels.attention(q, k, v, num_heads, blocked)


def window_attention(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    position_bias: Tensor,
    *,
    num_heads: int,
    side: int,
    shift: int,
    scale: float | None = None,
) -> Tensor:
    """Swin's attention (Liu et al., 2021, section 3.2): each token of a map sees those of its window.

    The map is padded behind its end to whole windows, and shifted cyclically towards its start. Padding are tokens as
    any other. In a shifted window, tokens that came from opposite ends of the padded map get -100 on their scores.
    Only where `has_kernels`.

    Args:
        qkv: (B, H, W, 3 C) float32: queries, keys and values, in each a head has C / num_heads channels side by side.
        qkv_bias: (3 C) float32, the queries, keys and values of padding; None: zeros.
        position_bias: (num_heads, T, T) float32 with T = side * side, added to the scores of tokens in a window.
        num_heads: divides C.
        side: of the windows.
        shift: in [0, side).
        scale: of the products of queries and keys; None: 1 / sqrt(C / num_heads).

    Returns:
        (B, H, W, C).

    Raises:
        ValueError: if a shape, type or number is another.
    """
    scale = (qkv.shape[-1] / 3 / num_heads) ** -0.5 if scale is None else scale
    return _kernels.window_attention(qkv, qkv_bias, position_bias, num_heads, side, shift, scale)
