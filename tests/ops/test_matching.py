"""Sums over all pairs of predictions and targets: the compiled kernel against the PyTorch reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mask2former.ops import mask_points
from mask2former.ops.matching import pair_sums, pair_sums_reference

pytestmark = pytest.mark.skipif(
    not mask_points.has_kernels,
    reason="no compiled kernels for points; to build them: python setup.py build_ext --inplace",
)
CANVAS = (52, 68)


def image(rows: int, channels: int, points: int, masks: int) -> list[Any]:
    """Arguments of `pair_sums`, with points around the canvas."""
    where = torch.rand(points, 2) * 1.3 - 0.15
    found = torch.rand(masks, 40, 50) > 0.5
    return [2 * torch.randn(rows, channels), torch.randn(channels, 13, 17), where, found, CANVAS]


def exact(arguments: list[Any]) -> Any:
    """The reference in float64."""
    embeddings, features, points, *others = arguments
    return pair_sums_reference(embeddings.double(), features.double(), points.double(), *others)


@pytest.mark.parametrize(
    ("rows", "channels", "points", "masks"),
    [(1, 1, 1, 1), (7, 5, 300, 3), (96, 16, 31, 2), (97, 3, 32, 1), (200, 8, 257, 4), (6, 4, 2000, 1), (5, 4, 16, 0)],
)
def test_sums_are_those_of_the_reference_in_float64(rows: int, channels: int, points: int, masks: int) -> None:
    arguments = image(rows, channels, points, masks)
    for found, expected in zip(pair_sums(*arguments), exact(arguments), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-5 * points)


def test_bytes_count_as_booleans_and_other_types_take_the_reference() -> None:
    arguments = image(9, 4, 50, 2)
    expected = pair_sums(*arguments)
    arguments[3] = arguments[3].to(torch.uint8)
    assert all(torch.equal(a, b) for a, b in zip(pair_sums(*arguments), expected, strict=True))
    doubles = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    assert pair_sums(*doubles).inner.dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_number_stays_in_its_row(bad: float) -> None:
    arguments = image(8, 4, 60, 2)
    expected = pair_sums(*arguments)
    arguments[0][3, 1] = bad
    found = pair_sums(*arguments)
    others = torch.arange(8) != 3
    for a, b in zip(found[:4], expected[:4], strict=True):
        assert torch.equal(a[others], b[others])
    assert not found.softplus[3].isfinite()


def test_large_logits() -> None:
    embeddings, masks = torch.tensor([[1e4], [-1e4]]), torch.ones(1, 8, 8).bool()
    found = pair_sums(embeddings, torch.ones(1, 4, 4), torch.full((40, 2), 0.5), masks, (8, 8))
    expected = [[4e5, 0.0], [40.0, 0.0], [[4e5], [-4e5]], [[40.0], [0.0]], [40.0]]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, torch.tensor(b))


def test_threads_change_nothing() -> None:
    arguments, before = image(300, 8, 100, 3), torch.get_num_threads()
    torch.set_num_threads(1)
    alone = pair_sums(*arguments)
    torch.set_num_threads(4)
    together = pair_sums(*arguments)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_operator_is_registered_as_pytorch_wants_it() -> None:
    arguments = [*image(5, 3, 20, 2)[:4], list(CANVAS)]
    torch.library.opcheck(
        torch.ops.mask2former.pair_sums.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(5, 2), "must agree"),
        (1, torch.zeros(3, 0, 4), "must agree"),
        (2, torch.zeros(5, 3), "must agree"),
        (0, torch.zeros(5, 3).double(), "must be float32"),
        (3, torch.zeros(2, 4, 4), "must be .N, H, W. bool or uint8"),
        (3, torch.zeros(2, 0, 4).bool(), "none empty"),
        (4, [3], "canvas must be"),
    ],
)
def test_direct_calls_do_not_read_wild_memory(place: int, value: Any, message: str) -> None:
    arguments = [*image(5, 3, 20, 2)[:4], list(CANVAS)]
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.mask2former.pair_sums(*arguments)
