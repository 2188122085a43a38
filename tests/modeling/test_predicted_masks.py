"""Predictions without masks give the losses and gradients of the same predictions with masks, and make few masks."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.structures import MaskPrediction, QueryPrediction
from tests.tiny import random_image, random_target, tiny_model

CANVAS = (32, 48)


def leaves(layers: int, batch: int, queries: int, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Class logits and mask embeddings of all layers, mask features."""
    shapes = [(layers, batch, queries, 6), (layers, batch, queries, 7), (batch, 7, 8, 12)]
    return [(1.5 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]


def without_masks(class_logits: Tensor, embeddings: Tensor, features: Tensor) -> list[QueryPrediction]:
    return [QueryPrediction(c, e, features) for c, e in zip(class_logits, embeddings, strict=True)]


def losses_of(predictions: Any, counts: tuple[int, ...], **settings: Any) -> dict[str, Tensor]:
    criterion = SetCriterion(num_classes=5, num_points=50, **settings)
    criterion.to(torch.promote_types(predictions[0].class_logits.dtype, torch.float32))
    torch.manual_seed(1)
    targets = [random_target(n, 30, 41, 5) for n in counts]
    return criterion(predictions, targets, CANVAS, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0), (8, 1)])
@pytest.mark.parametrize("parts", ["points", "masks"])
def test_same_losses_and_gradients(counts: tuple[int, ...], parts: str) -> None:
    tensors = leaves(3, 2, 6)
    results = []
    for predictions in (without_masks(*tensors), [p.with_masks for p in without_masks(*tensors)]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # more targets than queries
            losses = losses_of(predictions, counts, match_on=parts, loss_on=parts)
        total = sum(weight * loss for weight, loss in enumerate(losses.values(), start=1))
        results.append((losses, torch.autograd.grad(total, tensors, allow_unused=True)))
    (found, gradients), (expected, wanted) = results
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    tensors = leaves(2, 2, 6, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = losses_of(without_masks(*tensors), (3, 2))
    kept = torch.promote_types(dtype, torch.float32)
    exact = losses_of(without_masks(*(x.to(kept) for x in tensors)), (3, 2))
    assert all(loss.dtype == kept for name, loss in found.items() if "ce" not in name)
    torch.testing.assert_close(found, exact, rtol=0.02 if dtype == torch.bfloat16 else 1e-9, atol=0)


def test_predictions_of_both_kinds_together() -> None:
    tensors = leaves(2, 1, 6)
    first, second = without_masks(*tensors)
    torch.testing.assert_close(losses_of([first.with_masks, second], (3,)), losses_of([first, second], (3,)))


class LargestMaps(TorchDispatchMode):
    """The most maps of the given size that an operation made."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size, self.maps = height * width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.shape[-2:].numel() == self.size and x.dim() > 2:
                self.maps = max(self.maps, x.shape[:-2].numel())
        return result


def test_only_matched_masks_are_made() -> None:
    tensors = leaves(3, 1, 40)
    with LargestMaps(8, 12) as tracker:
        sum(losses_of(without_masks(*tensors), (2,)).values()).backward()
    assert tracker.maps == 7  # the seven channels of the features; two masks in each of three layers
    with LargestMaps(8, 12) as tracker:
        losses_of([p.with_masks for p in without_masks(*tensors)], (2,))
    assert tracker.maps == 40


def test_the_model_trains_without_masks_and_predicts_with_them() -> None:
    model = tiny_model()
    batch = model.batch_images([random_image(64, 96)])
    training = model.predict(batch, True, with_masks=False)
    whole = model.predict(batch, True)
    assert all(isinstance(p, QueryPrediction) for p in training)
    assert all(isinstance(p, MaskPrediction) for p in whole)
    for found, expected in zip(training, whole, strict=True):
        torch.testing.assert_close(found.with_masks, expected, rtol=0, atol=0)


class OldDecoder(nn.Module):
    """Knows no ``with_masks``, as decoders that others wrote."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: Any, all_layers: bool | None = None) -> Any:
        return self.decoder(features, all_layers)


def test_decoders_that_make_all_masks_train_as_before() -> None:
    model, images = tiny_model(), [random_image(64, 96)]
    targets = [random_target(3, 64, 96)]
    losses = []
    for _ in range(2):
        losses.append(model.losses(images, targets, torch.Generator().manual_seed(0)))
        model.sem_seg_head.predictor = OldDecoder(model.sem_seg_head.predictor)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert isinstance(model.predict(model.batch_images(images), True, with_masks=False)[0], MaskPrediction)
