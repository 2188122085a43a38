"""Boundary regions against a naive erosion and by hand; boundary PQ and boundary AP in closed form."""

import json

import numpy as np
import pytest

from mask2former.evaluation import InstanceAP, PanopticQuality
from mask2former.evaluation.boundary import boundary_distance, mask_boundaries, segment_boundaries


def naive_boundary(mask, distance):
    """Pixels of the mask with a pixel outside it in the square around them, the image being surrounded by outside."""
    padded = np.pad(mask, distance)
    out = np.zeros_like(mask)
    side = 2 * distance + 1
    for y, x in zip(*np.nonzero(mask), strict=True):
        out[y, x] = not padded[y : y + side, x : x + side].all()
    return out


@pytest.mark.parametrize("seed", range(8))
def test_regions_equal_a_naive_erosion(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 30, 2)
    distance = int(rng.integers(1, 7))
    ids = np.kron(rng.integers(0, 4, (height // 5 + 1, width // 6 + 1)), np.ones((5, 6), int))[:height, :width]
    ids[rng.random(ids.shape) < 0.02] = 9
    masks = np.stack([ids == value for value in (0, 1, 2, 3, 9, 77)])
    expected = np.stack([naive_boundary(mask, distance) for mask in masks])
    np.testing.assert_array_equal(mask_boundaries(masks, distance), expected)
    np.testing.assert_array_equal(segment_boundaries(ids, distance), expected.any(0))


def test_region_of_a_rectangle():
    mask = np.zeros((20, 20), bool)
    mask[4:14, 6:20] = True  # touches the right side of the image
    expected = mask.copy()
    expected[6:12, 8:18] = False
    np.testing.assert_array_equal(mask_boundaries(mask[None], 2)[0], expected)


@pytest.mark.parametrize(("size", "distance"), [((480, 640), 16), ((3, 4), 1), ((30, 40), 1), ((1024, 2048), 46)])
def test_distance_is_two_percent_of_the_diagonal(size, distance):
    assert boundary_distance(size) == distance


def test_a_ratio_of_nothing_is_refused():
    with pytest.raises(ValueError, match="above 0, got 0"):
        boundary_distance((10, 10), 0)


# An image of 60 x 80 has a diagonal of 100, so that d is 2.
HEIGHT, WIDTH = 60, 80


def square(y, x, side):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + side, x : x + side] = True
    return mask


def test_boundary_pq_by_hand():
    # A square of 20 predicted one pixel to the right. Masks share 20 * 19 of 20 * 21: IoU 380 / 420 = 0.905. Of the two
    # frames, 400 - 256 = 144 pixels each, the interiors are 16 wide: shared are 380 - |A or B inside, in both masks|
    # = 380 - (16 * 16 + 16 * 1) = 108, so that the IoU is 108 / (144 + 144 - 108) = 0.6.
    truth, predicted = square(20, 30, 20).astype(int), square(20, 31, 20).astype(int)
    segments = [{"id": 1, "category_id": 0}]
    background = [{"id": 2, "category_id": 1}]
    metric = PanopticQuality(is_thing=[True, False], class_names=["thing", "stuff"], dilation_ratio=0.02)
    metric.update(np.where(predicted, 1, 2), segments + background, np.where(truth, 1, 2), segments + background)
    assert metric.compute()["PQ-thing"] == pytest.approx(60)
    plain = PanopticQuality(is_thing=[True, False], class_names=["thing", "stuff"])
    plain.update(np.where(predicted, 1, 2), segments + background, np.where(truth, 1, 2), segments + background)
    assert plain.compute()["PQ-thing"] == pytest.approx(100 * 380 / 420)
    with pytest.raises(ValueError, match=r"dilation_ratio None, got 0\.02"):
        plain.merge(metric)


def test_boundary_pq_does_not_count_void():
    # Everything that is predicted beyond the true square lies on void.
    truth = square(20, 30, 20).astype(int)
    predicted = square(20, 30, 22).astype(int)
    segments = [{"id": 1, "category_id": 0}]
    metric = PanopticQuality(is_thing=[True], dilation_ratio=0.02)
    metric.update(predicted, segments, truth, segments)
    # The predicted frame lies, inside the truth, on the two upper and left sides only: 400 - 18 * 18 = 76 of 144.
    np.testing.assert_allclose(metric.counts[:, 0], [76 / 144, 1, 0, 0])


def ap_of(tmp_path, truth, predicted, crowd=0):
    row, column = np.flatnonzero(truth.any(1))[0], np.flatnonzero(truth.any(0))[0]
    side = int(truth.any(1).sum())
    corners = [column, row, column + side, row, column + side, row + side, column, row + side]
    annotation = {
        "id": 1, "image_id": 1, "category_id": 1, "iscrowd": crowd, "area": side * side,
        "bbox": [int(column), int(row), side, side], "segmentation": [[int(c) for c in corners]],
    }  # fmt: skip
    content = {
        "images": [{"id": 1, "height": HEIGHT, "width": WIDTH}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "cat"}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    metric = InstanceAP(coco_json=path, category_ids=[1], iou_types=["segm", "boundary"])
    metric.update(1, [0], [0.9], predicted[None])
    return metric


def test_boundary_ap_by_hand(tmp_path):
    # As above: IoU 0.905 counts at nine of ten thresholds, 0.6 at three of them (0.6 is reached).
    metric = ap_of(tmp_path, square(20, 30, 20), square(20, 31, 20))
    results = metric.compute()
    assert results["segm"]["AP"] == pytest.approx(90)
    assert results["boundary"]["AP"] == pytest.approx(30)
    metric.save(tmp_path / "results.json")
    assert sorted(json.loads((tmp_path / "results.json").read_text())[0]) == [
        "category_id", "image_id", "score", "segmentation",
    ]  # fmt: skip


def test_boundary_ap_without_predictions(tmp_path):
    metric = ap_of(tmp_path, square(20, 30, 20), square(20, 30, 20))
    empty = InstanceAP(coco_json=tmp_path / "instances.json", category_ids=[1], iou_types=["boundary"])
    empty.update(1, [], [], np.zeros((0, HEIGHT, WIDTH), bool))
    assert empty.compute()["boundary"]["AP"] == 0
    assert metric.compute()["boundary"]["AP"] == pytest.approx(100)
    with pytest.raises(ValueError, match="masks must be given"):
        InstanceAP(coco_json=tmp_path / "instances.json", category_ids=[1], iou_types=["boundary"]).update(1, [], [])
