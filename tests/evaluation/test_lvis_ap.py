"""LVIS AP by hand, against a naive loop and against the lvis package."""

import copy
import json
import math
import pickle

import numpy as np
import pytest

from mask2former.evaluation import InstanceAP, LvisAP

pytest.importorskip("pycocotools", reason="instance AP needs pycocotools")
HEIGHT, WIDTH = 60, 90
CATEGORIES = [{"id": 3 * i + 2, "name": f"c{i}", "frequency": "rcf"[i % 3]} for i in range(9)]
IDS = [category["id"] for category in CATEGORIES]


def rectangle(x, y, width, height):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + height, x : x + width] = True
    return mask


def annotation(image_id, label, box):
    x, y, width, height = box
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {
        "image_id": image_id, "category_id": IDS[label], "bbox": list(box), "area": width * height,
        "segmentation": [corners],
    }  # fmt: skip


def write(path, annotations, images):
    """images: id -> (negative labels, labels that are not exhaustive)."""
    content = {
        "images": [
            {
                "id": i, "height": HEIGHT, "width": WIDTH, "neg_category_ids": [IDS[x] for x in negative],
                "not_exhaustive_category_ids": [IDS[x] for x in not_exhaustive],
            }
            for i, (negative, not_exhaustive) in images.items()
        ],
        "annotations": [{"id": n, **a} for n, a in enumerate(annotations, start=1)],
        "categories": CATEGORIES,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def predict(metric, image_id, found):
    """found: (label, score, box) of each."""
    masks = np.array([rectangle(*box) for _, _, box in found], dtype=bool).reshape(-1, HEIGHT, WIDTH)
    boxes = np.array([[x, y, x + w, y + h] for _, _, (x, y, w, h) in found], float).reshape(-1, 4)
    metric.update(image_id, [label for label, _, _ in found] or [], [score for _, score, _ in found], masks, boxes)


CAT = (5, 5, 20, 20)
ELSEWHERE = (50, 20, 20, 20)


@pytest.mark.parametrize(
    ("negative", "not_exhaustive", "expected"),
    [
        ([], [], 50),  # the wrong one comes first: precision 1/2 at every recall
        ([], [0], 100),  # there may be more than are annotated
    ],
)
def test_a_wrong_prediction_where_not_all_are_annotated(tmp_path, negative, not_exhaustive, expected):
    path = write(tmp_path / "lvis.json", [annotation(1, 0, CAT)], {1: (negative, not_exhaustive)})
    metric = LvisAP(coco_json=path, category_ids=IDS)
    predict(metric, 1, [(0, 0.9, ELSEWHERE), (0, 0.5, CAT)])
    for results in metric.compute().values():
        assert results["AP"] == results["APr"] == results["AP-c0"] == pytest.approx(expected)
        assert math.isnan(results["APc"]) and math.isnan(results["APf"])
    assert list(results)[:9] == ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]


@pytest.mark.parametrize(("negative", "expected"), [([1], 50), ([], 100)])
def test_a_category_counts_only_in_images_that_are_known_for_it(tmp_path, negative, expected):
    path = write(tmp_path / "lvis.json", [annotation(1, 1, CAT)], {1: ([], []), 2: (negative, [])})
    metric = LvisAP(coco_json=path, category_ids=IDS)
    predict(metric, 1, [(1, 0.5, CAT)])
    predict(metric, 2, [(1, 0.9, CAT)])
    assert metric.compute()["segm"]["APc"] == pytest.approx(expected)


def test_the_best_300_of_an_image_count_whatever_their_category(tmp_path):
    path = write(tmp_path / "lvis.json", [annotation(1, 0, CAT)], {1: ([], [])})
    others = [(i % 8 + 1, 0.9, (0, 0, 2, 2)) for i in range(300)]
    metric = LvisAP(coco_json=path, category_ids=IDS)
    predict(metric, 1, [*others[:299], (0, 0.1, CAT)])
    assert metric.compute()["segm"]["AP"] == pytest.approx(100)
    metric = LvisAP(coco_json=path, category_ids=IDS)
    predict(metric, 1, [(0, 0.1, CAT), *others])
    assert metric.compute()["segm"]["AP"] == 0 and len(metric.results) == 300


def test_nothing_predicted_and_nothing_to_find(tmp_path):
    path = write(tmp_path / "lvis.json", [annotation(1, 0, CAT)], {1: ([], []), 2: ([0], [])})
    metric = LvisAP(coco_json=path, category_ids=IDS)
    assert all(math.isnan(value) for results in metric.compute().values() for value in results.values())
    predict(metric, 2, [])
    assert math.isnan(metric.compute()["segm"]["AP"])
    predict(metric, 1, [])
    assert metric.compute()["segm"]["AP"] == 0


def test_files_that_lack_what_lvis_has_are_refused(tmp_path):
    path = write(tmp_path / "lvis.json", [], {1: ([], [])})
    content = json.loads(path.read_text())
    del content["images"][0]["neg_category_ids"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"image 1 of .*lvis\.json lacks 'neg_category_ids'"):
        LvisAP(coco_json=path, category_ids=IDS)
    content["categories"][0]["frequency"] = "often"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"frequency of category 2 .*got 'often'"):
        LvisAP(coco_json=path, category_ids=IDS)


# ---- many images


def random_set(path, rng):
    annotations, images, boxes = [], {}, {}
    for i in range(1, 9):
        labels = rng.permutation(9)
        images[i] = (labels[3:6].tolist(), [int(x) for x in labels[:3] if rng.random() < 0.4])
        boxes[i] = []
        for label in labels[:3].tolist():
            for _ in range(rng.integers(1, 5)):
                box = tuple(int(x) for x in rng.integers((0, 0, 3, 3), (50, 30, 40, 30)))
                boxes[i].append((label, box))
                annotations.append(annotation(i, label, box))
    return write(path, annotations, images), boxes


def random_predictions(rng, boxes):
    for i, known in boxes.items():
        found = []
        for _ in range(340 if i == 4 else 25):
            label, (x, y, w, h) = known[rng.integers(len(known))]
            box = (max(0, x + int(rng.integers(-3, 4))), max(0, y + int(rng.integers(-3, 4))), w, h)
            found.append((label if rng.random() < 0.7 else int(rng.integers(9)), round(float(rng.random()), 2), box))
        yield i, found


@pytest.fixture(scope="module")
def random_metric(tmp_path_factory):
    rng = np.random.default_rng(0)
    path, boxes = random_set(tmp_path_factory.mktemp("lvis") / "lvis.json", rng)
    metrics = [LvisAP(coco_json=path, category_ids=IDS) for _ in range(3)]
    for i, found in random_predictions(rng, boxes):
        predict(metrics[0], i, found)
        predict(metrics[1 + i % 2], i, found)
    metrics[1].merge(pickle.loads(pickle.dumps(metrics[2])))
    return metrics[0], metrics[1], path


def test_processes_add_up(random_metric):
    whole, parts, _ = random_metric
    for kind, expected in whole.compute().items():
        assert parts.compute()[kind] == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_a_pickled_metric_leaves_the_annotations_behind(random_metric):
    whole, _, path = random_metric
    assert b"not_exhaustive_category_ids" not in pickle.dumps(whole)
    plain = InstanceAP(coco_json=path, category_ids=IDS)
    assert len(pickle.dumps(plain)) < 2000 < path.stat().st_size
    for metric in (copy.deepcopy(plain), pickle.loads(pickle.dumps(whole))):
        with pytest.raises(RuntimeError, match="merge it into the original"):
            metric.compute()
        with pytest.raises(RuntimeError, match="merge it into the original"):
            predict(metric, 1, [])


def naive_ap(content, results):
    """The rules one by one: mean precision of each category and IoU at 101 recalls."""
    values = {}
    kept = {}
    for i in {r["image_id"] for r in results}:
        of_image = [r for r in results if r["image_id"] == i]
        kept[i] = sorted(of_image, key=lambda r: -r["score"])[:300]
    for category in IDS:
        per_threshold = []
        for threshold in np.linspace(0.5, 0.95, 10):
            ranked, count = [], 0
            for image in sorted(content["images"], key=lambda image: image["id"]):
                truth = [
                    a for a in content["annotations"] if (a["image_id"], a["category_id"]) == (image["id"], category)
                ]
                if not truth and category not in image["neg_category_ids"]:
                    continue
                count += len(truth)
                free = list(truth)
                for r in [r for r in kept.get(image["id"], []) if r["category_id"] == category]:
                    best = max(free, key=lambda a: box_iou(a["bbox"], r["bbox"]), default=None)
                    if best is not None and box_iou(best["bbox"], r["bbox"]) >= threshold:
                        free.remove(best)
                        ranked.append((r["score"], True))
                    elif category not in image["not_exhaustive_category_ids"]:
                        ranked.append((r["score"], False))
            if not count:
                continue
            ranked.sort(key=lambda pair: -pair[0])
            right = np.cumsum([is_right for _, is_right in ranked])
            precision = right / np.arange(1, len(ranked) + 1)
            recall = right / count
            per_threshold.append(np.mean([
                max(precision[recall >= r], default=0.0) for r in np.linspace(0, 1, 101)
            ]))  # fmt: skip
        if per_threshold:
            values[category] = 100 * np.mean(per_threshold)
    return values


def box_iou(a, b):
    width = max(0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
    height = max(0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
    return width * height / (a[2] * a[3] + b[2] * b[3] - width * height)


def test_equals_a_naive_loop(random_metric):
    metric, _, path = random_metric
    expected = naive_ap(json.loads(path.read_text()), metric.results)
    results = metric.compute()["bbox"]
    for category in CATEGORIES:
        value = expected.get(category["id"], math.nan)
        assert results[f"AP-{category['name']}"] == pytest.approx(value, abs=1e-9, nan_ok=True)
    for letter in "rcf":
        of_group = [expected[c["id"]] for c in CATEGORIES if c["frequency"] == letter and c["id"] in expected]
        assert results[f"AP{letter}"] == pytest.approx(np.mean(of_group), abs=1e-9)
    assert 10 < results["AP"] < 90


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_equals_the_lvis_package(random_metric, monkeypatch, kind):
    monkeypatch.setattr(np, "float", float, raising=False)  # gone from NumPy 1.24, lvis 0.5.3 needs it
    lvis = pytest.importorskip("lvis", reason="lvis is not installed")
    metric, _, path = random_metric
    detections = copy.deepcopy(metric.results)
    for detection in detections:
        if kind == "segm":
            del detection["bbox"]  # else lvis takes its area
    truth = lvis.LVIS(str(path))
    evaluation = lvis.LVISEval(truth, lvis.LVISResults(truth, detections, max_dets=300), kind)
    evaluation.run()
    results = metric.compute()[kind]
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"):
        value = evaluation.get_results()[name]
        expected = 100 * value if value >= 0 else math.nan
        assert results[name] == pytest.approx(expected, abs=1e-9, nan_ok=True), name
