"""The simple feature pyramid: each level by hand, sizes, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.backbones.simple_pyramid import ChannelNorm, SimpleFeaturePyramid

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def pyramid(in_stride: int = 16, strides: dict[str, int] = STRIDES) -> SimpleFeaturePyramid:
    module = SimpleFeaturePyramid(in_channels=8, in_stride=in_stride, out_channels=6, out_strides=strides)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def normalised(x: Tensor, norm: nn.Module) -> Tensor:
    """Over channels, in a loop over places."""
    result = torch.empty_like(x)
    for b, i, j in [(b, i, j) for b in range(len(x)) for i in range(x.shape[2]) for j in range(x.shape[3])]:
        place = x[b, :, i, j]
        scaled = (place - place.mean()) / (place.var(unbiased=False) + 1e-6).sqrt()
        result[b, :, i, j] = scaled * norm.weight + norm.bias
    return result


def enlarged(x: Tensor, conv: nn.Module) -> Tensor:
    """A place becomes 2x2 places, each with weights of its own."""
    B, _, h, w = x.shape
    result = torch.empty(B, conv.weight.shape[1], 2 * h, 2 * w)
    for i, j in [(i, j) for i in range(2 * h) for j in range(2 * w)]:
        result[:, :, i, j] = x[:, :, i // 2, j // 2] @ conv.weight[:, :, i % 2, j % 2] + conv.bias
    return result


def projected(x: Tensor, level: nn.Module) -> Tensor:
    """The last four layers of a level."""
    one, first, three, second = list(level)[-4:]
    x = normalised(torch.einsum("oc,bchw->bohw", one.weight[:, :, 0, 0], x), first)
    return normalised(F.conv2d(x, three.weight, padding=1), second)


def test_levels_by_hand() -> None:
    module, x = pyramid(), torch.randn(2, 8, 3, 5)
    found = module(x)
    levels = module.levels
    assert [len(level) for level in levels.values()] == [8, 5, 4, 5]
    finest = enlarged(F.gelu(normalised(enlarged(x, levels["res2"][0]), levels["res2"][1])), levels["res2"][3])
    coarsest = torch.stack([x[:, :, i : i + 2, j : j + 2].amax((2, 3)) for i in (0, 2) for j in (0, 2, 4)], -1)
    before = {
        "res2": finest,
        "res3": enlarged(x, levels["res3"][0]),
        "res4": x,
        "res5": coarsest.view(2, 8, 2, 3),
    }
    for name, expected in before.items():
        torch.testing.assert_close(found[name], projected(expected, levels[name]), rtol=1e-4, atol=1e-4)


def test_a_constant_map_is_constant_where_no_border_is_near() -> None:
    found = pyramid(strides={"res4": 16, "res5": 32})(torch.randn(1, 8, 1, 1).expand(1, 8, 8, 10))
    for level in found.values():
        inner = level[:, :, 1:-1, 1:-1]
        torch.testing.assert_close(inner, inner[:, :, :1, :1].expand_as(inner))


@pytest.mark.parametrize(
    ("in_stride", "size", "sizes"),
    [
        (16, (3, 5), [(12, 20), (6, 10), (3, 5), (2, 3)]),
        (16, (1, 1), [(4, 4), (2, 2), (1, 1), (1, 1)]),
        (8, (5, 6), [(10, 12), (5, 6), (3, 3), (2, 2)]),
        (32, (2, 1), [(16, 8), (8, 4), (4, 2), (2, 1)]),
    ],
)
def test_sizes_and_a_gradient_for_every_parameter(
    in_stride: int, size: tuple[int, int], sizes: list[tuple[int, int]]
) -> None:
    module = pyramid(in_stride)
    found = module(torch.randn(1, 8, *size))
    assert {name: tuple(level.shape) for name, level in found.items()} == {
        name: (1, 6, *expected) for name, expected in zip(STRIDES, sizes, strict=True)
    }
    sum(level.sum() for level in found.values()).backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_its_norms_are_norms_for_the_optimizer() -> None:
    assert isinstance(ChannelNorm(4), nn.LayerNorm)


@pytest.mark.parametrize("stride", [12, 14, 48, 3])
def test_other_strides_are_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=rf"'res4'\] must be in_stride = 16 times .* power of two, got {stride}"):
        pyramid(16, {"res4": stride})
