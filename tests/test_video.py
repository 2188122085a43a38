"""Videos through a model: ids persist, and everything else is what the predictor gives."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from mask2former.data.images import read_image
from mask2former.predictor import Predictor
from mask2former.results import InstancePicture, PanopticPicture
from mask2former.video import INSTANCE_THRESHOLD, VideoSegmenter
from tests.tiny import categories, lively_model, picture

DEMO = Path(__file__).resolve().parents[1] / "demo"


def predictor(**settings: object) -> Predictor:
    """Finds several segments in `picture`."""
    defaults = {"shortest": 64, "longest": 160, "overlap_threshold": 0.2, "object_mask_threshold": 0.3}
    return Predictor(lively_model(), categories=categories(), **(defaults | settings))  # type: ignore[arg-type]


def panoptic(model: Predictor, pixels: np.ndarray) -> PanopticPicture:
    result = model(pixels, "panoptic")
    assert isinstance(result, PanopticPicture)
    return result


def test_the_first_frame_is_the_predictors_under_other_ids() -> None:
    model = predictor()
    alone, result = panoptic(model, picture()), VideoSegmenter(model)(picture())
    assert len(result.segments) >= 5
    assert [s.id for s in result.segments] == sorted(s.id for s in result.segments)
    assert result.ids.dtype == np.int32
    assert (result.ids == 0).sum() == (alone.ids == 0).sum()
    assert result.queries is not None and alone.queries is not None
    for segment, found in zip(result.segments, result.queries, strict=True):
        (number,) = np.unique(alone.ids[result.ids == segment.id]).tolist()
        np.testing.assert_array_equal(result.ids == segment.id, alone.ids == number)
        assert replace(segment, id=number) == alone.segments[number - 1]
        assert found == alone.queries[number - 1]


def test_a_picture_that_stands_still_keeps_all_ids() -> None:
    segmenter = VideoSegmenter(predictor())
    results = [segmenter(picture()) for _ in range(4)]
    for result in results[1:]:
        np.testing.assert_array_equal(result.ids, results[0].ids)
        assert result.segments == results[0].segments
    things = sum(segment.is_thing for segment in results[0].segments)
    assert len(segmenter.tracker) == things > 0


def test_ids_come_from_the_query_features() -> None:
    """Features that have nothing to do with those of the frame before give new ids to things, not to stuff."""
    model = predictor()
    segmenter = VideoSegmenter(model)
    first = segmenter(picture())
    real = model.with_queries

    def turned(*arguments: object, **others: object) -> object:
        result, features = real(*arguments, **others)  # type: ignore[arg-type]
        return result, -features

    model.with_queries = turned  # type: ignore[method-assign, assignment]
    second = segmenter(picture())
    old = {s.id for s in first.segments if s.is_thing}
    assert old and not old & {s.id for s in second.segments if s.is_thing}
    assert {s.id for s in first.segments if not s.is_thing} == {s.id for s in second.segments if not s.is_thing}


def test_a_real_model_keeps_ids_while_the_camera_moves() -> None:
    """Crops that move over a photo by a hundredth of it a frame, through the bundled model."""
    pixels = read_image(DEMO / "pictures" / "street_square.jpg")
    height, width = (size * 8 // 10 for size in pixels.shape[:2])
    segmenter = VideoSegmenter(Predictor.from_file(DEMO / "models" / "panoptic.safetensors", shortest=192, longest=288))
    results = []
    for number in range(8):
        top, left = number * pixels.shape[0] // 100, number * pixels.shape[1] // 100
        results.append(segmenter(pixels[top : top + height, left : left + width]))
    kept = {segment.id for segment in results[0].segments}
    assert kept
    for before, after in pairwise(results):
        classes = {segment.id: segment.category_id for segment in before.segments}
        assert all(classes.get(s.id, s.category_id) == s.category_id for s in after.segments)
        kept &= {segment.id for segment in after.segments}
    assert len(kept) >= 2


def test_empty_frames() -> None:
    """Nothing is sure enough to be a segment."""
    segmenter = VideoSegmenter(predictor(), threshold=1.0)
    for _ in range(2):
        result = segmenter(picture())
        assert result.segments == ()
        assert not result.ids.any()


def test_instances_are_laid_out_with_the_best_on_top() -> None:
    model = predictor(score_threshold=0.05)
    instances = model(picture(), "instance")
    assert isinstance(instances, InstancePicture)
    segmenter = VideoSegmenter(model, task="instance")
    results = [segmenter(picture()) for _ in range(2)]
    np.testing.assert_array_equal(results[0].ids, results[1].ids)
    first = results[0]
    owner = np.zeros(first.ids.shape, int)
    for number, mask in enumerate(instances.masks, start=1):
        owner[mask & (owner == 0)] = number  # best first
    assert (instances.masks.sum(0) > 1).any()  # some do overlap
    np.testing.assert_array_equal(first.ids > 0, owner > 0)
    seen = [n for n in range(1, len(instances.masks) + 1) if (owner == n).any()]
    assert len(first.segments) == len(seen) > 1
    assert first.queries is not None and instances.queries is not None
    for segment, queries in zip(first.segments, first.queries, strict=True):
        (number,) = np.unique(owner[first.ids == segment.id]).tolist()
        assert segment.area == (owner == number).sum()
        assert segment.is_thing
        assert segment.score == pytest.approx(float(instances.scores[number - 1]))
        assert segment.category_id == instances.labels[number - 1]
        assert queries == (instances.queries[number - 1],)


def test_instances_have_a_threshold_even_if_the_settings_have_none() -> None:
    result = VideoSegmenter(predictor(score_threshold=0.0), task="instance")(picture())
    assert all(segment.score >= INSTANCE_THRESHOLD for segment in result.segments)


def test_the_task_is_the_first_that_has_segments() -> None:
    segmenter = VideoSegmenter(predictor(tasks=("semantic", "panoptic")))
    np.testing.assert_array_equal(segmenter(picture()).ids > 0, panoptic(predictor(), picture()).ids > 0)


def test_a_frame_of_another_size_is_refused_until_reset() -> None:
    segmenter = VideoSegmenter(predictor())
    first = segmenter(picture(50, 70))
    with pytest.raises(ValueError, match=r"size must stay \(50, 70\) within a video .*, got \(60, 70\)"):
        segmenter(picture(60, 70))
    again = segmenter(picture(50, 70))
    assert [s.id for s in again.segments] == [s.id for s in first.segments]
    segmenter.reset()
    later = segmenter(picture(60, 70))
    assert min(s.id for s in later.segments) > max(s.id for s in first.segments)


def test_gates_reach_the_tracker() -> None:
    assert VideoSegmenter(predictor(), max_age=7).tracker.max_age == 7
    with pytest.raises(TypeError, match="max_years"):
        VideoSegmenter(predictor(), max_years=7)
    with pytest.raises(ValueError, match="max_age must be"):
        VideoSegmenter(predictor(), max_age=-7)


def test_tasks_and_thresholds_that_videos_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"task must be one of \['panoptic', 'instance'\] .*, got 'semantic'"):
        VideoSegmenter(predictor(), task="semantic")
    with pytest.raises(ValueError, match="task must be one of none for videos with this model, got None"):
        VideoSegmenter(predictor(tasks=("semantic",)))
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 2"):
        VideoSegmenter(predictor(), threshold=2)


def test_a_decoder_that_tells_no_features_is_refused() -> None:
    class Foreign(torch.nn.Module):
        pass

    model = predictor()
    model.model.sem_seg_head.predictor = Foreign()
    with pytest.raises(ValueError, match="decoder with predict_with_queries, got Foreign"):
        VideoSegmenter(model)
