"""Deformable convolution: offsets of zero, of whole pixels and of parts, against a naive loop and torchvision."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.ops import deform_conv
from mask2former.ops.deform_conv import deform_conv2d, deform_conv2d_reference


def arguments(
    B: int = 2, C: int = 3, D: int = 4, h: int = 4, w: int = 5, k: int = 3, spread: float = 2.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, C, h, w), (B, 2 * k * k, h, w), (D, C, k, k), (D,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[1] *= spread
    return [tensor.requires_grad_() for tensor in tensors]


class Convolution(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return deform_conv2d(*tensors)


def value_at(plane: Tensor, y: float, x: float) -> float:
    """Bilinear, zero outside."""
    total = 0.0
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < plane.shape[0] and 0 <= j < plane.shape[1]:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * plane[i, j].item()
    return total


def test_reference_equals_a_naive_loop() -> None:
    x, offsets, weight, bias = (tensor.detach() for tensor in arguments(B=1, C=2, D=2, h=3, w=4))
    expected = bias[:, None, None].expand(2, 3, 4).clone()
    for row in range(3):
        for column in range(4):
            for tap in range(9):
                i, j = divmod(tap, 3)
                y = row + i - 1 + offsets[0, 2 * tap, row, column].item()
                x_px = column + j - 1 + offsets[0, 2 * tap + 1, row, column].item()
                for channel in range(2):
                    expected[:, row, column] += weight[:, channel, i, j] * value_at(x[0, channel], y, x_px)
    torch.testing.assert_close(deform_conv2d_reference(x, offsets, weight, bias)[0], expected)


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
@pytest.mark.parametrize("k", [1, 3])
def test_offsets_of_zero_give_a_convolution(function, k: int) -> None:
    x, offsets, weight, bias = arguments(k=k)
    found = function(x, torch.zeros_like(offsets), weight, bias)
    torch.testing.assert_close(found, F.conv2d(x, weight, bias, padding=k // 2))


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
def test_offset_is_y_then_x_in_pixels(function) -> None:
    """One pixel down and two to the right, for a kernel of one tap that copies."""
    x = torch.arange(20.0).view(1, 1, 4, 5)
    offsets = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 4, 5)
    found = function(x, offsets, torch.ones(1, 1, 1, 1), torch.zeros(1))
    expected = torch.zeros(1, 1, 4, 5)
    expected[..., :3, :3] = x[..., 1:, 2:]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_reference_equals_torchvision_with_gradients(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    ours, theirs = arguments(spread=spread), arguments(spread=spread)
    output = deform_conv2d(*theirs)
    monkeypatch.setattr(deform_conv, "_HAS_TORCHVISION", False)
    found = deform_conv2d(*ours)
    torch.testing.assert_close(found, output)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    found.backward(upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and a.grad.any()
        torch.testing.assert_close(a.grad, b.grad)


def test_without_torchvision_and_in_exported_programs_the_plain_operators_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [tensor.detach() for tensor in arguments()]
    expected = deform_conv2d_reference(*tensors)
    monkeypatch.setattr(deform_conv, "_HAS_TORCHVISION", False)
    assert torch.equal(deform_conv2d(*tensors), expected)
    monkeypatch.undo()
    program = torch.export.export(Convolution(), tuple(tensors))
    assert not [node for node in program.graph.nodes if "torchvision" in str(node.target)]
    torch.testing.assert_close(program.module()(*tensors), expected)


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
def test_half_types_and_empty_batches(function) -> None:
    x, offsets, weight, bias = (tensor.detach().float() for tensor in arguments())
    expected = function(x.bfloat16().float(), offsets, weight, bias)
    if function is deform_conv2d:
        assert torch.equal(function(x.bfloat16(), offsets, weight, bias), expected.bfloat16())
    assert function(x[:0], offsets[:0], weight, bias).shape == (0, 4, 4, 5)


@pytest.mark.parametrize(
    ("place", "shape", "rule"),
    [
        (0, (3, 4, 5), r"x must have shape \(B, C, h, w\), got \(3, 4, 5\)"),
        (1, (2, 9, 4, 5), r"offsets_px must have shape \(2, 18, 4, 5\), got \(2, 9, 4, 5\)"),
        (2, (4, 3, 2, 2), r"weight must have shape \(D, 3, k, k\) with an odd k, got \(4, 3, 2, 2\)"),
        (2, (4, 2, 3, 3), r"weight must have shape \(D, 3, k, k\) with an odd k, got \(4, 2, 3, 3\)"),
        (3, (5,), r"bias must have shape \(4,\), got \(5,\)"),
    ],
)
def test_refusals(place: int, shape: tuple[int, ...], rule: str) -> None:
    tensors = arguments()
    tensors[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match=rule):
        deform_conv2d(*tensors)
