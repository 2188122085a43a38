"""Masks at random points: the compiled kernels against the PyTorch reference, and both against naive sums."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.ops import _extension, mask_points
from mask2former.ops.mask_points import (
    drawn_points,
    drawn_points_reference,
    mask_loss_sums,
    mask_loss_sums_reference,
    masks_at_points,
    random_points,
    sigmoid_and_softplus_sum,
    uncertain_points,
    uncertain_points_reference,
)

needs_kernels = pytest.mark.skipif(
    not mask_points.has_kernels,
    reason="no compiled kernels for points; to build them: python setup.py build_ext --inplace",
)
CANVAS = (52, 68)


def points_around_the_canvas(*shape: int) -> Tensor:
    """Some are outside, some on the border of the outermost pixels."""
    points = torch.rand(*shape, 2) * 1.3 - 0.15
    points[:, 0], points[:, 1], points[:, 2] = 0.0, 1.0, 0.5
    return points


def pairs(rows: int, points: int, *, dtype: torch.dtype = torch.float32) -> tuple[list[object], dict[str, object]]:
    """Arguments of `mask_loss_sums`: three images, one of them without pairs, masks of several sizes and types."""
    masks = [torch.rand(3, 40, 50) > 0.5, torch.zeros(0, 0, 0, dtype=torch.bool), torch.rand(2, 52, 68) > 0.5]
    masks[2] = masks[2].to(torch.uint8)
    first = rows // 2
    index = torch.cat([torch.randint(3, (first,)), torch.randint(2, (rows - first,))])
    logits = (4 * torch.randn(rows, 13, 17)).to(dtype).requires_grad_()
    arguments = {"counts": [first, 0, rows - first], "index": index, "canvas": CANVAS}
    return [logits, points_around_the_canvas(rows, points).to(dtype), masks], arguments


@needs_kernels
@pytest.mark.parametrize(("rows", "points"), [(5, 7), (4, 256), (3, 300), (2, 513), (0, 9)])
def test_sums_and_gradients_are_those_of_the_reference_in_float64(rows: int, points: int) -> None:
    (logits, where, masks), others = pairs(rows, points)
    exact = [logits.detach().double().requires_grad_(), where.double(), masks]
    found, expected = mask_loss_sums(logits, where, masks, **others), mask_loss_sums_reference(*exact, **others)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    weights = torch.randn(rows, 4)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), exact[0])
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_by_hand(dtype: torch.dtype) -> None:
    """One cell in the middle of nine, read at its centre and outside of everything."""
    logits = torch.zeros(1, 3, 3, dtype=dtype)
    logits[0, 1, 1] = math.log(3)
    masks = [torch.ones(1, 6, 6, dtype=torch.bool)]
    points = torch.tensor([[[0.5, 0.5], [5.0, 5.0]]], dtype=dtype)
    sums = mask_loss_sums(logits, points, masks, counts=[1], index=torch.tensor([0]), canvas=(6, 6))
    expected = [math.log(4) - math.log(3) + math.log(2), 0.75, 0.75 + 0.5, 1.0]
    assert sums[0].tolist() == pytest.approx(expected, rel=1e-6)


@needs_kernels
@pytest.mark.parametrize("large", [1e4, 1e30, float("inf")])
def test_large_logits_are_finite_and_bad_ones_stay_in_their_row(large: float) -> None:
    logits = torch.full((3, 4, 4), large)
    logits[1], logits[2] = -1e4, float("nan")
    inside = torch.full((3, 5, 2), 0.5)
    sums = mask_loss_sums(
        logits, inside, [torch.ones(1, 8, 8).bool()], counts=[3], index=torch.zeros(3).long(), canvas=(8, 8)
    )
    if math.isfinite(large):
        torch.testing.assert_close(sums[0], torch.tensor([0.0, 5.0, 5.0, 5.0]))
    torch.testing.assert_close(sums[1], torch.tensor([5e4, 0.0, 0.0, 5.0]))
    assert sums[2, :3].isnan().all()


@needs_kernels
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (1, 68), (52, 1), (52, 68)])
def test_masks_of_every_size_are_read_as_padded_ones(size: tuple[int, int]) -> None:
    logits, points = torch.zeros(2, 4, 4), points_around_the_canvas(2, 700)
    masks, others = [torch.ones(2, *size).bool()], {"counts": [2], "index": torch.arange(2), "canvas": CANVAS}
    points[0] *= torch.tensor(size).flip(0) / torch.tensor(CANVAS).flip(0) * 1.2  # about the mask
    found = torch.ops.mask2former.mask_loss_sums(logits, points, masks, [2], others["index"], list(CANVAS))[2]
    expected = masks_at_points(masks[0].double().bool(), points.double(), CANVAS, others["index"])
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=2e-5)


@needs_kernels
def test_second_derivatives_are_refused() -> None:
    arguments, others = pairs(2, 9)
    sums = mask_loss_sums(*arguments, **others).sum()
    (gradient,) = torch.autograd.grad(sums * 2.0, arguments[0], create_graph=True)
    if gradient.requires_grad:
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            gradient.sum().backward()


@needs_kernels
@pytest.mark.parametrize("count", [0, 1, 17, 299, 300])
def test_uncertain_points_are_those_of_the_reference(count: int) -> None:
    maps, candidates = torch.randn(4, 9, 11), torch.rand(4, 300, 2)  # outside all are equal
    found, expected = (f(maps, candidates, count) for f in (uncertain_points, uncertain_points_reference))
    assert found.shape == expected.shape == (4, count, 2)
    for row, wanted in zip(found.tolist(), expected.tolist(), strict=True):
        assert sorted(row) == sorted(wanted)


@needs_kernels
def test_of_equal_candidates_so_many_are_taken_as_are_wanted() -> None:
    maps = torch.zeros(2, 4, 4)
    maps[1] = float("nan")
    candidates = torch.rand(2, 50, 2) * 0.5 + 0.25
    for t, row in enumerate(uncertain_points(maps, candidates, 20)):
        assert torch.equal(row, candidates[t, :20])


@needs_kernels
@pytest.mark.parametrize(
    ("candidates", "uncertain", "others"), [(600, 150, 50), (513, 513, 1), (7, 1, 0), (5, 0, 301), (0, 0, 3)]
)
def test_drawn_points_are_those_of_the_reference(candidates: int, uncertain: int, others: int) -> None:
    maps, seed = torch.randn(4, 9, 11), 2**62 + 12345678901
    numbers = {"candidates": candidates, "uncertain": uncertain, "others": others}
    found, expected = (f(maps, seed, **numbers) for f in (drawn_points, drawn_points_reference))
    assert torch.equal(found[:, uncertain:], expected[:, uncertain:])
    for row, wanted in zip(found[:, :uncertain].tolist(), expected[:, :uncertain].tolist(), strict=True):
        assert sorted(row) == sorted(wanted)


@needs_kernels
def test_drawn_points_do_not_depend_on_threads_and_differ_between_rows_seeds_and_uses() -> None:
    maps, numbers = torch.randn(1, 9, 9).expand(5, 9, 9), {"candidates": 50, "uncertain": 50, "others": 50}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = drawn_points(maps, 3, **numbers)
    torch.set_num_threads(3)
    together = drawn_points(maps, 3, **numbers)
    torch.set_num_threads(before)
    assert torch.equal(alone, together)
    words = torch.cat([alone.flatten(), drawn_points(maps, 4, **numbers).flatten()])
    assert len(words.unique()) > 0.999 * len(words)


@pytest.mark.parametrize(
    ("word", "rounds", "expected"),
    [
        (0, 13, (0x531C7E4F, 0x39491EE5, 0x2C855A92, 0x3D6ABF9A)),
        (0, 20, (0x9C6CA96A, 0xE17EAE66, 0xFC10ECD4, 0x5256A7D8)),
        (0xFFFFFFFF, 13, (0xC4189358, 0x1C9CC83A, 0xD5881C67, 0x6A0A89E0)),
        (0xFFFFFFFF, 20, (0x2A881696, 0x57012287, 0xF6C7446E, 0xA16A6732)),
    ],
)
def test_threefry_gives_its_authors_known_answers(word: int, rounds: int, expected: tuple[int, ...]) -> None:
    found = mask_points.threefry([torch.tensor(word)] * 4, [word] * 4, rounds)
    assert tuple(int(x) for x in found) == expected


def test_random_points_are_uniform_and_independent_of_how_many() -> None:
    points = random_points(5, 4, 20001, use=0)
    assert torch.equal(points[:, :77], random_points(5, 4, 77, use=0))
    assert points.min() >= 0
    assert points.max() < 1
    values = points.flatten().double()
    counts = torch.histc(values, 64, 0, 1)
    chi_square = ((counts - len(values) / 64) ** 2 / (len(values) / 64)).sum().item()
    assert 30 < chi_square < 110  # 63 degrees of freedom: six standard deviations either side
    shifted = torch.stack([values[:-1] - 0.5, values[1:] - 0.5])
    assert abs(torch.corrcoef(shifted)[0, 1].item()) < 0.01  # the standard deviation is 0.0025


@pytest.mark.parametrize("shape", [(1,), (3, 31), (2, 2, 257), (0, 5), (4, 0)])
def test_sigmoid_and_softplus_sum(shape: tuple[int, ...]) -> None:
    logits = 20 * torch.randn(shape)
    probability, sums = sigmoid_and_softplus_sum(logits)
    torch.testing.assert_close(probability, logits.sigmoid())
    torch.testing.assert_close(sums.double(), F.softplus(logits.double()).sum(-1), rtol=1e-5, atol=1e-5)


def test_masks_at_points_equal_padded_float_masks() -> None:
    masks, points = torch.rand(3, 40, 50) > 0.5, points_around_the_canvas(3, 40)
    padded = F.pad(masks.double(), (0, CANVAS[1] - 50, 0, CANVAS[0] - 40))
    expected = F.grid_sample(padded[:, None], 2 * points[:, None].double() - 1, align_corners=False)[:, 0, 0]
    found = masks_at_points(masks, points, CANVAS, torch.arange(3))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@needs_kernels
def test_the_reference_serves_other_types_and_reference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("uncertain_points", "mask_loss_sums", "sigmoid_and_softplus_sum"):
        monkeypatch.delattr(torch.ops.mask2former, name, raising=False)
        monkeypatch.setattr(torch.ops.mask2former, name, None, raising=False)
    doubles, others = pairs(3, 9, dtype=torch.float64)
    assert mask_loss_sums(*doubles, **others).dtype == torch.float64
    with _extension.reference_only():
        assert uncertain_points(torch.randn(2, 3, 3), torch.rand(2, 5, 2), 2).shape == (2, 2, 2)
        assert sigmoid_and_softplus_sum(torch.randn(2, 5))[1].shape == (2,)


@needs_kernels
def test_operators_are_registered_as_pytorch_wants_them() -> None:
    (logits, where, masks), others = pairs(3, 9)
    ops = torch.ops.mask2former
    arguments = (logits, where, masks, others["counts"], others["index"], list(CANVAS))
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.mask_loss_sums.default, arguments, test_utils=utilities)
    torch.library.opcheck(ops.uncertain_points.default, (logits.detach(), where, 4), test_utils=utilities)
    torch.library.opcheck(ops.drawn_points.default, (logits.detach(), 3, 9, 4, 2), test_utils=utilities)
    torch.library.opcheck(ops.sigmoid_and_softplus_sum.default, (logits.detach(),), test_utils=utilities)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.tensor([0, 3, 0])}, "index must name masks that are there"),
        ({"index": torch.tensor([0, -1, 0])}, "index must name masks that are there"),
        ({"counts": [1, 0, 1]}, "counts must add up"),
        ({"counts": [1, 0, 3]}, "counts must add up"),
        ({"counts": [3]}, "counts must have an entry"),
        ({"counts": [0, 3, 0]}, "index must name masks that are there"),
    ],
)
def test_direct_calls_do_not_read_wild_memory(change: dict[str, object], message: str) -> None:
    (logits, where, masks), others = pairs(3, 9)
    others |= change
    with pytest.raises(ValueError, match=message):
        mask_loss_sums(logits, where, masks, **others)
