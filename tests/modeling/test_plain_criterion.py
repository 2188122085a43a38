"""The criterion against the loss written down plainly (benchmarks/plain_criterion.py), from the same points."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from benchmarks.plain_criterion import PlainCriterion
from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.structures import MaskPrediction, MaskTarget, QueryPrediction
from mask2former.ops import _extension, mask_points
from tests.tiny import random_target

CANVAS, SIZE = (32, 48), (8, 12)
SETTINGS = {"num_classes": 5, "num_points": 50}


class RecordedPoints:
    """The random numbers that a criterion drew: points of images, then candidates and others of all pairs."""

    def __init__(self, draws: list[Tensor], layers: int, counts: list[int]) -> None:
        """``counts``: pairs of each image in each layer; the criterion sorts them by image, then layer."""
        self.draws, self.layers, self.counts = draws, layers, counts

    def matching(self, layer: int, image: int, count: int) -> Tensor:
        assert self.draws[0].shape == (len(self.counts), count, 2)
        return self.draws[0][image]

    def candidates(self, layer: int, image: int, pairs: int, count: int) -> Tensor:
        return self._of_pairs(self.draws[1], layer, image, pairs, count)

    def uniform(self, layer: int, image: int, pairs: int, count: int) -> Tensor:
        return self._of_pairs(self.draws[2], layer, image, pairs, count)

    def _of_pairs(self, draw: Tensor, layer: int, image: int, pairs: int, count: int) -> Tensor:
        assert draw.shape == (self.layers * sum(self.counts), count, 2)
        first = self.layers * sum(self.counts[:image]) + layer * self.counts[image]
        assert pairs == self.counts[image]
        return draw[first : first + pairs]


@pytest.fixture(params=["compiled", "reference"])
def draws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What `torch.rand` gave, and what the kernel drew by itself: its candidates, then the others."""
    if request.param == "compiled" and not mask_points.has_kernels:
        pytest.skip("no compiled kernels for points; to build them: python setup.py build_ext --inplace")
    kept: list[Tensor] = []
    original, drawn_points = torch.rand, mask_points.drawn_points

    def recording(*args: object, **kwargs: object) -> Tensor:
        kept.append(original(*args, **kwargs))
        return kept[-1].clone()

    def drawing(maps: Tensor, seed: int, **numbers: int) -> Tensor:
        for use, count in enumerate((numbers["candidates"], numbers["others"])):
            kept.append(mask_points.random_points(seed, len(maps), count, use=use))
        return drawn_points(maps, seed, **numbers)

    monkeypatch.setattr(torch, "rand", recording)
    monkeypatch.setattr("mask2former.modeling.point_sampling.drawn_points", drawing)
    with nullcontext() if request.param == "compiled" else _extension.reference_only():
        yield kept


def smooth_maps(*shape: int) -> Tensor:
    """Random maps at a quarter of `CANVAS`."""
    coarse = torch.randn(*shape, 2, 3).flatten(0, -4)
    return torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear").unflatten(0, shape[:-1])


def make_predictions(
    layers: int, batch: int, queries: int, with_masks: bool = True
) -> tuple[list[Tensor], list[MaskPrediction] | list[QueryPrediction]]:
    """What wants a gradient, and predictions from it."""
    class_logits = [(2 * torch.randn(batch, queries, 6)).requires_grad_() for _ in range(layers)]
    if with_masks:
        maps = [(3 * smooth_maps(batch, queries)).requires_grad_() for _ in range(layers)]
        return [*class_logits, *maps], [MaskPrediction(c, m) for c, m in zip(class_logits, maps, strict=True)]
    # not smooth: where maps are constant, candidates are equally uncertain, and rounding chooses between them
    features = torch.randn(batch, 7, *SIZE).requires_grad_()
    embeddings = [torch.randn(batch, queries, 7).requires_grad_() for _ in range(layers)]
    predictions = [QueryPrediction(c, e, features) for c, e in zip(class_logits, embeddings, strict=True)]
    return [*class_logits, *embeddings, features], predictions


def losses_and_gradients(losses: dict[str, Tensor], leaves: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    # different weights, so that errors of two losses cannot cancel out
    total = sum(weight * loss for weight, loss in enumerate(losses.values(), start=1))
    return losses, list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (5,), (8, 1)])
@pytest.mark.parametrize("with_masks", [True, False])
def test_same_points_give_the_same_losses_and_gradients(
    counts: tuple[int, ...], with_masks: bool, draws: list[Tensor]
) -> None:
    layers, queries = 3, 6
    leaves, predictions = make_predictions(layers, len(counts), queries, with_masks)
    targets = [random_target(n, 30, 41, 5) for n in counts]
    draws.clear()
    criterion = SetCriterion(**SETTINGS)
    with pytest.warns(UserWarning) if max(counts) > queries else nullcontext():
        found = losses_and_gradients(criterion(predictions, targets, CANVAS), leaves)
    points = RecordedPoints(list(draws), layers, [min(n, queries) for n in counts])
    whole = predictions if with_masks else [p.with_masks for p in predictions]
    expected = losses_and_gradients(PlainCriterion(**SETTINGS)(whole, targets, CANVAS, points), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(draws) == 3


def test_masks_of_any_binary_type_and_size(draws: list[Tensor]) -> None:
    _, predictions = make_predictions(1, 2, 4)
    targets = [MaskTarget(torch.tensor([1]), torch.ones(1, *size).to(torch.uint8)) for size in (CANVAS, (1, 1))]
    found = SetCriterion(**SETTINGS)(predictions, targets, CANVAS)
    points = RecordedPoints(list(draws), 1, [1, 1])
    torch.testing.assert_close(found, PlainCriterion(**SETTINGS)(predictions, targets, CANVAS, points))
