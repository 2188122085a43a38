"""Cross-entropy and dice: closed forms, and costs of all pairs against losses of pairs."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mask2former.modeling.losses import (
    dice,
    pairwise_class_cost,
    pairwise_mask_costs,
    sigmoid_cross_entropy,
)


def test_sigmoid_cross_entropy_closed_form() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(3), -math.log(3), math.log(3)]])
    targets = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]])
    expected = [math.log(2), (2 * -math.log(0.75) - math.log(0.25)) / 3]
    assert sigmoid_cross_entropy(logits, targets).tolist() == pytest.approx(expected, rel=1e-6)


def test_dice_closed_form() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 100.0, -100.0, -100.0], [100.0, 100.0, -100.0, -100.0]])
    targets = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    assert dice(logits, targets).tolist() == pytest.approx([1 - 2 / 4, 0.0, 1 - 1 / 5], abs=1e-6)


def test_dice_of_nothing_with_nothing_is_zero() -> None:
    assert dice(torch.full((1, 5), -100.0), torch.zeros(1, 5)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("place", "paired"), [(0, sigmoid_cross_entropy), (1, dice)])
def test_pairwise_cost_equals_loss_of_each_pair(place: int, paired: Callable[[Tensor, Tensor], Tensor]) -> None:
    logits, targets = 4 * torch.randn(3, 2, 6, 50), torch.rand(2, 5, 50)
    costs = pairwise_mask_costs(logits, targets)[place]
    assert costs.shape == (3, 2, 6, 5)
    for layer in range(3):
        for b in range(2):
            for q in range(6):
                for n in range(5):
                    expected = paired(logits[layer, b, q][None], targets[b, n][None])[0]
                    torch.testing.assert_close(costs[layer, b, q, n], expected, rtol=1e-4, atol=1e-5)


def test_large_logits_stay_finite() -> None:
    logits, targets = torch.tensor([[1e4, -1e4]]), torch.tensor([[0.0, 1.0]])
    assert sigmoid_cross_entropy(logits, targets).item() == pytest.approx(1e4)
    assert pairwise_mask_costs(logits, targets)[0].item() == pytest.approx(1e4)


def test_class_cost_is_minus_the_probability_of_the_label() -> None:
    logits, labels = torch.randn(3, 2, 4, 6), torch.tensor([[0, 5, 2], [3, 3, 1]])
    costs = pairwise_class_cost(logits, labels)
    assert costs.shape == (3, 2, 4, 3)
    for layer in range(3):
        for b in range(2):
            for q in range(4):
                exponents = [math.exp(x) for x in logits[layer, b, q].tolist()]
                for n in range(3):
                    expected = -exponents[labels[b, n]] / sum(exponents)
                    assert costs[layer, b, q, n].item() == pytest.approx(expected, rel=1e-5)
