"""Post-processing against definitions written as loops, and in degenerate cases."""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mask2former.modeling import bands
from mask2former.modeling.bands import BandResizer
from mask2former.modeling.postprocessing import (
    InstanceResult,
    MaskGeometry,
    PanopticResult,
    compact_instance_segmentation,
    instance_segmentation,
    masks_to_boxes,
    panoptic_segmentation,
    semantic_labels,
    semantic_segmentation,
)
from mask2former.ops.pixels import largest

GEOMETRY = MaskGeometry(canvas=(32, 64), image_size=(30, 41), output_size=(19, 26))
IS_THING = torch.tensor([True, False, True, False])


class _Case(NamedTuple):
    class_logits: Tensor
    mask_logits: Tensor


def _case(queries: int = 12, classes: int = 4, size: tuple[int, int] = (8, 16), sharpness: float = 6.0) -> _Case:
    """Confident classes and smooth blobs, so that segments of all kinds come about."""
    class_logits = sharpness * torch.randn(queries, classes + 1)
    blobs = F.interpolate(8 * torch.randn(1, queries, 3, 4), size, mode="bicubic")[0]
    return _Case(class_logits, blobs + 1)


def _by_hand(mask_logits: Tensor, geometry: MaskGeometry) -> Tensor:
    height, width = geometry.image_size
    maps = F.interpolate(mask_logits[None], geometry.canvas, mode="bilinear", align_corners=False)
    maps = F.interpolate(maps[..., :height, :width], geometry.output_size, mode="bilinear", align_corners=False)
    return maps[0]


def _panoptic(case: _Case, geometry: MaskGeometry = GEOMETRY, **changes: Any) -> PanopticResult:
    arguments = {"is_thing": IS_THING, "object_mask_threshold": 0.6, "overlap_threshold": 0.5, **changes}
    return panoptic_segmentation(*case, geometry, **arguments)


def _instances(case: _Case, geometry: MaskGeometry = GEOMETRY, **changes: Any) -> InstanceResult:
    return instance_segmentation(*case, geometry, **{"top_k": 20, **changes})


# ------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize(
    "geometry",
    [
        GEOMETRY,
        MaskGeometry((32, 64), (32, 64), (32, 64)),
        MaskGeometry((32, 32), (1, 1), (1, 1)),
        MaskGeometry((32, 32), (1, 1), (7, 5)),
        MaskGeometry((32, 64), (30, 41), (60, 82)),
        MaskGeometry((8, 16), (5, 9), (5, 9)),
    ],
)
def test_geometry_is_canvas_crop_resize(geometry: MaskGeometry) -> None:
    maps = torch.randn(3, 8, 16)
    found = geometry.resize(maps)
    assert found.shape == (3, *geometry.output_size)
    torch.testing.assert_close(found, _by_hand(maps, geometry), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ semantic


def _naive_semantic(case: _Case, geometry: MaskGeometry, resize_first: bool) -> Tensor:
    probability = case.class_logits.softmax(-1)
    maps = F.interpolate(case.mask_logits[None], geometry.canvas, mode="bilinear", align_corners=False)[0]
    if resize_first:
        maps = _by_hand(case.mask_logits, geometry)
    scores = torch.zeros(probability.shape[1] - 1, *maps.shape[1:])
    for k in range(len(scores)):
        for q in range(len(maps)):
            scores[k] += probability[q, k] * maps[q].sigmoid()
    if resize_first:
        return scores
    height, width = geometry.image_size
    cropped = scores[None, :, :height, :width]
    return F.interpolate(cropped, geometry.output_size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("resize_first", [True, False])
@pytest.mark.parametrize("geometry", [GEOMETRY, MaskGeometry((32, 64), (1, 1), (1, 1))])
def test_semantic_equals_loop(geometry: MaskGeometry, resize_first: bool) -> None:
    case = _case()
    found = semantic_segmentation(*case, geometry, resize_first=resize_first)
    assert found.shape == (4, *geometry.output_size)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, _naive_semantic(case, geometry, resize_first), rtol=1e-4, atol=1e-5)


def test_semantic_orders_differ() -> None:
    case = _case()
    first, last = (semantic_segmentation(*case, GEOMETRY, resize_first=r) for r in (True, False))
    assert (first - last).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------ panoptic


def _naive_panoptic(
    case: _Case, geometry: MaskGeometry, is_thing: Tensor, object_mask_threshold: float, overlap_threshold: float
) -> tuple[Tensor, list[tuple[int, int, bool, float, int]]]:
    height, width = geometry.output_size
    probability = case.class_logits.softmax(-1)
    masks = _by_hand(case.mask_logits, geometry).sigmoid().tolist()
    kept = []
    for q in range(len(masks)):
        score, label = probability[q].max(-1)
        if label.item() < len(is_thing) and score.item() > object_mask_threshold:
            kept.append((q, int(label), score.item()))
    winners = [
        [max(kept, key=lambda k: k[2] * masks[k[0]][y][x])[0] if kept else -1 for x in range(width)]
        for y in range(height)
    ]
    ids = torch.zeros(height, width, dtype=torch.int32)
    segments: list[tuple[int, int, bool, float, int]] = []
    pixels = [(y, x) for y in range(height) for x in range(width)]
    for q, label, score in kept:
        won = [(y, x) for y, x in pixels if winners[y][x] == q]
        own = [(y, x) for y, x in pixels if masks[q][y][x] >= 0.5]
        sure = [p for p in won if p in set(own)]
        if not won or not own or not sure or len(won) / len(own) < overlap_threshold:
            continue
        old = [i for i, s in enumerate(segments) if s[1] == label and not is_thing[label]]
        if old:
            number, _, thing, old_score, area = segments[old[0]]
            segments[old[0]] = (number, label, thing, max(old_score, score), area + len(sure))
        else:
            number = len(segments) + 1
            segments.append((number, label, bool(is_thing[label]), score, len(sure)))
        for y, x in sure:
            ids[y, x] = number
    return ids, segments


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("object_mask_threshold", "overlap_threshold"), [(0.6, 0.5), (0.0, 0.0), (0.9, 0.95)])
def test_panoptic_equals_loop(seed: int, object_mask_threshold: float, overlap_threshold: float) -> None:
    torch.manual_seed(seed)
    case = _case()
    thresholds = {"object_mask_threshold": object_mask_threshold, "overlap_threshold": overlap_threshold}
    result = _panoptic(case, **thresholds)
    ids, segments = _naive_panoptic(case, GEOMETRY, IS_THING, **thresholds)
    assert result.ids.dtype == torch.int32
    assert torch.equal(result.ids, ids)
    found = [(s.id, s.category_id, s.is_thing, s.score, s.area) for s in result.segments]
    assert found == [(*s[:3], pytest.approx(s[3]), s[4]) for s in segments]
    assert [s.area for s in result.segments] == [int((result.ids == s.id).sum()) for s in result.segments]


@pytest.mark.parametrize("seed", range(8))
def test_panoptic_tells_the_queries_of_each_segment(seed: int) -> None:
    torch.manual_seed(seed)
    case = _case()
    result = _panoptic(case, object_mask_threshold=0.3, overlap_threshold=0.2)
    scores, labels = case.class_logits.softmax(-1).max(-1)
    probability = _by_hand(case.mask_logits, GEOMETRY).sigmoid()
    rivals = torch.where((labels < 4) & (scores > 0.3), scores, -1)[:, None, None] * probability
    winner = rivals.argmax(0)  # (H, W)
    assert result.queries is not None
    assert len(result.queries) == len(result.segments) > 0
    for segment, queries in zip(result.segments, result.queries, strict=True):
        inside = winner[result.ids == segment.id].unique().tolist()
        assert queries == inside
        assert {int(labels[query]) for query in queries} == {segment.category_id}
        assert max(scores[queries].tolist()) == pytest.approx(segment.score)
        assert len(queries) == 1 or not segment.is_thing


def test_panoptic_without_segments_has_no_queries() -> None:
    assert _panoptic(_case(), object_mask_threshold=1.0).queries == []


def test_the_random_cases_contain_merged_stuff_and_dropped_queries() -> None:
    merged = dropped = 0
    for seed in range(8):
        torch.manual_seed(seed)
        case = _case()
        scores, labels = case.class_logits.softmax(-1).max(-1)
        kept = labels[(labels < 4) & (scores > 0.6)].tolist()
        found = [s.category_id for s in _panoptic(case, overlap_threshold=0.0).segments]
        merged += sum(kept.count(k) - found.count(k) for k in (1, 3) if found.count(k))
        dropped += len(_panoptic(case, overlap_threshold=0.95).segments) < len(found)
    assert merged > 0
    assert dropped > 0


def _blocks(labels: list[int], columns: list[tuple[int, int]], classes: int = 4) -> _Case:
    """One query for each label, sure of its class, with a mask over whole columns of a 4x8 map."""
    class_logits = torch.full((len(labels), classes + 1), -20.0)
    mask_logits = torch.full((len(labels), 4, 8), -20.0)
    for q, (label, (start, stop)) in enumerate(zip(labels, columns, strict=True)):
        class_logits[q, label] = 20 - q  # the first query wins where masks overlap
        mask_logits[q, :, start:stop] = 20.0
    return _Case(class_logits, mask_logits)


PLAIN = MaskGeometry((4, 8), (4, 8), (4, 8))


def test_stuff_of_one_class_merges_and_things_do_not() -> None:
    result = _panoptic(_blocks([1, 0, 1, 0], [(0, 2), (2, 4), (4, 6), (6, 8)]), PLAIN)
    assert [(s.id, s.category_id, s.is_thing, s.area) for s in result.segments] == [
        (1, 1, False, 16),
        (2, 0, True, 8),
        (3, 0, True, 8),
    ]
    assert result.ids[0].tolist() == [1, 1, 2, 2, 1, 1, 3, 3]


def test_ids_stay_dense_when_a_query_is_dropped() -> None:
    # the second query keeps one of its four columns, the third has an empty mask
    case = _blocks([0, 2, 2, 1], [(0, 3), (0, 4), (5, 5), (4, 8)])
    result = _panoptic(case, PLAIN)
    assert [(s.id, s.category_id) for s in result.segments] == [(1, 0), (2, 1)]
    assert result.ids[0].tolist() == [1, 1, 1, 0, 2, 2, 2, 2]


@pytest.mark.parametrize(("threshold", "stays"), [(0.25, True), (0.26, False)])
def test_overlap_threshold_is_inclusive(threshold: float, stays: bool) -> None:
    result = _panoptic(_blocks([0, 2], [(0, 3), (0, 4)]), PLAIN, overlap_threshold=threshold)
    assert ([s.category_id for s in result.segments] == [0, 2]) == stays


def test_overlap_counts_all_pixels_won_but_a_segment_has_the_sure_ones() -> None:
    case = _blocks([0, 2], [(0, 2), (1, 4)])
    case.mask_logits[1, :, 4:] = -1.0  # wins these four columns without being sure
    result = _panoptic(case, PLAIN, overlap_threshold=0.8)  # 6 columns won of 3 own, 2 of them sure
    assert [(s.category_id, s.area) for s in result.segments] == [(0, 8), (2, 8)]
    assert result.ids[0].tolist() == [1, 1, 2, 2, 0, 0, 0, 0]


def test_pixels_that_no_query_is_sure_of_are_void() -> None:
    result = _panoptic(_blocks([0], [(0, 3)]), PLAIN)
    assert result.ids[0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("label", [4, None])
def test_no_kept_query_gives_an_empty_result(label: int | None) -> None:
    case = _blocks([4, 4], [(0, 3), (3, 8)]) if label == 4 else _Case(torch.zeros(3, 5), torch.randn(3, 4, 8))
    result = _panoptic(case, PLAIN)
    assert result.segments == []
    assert result.ids.shape == (4, 8)
    assert result.ids.dtype == torch.int32
    assert not result.ids.any()


def test_score_of_merged_stuff_is_the_largest() -> None:
    case = _blocks([1, 1], [(0, 4), (4, 8)])
    case.class_logits[0, 1] = -19.0  # about 0.4 at first
    case.class_logits[0, 4] = -19.5
    result = _panoptic(case, PLAIN, object_mask_threshold=0.3)
    scores = case.class_logits.softmax(-1)[:, 1].tolist()
    assert scores[0] < scores[1]
    assert [s.score for s in result.segments] == [pytest.approx(scores[1])]


@pytest.mark.parametrize("length", [0, 3, 5])
def test_is_thing_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"is_thing must have shape \(4,\), got \({length},\)"):
        _panoptic(_case(), is_thing=torch.ones(length, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------ instances


def _naive_instances(
    case: _Case, geometry: MaskGeometry, top_k: int, is_thing: Tensor | None, score_threshold: float
) -> list[tuple[float, int, Tensor]]:
    probability = case.class_logits.softmax(-1)
    maps = _by_hand(case.mask_logits, geometry)
    queries, classes = probability.shape[0], probability.shape[1] - 1
    pairs = sorted(((probability[q, k].item(), q, k) for q in range(queries) for k in range(classes)), reverse=True)
    result = []
    for score, q, k in pairs[:top_k]:
        if is_thing is not None and not is_thing[k]:
            continue
        inside = [x for x in maps[q].flatten().tolist() if x > 0]
        quality = sum(1 / (1 + math.exp(-x)) for x in inside) / (len(inside) + 1e-6)
        if score * quality >= score_threshold:
            result.append((score * quality, k, maps[q] > 0))
    return sorted(result, key=lambda r: -r[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("is_thing", [None, IS_THING])
@pytest.mark.parametrize(("top_k", "score_threshold"), [(20, 0.0), (5, 0.0), (48, 0.3), (1000, 0.0), (20, 0.999)])
def test_instances_equal_loop(seed: int, is_thing: Tensor | None, top_k: int, score_threshold: float) -> None:
    torch.manual_seed(seed)
    case = _case(sharpness=2.0)
    case.mask_logits[3] = -5  # one empty mask
    result = _instances(case, top_k=top_k, is_thing=is_thing, score_threshold=score_threshold)
    expected = _naive_instances(case, GEOMETRY, top_k, is_thing, score_threshold)
    assert len(result.scores) == len(expected)
    positive = [r for r in expected if r[0] > 0]  # of equal scores, 0, the order is free
    assert result.scores.tolist() == pytest.approx([r[0] for r in expected], rel=1e-5)
    assert result.labels[: len(positive)].tolist() == [r[1] for r in positive]
    assert all(torch.equal(m, r[2]) for m, r in zip(result.masks, positive, strict=False))
    assert result.masks.dtype == torch.bool
    assert result.masks.shape == (len(expected), *GEOMETRY.output_size)
    torch.testing.assert_close(result.boxes, _naive_boxes(result.masks))


def test_instances_tell_their_queries() -> None:
    case = _case(sharpness=2.0)
    result = _instances(case)
    masks = _by_hand(case.mask_logits, GEOMETRY) > 0
    assert result.queries is not None
    assert result.queries.shape == result.labels.shape
    assert torch.equal(result.masks, masks[result.queries])
    probability = case.class_logits.softmax(-1)[result.queries, result.labels]
    quality = result.scores / probability
    for query in result.queries.unique():  # the quality of a mask is the same for all its classes
        same = quality[result.queries == query]
        torch.testing.assert_close(same, same[:1].expand_as(same))


def test_top_k_is_clamped_to_all_pairs() -> None:
    case = _case(queries=2)
    assert len(_instances(case, top_k=100).scores) == 8


def test_top_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        _instances(_case(), top_k=0)


def test_a_query_may_appear_with_several_classes_and_its_mask_is_enlarged_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enlarged: list[int] = []
    original = BandResizer.chunks
    monkeypatch.setattr(BandResizer, "chunks", lambda *args: enlarged.append(len(args[1])) or original(*args))
    class_logits = torch.tensor([[3.0, 2.0, -9.0, -9.0, -9.0]])
    result = _instances(_Case(class_logits, torch.full((1, 8, 16), 9.0)), top_k=2)
    assert result.labels.tolist() == [0, 1]
    assert enlarged == [1]
    assert torch.equal(result.masks[0], result.masks[1])


def test_score_threshold_and_things_can_leave_nothing() -> None:
    for changes in ({"score_threshold": 2.0}, {"is_thing": torch.zeros(4, dtype=torch.bool)}):
        result = _instances(_case(), **changes)
        assert len(result.labels) == len(result.scores) == 0
        assert result.masks.shape == (0, *GEOMETRY.output_size)
        assert result.boxes.shape == (0, 4)


def _naive_boxes(masks: Tensor) -> Tensor:
    boxes = []
    for mask in masks:
        inside = mask.nonzero().tolist()
        ys, xs = [y for y, _ in inside], [x for _, x in inside]
        boxes.append([min(xs), min(ys), max(xs) + 1, max(ys) + 1] if inside else [0, 0, 0, 0])
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (6, 7)])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_boxes_equal_loop(height: int, width: int, share: float) -> None:
    masks = torch.rand(20, height, width) < share
    torch.testing.assert_close(masks_to_boxes(masks), _naive_boxes(masks), rtol=0, atol=0)


def test_no_boxes_of_no_masks() -> None:
    assert masks_to_boxes(torch.zeros(0, 3, 4, dtype=torch.bool)).shape == (0, 4)


# ------------------------------------------------------------------------------------------------ all three


@pytest.mark.parametrize(("pixels", "rows", "parts"), [(1, 1, 19 * 30), (5000, 8, 5 + 5 + 2), (1 << 18, 8, 1)])
def test_bands_and_chunks_change_nothing(pixels: int, rows: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case(queries=30, sharpness=3.0)

    def results() -> tuple[Tensor, ...]:
        semantic = semantic_segmentation(*case, GEOMETRY)
        late = semantic_segmentation(*case, GEOMETRY, resize_first=False)
        panoptic = _panoptic(case, overlap_threshold=0.1)
        areas = torch.tensor([(s.category_id, s.area) for s in panoptic.segments])
        instances = _instances(case)
        return semantic, late, panoptic.ids, areas, instances.scores, instances.labels, instances.masks, instances.boxes

    monkeypatch.setattr(bands, "CPU_CHUNK_PIXELS", 1 << 30)
    whole = results()
    monkeypatch.setattr(bands, "CPU_CHUNK_PIXELS", pixels)
    monkeypatch.setattr(bands, "MIN_ROWS", rows)
    resizer = GEOMETRY.bands(case.mask_logits)
    assert sum(len(list(resizer.chunks(case.mask_logits, band))) for band in resizer.bands(30)) == parts
    for found, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_first_of_equal_queries_wins_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _blocks([0, 2, 2], [(0, 8), (0, 8), (0, 8)])
    case.class_logits[torch.arange(3), torch.tensor([0, 2, 2])] = 20.0
    whole = _panoptic(case, PLAIN)
    monkeypatch.setattr(bands, "CPU_CHUNK_PIXELS", 1)
    chunked = _panoptic(case, PLAIN)
    assert [s.category_id for s in whole.segments] == [s.category_id for s in chunked.segments] == [0]


def test_inputs_are_not_changed() -> None:
    """Without a resize there is nothing between them and what is computed in place."""
    case = _case(size=(4, 8))
    before = [x.clone() for x in case]
    for _ in (_panoptic(case, PLAIN), _instances(case, PLAIN), semantic_segmentation(*case, PLAIN)):
        assert all(torch.equal(x, y) for x, y in zip(case, before, strict=True))


@pytest.mark.parametrize("resize_first", [True, False])
def test_semantic_labels_are_the_arg_max(resize_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "CPU_CHUNK_PIXELS", 3000)
    case = _blocks([1, 0, 2], [(0, 2), (2, 5), (5, 8)])
    labels = semantic_labels(*case, GEOMETRY, resize_first=resize_first)
    assert labels.dtype == torch.int32
    expected = semantic_segmentation(*case, GEOMETRY, resize_first=resize_first).argmax(0)
    assert torch.equal(labels, expected.int())
    assert labels.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 7, 300])
def test_largest_takes_the_first_of_equal_numbers(count: int) -> None:
    scores = torch.randint(0, 5, (count, 9, 11)) / 7
    values, places = largest(scores)
    assert torch.equal(values, scores.max(0).values)
    assert torch.equal(places, (scores == values).int().argmax(0))
    scores[count // 2, 3, 4] = torch.nan
    values, places = largest(scores)
    assert values[3, 4].isnan()
    assert 0 <= places.min() <= places.max() < count


@pytest.mark.parametrize("score_threshold", [0.0, 0.3, 2.0])
def test_compact_instances_are_the_instances(score_threshold: float) -> None:
    case = _case(sharpness=2.0)
    case.mask_logits[3] = -5  # one empty mask
    full = _instances(case, score_threshold=score_threshold)
    compact = compact_instance_segmentation(*case, GEOMETRY, top_k=20, score_threshold=score_threshold)
    for name in ("labels", "scores", "boxes"):
        assert torch.equal(getattr(compact, name), getattr(full, name)), name
    assert torch.equal(compact.areas, full.masks.flatten(1).sum(1))
    assert all(torch.equal(compact.mask(i), mask) for i, mask in enumerate(full.masks))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_give_float32_results(dtype: torch.dtype) -> None:
    case = _Case(*(x.to(dtype) for x in _case()))
    exact = _Case(*(x.float() for x in case))
    torch.testing.assert_close(
        semantic_segmentation(*case, GEOMETRY), semantic_segmentation(*exact, GEOMETRY), rtol=0, atol=0
    )
    assert torch.equal(_panoptic(case).ids, _panoptic(exact).ids)
    torch.testing.assert_close(_instances(case).scores, _instances(exact).scores, rtol=0, atol=0)


def test_one_pixel_image_one_query_one_class() -> None:
    geometry = MaskGeometry((32, 32), (1, 1), (1, 1))
    case = _Case(torch.tensor([[5.0, -5.0]]), torch.full((1, 8, 8), 3.0))
    assert semantic_segmentation(*case, geometry).shape == (1, 1, 1)
    panoptic = _panoptic(case, geometry, is_thing=torch.tensor([True]))
    assert panoptic.ids.tolist() == [[1]]
    instances = _instances(case, geometry)
    assert instances.masks.tolist() == [[[True]]]
    assert instances.boxes.tolist() == [[0, 0, 1, 1]]
    assert instances.scores.item() == pytest.approx(torch.sigmoid(torch.tensor(10.0)).item() * 0.9525741, rel=1e-4)


def test_no_gradient_is_kept() -> None:
    case = _Case(*(x.requires_grad_() for x in _case()))
    assert not semantic_segmentation(*case, GEOMETRY).requires_grad
    assert not _instances(case).scores.requires_grad


class _LargestTensor(TorchDispatchMode):
    """Remembers the size in bytes of the largest tensor made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel() * x.element_size())
        return result


def test_memory_is_that_of_the_result() -> None:
    """100 queries at 2000 x 2500 would be 2 GB at once; 3 are kept, and no map of one of them is ever made."""
    geometry = MaskGeometry((512, 640), (512, 640), (2000, 2500))
    pixels = 2000 * 2500
    class_logits = torch.randn(100, 5)
    class_logits[:, 4] += 9  # almost all are "no object"
    class_logits[[3, 50, 98], [0, 1, 2]] = 30.0
    case = _Case(class_logits, torch.randn(100, 128, 160))
    with _LargestTensor() as tracker:
        _panoptic(case, geometry)
    assert tracker.largest == 4 * pixels  # the ids
    with _LargestTensor() as tracker:
        result = _instances(case, geometry, score_threshold=0.3)
    assert len(result.scores) == 3
    assert tracker.largest == 3 * pixels  # the masks
    with _LargestTensor() as tracker:
        compact = compact_instance_segmentation(*case, geometry, top_k=20, score_threshold=0.3)
    assert len(compact.scores) == 3
    assert tracker.largest < pixels
    with _LargestTensor() as tracker:
        semantic_segmentation(class_logits[:7, :2], case.mask_logits[:7], geometry)
    assert tracker.largest == 4 * pixels  # the scores of one class
    with _LargestTensor() as tracker:
        semantic_labels(class_logits[:7], case.mask_logits[:7], geometry)
    assert tracker.largest == 4 * pixels  # the labels
