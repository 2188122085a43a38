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

_FEW_ROWS = 192  # with fewer the weights are re-ordered for too little work
_CODES: dict[Activation, int] = {"none": 0, "relu": 1, "gelu": 2}  # enum class Activation in csrc/cpu/products.h
_RELU_OF_SUM = 3
_WINOGRAD_PIXELS = 4  # for each channel; with fewer, transforming the weights takes what fewer products save
_WINOGRAD_CHANNELS = 8  # they are a multiple of it

_operators: Any = torch.ops.mkldnn
_has_operators = (
    torch.backends.mkldnn.is_available()
    and platform.machine() in ("x86_64", "AMD64")
    and all(hasattr(_operators, name) for name in ("_linear_pointwise", "_convolution_pointwise"))
)

_kernels: Any = torch.ops.mask2former
# An extension built from an earlier version of the sources lacks these operators.
_has_kernels = (
    _extension.extension.module is not None
    and hasattr(_kernels, "has_product_kernels")
    and bool(_kernels.has_product_kernels())
)


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


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Activation of a linear map, plus a residual.

    Args:
        x: (…, C_in).
        weight: (C_out, C_in).
        bias: (C_out,).
        activation: "gelu" is the exact one.
        residual: (…, C_out).

    Returns:
        (…, C_out).
    """
    # the size last: a compiler would make graphs of their own for small and large inputs
    if _fuse(x, weight, bias, residual) and x.numel() >= _FEW_ROWS * x.shape[-1]:
        if _use_kernels(x):
            return _kernels.linear(x, weight, bias, residual, _CODES[activation])
        if residual is None:
            return _operators._linear_pointwise(x, weight, bias, activation, [], "none")
        if activation == "none":
            return _operators._linear_pointwise.binary(x, residual, weight, bias, "add")
    out = _activated(F.linear(x, weight, bias), activation)
    return out if residual is None else residual + out


def feed_forward(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    *,
    activation: Activation,
    residual: Tensor | None = None,
) -> Tensor:
    """Two linear maps with an activation in between, plus a residual.

    Args:
        x: (…, C_in).
        weights: (C_hidden, C_in) and (C_out, C_hidden).
        biases: (C_hidden,) and (C_out,).
        activation: "gelu" is the exact one.
        residual: (…, C_out).

    Returns:
        (…, C_out).
    """
    (first, second), (first_bias, second_bias) = weights, biases
    parts = (x, first, first_bias, second, second_bias, residual)
    if _fuse(*parts) and _use_kernels(x) and x.numel() >= _FEW_ROWS * x.shape[-1]:
        return _kernels.feed_forward(*parts, _CODES[activation])
    hidden = linear(x, first, first_bias, activation=activation)
    return linear(hidden, second, second_bias, residual=residual)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """ReLU of a convolution plus a residual, both optional. Faster with maps in channels-last order.

    Args:
        x: (B, C_in, H, W).
        weight: (C_out, C_in, h, w).
        bias: (C_out,).
        stride, padding: vertical and horizontal.
        residual: of the result's shape.
        relu: set negative values to 0 at the end.

    Returns:
        (B, C_out, H', W'), in the order of ``x``.
    """
    if not _fuse(x, weight, bias, residual):
        out = F.conv2d(x, weight, bias, stride, padding)
        out = out if residual is None else out + residual
        return F.relu_(out) if relu else out
    if _use_kernels(x) and x.is_contiguous(memory_format=torch.channels_last):
        if weight.shape[2:] == (1, 1) and padding == (0, 0):
            return _pointwise(x, weight, bias, stride, residual, relu)
        if residual is None and _suits_winograd(x, weight, stride, padding):
            return _kernels.convolution3x3(x, weight, bias, relu)
    return _convolution_by_operators(x, weight, bias, stride, padding, residual, relu)


def _pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], residual: Tensor | None, relu: bool
) -> Tensor:
    """A convolution that sees one pixel at a time, which is a linear map of the channels."""
    pixels = x.permute(0, 2, 3, 1)[:, :: stride[0], :: stride[1]]  # (B, H', W', C_in)
    added = None if residual is None else residual.permute(0, 2, 3, 1)  # (B, H', W', C_out)
    out = _kernels.linear(pixels, weight.flatten(1), bias, added, _RELU_OF_SUM if relu else 0)
    return out.permute(0, 3, 1, 2)  # (B, C_out, H', W')


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


def _use_kernels(x: Tensor) -> bool:
    return _has_kernels and _extension.kernel_applies(x.device, x.dtype)


def _use_operators() -> bool:
    return _has_operators and bool(torch.backends.mkldnn.enabled)


def _fuse(x: Tensor, *others: Tensor | None) -> bool:
    """`fuses`, and all are of one type; with others ordinary operators are the ones that know what to say or do."""
    return fuses(x) and all(other is None or other.dtype == x.dtype for other in others)
