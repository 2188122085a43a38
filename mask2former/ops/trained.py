"""Linear maps, FFNs and convolutions in training on CPUs in float32: faster, and less is kept for the backward pass.

The products of inputs and weights, and of gradients and weights, are those of `mask2former.ops.fused`, which has no
gradients of its own. An FFN keeps its input alone: the hidden tensor, the largest one of a transformer, is made again
in the backward pass, some rows at a time, which stay in the cache. In all other cases ordinary operations are used.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mask2former.ops import fused

_FEW_ROWS = 192  # as in `fused`
_HIDDEN_NUMBERS = 1 << 19  # of the hidden tensor that are made again at a time: 2 MiB


def trains(x: Tensor, *others: Tensor | None) -> bool:
    """Whether `linear` and `feed_forward` apply: to float32 on a CPU, with gradients, in nothing but plain training."""
    return _is_plain_training(x, *others) and x.numel() >= _FEW_ROWS * x.shape[-1]


def _is_plain_training(x: Tensor, *others: Tensor | None) -> bool:
    return (
        type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and all(other is None or other.dtype == x.dtype for other in others)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch.is_autocast_enabled("cpu")
        and not is_in_torch_dispatch_mode()
    )


def convolves(x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> bool:
    """Whether `convolution` is more than an ordinary one: it keeps the map's size, and there are kernels for that."""
    same_size = stride == (1, 1) and (tuple(weight.shape[2:]), padding) in (((1, 1), (0, 0)), ((3, 3), (1, 1)))
    return same_size and _is_plain_training(x, weight) and fused.has_kernels(x)


def wants_channels_last(x: Tensor) -> bool:
    """Whether convolutions of maps like ``x`` are faster in channels-last order, in training or inference."""
    return fused.fuses(x) or (_is_plain_training(x) and fused.has_kernels(x))


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
) -> Tensor:
    """A convolution: (B, C_in, H, W), (C_out, C_in, h, w), (C_out,) -> (B, C_out, H', W'); in inference `fused`'s."""
    if convolves(x, weight, stride, padding):
        return _Convolution.apply(x, weight, bias, padding)
    return fused.convolution(x, weight, bias, stride=stride, padding=padding)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map: (…, C_in), (C_out, C_in), (C_out,) -> (…, C_out)."""
    return _Linear.apply(x, weight, bias) if trains(x, weight, bias) else F.linear(x, weight, bias)


def feed_forward(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    *,
    activation: fused.Activation,
) -> Tensor:
    """Two linear maps with an activation in between.

    Args:
        x: (…, C_in).
        weights: (C_hidden, C_in) and (C_out, C_hidden).
        biases: (C_hidden,) and (C_out,).
        activation: "gelu" is the exact one.

    Returns:
        (…, C_out).
    """
    (first, second), (first_bias, second_bias) = weights, biases
    if trains(x, first, second, first_bias, second_bias):
        return _FeedForward.apply(x, first, first_bias, second, second_bias, activation)
    hidden = F.linear(x, first, first_bias)
    hidden = F.relu(hidden) if activation == "relu" else F.gelu(hidden) if activation == "gelu" else hidden
    return F.linear(hidden, second, second_bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return fused.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # (R, C_out)
        of_x = fused.linear(gradient, weight.t().contiguous(), None) if ctx.needs_input_grad[0] else None
        of_weight = rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None


class _Convolution(torch.autograd.Function):
    """Step 1, and as many zeros around the map as keep its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.has_bias = padding, bias is not None
        return fused.convolution(x, weight, bias, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:  # a convolution, too, of mirrored weights
            mirrored = weight.flip(2, 3).transpose(0, 1).contiguous()
            of_x = fused.convolution(gradient, mirrored, None, padding=ctx.padding)
        if ctx.needs_input_grad[1]:
            of_weight = _gradient_of_weight(gradient, x, weight, ctx.padding)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None


def _gradient_of_weight(gradient: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    """(C_out, C_in, h, w): for each place of the window a product of all pixels of the gradient and of the moved maps.

    With zeros around both, pixels that moved out of their line or image meet zeros.
    """
    down, right = padding
    borders = (0, 0, right, right, down, down)
    padded = [F.pad(t.permute(0, 2, 3, 1), borders).flatten(0, 2) for t in (gradient, x)]  # (R, C_out), (R, C_in)
    rows, inputs = padded
    line, count = x.shape[3] + 2 * right, len(rows)
    of_weight = torch.empty_like(weight)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            move = (i - down) * line + j - right
            first, last = max(0, -move), count - max(0, move)
            of_weight[:, :, i, j] = rows[first:last].t() @ inputs[first + move : last + move]
    return of_weight


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor,
        first_bias: Tensor | None,
        second: Tensor,
        second_bias: Tensor | None,
        activation: fused.Activation,
    ) -> Tensor:
        ctx.save_for_backward(x, first, first_bias, second)
        ctx.activation, ctx.has_bias = activation, second_bias is not None
        return fused.feed_forward(x, (first, second), (first_bias, second_bias), activation=activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, first, first_bias, second = ctx.saved_tensors
        rows, gradients = x.flatten(0, -2), gradient.flatten(0, -2)  # (R, C_in), (R, C_out)
        of_x, of_first, of_second = torch.empty_like(rows), torch.zeros_like(first), torch.zeros_like(second)
        of_first_bias = first.new_zeros(len(first))
        transposed = first.t().contiguous(), second.t().contiguous()
        step = max(_FEW_ROWS, _HIDDEN_NUMBERS // len(first))
        for some, change, out in zip(rows.split(step), gradients.split(step), of_x.split(step), strict=True):
            raw = fused.linear(some, first, first_bias)  # (r, C_hidden)
            hidden = _activated(raw, ctx.activation)
            of_second.addmm_(change.t(), hidden)
            of_raw = _times_slope(fused.linear(change, transposed[1], None), raw, hidden, ctx.activation)
            of_first.addmm_(of_raw.t(), some)
            of_first_bias += of_raw.sum(0)
            out.copy_(fused.linear(of_raw, transposed[0], None))
        return (
            of_x.view(x.shape),
            of_first,
            None if first_bias is None else of_first_bias,
            of_second,
            gradients.sum(0) if ctx.has_bias else None,
            None,
        )


def _activated(raw: Tensor, activation: fused.Activation) -> Tensor:
    return raw.relu() if activation == "relu" else F.gelu(raw) if activation == "gelu" else raw


def _times_slope(gradient: Tensor, raw: Tensor, hidden: Tensor, activation: fused.Activation) -> Tensor:
    if activation == "relu":
        return torch.ops.aten.threshold_backward(gradient, hidden, 0)
    return torch.ops.aten.gelu_backward(gradient, raw) if activation == "gelu" else gradient
