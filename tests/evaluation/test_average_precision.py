"""Instance AP against closed forms and a plain pycocotools run."""

import contextlib
import copy
import io
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from mask2former.evaluation.average_precision import InstanceAP

pytest.importorskip("pycocotools", reason="instance AP needs pycocotools")
SAMPLE = Path(__file__).parents[2] / "datasets" / "sample" / "annotations" / "instances_val2017.json"
HEIGHT, WIDTH = 90, 120
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "cow"}]
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def rle(mask):
    from pycocotools import mask as mask_api

    encoded = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def rectangle(x, y, width, height):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + height, x : x + width] = True
    return mask


def annotation(number, image_id, category_id, box, crowd=0):
    mask = rectangle(*box)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": rle(mask),
        "bbox": list(box),
        "area": int(mask.sum()),
        "iscrowd": crowd,
    }


def write(tmp_path, annotations, images=(1, 2)):
    data = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH, "file_name": f"{i}.jpg"} for i in images],
        "categories": CATEGORIES,
        "annotations": annotations,
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data))
    return path


def predict(metric, image_id, boxes, labels, scores):
    masks = np.array([rectangle(*box) for box in boxes], dtype=bool).reshape(-1, HEIGHT, WIDTH)
    corners = np.array([[x, y, x + w, y + h] for x, y, w, h in boxes], float).reshape(-1, 4)
    metric.update(image_id, np.array(labels, dtype=np.int64), np.array(scores, dtype=float), masks, corners)


@pytest.fixture
def two_cats(tmp_path):
    return write(tmp_path, [annotation(1, 1, 7, (5, 5, 40, 30)), annotation(2, 1, 7, (60, 40, 50, 40))])


def metric_of(path, **arguments):
    return InstanceAP(coco_json=path, category_ids=[7, 3, 90], **arguments)


def test_perfect_prediction_is_100(two_cats):
    metric = metric_of(two_cats)
    predict(metric, 1, [(5, 5, 40, 30), (60, 40, 50, 40)], [0, 0], [0.9, 0.8])
    for results in metric.compute().values():
        assert results["AP"] == results["AP50"] == results["APm"] == results["AP-cat"] == pytest.approx(100)
        assert math.isnan(results["AP-dog"]) and math.isnan(results["APs"])
        assert list(results) == [*METRICS, "AP-cat", "AP-dog", "AP-cow"]


def test_half_of_the_objects_found(two_cats):
    # Precision 1 up to recall 0.5: 51 of the 101 recall points.
    metric = metric_of(two_cats)
    predict(metric, 1, [(5, 5, 40, 30)], [0], [0.9])
    assert metric.compute()["segm"]["AP"] == pytest.approx(100 * 51 / 101)


def test_iou_of_three_quarters_counts_for_six_of_ten_thresholds(tmp_path):
    path = write(tmp_path, [annotation(1, 1, 7, (0, 0, 40, 40))])
    metric = metric_of(path)
    predict(metric, 1, [(0, 0, 40, 31)], [0], [0.5])  # IoU 0.775
    results = metric.compute()["segm"]
    assert results["AP"] == pytest.approx(60)
    assert results["AP50"] == results["AP75"] == pytest.approx(100)


def test_masks_and_boxes_are_judged_apart(two_cats):
    metric = metric_of(two_cats)
    masks = np.array([rectangle(5, 5, 40, 30), rectangle(60, 40, 50, 40)])
    metric.update(1, [0, 0], [0.9, 0.8], masks, [[0, 0, 1, 1], [0, 0, 2, 2]])
    results = metric.compute()
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["bbox"]["AP"] == 0


def test_no_predictions_give_zero(two_cats):
    metric = metric_of(two_cats)
    metric.update(1, [], [], np.zeros((0, HEIGHT, WIDTH), bool), np.zeros((0, 4)))
    for results in metric.compute().values():
        assert results["AP"] == results["AP-cat"] == 0
        assert math.isnan(results["AP-cow"])


def test_unused_metric_is_nan(two_cats):
    assert all(math.isnan(v) for results in metric_of(two_cats).compute().values() for v in results.values())


def test_only_images_given_are_evaluated(tmp_path):
    boxes = (5, 5, 40, 30)
    path = write(tmp_path, [annotation(1, 1, 7, boxes), annotation(2, 2, 7, boxes)])
    metric = metric_of(path)
    predict(metric, 1, [boxes], [0], [0.9])
    assert metric.compute()["segm"]["AP"] == pytest.approx(100)
    predict(metric, 2, [], [], [])
    assert metric.compute()["segm"]["AP"] == pytest.approx(100 * 51 / 101)


def test_crowd_is_neither_found_nor_missed(tmp_path):
    crowd = annotation(2, 1, 7, (60, 40, 50, 40), crowd=1)
    path = write(tmp_path, [annotation(1, 1, 7, (5, 5, 40, 30)), crowd])
    metric = metric_of(path)
    predict(metric, 1, [(5, 5, 40, 30), (60, 40, 10, 10), (70, 50, 20, 20)], [0] * 3, [0.5, 0.9, 0.8])
    assert metric.compute()["segm"]["AP"] == pytest.approx(100)


def test_at_most_100_predictions_an_image_and_category(two_cats):
    metric = metric_of(two_cats)
    wrong = [(0, 0, 2, 2)] * 100
    predict(metric, 1, [*wrong, (5, 5, 40, 30)], [0] * 101, [0.9] * 100 + [0.1])
    assert metric.compute()["segm"]["AP"] == 0


def test_annotation_ids_of_zero_or_twice_do_no_harm(tmp_path):
    path = write(tmp_path, [annotation(0, 1, 7, (5, 5, 40, 30)), annotation(0, 1, 7, (60, 40, 50, 40))])
    metric = metric_of(path)
    predict(metric, 1, [(5, 5, 40, 30), (60, 40, 50, 40)], [0, 0], [0.9, 0.8])
    assert metric.compute()["segm"]["AP"] == pytest.approx(100)


def test_missing_iscrowd_means_no_crowd(tmp_path):
    plain = annotation(1, 1, 7, (5, 5, 40, 30))
    del plain["iscrowd"]
    metric = metric_of(write(tmp_path, [plain]))
    predict(metric, 1, [(5, 5, 40, 30)], [0], [0.9])
    assert metric.compute()["bbox"]["AP"] == pytest.approx(100)


def test_nothing_is_printed(two_cats, capsys, caplog):
    metric = metric_of(two_cats)
    predict(metric, 1, [(5, 5, 40, 30)], [0], [0.9])
    with caplog.at_level(logging.CRITICAL, logger="mask2former"):  # a log that earlier tests have set up is no print
        metric.compute()
    assert capsys.readouterr() == ("", "")


def test_compute_can_be_repeated(two_cats):
    metric = metric_of(two_cats)
    predict(metric, 1, [(5, 5, 40, 30)], [0], [0.9])
    before = copy.deepcopy(metric.results)
    assert str(metric.compute()) == str(metric.compute())
    assert metric.results == before


def test_one_iou_type_needs_only_its_input(two_cats):
    boxes_only = metric_of(two_cats, iou_types=["bbox"])
    boxes_only.update(1, [0], [0.5], boxes=[[5, 5, 45, 35]])
    assert list(boxes_only.compute()) == ["bbox"]
    masks_only = metric_of(two_cats, iou_types=["segm"])
    masks_only.update(1, [0], [0.5], rectangle(5, 5, 40, 30)[None])
    assert list(masks_only.compute()) == ["segm"] and "bbox" not in masks_only.results[0]


def test_a_mask_of_several_predictions_is_given_once(two_cats):
    apart, together = (metric_of(two_cats, iou_types=["segm", "bbox", "boundary"]) for _ in range(2))
    masks = np.array([rectangle(5, 5, 40, 30), rectangle(60, 40, 50, 40)])
    boxes = [[5, 5, 45, 35], [60, 40, 110, 80], [5, 5, 45, 35], [1, 2, 3, 4]]
    which = np.array([0, 1, 0, 1])
    apart.update(1, [0, 0, 1, 2], [0.9, 0.8, 0.7, 0.6], masks[which], boxes)
    together.update(1, [0, 0, 1, 2], [0.9, 0.8, 0.7, 0.6], masks, boxes, mask_of=which)
    assert together.results == apart.results
    together.update(2, [], [], masks[:0], np.zeros((0, 4)), mask_of=[])
    assert len(together.results) == 4


def test_save_writes_cocos_result_format(two_cats, tmp_path):
    from pycocotools.coco import COCO

    metric = metric_of(two_cats)
    predict(metric, 1, [(5, 5, 40, 30)], [0], [0.9])
    path = tmp_path / "new" / "results.json"
    metric.save(path)
    metric.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
    assert json.loads(path.read_text()) == metric.results
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = COCO(str(two_cats)).loadRes(str(path)).anns[1]
    assert loaded["category_id"] == 7 and loaded["bbox"] == [5, 5, 40, 30]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image_id": 5}, ValueError, "image_id.*got 5"),
        ({"labels": [3]}, ValueError, r"labels.*\[0, 3\), got 3"),
        ({"labels": [-1]}, ValueError, "labels.*got -1"),
        ({"labels": [0.0]}, TypeError, "labels.*float64"),
        ({"labels": [[0]]}, ValueError, r"labels.*\(N,\)"),
        ({"scores": [0.1, 0.2]}, ValueError, r"scores.*\(1,\).*\(2,\)"),
        ({"scores": [math.nan]}, ValueError, "scores.*nan"),
        ({"masks": None}, ValueError, "masks.*segm"),
        ({"masks": np.zeros((1, HEIGHT, WIDTH), np.uint8)}, TypeError, "masks.*uint8"),
        ({"masks": np.zeros((1, HEIGHT, 5), bool)}, ValueError, r"masks.*image 1.*\(90, 5\)"),
        ({"masks": np.zeros((2, HEIGHT, WIDTH), bool)}, ValueError, r"masks.*\(1, H, W\)"),
        ({"mask_of": [1]}, ValueError, r"mask_of.*\[0, 1\).*got 1"),
        ({"mask_of": [-1]}, ValueError, r"mask_of.*\[0, 1\).*got -1"),
        ({"mask_of": [0, 0]}, ValueError, r"mask_of.*\(1,\) as labels, got \(2,\)"),
        ({"mask_of": [0.0]}, TypeError, "mask_of.*float64"),
        ({"masks": np.zeros((3, HEIGHT, 5), bool), "mask_of": [0]}, ValueError, r"masks.*image 1.*\(90, 5\)"),
        ({"masks": np.zeros((HEIGHT, WIDTH), bool), "mask_of": [0]}, ValueError, r"masks.*\(M, H, W\)"),
        ({"boxes": None}, ValueError, "boxes.*bbox"),
        ({"boxes": [[0, 1, 2]]}, ValueError, r"boxes.*\(1, 4\)"),
        ({"boxes": [[0, 1, 2, math.inf]]}, ValueError, "boxes.*inf"),
    ],
)
def test_wrong_input_is_named_and_changes_nothing(two_cats, change, error, message):
    arguments = {
        "image_id": 1,
        "labels": [0],
        "scores": [0.5],
        "masks": rectangle(5, 5, 40, 30)[None],
        "boxes": [[5, 5, 45, 35]],
    }
    metric = metric_of(two_cats)
    with pytest.raises(error, match=message):
        metric.update(**(arguments | change))
    assert not metric.results and not metric.image_ids
    metric.update(**arguments)
    with pytest.raises(ValueError, match="1 twice"):
        metric.update(**arguments)


def test_wrong_construction_is_refused(two_cats, tmp_path):
    with pytest.raises(ValueError, match=r"iou_types.*keypoints"):
        metric_of(two_cats, iou_types=["keypoints"])
    with pytest.raises(ValueError, match=r"lacks \[8\]"):
        InstanceAP(coco_json=two_cats, category_ids=[7, 8])
    with pytest.raises(ValueError, match=r"category_ids.*different"):
        InstanceAP(coco_json=two_cats, category_ids=[7, 7])
    broken = annotation(4, 1, 7, (0, 0, 5, 5))
    del broken["area"]
    with pytest.raises(ValueError, match=r"annotation 4 lacks \['area'\]"):
        metric_of(write(tmp_path, [broken]))


# ---- pycocotools


def noisy_predictions(rng, data):
    """Moves, drops, doubles and relabels the true masks; scores are random."""
    from pycocotools import mask as mask_api

    ids = [category["id"] for category in data["categories"]]
    for image in data["images"]:
        truth = [a for a in data["annotations"] if a["image_id"] == image["id"] and rng.random() < 0.9]
        masks, labels = [np.zeros((0, image["height"], image["width"]), bool)], []
        for a in truth + truth[:2]:
            mask = mask_api.decode(a["segmentation"]).astype(bool)
            masks.append(np.roll(mask, rng.integers(-3, 4, 2), (0, 1))[None])
            labels.append(ids.index(a["category_id"]) if rng.random() < 0.9 else int(rng.integers(len(ids))))
        stack = np.concatenate(masks)
        boxes = np.zeros((len(stack), 4))
        for row, mask in zip(boxes, stack, strict=True):
            if mask.any():
                ys, xs = np.nonzero(mask)
                row[:] = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        yield image["id"], np.array(labels, np.int64), rng.random(len(stack)), stack, boxes


def made_data():
    rng = np.random.default_rng(1)
    annotations = []
    for number in range(1, 60):
        x, y = int(rng.integers(0, 80)), int(rng.integers(0, 60))
        box = (x, y, int(rng.integers(4, 40)), int(rng.integers(4, 30)))
        category = CATEGORIES[int(rng.integers(2))]["id"]
        annotations.append(annotation(number, number % 8 + 1, category, box, crowd=int(rng.random() < 0.1)))
    images = [{"id": i, "height": HEIGHT, "width": WIDTH, "file_name": f"{i}.jpg"} for i in range(1, 9)]
    return {"images": images, "categories": CATEGORIES, "annotations": annotations}


def plain_pycocotools(path, results, iou_type, category_ids):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = copy.deepcopy(results)
    if iou_type == "segm":
        for result in results:  # else loadRes takes the area of the box
            del result["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = [100 * s if s >= 0 else math.nan for s in evaluation.stats[:6]]
    order, per_category = sorted(category_ids), []
    for category_id in category_ids:
        precision = evaluation.eval["precision"][:, :, order.index(category_id), 0, -1]
        precision = precision[precision > -1]
        per_category.append(100 * precision.mean() if precision.size else math.nan)
    return stats, per_category


@pytest.mark.parametrize("source", ["made", "sample"])
def test_equals_plain_pycocotools(tmp_path, source):
    if source == "sample" and not SAMPLE.exists():
        pytest.skip("datasets/sample is not there")
    data = made_data() if source == "made" else json.loads(SAMPLE.read_text())
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data))
    ids = [category["id"] for category in data["categories"]]
    metric = InstanceAP(coco_json=path, category_ids=ids)
    halves = [InstanceAP(coco_json=path, category_ids=ids) for _ in range(2)]
    for i, prediction in enumerate(noisy_predictions(np.random.default_rng(0), data)):
        metric.update(*prediction)
        halves[i % 2].update(*prediction)
    results = metric.compute()
    for iou_type in ("segm", "bbox"):
        stats, per_category = plain_pycocotools(path, metric.results, iou_type, ids)
        values = list(results[iou_type].values())
        np.testing.assert_allclose(values[:6], stats, rtol=1e-12)
        np.testing.assert_allclose(values[6:], per_category, rtol=1e-12)
        assert 5 < values[0] < 95, "the noise must neither be nothing nor destroy everything"
    halves[0].merge(halves[1])
    merged = halves[0].compute()
    for iou_type in results:
        assert merged[iou_type] == pytest.approx(results[iou_type], rel=1e-12, nan_ok=True)
    with pytest.raises(ValueError, match="both have"):
        metric.merge(halves[0])
    with pytest.raises(ValueError, match="category_ids"):
        metric.merge(InstanceAP(coco_json=path, category_ids=ids[:1]))
