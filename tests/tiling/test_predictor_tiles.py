"""Tiles with the real predictor and a tiny network."""

import numpy as np
import pytest

from mask2former.predictor import Predictor
from mask2former.tiling import segment_large
from tests.tiny import categories, lively_model, picture


@pytest.fixture(scope="module")
def predictor():
    thresholds = {"object_mask_threshold": 0.0, "overlap_threshold": 0.1}
    return Predictor(lively_model(), categories=categories(), shortest=64, longest=96, **thresholds)


def test_one_tile_is_the_whole_picture(predictor):
    pixels = picture(60, 80)
    panoptic, expected = segment_large(predictor, pixels, tile=100, overlap=10), predictor(pixels, "panoptic")
    assert np.array_equal(panoptic.ids, expected.ids)
    assert len(expected.segments) > 1
    for found, segment in zip(panoptic.segments, expected.segments, strict=True):
        for name in ("id", "category_id", "name", "is_thing", "area"):
            assert getattr(found, name) == getattr(segment, name)
        assert found.score == pytest.approx(segment.score)
    semantic = segment_large(predictor, pixels, "semantic", tile=100, overlap=10)
    assert np.array_equal(semantic.labels, predictor(pixels, "semantic").labels)
    instances = segment_large(predictor, pixels, "instance", tile=100, overlap=10)
    expected = predictor(pixels, "instance")
    is_there = expected.masks.any((1, 2))
    assert instances.count == is_there.sum() > 0
    assert [i.category_id for i in instances.instances] == expected.labels[is_there].tolist()
    assert [i.area for i in instances.instances] == expected.masks[is_there].sum((1, 2)).tolist()
    assert [i.box for i in instances.instances] == [tuple(box) for box in expected.boxes[is_there].tolist()]


@pytest.mark.parametrize("grey", [True, False])
def test_several_tiles(predictor, grey):
    pixels = picture(60, 80)
    pixels = pixels[..., :1] if grey else pixels
    result = segment_large(predictor, pixels, tile=40, overlap=12, threshold=0.1)
    assert result.ids.shape == (60, 80)
    assert [s.area for s in result.segments] == np.bincount(result.ids.ravel(), minlength=2)[1:].tolist()
    labels = segment_large(predictor, pixels, "semantic", tile=40, overlap=12).labels
    corner = predictor(pixels[:40, :40], "semantic").labels
    assert np.array_equal(labels[:20, :20], corner[:20, :20])
