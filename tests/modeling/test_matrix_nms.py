"""Matrix NMS against the formula written out for single pairs."""

import math

import pytest
import torch
from torch import Tensor

from mask2former.modeling.bands import MaskGeometry
from mask2former.modeling.matrix_nms import matrix_nms_decay
from mask2former.modeling.postprocessing import compact_instance_segmentation, instance_segmentation


def naive(scores: Tensor, labels: Tensor, masks: Tensor, sigma: float) -> list[float]:
    count = len(scores)

    def better(i: int, j: int) -> bool:
        return labels[i] == labels[j] and (scores[i] > scores[j] or (scores[i] == scores[j] and i < j))

    def iou(i: int, j: int) -> float:
        union = (masks[i] | masks[j]).sum().item()
        return (masks[i] & masks[j]).sum().item() / union if union else 0.0

    worst = [max([iou(i, j) for i in range(count) if better(i, j)], default=0.0) for j in range(count)]
    return [
        min([math.exp(-sigma * (iou(i, j) ** 2 - worst[i] ** 2)) for i in range(count) if better(i, j)] + [1.0])
        for j in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_formula_pair_by_pair(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(1, 6, (12,), generator=generator) / 5  # with equal ones
    labels = torch.randint(0, 2, (12,), generator=generator)
    masks = torch.rand(12, 5, 7, generator=generator) < torch.rand(12, 1, 1, generator=generator)
    masks[3] = False
    expected = torch.tensor(naive(scores, labels, masks, 2.0))
    torch.testing.assert_close(matrix_nms_decay(scores, labels, masks, 2.0), expected, rtol=1e-5, atol=1e-6)


def test_a_copy_falls_by_exp_minus_sigma_and_other_classes_and_places_stay() -> None:
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[:3, :2] = True
    masks[3, 2:] = True
    decay = matrix_nms_decay(torch.tensor([0.5, 0.9, 0.8, 0.7]), torch.tensor([0, 0, 1, 0]), masks, 2.0)
    torch.testing.assert_close(decay, torch.tensor([math.exp(-2.0), 1.0, 1.0, 1.0]))


def test_nothing_gives_nothing_and_sigma_must_be_positive() -> None:
    empty = torch.zeros(0)
    assert matrix_nms_decay(empty, empty.long(), torch.zeros(0, 3, 3, dtype=torch.bool), 2.0).shape == (0,)
    with pytest.raises(ValueError, match="sigma must be above 0, got 0"):
        matrix_nms_decay(torch.ones(1), torch.zeros(1), torch.ones(1, 2, 2, dtype=torch.bool), 0)


def test_instances_that_repeat_a_better_one_lose_score_and_fall_below_the_threshold() -> None:
    class_logits = torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    mask_logits = torch.full((3, 8, 8), -9.0)
    mask_logits[:2, :4] = 9.0
    mask_logits[2, 4:] = 9.0
    geometry = MaskGeometry((8, 8), (8, 8), (8, 8))
    plain = instance_segmentation(class_logits, mask_logits, geometry, top_k=3)
    assert plain.queries is not None
    assert plain.queries.tolist() == [0, 1, 2]
    arguments = {"top_k": 3, "matrix_nms_sigma": 2.0}
    result = instance_segmentation(class_logits, mask_logits, geometry, **arguments)
    assert result.queries is not None
    assert result.queries.tolist() == [0, 2, 1]
    expected = plain.scores[[0, 2, 1]] * torch.tensor([1.0, 1.0, math.exp(-2.0)])
    torch.testing.assert_close(result.scores, expected)
    assert torch.equal(result.masks, plain.masks[[0, 2, 1]])
    compact = compact_instance_segmentation(class_logits, mask_logits, geometry, score_threshold=0.5, **arguments)
    torch.testing.assert_close(compact.scores, expected[:2])
