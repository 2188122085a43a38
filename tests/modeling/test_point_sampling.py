"""Sampling at points against `grid_sample` on padded float masks; where uncertain points go."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.modeling.point_sampling import sample_logits, sample_masks, sample_uncertain_points
from mask2former.ops import _extension
from mask2former.ops.mask_points import has_kernels, random_points

needs_kernels = pytest.mark.skipif(
    not has_kernels, reason="no compiled kernels for points; to build them: python setup.py build_ext --inplace"
)


def _padded_and_sampled(masks: Tensor, points: Tensor, canvas: tuple[int, int]) -> Tensor:
    """(N, P): what the sampling of float masks on a zero-padded canvas gives, in float64."""
    padded = F.pad(masks.double(), (0, canvas[1] - masks.shape[2], 0, canvas[0] - masks.shape[1]))
    grid = 2 * points.double().expand(len(masks), -1, 2).unsqueeze(1) - 1
    return F.grid_sample(padded.unsqueeze(1), grid, align_corners=False)[:, 0, 0]


CORNERS_AND_BORDERS = torch.tensor([(x, y) for x in (0.0, 0.5, 1.0) for y in (0.0, 0.25, 1.0)])


@pytest.mark.parametrize(
    ("size", "canvas"),
    [((5, 7), (5, 7)), ((5, 7), (32, 64)), ((1, 1), (1, 1)), ((1, 1), (32, 32)), ((31, 2), (32, 32))],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_sample_masks_equals_grid_sample_of_the_padded_float_masks(
    size: tuple[int, int], canvas: tuple[int, int], dtype: torch.dtype
) -> None:
    masks = (torch.rand(4, *size) > 0.5).to(dtype)
    masks[0] = 1
    points = torch.cat([torch.rand(300, 2), CORNERS_AND_BORDERS])
    # points on the border of the mask inside the canvas, and in pixel centres
    edge = torch.tensor([size[1] / canvas[1], size[0] / canvas[0]])
    points = torch.cat([points, edge * torch.rand(50, 1), edge[None], (edge - 0.5 / torch.tensor(canvas[::-1]))[None]])
    found = sample_masks(masks, points, canvas)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), _padded_and_sampled(masks, points, canvas), rtol=0, atol=1e-5)


def test_sample_masks_by_index() -> None:
    masks, index = torch.rand(3, 6, 5) > 0.5, torch.tensor([2, 0, 0, 1, 2])
    points = torch.rand(5, 20, 2)
    found = sample_masks(masks, points, (8, 8), index)
    for row, mask in enumerate(index.tolist()):
        expected = _padded_and_sampled(masks[mask : mask + 1], points[row], (8, 8))[0]
        torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 5), (0, 0)])
def test_sample_masks_without_masks(size: tuple[int, int]) -> None:
    masks = torch.zeros(0, *size, dtype=torch.bool)
    assert sample_masks(masks, torch.rand(9, 2), (8, 8)).shape == (0, 9)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert sample_masks(masks, torch.rand(0, 9, 2), (8, 8), nothing).shape == (0, 9)


def test_sample_logits_in_closed_form() -> None:
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    points = torch.tensor([[(0.25, 0.25), (0.75, 0.75), (0.5, 0.5), (0.5, 0.25), (0.0, 0.25), (1.0, 1.0), (-1, 0.5)]])
    assert sample_logits(maps, points)[0, 0].tolist() == [1.0, 4.0, 2.5, 1.5, 0.5, 1.0, 0.0]


def test_sample_logits_uses_own_points_of_each_map_and_all_channels() -> None:
    maps, points = torch.randn(3, 4, 6, 5), torch.rand(3, 11, 2)
    found = sample_logits(maps, points)
    assert found.shape == (3, 4, 11)
    for n in range(3):
        torch.testing.assert_close(found[n], sample_logits(maps[n : n + 1], points[n : n + 1])[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sample_logits_is_float32_even_under_autocast(dtype: torch.dtype) -> None:
    maps, points = torch.randn(2, 3, 6, 5).to(dtype), torch.rand(2, 40, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sample_logits(maps, points)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, sample_logits(maps.float(), points), rtol=0, atol=0)


def _uncertain(logits: Tensor, seed: int = 0, **changes: float) -> Tensor:
    arguments = {"num_points": 200, "oversample_ratio": 3.0, "importance_sample_ratio": 0.75, **changes}
    return sample_uncertain_points(logits, generator=torch.Generator().manual_seed(seed), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_kernels)])
def test_uncertain_points_are_the_candidates_closest_to_zero(compiled: bool) -> None:
    logits = torch.randn(3, 8, 8)
    with nullcontext() if compiled else _extension.reference_only():
        points = _uncertain(logits)
    assert points.shape == (3, 200, 2)
    assert points.min() >= 0
    assert points.max() <= 1
    generator = torch.Generator().manual_seed(0)
    if compiled:
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        candidates, uniform = random_points(seed, 3, 600, use=0), random_points(seed, 3, 50, use=1)
    else:
        candidates, uniform = torch.rand(3, 600, 2, generator=generator), torch.rand(3, 50, 2, generator=generator)
    for t in range(3):
        certainty = sample_logits(logits[t][None, None], candidates[t][None])[0, 0].abs()
        best = candidates[t][certainty.argsort()[:150]]
        assert set(map(tuple, points[t, :150].tolist())) == set(map(tuple, best.tolist()))
    assert torch.equal(points[:, 150:], uniform)


def test_between_two_certain_pixels_of_opposite_sign_is_the_most_uncertain_place() -> None:
    row = torch.tensor([0.8] * 10 + [-1.0, 1.0] * 5)
    points = _uncertain(row.expand(1, 200, 20), oversample_ratio=8.0, importance_sample_ratio=1.0)
    # Pixels of the left half are less certain, but in the right half logits pass through zero between pixels.
    assert points[..., 0].min() > 0.47


@pytest.mark.parametrize(("ratio", "near_zero"), [(0.0, 0.25), (0.5, 0.625), (1.0, 1.0)])
def test_importance_ratio_is_the_share_of_chosen_points(ratio: float, near_zero: float) -> None:
    logits = torch.full((1, 1, 100), 5.0)
    logits[..., 40:65] = 0.01  # a quarter is uncertain
    points = _uncertain(logits, num_points=2000, oversample_ratio=8.0, importance_sample_ratio=ratio)
    inside = ((points[..., 0] > 0.4) & (points[..., 0] < 0.65)).double().mean()
    assert inside.item() == pytest.approx(near_zero, abs=0.04)


def test_generator_determines_the_points() -> None:
    logits = torch.randn(2, 4, 4)
    assert torch.equal(_uncertain(logits, 5), _uncertain(logits, 5))
    assert not torch.equal(_uncertain(logits, 5), _uncertain(logits, 6))


@pytest.mark.parametrize("num_points", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_shapes(num_points: int, count: int) -> None:
    logits = torch.randn(count, 3, 5)
    points = _uncertain(logits, num_points=num_points, oversample_ratio=1.0, importance_sample_ratio=1.0)
    assert points.shape == (count, num_points, 2)
    assert _uncertain(logits, num_points=num_points).shape == (count, num_points, 2)


def test_candidates_drawn_in_parts_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 4, 4)
    with _extension.reference_only():
        together = _uncertain(logits)
        for size in (1, 600, 1300):
            monkeypatch.setattr("mask2former.modeling.point_sampling._CPU_CANDIDATES", size)
            assert torch.equal(_uncertain(logits), together)
