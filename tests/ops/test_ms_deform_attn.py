"""Deformable attention against a naive loop, golden numbers and numeric gradients."""

import math

import pytest
import torch
from torch import Tensor, nn

from mask2former.ops import ms_deform_attn
from tests.golden import load_tensors

Shapes = list[tuple[int, int]]


def _pixel(value: Tensor, b: int, m: int, start: int, h: int, w: int, y: int, x: int) -> Tensor:
    if 0 <= y < h and 0 <= x < w:
        return value[b, start + y * w + x, m]
    return torch.zeros(value.shape[-1], dtype=value.dtype)


def _naive(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Equation 3 of Deformable DETR, one sample at a time."""
    B, Q, M, L, P, _ = locations.shape
    output = torch.zeros(B, Q, M, value.shape[-1], dtype=value.dtype)
    for b in range(B):
        for q in range(Q):
            for m in range(M):
                start = 0
                for level in range(L):
                    h, w = shapes[level]
                    for p in range(P):
                        x, y = locations[b, q, m, level, p].tolist()
                        x_px, y_px = x * w - 0.5, y * h - 0.5
                        left, top = math.floor(x_px), math.floor(y_px)
                        fx, fy = x_px - left, y_px - top
                        sampled = (
                            (1 - fy) * (1 - fx) * _pixel(value, b, m, start, h, w, top, left)
                            + (1 - fy) * fx * _pixel(value, b, m, start, h, w, top, left + 1)
                            + fy * (1 - fx) * _pixel(value, b, m, start, h, w, top + 1, left)
                            + fy * fx * _pixel(value, b, m, start, h, w, top + 1, left + 1)
                        )
                        output[b, q, m] += weights[b, q, m, level, p] * sampled
                    start += h * w
    return output.flatten(2)


def _random_inputs(
    B: int, Q: int, M: int, D: int, P: int, shapes: Shapes, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations (some outside) and weights that sum to one."""
    S, L = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(B, S, M, D, dtype=dtype)
    locations = torch.rand(B, Q, M, L, P, 2, dtype=dtype) * 1.6 - 0.3
    weights = torch.rand(B, Q, M, L * P, dtype=dtype).softmax(-1).view(B, Q, M, L, P)
    return value, locations, weights


@pytest.mark.parametrize(
    ("B", "Q", "M", "D", "P", "shapes"),
    [
        (1, 1, 1, 1, 1, [(1, 1)]),
        (2, 5, 3, 4, 2, [(4, 6), (2, 3)]),
        (1, 7, 2, 3, 4, [(1, 5), (6, 1), (3, 3)]),
        (3, 2, 4, 2, 1, [(2, 2), (5, 4), (1, 1), (3, 7)]),
    ],
)
def test_equals_naive_loop(B: int, Q: int, M: int, D: int, P: int, shapes: Shapes) -> None:
    value, locations, weights = _random_inputs(B, Q, M, D, P, shapes)
    output = ms_deform_attn(value, shapes, locations, weights)
    assert output.shape == (B, Q, M * D)
    torch.testing.assert_close(output, _naive(value, shapes, locations, weights), rtol=0, atol=1e-12)


def test_locations_on_borders_corners_and_far_outside() -> None:
    shapes = [(3, 4)]
    value = torch.randn(1, 12, 1, 2, dtype=torch.float64)
    columns, rows = (-1e6, -0.125, 0.0, 0.125, 0.5, 1.0, 1.125, 7.0), (-9.0, 0.0, 0.5, 1.0, 1e6)
    places = [(x, y) for x in columns for y in rows]
    locations = torch.tensor(places, dtype=torch.float64).view(1, -1, 1, 1, 1, 2)
    weights = torch.ones(locations.shape[:-1], dtype=torch.float64)
    output = ms_deform_attn(value, shapes, locations, weights)
    torch.testing.assert_close(output, _naive(value, shapes, locations, weights), rtol=0, atol=1e-12)
    # on the outer border half of the weight is outside, in a corner three quarters
    corner = places.index((0.0, 0.0))
    torch.testing.assert_close(output[0, corner], value[0, 0, 0] / 4)
    outside = [i for i, (x, y) in enumerate(places) if x in (-1e6, 7.0) or y in (-9.0, 1e6)]
    assert (output[0, outside] == 0).all()


def test_cell_centres_give_the_cells() -> None:
    value = torch.randn(1, 6, 1, 2, dtype=torch.float64)
    centres = torch.tensor([((j + 0.5) / 3, (i + 0.5) / 2) for i in range(2) for j in range(3)]).double()
    weights = torch.ones(1, 6, 1, 1, 1).double()
    output = ms_deform_attn(value, [(2, 3)], centres.view(1, 6, 1, 1, 1, 2), weights)
    torch.testing.assert_close(output[0], value[0, :, 0], rtol=0, atol=1e-6)


def test_golden_output_and_gradients() -> None:
    golden = load_tensors("ms_deform_attn")
    names = ("value", "sampling_locations", "attention_weights")
    value, locations, weights = (golden[n].requires_grad_() for n in names)
    shapes = [(h, w) for h, w in golden["spatial_shapes"].tolist()]
    output = ms_deform_attn(value, shapes, locations, weights)
    torch.testing.assert_close(output, golden["output"], rtol=0, atol=1e-10)
    gradients = torch.autograd.grad(output, (value, locations, weights), golden["grad_output"])
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(gradient, golden[f"grad_{name}"], rtol=0, atol=1e-10)


def test_gradcheck() -> None:
    shapes = [(3, 4), (2, 2)]
    value, locations, weights = _random_inputs(2, 3, 2, 2, 2, shapes)
    inputs = tuple(x.requires_grad_() for x in (value, locations, weights))
    assert torch.autograd.gradcheck(lambda v, s, a: ms_deform_attn(v, shapes, s, a), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    shapes = [(5, 6), (3, 3)]
    inputs = [x.to(dtype) for x in _random_inputs(2, 9, 2, 4, 4, shapes)]
    output = ms_deform_attn(inputs[0], shapes, *inputs[1:])
    assert output.dtype == dtype
    exact = ms_deform_attn(inputs[0].double(), shapes, *(x.double() for x in inputs[1:]))
    # only the result is rounded: one unit in the last place
    torch.testing.assert_close(output.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_half_value_with_float_locations() -> None:
    shapes = [(5, 6)]
    value, locations, weights = _random_inputs(1, 4, 2, 4, 3, shapes, torch.float32)
    output = ms_deform_attn(value.half(), shapes, locations, weights)
    expected = ms_deform_attn(value.half().float(), shapes, locations, weights)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.float(), expected, rtol=1e-3, atol=1e-5)


class _Op(nn.Module):
    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, [(3, 4), (2, 2)], locations, weights)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    inputs = _random_inputs(1, 5, 2, 3, 2, [(3, 4), (2, 2)], torch.float32)
    program = torch.export.export(_Op(), inputs, strict=strict)
    other = _random_inputs(1, 5, 2, 3, 2, [(3, 4), (2, 2)], torch.float32)
    torch.testing.assert_close(program.module()(*other), _Op()(*other))


def _arguments() -> dict[str, object]:
    value, locations, weights = _random_inputs(2, 5, 3, 4, 2, [(4, 6), (2, 3)], torch.float32)
    return {
        "value": value,
        "spatial_shapes": [(4, 6), (2, 3)],
        "sampling_locations": locations,
        "attention_weights": weights,
    }


def test_the_unchanged_arguments_are_valid() -> None:
    assert ms_deform_attn(**_arguments()).shape == (2, 5, 12)


@pytest.mark.parametrize(
    ("argument", "wrong", "message"),
    [
        ("value", torch.rand(2, 30, 12), r"value must have shape \(B, S, M, D\), got \(2, 30, 12\)"),
        ("value", torch.ones(2, 30, 3, 4, dtype=torch.int32), "value must be floating point, got torch.int32"),
        ("value", torch.rand(2, 29, 3, 4), "spatial_shapes must add up .* S = 29, .* with sum 30"),
        ("value", torch.rand(3, 30, 3, 4), r"sampling_locations must agree .* = \(3, 3, 2\), got \(2, 3, 2\)"),
        ("value", torch.rand(2, 30, 1, 4), r"sampling_locations must agree .* = \(2, 1, 2\), got \(2, 3, 2\)"),
        ("spatial_shapes", [], "spatial_shapes must be L >= 1 pairs"),
        ("spatial_shapes", [(30, 1), (0, 3)], r"spatial_shapes must be .* got \[\(30, 1\), \(0, 3\)\]"),
        ("spatial_shapes", [(5, 6)], r"sampling_locations must agree .* = \(2, 3, 1\)"),
        ("sampling_locations", torch.rand(2, 5, 3, 2, 2), r"{} must have shape .*\(2, 5, 3, 2, 2\)"),
        ("sampling_locations", torch.rand(2, 5, 3, 2, 2, 3), "{} must have shape .*P, 2"),
        ("sampling_locations", torch.rand(2, 6, 3, 2, 2, 2), "attention_weights must have shape"),
        ("sampling_locations", torch.ones(2, 5, 3, 2, 2, 2).long(), "{} must be floating point"),
        ("sampling_locations", torch.ones(2, 5, 3, 2, 2, 2, device="meta"), "{} must be on the device"),
        ("attention_weights", torch.rand(2, 5, 3, 4), r"{} must have shape .*got \(2, 5, 3, 4\)"),
        ("attention_weights", torch.ones(2, 5, 3, 2, 2).long(), "{} must be floating point"),
        ("attention_weights", torch.ones(2, 5, 3, 2, 2, device="meta"), "{} must be on the device"),
    ],
)
def test_wrong_arguments_are_named(argument: str, wrong: object, message: str) -> None:
    with pytest.raises(ValueError, match=message.format(argument)):
        ms_deform_attn(**{**_arguments(), argument: wrong})
