"""The tensor-only forms give what the functions of the model give, on random and on degenerate predictions."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.export.postprocessing import (
    InstanceTensors,
    PanopticTensors,
    instance_tensors,
    panoptic_tensors,
    semantic_labels,
)
from mask2former.modeling.postprocessing import (
    InstanceResult,
    MaskGeometry,
    PanopticResult,
    instance_segmentation,
    panoptic_segmentation,
    semantic_segmentation,
)

CANVAS, SIZE = (32, 64), (30, 41)
GEOMETRY = MaskGeometry(CANVAS, SIZE, SIZE)
IS_THING = torch.tensor([True, False, True, False])
Prediction = tuple[Tensor, Tensor]


def random_prediction(seed: int, queries: int = 14, sharpness: float = 6.0) -> Prediction:
    """Confident classes and smooth blobs."""
    torch.manual_seed(seed)
    blobs = F.interpolate(8 * torch.randn(1, queries, 3, 4), (8, 16), mode="bicubic")[0]
    return sharpness * torch.randn(queries, 5), blobs + 1


def stripes(classes: list[int], columns: list[tuple[int, int]], confidence: float = 20.0) -> Prediction:
    """Queries of given classes (4: no object), each a stripe of full height, in columns of the 8 x 16 map."""
    class_logits = torch.zeros(len(classes), 5)
    class_logits[torch.arange(len(classes)), torch.tensor(classes, dtype=torch.int64)] = confidence
    masks = torch.full((len(classes), 8, 16), -20.0)
    for mask, (start, stop) in zip(masks, columns, strict=True):
        mask[:, start:stop] = 20.0
    return class_logits, masks


CASES: dict[str, Prediction] = {
    **{f"random {seed}": random_prediction(seed) for seed in range(6)},
    "no segment": stripes([4, 4], [(0, 8), (4, 12)]),
    "unsure classes": stripes([0, 1], [(0, 8), (4, 12)], confidence=0.5),
    "one": stripes([2], [(0, 4)]),
    "empty masks": stripes([0, 1], [(0, 0), (3, 3)]),
    "merged stuff": stripes([1, 0, 1, 3, 1], [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]),
    "merged stuff around a dropped one": stripes([1, 0, 1, 1], [(0, 6), (0, 6), (0, 6), (8, 10)]),
    "equal queries": stripes([0, 2, 2, 1, 1], [(0, 4), (0, 4), (0, 4), (0, 4), (4, 6)]),
    "things of one class": stripes([0, 0, 0], [(0, 3), (2, 7), (6, 9)]),
    "all pixels": stripes([3, 0], [(0, 16), (0, 16)]),
    "hopeless masks": (stripes([0, 1], [(0, 1), (1, 2)])[0], torch.full((2, 8, 16), -200.0)),
}


@pytest.fixture(params=CASES)
def prediction(request: pytest.FixtureRequest) -> Prediction:
    return CASES[request.param]


def both_panoptic(prediction: Prediction, **changes: Any) -> tuple[PanopticTensors, PanopticResult]:
    thresholds = {"object_mask_threshold": 0.6, "overlap_threshold": 0.5, **changes}
    found = panoptic_tensors(*prediction, CANVAS, SIZE, is_thing=IS_THING, **thresholds)
    return found, panoptic_segmentation(*prediction, GEOMETRY, is_thing=IS_THING, **thresholds)


def both_instances(
    prediction: Prediction, *, top_k: int = 20, is_thing: Tensor | None = None, **changes: float
) -> tuple[InstanceTensors, InstanceResult]:
    arguments: dict[str, Any] = {"top_k": top_k, "is_thing": is_thing, "score_threshold": 0.0, **changes}
    return instance_tensors(*prediction, CANVAS, SIZE, **arguments), instance_segmentation(
        *prediction, GEOMETRY, **arguments
    )


def in_one_order(result: InstanceTensors | InstanceResult) -> list[int]:
    """Places of the rows by class, mask and score: rounding decides the order of scores that are the same."""
    keys = list(zip(result.labels.tolist(), map(str, result.masks.flatten(1).int().tolist()), strict=True))
    return sorted(range(len(keys)), key=lambda row: (*keys[row], result.scores[row].item()))


@pytest.mark.parametrize("thresholds", [(0.6, 0.5), (0.0, 0.0), (0.9, 0.95), (0.6, 1.0)])
def test_panoptic(prediction: Prediction, thresholds: tuple[float, float]) -> None:
    found, expected = both_panoptic(
        prediction, object_mask_threshold=thresholds[0], overlap_threshold=thresholds[1]
    )
    assert torch.equal(found.ids, expected.ids)
    assert found.ids.dtype == torch.int32
    rows = zip(*(x.tolist() for x in found[1:]), strict=True)
    assert list(rows) == [(s.category_id, s.score, s.is_thing, s.area) for s in expected.segments]
    assert [s.id for s in expected.segments] == list(range(1, len(found.scores) + 1))


def test_the_cases_hold_what_they_are_named_after() -> None:
    def segments(name: str, **changes: Any) -> list[tuple[int, int]]:
        return [(s.category_id, s.area) for s in both_panoptic(CASES[name], **changes)[1].segments]

    assert segments("no segment") == segments("unsure classes") == segments("hopeless masks") == []
    assert [c for c, _ in segments("merged stuff")] == [1, 0, 3]
    assert [c for c, _ in segments("merged stuff around a dropped one")] == [1]
    assert [c for c, _ in segments("equal queries")] == [0, 1]
    assert sum(len(segments(f"random {seed}", overlap_threshold=0.0)) for seed in range(6)) > 12


def test_share_exactly_at_the_overlap_threshold() -> None:
    """The first query wins half of the columns of the second one, and nothing is enlarged."""
    class_logits, masks = stripes([0, 2], [(0, 8), (0, 16)])
    class_logits[1, 2] = 10.0
    arguments = {"is_thing": IS_THING, "object_mask_threshold": 0.5}
    geometry = MaskGeometry((8, 16), (8, 16), (8, 16))
    for threshold, segments in ((0.5, 2), (math.nextafter(0.5, 1) + 1e-6, 1)):
        found = panoptic_tensors(class_logits, masks, (8, 16), (8, 16), overlap_threshold=threshold, **arguments)
        expected = panoptic_segmentation(class_logits, masks, geometry, overlap_threshold=threshold, **arguments)
        assert len(expected.segments) == segments
        assert torch.equal(found.ids, expected.ids)


@pytest.mark.parametrize(
    ("is_thing", "top_k", "score_threshold", "matrix_nms_sigma"),
    [
        (None, 20, 0.0, 0.0),
        (IS_THING, 20, 0.0, 0.0),
        (IS_THING, 3, 0.2, 0.0),
        (None, 1000, 0.9, 0.0),
        (~IS_THING & IS_THING, 5, 0.0, 2.0),
        (None, 20, 0.1, 2.0),
    ],
    ids=["all", "things", "few", "good", "none", "matrix NMS"],
)
def test_instances(
    prediction: Prediction, is_thing: Tensor | None, top_k: int, score_threshold: float, matrix_nms_sigma: float
) -> None:
    changes = {"score_threshold": score_threshold, "matrix_nms_sigma": matrix_nms_sigma}
    found, expected = both_instances(prediction, is_thing=is_thing, top_k=top_k, **changes)
    assert found.scores.shape == expected.scores.shape
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-6, atol=1e-7)
    a, b = in_one_order(found), in_one_order(expected)
    torch.testing.assert_close(found.scores[a], expected.scores[b], rtol=1e-6, atol=1e-7)
    assert torch.equal(found.labels[a], expected.labels[b])
    assert torch.equal(found.masks[a], expected.masks[b])
    assert torch.equal(found.boxes[a], expected.boxes[b])
    assert (found.boxes.dtype, found.masks.dtype, found.labels.dtype) == (torch.float32, torch.bool, torch.int64)


def test_semantic(prediction: Prediction) -> None:
    found = semantic_labels(*prediction, CANVAS, SIZE)
    assert found.dtype == torch.int32
    for resize_first in (True, False):
        scores = semantic_segmentation(*prediction, GEOMETRY, resize_first=resize_first)
        chosen = scores.gather(0, found[None].long())[0]
        torch.testing.assert_close(chosen, scores.amax(0), rtol=1e-5, atol=1e-6)  # of equal scores any class is right


def test_half_logits_are_computed_in_float32() -> None:
    half = tuple(x.half() for x in CASES["random 0"])
    exact = tuple(x.float() for x in half)
    arguments: dict[str, Any] = {"is_thing": IS_THING, "object_mask_threshold": 0.3, "overlap_threshold": 0.5}
    found = panoptic_tensors(half[0], half[1], CANVAS, SIZE, **arguments)
    expected = panoptic_tensors(exact[0], exact[1], CANVAS, SIZE, **arguments)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)
