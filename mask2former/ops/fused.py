"""Linear maps and convolutions together with what follows them, by oneDNN where that is faster.

PyTorch computes float32 products of matrices on a CPU with another library, which is slower on many processors, and
adds, activates and re-orders in passes of their own. The operators that ``torch.compile`` uses for CPUs do all this in
one pass. Here they are used for inference without compilation; in all other cases, and in a PyTorch without them, the
same is computed by ordinary operations, up to rounding.
"""

import platform
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Activation = Literal["none", "relu", "gelu"]

_FEW_ROWS = 192  # with fewer the weights are re-ordered for too little work

_operators: Any = torch.ops.mkldnn
_has_operators = (
    torch.backends.mkldnn.is_available()
    and platform.machine() in ("x86_64", "AMD64")
    and all(hasattr(_operators, name) for name in ("_linear_pointwise", "_convolution_pointwise"))
)


def fuses(x: Tensor) -> bool:
    """Whether oneDNN's operators are used for an input: float32 on an x86 CPU, in nothing but plain inference.

    Not with gradients, which these operators have not; not when compiling, exporting or tracing, which want ordinary
    operators; not under a mode that looks at the operators, as those that count them do; not under autocast.
    """
    return (
        _has_operators
        and type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch.is_autocast_enabled("cpu")
        and not is_in_torch_dispatch_mode()
        and bool(torch.backends.mkldnn.enabled)
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
    is_one_step = residual is None or activation == "none"
    if not is_one_step or x.numel() < _FEW_ROWS * x.shape[-1] or not _fuse(x, weight, bias, residual):
        out = F.linear(x, weight, bias)
        out = F.relu_(out) if activation == "relu" else F.gelu(out) if activation == "gelu" else out
        return out if residual is None else residual + out
    if residual is not None:
        return _operators._linear_pointwise.binary(x, residual, weight, bias, "add")
    return _operators._linear_pointwise(x, weight, bias, activation, [], "none")


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
    place = (padding, stride, (1, 1), 1)
    if residual is None:
        return _operators._convolution_pointwise(x, weight, bias, *place, "relu" if relu else "none", [], "")
    after = "relu" if relu else None
    return _operators._convolution_pointwise.binary(x, residual, weight, bias, *place, "add", 1.0, after, [], None)


def _fuse(x: Tensor, *others: Tensor | None) -> bool:
    """`fuses`, and all are of one type; with others ordinary operators are the ones that know what to say or do."""
    return fuses(x) and all(other is None or other.dtype == x.dtype for other in others)
