"""Classified pixels: loss by hand, ignored pixels, scores, and what has no meaning for them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.modeling import per_pixel
from mask2former.modeling.per_pixel import PixelClassifier, PixelCriterion, label_map
from mask2former.modeling.postprocessing import (
    MaskGeometry,
    instance_segmentation,
    panoptic_segmentation,
    semantic_segmentation,
)
from mask2former.modeling.structures import MaskPrediction, MaskTarget, PixelFeatures, per_pixel_prediction

K = 3
CANVAS = (8, 12)


def target(*pairs: tuple[int, Tensor], size: tuple[int, int] = CANVAS) -> MaskTarget:
    masks = torch.stack([mask for _, mask in pairs]) if pairs else torch.zeros(0, *size, dtype=torch.bool)
    return MaskTarget(torch.tensor([label for label, _ in pairs], dtype=torch.int64), masks)


def random_label_target(height: int = 8, width: int = 12) -> tuple[MaskTarget, Tensor]:
    """A partition into classes and ignored pixels, and the map of labels that it means, -1 for ignored ones."""
    labels = torch.randint(-1, K, (height, width))
    return target(*((k, labels == k) for k in range(K))), labels


def logits(batch: int = 2, size: tuple[int, int] = (2, 3)) -> Tensor:
    return torch.randn(batch, K, *size, requires_grad=True)


def loss_by_hand(small: Tensor, labels: list[Tensor]) -> float:
    """The mean of -log softmax over the pixels that have a label."""
    large = F.interpolate(small.detach(), CANVAS, mode="bilinear", align_corners=False)
    total, count = 0.0, 0
    for image, rows in enumerate(labels):
        for y, row in enumerate(rows.tolist()):
            for x, label in enumerate(row):
                if label >= 0:
                    values = large[image, :, y, x].tolist()
                    total += math.log(sum(math.exp(v) for v in values)) - values[label]
                    count += 1
    return total / count


def test_loss_equals_cross_entropy_by_hand_with_ignored_pixels_and_padding() -> None:
    (whole, whole_labels), (smaller, smaller_labels) = random_label_target(), random_label_target(5, 7)
    small = logits()
    losses = PixelCriterion(num_classes=K)([per_pixel_prediction(small)], [whole, smaller], CANVAS)
    assert set(losses) == {"loss_sem_seg"}
    assert losses["loss_sem_seg"].item() == pytest.approx(loss_by_hand(small, [whole_labels, smaller_labels]), rel=1e-5)
    (gradient,) = torch.autograd.grad(losses["loss_sem_seg"], small)
    assert gradient.any()


def test_a_batch_of_ignored_pixels_has_no_loss_and_gradients_of_zero() -> None:
    small = logits()
    criterion = PixelCriterion(num_classes=K)
    for targets in ([target(), target(size=(1, 1))], [target((1, torch.zeros(CANVAS, dtype=torch.bool)))] * 2):
        loss = criterion([per_pixel_prediction(small)], targets, CANVAS)["loss_sem_seg"]
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, small)
        assert torch.equal(gradient, torch.zeros_like(small))


def test_an_ignored_image_beside_another_changes_nothing() -> None:
    (whole, _), small = random_label_target(), logits()
    criterion = PixelCriterion(num_classes=K)
    alone = criterion([per_pixel_prediction(small[:1])], [whole], CANVAS)["loss_sem_seg"]
    both = criterion([per_pixel_prediction(small)], [whole, target()], CANVAS)["loss_sem_seg"]
    torch.testing.assert_close(both, alone)


def test_every_layer_is_supervised_or_only_the_last() -> None:
    (whole, labels), layers = random_label_target(), [logits(1) for _ in range(3)]
    predictions = [per_pixel_prediction(x) for x in layers]
    losses = PixelCriterion(num_classes=K)(predictions, [whole], CANVAS)
    assert list(losses) == ["loss_sem_seg_0", "loss_sem_seg_1", "loss_sem_seg"]
    for loss, small in zip(losses.values(), layers, strict=True):
        assert loss.item() == pytest.approx(loss_by_hand(small, [labels]), rel=1e-5)
    alone = PixelCriterion(num_classes=K, deep_supervision=False)(predictions, [whole], CANVAS)
    assert list(alone) == ["loss_sem_seg"]
    assert torch.equal(alone["loss_sem_seg"], losses["loss_sem_seg"])


def test_weighted_losses() -> None:
    criterion = PixelCriterion(num_classes=K, loss_weight=0.5)
    losses = {"loss_sem_seg": torch.tensor(3.0), "loss_sem_seg_0": torch.tensor(5.0)}
    assert criterion.weighted(losses) == {"loss_sem_seg": 1.5, "loss_sem_seg_0": 2.5}


def test_the_number_of_pixels_is_the_mean_over_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole, _), small = random_label_target(), logits(1)
    criterion, predictions = PixelCriterion(num_classes=K), [per_pixel_prediction(small)]
    plain = criterion(predictions, [whole], CANVAS)["loss_sem_seg"]
    monkeypatch.setattr(per_pixel, "average_over_ranks", lambda count: count * 2)
    torch.testing.assert_close(criterion(predictions, [whole], CANVAS)["loss_sem_seg"], plain / 2)


def test_half_types_are_summed_in_float32() -> None:
    (whole, _), small = random_label_target(), logits(1).detach().bfloat16()
    criterion = PixelCriterion(num_classes=K)
    found = criterion([per_pixel_prediction(small)], [whole], CANVAS)["loss_sem_seg"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, criterion([per_pixel_prediction(small.float())], [whole], CANVAS)["loss_sem_seg"])


def test_label_map_of_masks_that_overlap_and_of_bytes() -> None:
    left, top = torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)
    left[:, 0], top[0] = 1, 1
    found = label_map(target((2, left), (0, top)), (3, 3))
    assert found.tolist() == [[0, 0, -1], [2, -1, -1], [-1, -1, -1]]


def test_targets_that_do_not_fit_are_refused() -> None:
    criterion, predictions = PixelCriterion(num_classes=K), [per_pixel_prediction(logits(1))]
    full = torch.ones(CANVAS, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"targets\[0\].labels must be in \[0, 3\), got \[3\]"):
        criterion(predictions, [target((3, full))], CANVAS)
    with pytest.raises(ValueError, match="targets must hold one entry for each of the 1 images, got 2"):
        criterion(predictions, [target((0, full))] * 2, CANVAS)
    with pytest.raises(ValueError, match=r"must fit into the canvas \(4, 4\)"):
        criterion(predictions, [target((0, full))], (4, 4))


def test_the_classifier_is_linear_in_the_mask_features() -> None:
    classifier = PixelClassifier(num_classes=K, mask_dim=5)
    x = torch.randn(2, 5, 4, 6)
    for every in (True, False, None):
        (prediction,) = classifier(PixelFeatures(x, []), every)
        expected = torch.einsum("bchw,kc->bkhw", x, classifier.weight[:, :, 0, 0]) + classifier.bias[:, None, None]
        assert prediction.is_per_pixel
        torch.testing.assert_close(prediction.mask_logits, expected)
    assert {n: tuple(p.shape) for n, p in classifier.named_parameters()} == {"weight": (K, 5, 1, 1), "bias": (K,)}
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        PixelClassifier(num_classes=0)


@pytest.mark.parametrize("resize_first", [True, False])
def test_scores_are_the_softmax_of_the_resized_logits(resize_first: bool) -> None:
    class_logits, mask_logits = (x[0] for x in per_pixel_prediction(logits(1).detach() * 30))
    geometry = MaskGeometry(canvas=CANVAS, image_size=(6, 10), output_size=(12, 20))
    scores = semantic_segmentation(class_logits, mask_logits, geometry, resize_first=resize_first)
    large = F.interpolate(mask_logits[None], CANVAS, mode="bilinear")[:, :, :6, :10]
    large = F.interpolate(large, (12, 20), mode="bilinear")[0]
    torch.testing.assert_close(scores, large.softmax(0))
    assert torch.equal(scores.argmax(0), large.argmax(0))


def test_pixels_are_no_objects() -> None:
    class_logits, mask_logits = (x[0] for x in per_pixel_prediction(logits(1).detach()))
    geometry = MaskGeometry(CANVAS, CANVAS, CANVAS)
    with pytest.raises(ValueError, match="got classified pixels, which have no objects"):
        instance_segmentation(class_logits, mask_logits, geometry, top_k=3)
    with pytest.raises(ValueError, match="got classified pixels, which have no objects"):
        panoptic_segmentation(
            class_logits,
            mask_logits,
            geometry,
            is_thing=torch.ones(K, dtype=torch.bool),
            object_mask_threshold=0.5,
            overlap_threshold=0.5,
        )


def test_only_predictions_without_classes_are_per_pixel() -> None:
    assert not MaskPrediction(torch.zeros(1, 4, K + 1), torch.zeros(1, 4, 2, 3)).is_per_pixel
    assert per_pixel_prediction(torch.zeros(1, K, 2, 3)).is_per_pixel
