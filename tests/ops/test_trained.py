"""Linear maps and FFNs with gradients of their own against ordinary operations."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.ops import fused, trained
from mask2former.ops.fused import Activation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def gradients(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    return torch.autograd.grad((out * torch.randn(out.shape).to(out.dtype)).sum(), leaves)


def check(found: Callable[..., Tensor], expected: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Values and gradients, against float64."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out, wanted = found(*leaves), expected(*exact)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
    for gradient, other in zip(gradients(out, leaves), gradients(wanted, exact), strict=True):
        torch.testing.assert_close(gradient.double(), other, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("shape", [(200, 24), (2, 150, 24), (2, 3, 67, 24)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(shape: tuple[int, ...], has_bias: bool) -> None:
    leaves = [leaf(*shape), leaf(40, 24), *([leaf(40)] if has_bias else [])]
    assert trained.trains(*leaves)
    check(lambda x, w, b=None: trained.linear(x, w, b), F.linear, leaves)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("shape", [(193, 24), (2, 300, 24)])
def test_feed_forward(activation: Activation, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "_HIDDEN_NUMBERS", 250 * 72)  # several parts, the last one smaller
    leaves = [leaf(*shape), leaf(72, 24), leaf(72), leaf(40, 72), leaf(40)]

    def found(x: Tensor, first: Tensor, a: Tensor, second: Tensor, b: Tensor) -> Tensor:
        return trained.feed_forward(x, (first, second), (a, b), activation=activation)

    def expected(x: Tensor, first: Tensor, a: Tensor, second: Tensor, b: Tensor) -> Tensor:
        return F.linear(ACTIVATIONS[activation](F.linear(x, first, a)), second, b)

    check(found, expected, leaves)


def test_an_ffn_keeps_no_hidden_tensor() -> None:
    kept: list[Tensor] = []
    leaves = [leaf(300, 16), leaf(64, 16), leaf(64), leaf(16, 64), leaf(16)]

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        trained.feed_forward(leaves[0], (leaves[1], leaves[3]), (leaves[2], leaves[4]), activation="relu")
    assert {tuple(x.shape) for x in kept} == {(300, 16), (64, 16), (64,), (16, 64)}


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    x, weight, bias = leaf(200, 8), torch.randn(8, 8), leaf(8)
    trained.linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((8,), 200.0))
    assert x.grad is not None
    assert weight.grad is None
    trained.feed_forward(x.detach(), (weight, weight), (bias, None), activation="relu").sum().backward()
    assert weight.grad is None


@pytest.mark.parametrize("kind", ["float64", "few rows", "no gradients", "autocast", "compiling"])
def test_other_cases_take_ordinary_operations(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained._Linear, "apply", None)
    monkeypatch.setattr(trained._FeedForward, "apply", None)
    x, weight = leaf(10 if kind == "few rows" else 300, 8), leaf(8, 8)
    if kind == "float64":
        x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    if kind == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    enabled = kind != "no gradients"
    with torch.set_grad_enabled(enabled), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        assert trained.linear(x, weight, None).requires_grad == enabled
        assert trained.feed_forward(x, (weight, weight), (None, None), activation="gelu").requires_grad == enabled


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("channels", [(16, 24), (24, 16), (6, 10)])  # Winograd's kernel has multiples of 8
def test_convolution(order: torch.memory_format, size: int, has_bias: bool, channels: tuple[int, int]) -> None:
    C_in, C_out = channels
    x = torch.randn(2, C_in, 14, 21).contiguous(memory_format=order).requires_grad_()
    padding = (size // 2, size // 2)
    weight = (torch.randn(C_out, C_in, size, size) * (size * size * C_in) ** -0.5).requires_grad_()
    leaves = [x, weight, *([leaf(C_out)] if has_bias else [])]

    def found(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return trained.convolution(x, w, b, padding=padding)

    check(found, lambda x, w, b=None: F.conv2d(x, w, b, padding=padding), leaves)


def test_which_convolutions_have_gradients_of_their_own() -> None:
    x, one, three = leaf(1, 8, 14, 21), torch.zeros(8, 8, 1, 1), torch.zeros(8, 8, 3, 3)
    assert trained.convolves(x, one, (1, 1), (0, 0)) == fused._has_kernels
    assert trained.convolves(x, three, (1, 1), (1, 1)) == fused._has_kernels
    others = [(one, 2, 0), (three, 1, 0), (three, 2, 1), (one, 1, 1), (torch.zeros(8, 8, 1, 3), 1, 0)]
    for weight, stride, padding in others:
        assert not trained.convolves(x, weight, (stride, stride), (padding, padding))
    with torch.no_grad():
        assert not trained.convolves(x, one, (1, 1), (0, 0))
    assert not trained.convolves(x.double(), one.double(), (1, 1), (0, 0))


def test_a_convolution_gives_no_gradient_to_what_is_frozen() -> None:
    x, weight, bias = torch.randn(1, 8, 14, 21), leaf(8, 8, 3, 3), torch.zeros(8)
    trained.convolution(x, weight, bias, padding=(1, 1)).sum().backward()
    assert weight.grad is not None
    assert bias.grad is None
    inputs = leaf(1, 8, 14, 21)
    trained.convolution(inputs, weight.detach(), None, padding=(1, 1)).sum().backward()
    assert inputs.grad is not None
