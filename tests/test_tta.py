"""Test-time augmentation: one view is the plain result, mirrored images give mirrored results, matches are means."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mask2former import tta
from mask2former.inference import ImageResult, image_result, predict_image
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.postprocessing import MaskGeometry
from mask2former.modeling.structures import MaskPrediction
from mask2former.tta import TestAugmentation, augmented_result
from tests.tiny import lively_model, picture

K = 4
SETTINGS: dict[str, Any] = {
    "semantic_on": True,
    "panoptic_on": True,
    "instance_on": True,
    "object_mask_threshold": 0.2,
    "overlap_threshold": 0.2,
    "sem_seg_postprocessing_before_inference": True,
    "top_k": 20,
    "score_threshold": 0.0,
    "matrix_nms_sigma": 0.0,
}
OUTPUT = (50, 70)


@pytest.fixture(scope="module")
def model() -> Mask2Former:
    return lively_model().eval()


def is_thing() -> Tensor:
    return torch.tensor([True, False, True, False])


def image(height: int = 60, width: int = 84, seed: int = 0) -> Tensor:
    return torch.from_numpy(picture(height, width, seed).transpose(2, 0, 1).copy())


def plain(model: Mask2Former, x: Tensor, settings: dict[str, Any] = SETTINGS) -> ImageResult:
    with torch.no_grad():
        return image_result(*predict_image(model, x, OUTPUT), settings, is_thing)


def augmented(
    model: Mask2Former, x: Tensor, sizes: tuple[int, ...], *, flip: bool, settings: dict[str, Any] = SETTINGS
) -> ImageResult:
    augmentation = TestAugmentation(min_sizes=sizes, max_size=200, flip=flip)
    return augmented_result(model, x, OUTPUT, settings, is_thing, augmentation)


def category_map(result: ImageResult) -> Tensor:
    """(H, W) of the panoptic result, -1 where nothing is; does not depend on the order of the segments."""
    assert result.panoptic is not None
    lookup = torch.tensor([-1, *(segment.category_id for segment in result.panoptic.segments)])
    return lookup[result.panoptic.ids.long()]


def assert_equal_bits(a: ImageResult, b: ImageResult) -> None:
    assert a.semantic is not None
    assert b.semantic is not None
    assert torch.equal(a.semantic, b.semantic)
    assert a.panoptic is not None
    assert b.panoptic is not None
    assert torch.equal(a.panoptic.ids, b.panoptic.ids)
    assert a.panoptic.segments == b.panoptic.segments
    assert a.instances is not None
    assert b.instances is not None
    for name in ("labels", "scores", "masks", "boxes"):
        assert torch.equal(getattr(a.instances, name), getattr(b.instances, name)), name


@pytest.mark.parametrize("before", [True, False])
def test_the_test_size_alone_is_the_plain_result_bit_for_bit(model: Mask2Former, before: bool) -> None:
    settings = SETTINGS | {"sem_seg_postprocessing_before_inference": before}
    expected = plain(model, image(), settings)
    assert expected.panoptic is not None
    assert len(expected.panoptic.segments) >= 3
    assert_equal_bits(augmented(model, image(), (60,), flip=False, settings=settings), expected)


def test_another_size_alone_is_the_plain_result_of_that_size(model: Mask2Former) -> None:
    resized = Image.fromarray(picture(60, 84)).resize((112, 80), Image.Resampling.BILINEAR)
    larger = torch.from_numpy(np.asarray(resized).transpose(2, 0, 1).copy())
    assert_equal_bits(augmented(model, image(), (80,), flip=False), plain(model, larger))


@pytest.mark.parametrize("before", [True, False])
def test_the_semantic_result_is_the_mean_of_the_views(model: Mask2Former, before: bool) -> None:
    settings = SETTINGS | {"sem_seg_postprocessing_before_inference": before}
    x, expected = image(), []
    for size in (60, 44):
        view = tta._resized(x, (size, round(size * 1.4)))
        for mirrored in (False, True):
            scores = plain(model, view.flip(2) if mirrored else view, settings).semantic
            assert scores is not None
            expected.append(scores.flip(2) if mirrored else scores)
    found = augmented(model, x, (60, 44), flip=True, settings=settings).semantic
    torch.testing.assert_close(found, torch.stack(expected).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(60,), (60, 44), (44, 60, 84)])
@pytest.mark.parametrize("width", [84, 83])
def test_the_result_of_a_mirrored_image_is_the_mirrored_result(
    model: Mask2Former, sizes: tuple[int, ...], width: int
) -> None:
    x = image(60, width)
    a, b = augmented(model, x, sizes, flip=True), augmented(model, x.flip(2), sizes, flip=True)
    assert a.semantic is not None
    assert b.semantic is not None
    torch.testing.assert_close(a.semantic, b.semantic.flip(2), rtol=0, atol=1e-4)
    assert (category_map(a) == category_map(b).flip(1)).float().mean() > 0.999  # pixels at a tie may change sides
    assert a.instances is not None
    assert b.instances is not None
    assert torch.equal(a.instances.labels, b.instances.labels)
    torch.testing.assert_close(a.instances.scores, b.instances.scores, rtol=0, atol=1e-4)
    assert (a.instances.masks == b.instances.masks.flip(2)).float().mean() > 0.999
    # without the mirrored views the model does not do this
    c, d = augmented(model, x, sizes, flip=False).semantic, augmented(model, x.flip(2), sizes, flip=False).semantic
    assert c is not None
    assert d is not None
    assert (c - d.flip(2)).abs().max() > 1e-2


def test_a_symmetric_image_has_a_symmetric_result(model: Mask2Former) -> None:
    half = image(60, 42)
    result = augmented(model, torch.cat([half, half.flip(2)], dim=2), (60,), flip=True)
    assert result.semantic is not None
    torch.testing.assert_close(result.semantic, result.semantic.flip(2), rtol=0, atol=1e-5)
    categories = category_map(result)
    assert (categories == categories.flip(1)).float().mean() > 0.999


def test_twice_the_same_size_changes_nothing(model: Mask2Former) -> None:
    """Equal views are matched query by query, and their mean is what they are.

    The image needs no padding, which would be seen at its edge. A mean's logits end where its probabilities do.
    """
    x, end = image(64, 96), math.log((1 - 1e-6) / 1e-6)
    with torch.no_grad():
        prediction, geometry = predict_image(model, x, (64, 96))
    ended = prediction._replace(mask_logits=prediction.mask_logits.clamp(-end, end))
    once = image_result(ended, geometry, SETTINGS, is_thing)
    augmentation = TestAugmentation(min_sizes=(64, 64), max_size=200, flip=False)
    twice = augmented_result(model, x, (64, 96), SETTINGS, is_thing, augmentation)
    assert once.panoptic is not None
    assert twice.panoptic is not None
    assert len(once.panoptic.segments) >= 3
    assert (once.panoptic.ids == twice.panoptic.ids).float().mean() > 0.999
    assert once.instances is not None
    assert twice.instances is not None
    assert torch.equal(once.instances.labels, twice.instances.labels)
    torch.testing.assert_close(once.instances.scores, twice.instances.scores, rtol=0, atol=1e-4)


def test_only_what_is_on_is_computed(model: Mask2Former) -> None:
    for task in ("semantic", "panoptic", "instance"):
        settings = SETTINGS | {f"{other}_on": other == task for other in ("semantic", "panoptic", "instance")}
        result = augmented(model, image(), (60, 44), flip=True, settings=settings)
        present = [value is not None for value in result]
        assert present == [task == "semantic", task == "panoptic", task == "instance"]


def test_sizes_start_with_the_one_nearest_to_the_image_and_are_bounded() -> None:
    augmentation = TestAugmentation(min_sizes=(30, 60, 90, 300), max_size=150, flip=True)
    assert augmentation.sizes(60, 80) == [(60, 80), (30, 40), (90, 120), (113, 150)]
    assert augmentation.sizes(80, 60) == [(80, 60), (40, 30), (120, 90), (150, 113)]


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"min_sizes": ()}, "min_sizes"), ({"min_sizes": (0,)}, "min_sizes"), ({"max_size": 0}, "max_size")],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"{match} must be"):
        TestAugmentation(**{"min_sizes": (60,), "max_size": 80, "flip": True, **changes})


# Queries by hand: the image is 16 x 16 on a canvas of 16 x 32, masks have stride 4.


def view(classes: list[list[float]], masks: Tensor, *, is_mirrored: bool = False) -> tta._View:
    """From class probabilities (Q, K + 1) and mask probabilities (Q, 4, 4), which are padded to the canvas."""
    padded = torch.cat([masks, torch.full_like(masks, 0.5)], dim=2)
    prediction = MaskPrediction(torch.tensor(classes).clamp_min(1e-7).log(), padded.logit(1e-7))
    return tta._View(prediction, MaskGeometry((16, 32), (16, 16), (16, 16)), is_mirrored)


def square(*places: int) -> Tensor:
    """(4, 4) mask of that rows and columns."""
    mask = torch.full((4, 4), 0.01)
    mask[torch.tensor(places)[:, None], torch.tensor(places)] = 0.99
    return mask


CAT, DOG, NOTHING = [0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.02, 0.02, 0.96]


def mean_of(*sizes: list[tta._View]) -> tuple[Tensor, Tensor]:
    """Class probabilities and mask probabilities of the mean."""
    queries = tta._QueryMean(largest=(16, 16))
    for views in sizes:
        queries.add(views)
    prediction, geometry = queries.prediction((16, 16))
    assert geometry == MaskGeometry((4, 4), (4, 4), (16, 16))
    return prediction.class_logits.softmax(-1), prediction.mask_logits.sigmoid()


def test_queries_in_another_order_are_matched_and_averaged() -> None:
    masks = torch.stack([square(0, 1), square(2, 3), square(1)])
    first = view([CAT, DOG, NOTHING], masks)
    second = view([NOTHING, [0.7, 0.2, 0.1], DOG], masks[[2, 0, 1]])
    classes, probabilities = mean_of([first], [second])
    cats = (0.95 * torch.tensor(CAT) + 0.9 * torch.tensor([0.7, 0.2, 0.1])) / 1.85
    expected = torch.stack([cats, torch.tensor(DOG), torch.tensor(NOTHING)])
    torch.testing.assert_close(classes, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probabilities, masks, rtol=1e-4, atol=1e-4)


def test_a_mirrored_view_is_mirrored_back_inside_the_image_not_inside_the_canvas() -> None:
    masks = torch.stack([square(0, 1), square(3)])
    classes, probabilities = mean_of([view([CAT, DOG], masks), view([DOG, CAT], masks.flip(0, 2), is_mirrored=True)])
    torch.testing.assert_close(classes, torch.tensor([CAT, DOG]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probabilities, masks, rtol=1e-4, atol=1e-4)


def test_a_query_counts_by_its_probability_of_being_an_object() -> None:
    """By hand: what the second view has to say of something that it does not see hardly counts."""
    seen, spare = square(0, 1), square(3)
    classes, probabilities = mean_of([view([CAT], seen[None])], [view([NOTHING], spare[None])])
    expected = (0.95 * torch.tensor([CAT]) + 0.04 * torch.tensor([NOTHING])) / 0.99
    torch.testing.assert_close(classes, expected, rtol=1e-4, atol=1e-5)
    expected = (0.95 * seen + 0.04 * spare) / 0.99
    torch.testing.assert_close(probabilities[0], expected, rtol=1e-4, atol=1e-4)


def test_classes_decide_between_equal_masks_and_masks_between_equal_classes() -> None:
    same = torch.stack([square(0, 1), square(0, 1)])
    classes, _ = mean_of([view([CAT, DOG], same)], [view([DOG, CAT], same)])
    torch.testing.assert_close(classes, torch.tensor([CAT, DOG]), rtol=1e-4, atol=1e-5)
    masks = torch.stack([square(0, 1), square(2, 3)])
    _, probabilities = mean_of([view([CAT, CAT], masks)], [view([CAT, CAT], masks.flip(0))])
    torch.testing.assert_close(probabilities, masks, rtol=1e-4, atol=1e-4)


def test_predictions_that_are_not_finite_end_nothing() -> None:
    masks = torch.stack([square(0, 1), square(2, 3)])
    broken = view([[float("nan")] * 3, DOG], masks)
    classes, _ = mean_of([view([CAT, DOG], masks)], [broken])
    torch.testing.assert_close(classes[1], torch.tensor(DOG), rtol=1e-4, atol=1e-5)


def test_the_grid_is_that_of_the_largest_view(model: Mask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the number of views: what is kept is one mean and the reference."""
    shapes = []
    original: Callable[..., Any] = tta._votes

    def record(view: tta._View, grid: tuple[int, int]) -> Any:
        votes = original(view, grid)
        shapes.append(votes.masks.shape)
        return votes

    monkeypatch.setattr(tta, "_votes", record)
    augmented(model, image(60, 84), (60, 44, 81), flip=True)
    assert set(shapes) == {(8, 21, 29)}  # ceil(81 / 4), ceil(113 / 4)
    assert len(shapes) == 6
