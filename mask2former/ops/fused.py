"""Linear maps and convolutions together with what follows them, for inference on CPUs in float32.

PyTorch computes products of float32 matrices on a CPU with a library that is slow on many processors, and adds,
activates and re-orders in passes of their own. Here all that is one pass: by this project's kernels
(csrc/cpu/products_kernel.h) on processors with AVX2 and no AVX-512, else by oneDNN's operators, which ``torch.compile``
uses for CPUs. In all other cases, and where neither is there, the same is computed by ordinary operations, up to
rounding.
"""

import platform
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mask2former.ops import _extension

Activation = Literal["none", "relu", "gelu"]
LayerNorm = tuple[Tensor, Tensor, float]
"""Weight and bias, (C,) each, and what is added to the variance."""

_FEW_ROWS = 192  # with fewer the weights are re-ordered for too little work
_FEWEST_ROWS = 48  # of the kernel for few rows, which re-orders weights where it uses them
_CODES: dict[Activation, int] = {"none": 0, "relu": 1, "gelu": 2}  # enum class Activation in csrc/cpu/products.h
_RELU_OF_SUM = 3
_WINOGRAD_PIXELS = 4  # for each channel; with fewer, transforming the weights takes what fewer products save
_WINOGRAD_CHANNELS = 8  # they are a multiple of it
_WINDOW_CHANNELS = 256  # with fewer oneDNN is as fast
_PANEL = 16  # channels that the kernel computes together

_operators: Any = torch.ops.mkldnn
_has_operators = (
    torch.backends.mkldnn.is_available()
    and platform.machine() in ("x86_64", "AMD64")
    and all(hasattr(_operators, name) for name in ("_linear_pointwise", "_convolution_pointwise"))
)

_kernels: Any = torch.ops.mask2former
_has_kernels = _extension.has_kernels("product", "group_norm_")


def fuses(x: Tensor) -> bool:
    """Whether more than ordinary operations is used for an input: float32 on a CPU, in nothing but plain inference.

    Not with gradients, which these operators have not; not when compiling, exporting or tracing, which want ordinary
    operators; not under a mode that looks at the operators, as those that count them do; not under autocast.
    """
    return (
        type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch.is_autocast_enabled("cpu")
        and not is_in_torch_dispatch_mode()
        and (_use_kernels(x) or _use_operators())
    )


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels of this project for products of tensors like this one."""
    return _use_kernels(x)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
    added: Tensor | None = None,
    before: LayerNorm | None = None,
    after: LayerNorm | None = None,
) -> Tensor:
    """Activation of a linear map, plus a residual.

    Args:
        x: (…, S, C_in).
        weight: (C_out, C_in).
        bias: (C_out,).
        activation: "gelu" is the exact one.
        residual: (…, S, C_out).
        added: (S, C_in), added to ``x`` before anything else.
        before: normalises the sum before the map.
        after: normalises the result.

    Returns:
        (…, S, C_out).
    """
    # the size last: a compiler would make graphs of their own for small and large inputs
    norms = (*_tensors(before), *_tensors(after))
    if _fuse(x, weight, bias, residual, added, *norms) and x.numel() >= _least_rows(x) * x.shape[-1]:
        if _use_kernels(x):
            return _own_linear(x, weight, bias, residual, _CODES[activation], added, before, after)
        x = _prepared(x, added, before)
        if residual is None:
            return _normalised(_operators._linear_pointwise(x, weight, bias, activation, [], "none"), after)
        if activation == "none":
            return _normalised(_operators._linear_pointwise.binary(x, residual, weight, bias, "add"), after)
        added = before = None
    out = _activated(F.linear(_prepared(x, added, before), weight, bias), activation)
    return _normalised(out if residual is None else residual + out, after)


def feed_forward(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    *,
    activation: Activation,
    residual: Tensor | None = None,
    before: LayerNorm | None = None,
    after: LayerNorm | None = None,
) -> Tensor:
    """Two linear maps with an activation in between, plus a residual.

    Args:
        x: (…, C_in).
        weights: (C_hidden, C_in) and (C_out, C_hidden).
        biases: (C_hidden,) and (C_out,).
        activation: "gelu" is the exact one.
        residual: (…, C_out).
        before: normalises what goes into the first map.
        after: normalises the result.

    Returns:
        (…, C_out).
    """
    (first, second), (first_bias, second_bias) = weights, biases
    parts = (x, first, first_bias, second, second_bias, residual)
    norms = (*_tensors(before), *_tensors(after))
    if _fuse(*parts, *norms) and _use_kernels(x) and x.numel() >= _FEW_ROWS * x.shape[-1]:
        return _kernels.feed_forward(*parts, _CODES[activation], *_parts(before), *_parts(after))
    hidden = linear(x, first, first_bias, activation=activation, before=before)
    return linear(hidden, second, second_bias, residual=residual, after=after)


def heads_first(x: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    """A linear map whose result is read one head at a time: (B, S, C_in) -> (B, S, M, D), if possible with S before M
    in memory exchanged.

    Args:
        x: (B, S, C_in).
        weight: (M * D, C_in).
        bias: (M * D,).
        num_heads: M.
    """
    suits = x.shape[0] == 1 and weight.shape[0] % (num_heads * _PANEL) == 0
    if _fuse(x, weight, bias) and suits and _use_kernels(x) and x.numel() >= _FEW_ROWS * x.shape[-1]:
        return _own_linear(x, weight, bias, heads=num_heads).transpose(1, 2)  # (1, M, S, D) before
    return linear(x, weight, bias).unflatten(-1, (num_heads, -1))


def product(left: Tensor, maps: Tensor) -> Tensor:
    """(B, Q, C) times maps (B, C, H, W): (B, Q, H, W)."""
    few = left.shape[1] <= _FEW_ROWS
    if _fuse(left, maps) and few and _use_kernels(left) and maps.is_contiguous(memory_format=torch.channels_last):
        pixels = maps.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H*W, C)
        parts = [_own_linear(x, y, None) for x, y in zip(left, pixels, strict=True)]  # each (Q, H*W)
        out = parts[0][None] if len(parts) == 1 else torch.stack(parts)
        return out.unflatten(2, maps.shape[2:])
    return torch.einsum("bqc,bchw->bqhw", left, maps)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    residual: Tensor | None = None,
    relu: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """ReLU of a convolution plus a residual, both optional. Faster with maps in channels-last order.

    Args:
        x: (B, C_in, H, W).
        weight: (C_out, C_in, h, w).
        bias: (C_out,).
        stride, padding: vertical and horizontal.
        residual: of the result's shape.
        relu: set negative values to 0 at the end.
        scale: (C_out,), times the weights.

    Returns:
        (B, C_out, H', W'), in the order of ``x``.
    """
    fuse = _fuse(x, weight, bias, residual, scale)
    if fuse and _use_kernels(x) and x.is_contiguous(memory_format=torch.channels_last):
        code = _RELU_OF_SUM if relu else 0
        if residual is None and _suits_winograd(x, weight, stride, padding):
            return _kernels.convolution3x3(x, weight, scale, bias, relu)
        if weight.shape[2:] == (1, 1) or weight.shape[1] >= _WINDOW_CHANNELS:
            return _kernels.convolution(x, weight, scale, bias, residual, stride, padding, code)
    weight = weight if scale is None else weight * scale[:, None, None, None]
    if fuse:
        return _convolution_by_operators(x, weight, bias, stride, padding, residual, relu)
    out = F.conv2d(x, weight, bias, stride, padding)
    out = out if residual is None else out + residual
    return F.relu_(out) if relu else out


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    coarse: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Group normalisation, plus a coarser map resized bilinearly, and a ReLU, both optional.

    Args:
        x: (B, C, H, W). May be overwritten if `fuses` says so.
        groups: C is a multiple of it.
        weight, bias: (C,).
        eps: added to the variance.
        coarse: (B, C, h, w).
        relu: set negative values to 0 at the end.

    Returns:
        (B, C, H, W).
    """
    maps = [x] if coarse is None else [x, coarse]
    dense = all(m.is_contiguous(memory_format=torch.channels_last) for m in maps) and x.numel() > 0
    if _fuse(x, weight, bias, coarse) and _use_kernels(x) and dense and x.shape[1] % _WINOGRAD_CHANNELS == 0:
        _kernels.group_norm_(x, groups, weight, bias, eps, coarse, relu)
        return x
    x = F.group_norm(x, groups, weight, bias, eps)
    if coarse is not None:
        x = x + F.interpolate(coarse, x.shape[-2:], mode="bilinear", align_corners=False).to(x.dtype)
    return F.relu_(x) if relu else x


def _suits_winograd(x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> bool:
    """3 x 3 over all pixels, of which there are many.

    Winograd's algorithm needs a quarter of the products, and rounds about four times as much.
    """
    channels = (weight.shape[0], weight.shape[1])
    return (
        weight.shape[2:] == (3, 3)
        and stride == padding == (1, 1)
        and all(count % _WINOGRAD_CHANNELS == 0 for count in channels)
        and x.shape[0] * x.shape[2] * x.shape[3] >= _WINOGRAD_PIXELS * max(channels)
    )


def _convolution_by_operators(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    if not _use_operators():
        out = F.conv2d(x, weight, bias, stride, padding)
        out = out if residual is None else out.add_(residual)
        return out.relu_() if relu else out
    place = (padding, stride, (1, 1), 1)
    if residual is None:
        return _operators._convolution_pointwise(x, weight, bias, *place, "relu" if relu else "none", [], "")
    after = "relu" if relu else None
    return _operators._convolution_pointwise.binary(x, residual, weight, bias, *place, "add", 1.0, after, [], None)


def _activated(x: Tensor, activation: Activation) -> Tensor:
    """In place where that is possible: of a view, as a linear map gives it, autograd would copy the whole tensor."""
    if activation == "relu" and torch.is_grad_enabled():
        return F.relu(x)
    return F.relu_(x) if activation == "relu" else F.gelu(x) if activation == "gelu" else x


def _own_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    code: int = 0,
    added: Tensor | None = None,
    before: LayerNorm | None = None,
    after: LayerNorm | None = None,
    heads: int = 0,
) -> Tensor:
    return _kernels.linear(x, weight, bias, residual, code, added, *_parts(before), *_parts(after), heads)


def _parts(norm: LayerNorm | None) -> tuple[list[Tensor], float]:
    return ([], 0.0) if norm is None else ([norm[0], norm[1]], norm[2])


def _tensors(norm: LayerNorm | None) -> tuple[Tensor, ...]:
    return () if norm is None else norm[:2]


def _normalised(x: Tensor, norm: LayerNorm | None) -> Tensor:
    return x if norm is None else F.layer_norm(x, x.shape[-1:], *norm)


def _prepared(x: Tensor, added: Tensor | None, before: LayerNorm | None) -> Tensor:
    return _normalised(x if added is None else x + added, before)


def _use_kernels(x: Tensor) -> bool:
    return _has_kernels and _extension.kernel_applies(x.device, x.dtype)


def _least_rows(x: Tensor) -> int:
    return _FEWEST_ROWS if _use_kernels(x) else _FEW_ROWS


def _use_operators() -> bool:
    return _has_operators and bool(torch.backends.mkldnn.enabled)


def _fuse(x: Tensor, *others: Tensor | None) -> bool:
    """`fuses`, and all are of one type; with others ordinary operators are the ones that know what to say or do."""
    return fuses(x) and all(other is None or other.dtype == x.dtype for other in others)
