"""Losses and matching on whole masks instead of points (Table 5), against loops over pixels."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.modeling import criterion as module
from mask2former.modeling import predicted_masks
from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.structures import MaskPrediction, MaskTarget
from mask2former.modeling.whole_masks import whole_logits, whole_masks
from mask2former.ops import _extension
from tests.tiny import random_target

CANVAS = (8, 12)
ON_MASKS = {"match_on": "masks", "loss_on": "masks"}


def _criterion(**changes: Any) -> SetCriterion:
    return SetCriterion(**{"num_classes": 5, "num_points": 50, **changes})


def _predictions(layers: int, batch: int, queries: int) -> list[MaskPrediction]:
    return [
        MaskPrediction(
            (2 * torch.randn(batch, queries, 6)).requires_grad_(),
            (3 * torch.randn(batch, queries, 4, 6)).requires_grad_(),
        )
        for _ in range(layers)
    ]


def _losses(criterion: SetCriterion, predictions: list[MaskPrediction], targets: list[MaskTarget]) -> dict[str, Tensor]:
    return criterion(predictions, targets, CANVAS, torch.Generator().manual_seed(0))


def _pixel_losses(logits: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and dice loss of one enlarged mask, pixel by pixel; outside of the target is background."""
    cross_entropy, overlap, total, (height, width) = 0.0, 0.0, 0.0, CANVAS
    for i in range(height):
        for j in range(width):
            wanted = float(mask[i, j]) if i < mask.shape[0] and j < mask.shape[1] else 0.0
            p = 1 / (1 + math.exp(-logits[i, j].item()))
            cross_entropy -= math.log(p) if wanted else math.log1p(-p)
            overlap += p * wanted
            total += p + wanted
    return cross_entropy / (height * width), 1 - (2 * overlap + 1) / (total + 1)


def _pair_losses(prediction: MaskPrediction, target: MaskTarget, image: int) -> dict[tuple[int, int], Any]:
    """By query and target: cost of the class, mask and dice losses."""
    large = F.interpolate(prediction.mask_logits[image][None], CANVAS, mode="bilinear", align_corners=False)[0]
    probability = prediction.class_logits[image].softmax(-1)
    return {
        (q, n): (-probability[q, target.labels[n]].item(), *_pixel_losses(large[q], target.masks[n]))
        for q in range(len(large))
        for n in range(len(target.labels))
    }


def test_matching_and_losses_equal_the_naive_sums() -> None:
    torch.manual_seed(0)
    predictions, targets = _predictions(2, 2, 4), [random_target(3, 7, 10, 5), random_target(1, 8, 12, 5)]
    losses = _losses(_criterion(**ON_MASKS), predictions, targets)
    for layer, prediction in enumerate(predictions):
        cross_entropy = dice = 0.0
        wanted = torch.full((2, 4), 5)
        for image, target in enumerate(targets):
            pairs = _pair_losses(prediction, target, image)
            cost = {pair: 2 * c + 5 * m + 5 * d for pair, (c, m, d) in pairs.items()}
            choices = itertools.permutations(range(4), len(target.labels))
            best = min(choices, key=lambda queries, cost=cost: sum(cost[q, n] for n, q in enumerate(queries)))
            for n, q in enumerate(best):
                wanted[image, q] = target.labels[n]
                cross_entropy += pairs[q, n][1]
                dice += pairs[q, n][2]
        suffix = "_0" if layer == 0 else ""
        weight = torch.tensor([1.0] * 5 + [0.1])
        expected = F.cross_entropy(prediction.class_logits.flatten(0, 1), wanted.flatten(), weight).item()
        assert losses["loss_ce" + suffix].item() == pytest.approx(expected, rel=1e-4)
        assert losses["loss_mask" + suffix].item() == pytest.approx(cross_entropy / 4, rel=1e-4)
        assert losses["loss_dice" + suffix].item() == pytest.approx(dice / 4, rel=1e-4)


def test_costs_of_matching_on_whole_masks_equal_the_naive_ones() -> None:
    torch.manual_seed(1)
    predictions, targets = _predictions(1, 2, 3), [random_target(2, 8, 12, 5), random_target(0, 1, 1, 5)]
    criterion = _criterion(match_on="masks")
    logits = torch.stack([p.class_logits for p in predictions])
    costs = criterion._whole_costs(predicted_masks.predicted_masks(predictions), logits, targets, CANVAS)
    assert costs.shape == (1, 2, 3, 2)
    for (q, n), (c, m, d) in _pair_losses(predictions[0], targets[0], 0).items():
        assert costs[0, 0, q, n].item() == pytest.approx(2 * c + 5 * m + 5 * d, rel=1e-4)
    assert not costs[0, 1].any()


def test_each_of_the_two_settings_acts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    predictions, targets = _predictions(2, 2, 4), [random_target(3, 7, 10, 5), random_target(1, 8, 12, 5)]
    calls: list[str] = []
    for place, name in ((predicted_masks, "sample_logits"), (module, "mask_loss_sums"), (module, "whole_logits")):
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, name=name, f=original, **kw: calls.append(name) or f(*a, **kw))
    expected = {
        ("points", "points"): ["sample_logits"] * 2 + ["mask_loss_sums"],
        ("points", "masks"): ["sample_logits"] * 2 + ["whole_logits"],
        ("masks", "points"): ["whole_logits"] * 4 + ["mask_loss_sums"],
        ("masks", "masks"): ["whole_logits"] * 5,
    }
    for (match_on, loss_on), names in expected.items():
        calls.clear()
        losses = _losses(_criterion(match_on=match_on, loss_on=loss_on), predictions, targets)
        assert calls == names
        assert all(loss.isfinite() for loss in losses.values())


def test_points_everywhere_agree_with_whole_masks() -> None:
    """Of one constant mask: any point has the loss of every pixel."""
    prediction = MaskPrediction(torch.randn(1, 1, 6), torch.full((1, 1, 4, 6), 0.7))
    target = MaskTarget(torch.tensor([2]), torch.ones(1, *CANVAS, dtype=torch.bool))
    with pytest.MonkeyPatch.context() as patch, _extension.reference_only():  # the kernel draws for itself
        original = torch.rand  # points away from the border, beyond which everything is zero
        patch.setattr(torch, "rand", lambda *size, **kw: 0.2 + 0.6 * original(*size, **kw))
        points = _losses(_criterion(num_points=96), [prediction], [target])
    torch.testing.assert_close(_losses(_criterion(**ON_MASKS), [prediction], [target]), points)


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (1, 1), (4, 4), (6, 1)])
@pytest.mark.parametrize("size", [(7, 10), (0, 0)])
@pytest.mark.filterwarnings("ignore:an image has 6 targets")
def test_empty_and_full_images_give_finite_losses_and_gradients(counts: tuple[int, int], size: tuple[int, int]) -> None:
    targets = [random_target(n, *(size if n == 0 else (7, 10)), 5) for n in counts]
    predictions = _predictions(2, 2, 4)
    losses = _losses(_criterion(**ON_MASKS), predictions, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for prediction in predictions:
        assert all(x.grad is not None and x.grad.isfinite().all() for x in prediction)
        assert prediction.mask_logits.grad.any() == (sum(counts) > 0)


def test_nothing_is_drawn() -> None:
    predictions, targets = _predictions(2, 1, 4), [random_target(2, 7, 10, 5)]
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    _criterion(**ON_MASKS)(predictions, targets, CANVAS, generator)
    assert torch.equal(generator.get_state(), state)


def test_bad_logits_are_counted_and_named() -> None:
    criterion, predictions = _criterion(**ON_MASKS), _predictions(2, 2, 4)
    with torch.no_grad():
        predictions[0].mask_logits[1] = float("nan")
    with pytest.warns(UserWarning, match="not finite.*image 1 of the batch, decoder layer 0"):
        _losses(criterion, predictions, [random_target(3, 7, 10, 5), random_target(2, 7, 10, 5)])
    assert criterion.matcher.num_nonfinite == 4 * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    predictions = [MaskPrediction(*(x.detach().to(dtype).requires_grad_() for x in p)) for p in _predictions(2, 1, 4)]
    criterion = _criterion(**ON_MASKS).to(torch.promote_types(dtype, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = _losses(criterion, predictions, [random_target(2, 7, 10, 5)])
    assert losses["loss_mask"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    sum(losses.values()).backward()


def test_masks_are_padded_and_logits_enlarged() -> None:
    masks = torch.rand(2, 3, 5) > 0.5
    padded = whole_masks(masks, (4, 7)).view(2, 4, 7)
    assert torch.equal(padded[:, :3, :5], masks.float())
    assert padded.sum() == masks.sum()
    assert torch.equal(whole_masks(masks.to(torch.uint8), (4, 7)), padded.flatten(1))
    ramp = torch.tensor([[[0.0, 4.0]]])
    assert whole_logits(ramp, (1, 4)).tolist() == [[0, 1, 3, 4]]


@pytest.mark.parametrize("name", ["match_on", "loss_on"])
def test_other_words_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of points, masks, got 'boxes'"):
        _criterion(**{name: "boxes"})
