"""faster-coco-eval gives pycocotools' precision, bit for bit; which one is used, and what the log says of it."""

import importlib.metadata
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from mask2former.evaluation import InstanceAP, LvisAP, coco_matching
from mask2former.evaluation.average_precision import encode_masks
from mask2former.evaluation.coco_matching import category_precision, matching_library
from mask2former.predictor import Predictor

mask_api = pytest.importorskip("pycocotools.mask", reason="instance AP needs pycocotools")
ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 50, 70
SWITCH = "MASK2FORMER_FASTER_COCO_EVAL"


@pytest.fixture
def faster(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    coco_matching._installed_library.cache_clear()
    if not matching_library("segm").is_faster:
        pytest.skip(matching_library("segm").account)


def random_mask(rng, box):
    x, y, w, h = box
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + h, x : x + w] = rng.random(mask[y : y + h, x : x + w].shape) < 0.9
    return mask


def segmentation(rng, box):
    """Outlines, RLE with text and RLE with numbers, as COCO's files have them."""
    x, y, w, h = box
    kind = rng.integers(3)
    if kind == 0:
        outlines = [[x + 0.3, y, x + w, y + 0.7, x + w - 1, y + h, x, y + h - 0.5], [x, y, x + w, y, x, y + 3]]
        return outlines[: int(rng.integers(1, 3))]
    mask = random_mask(rng, box)
    if kind == 1:
        return encode_masks(mask[None])[0]
    flat = mask.T.reshape(-1)
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0] if flat[0] else []
    return {"size": [HEIGHT, WIDTH], "counts": first + np.diff([0, *ends, flat.size]).tolist()}


def random_box(rng):
    return tuple(int(v) for v in rng.integers((0, 0, 2, 2), (40, 30, 40, 25)))


def problem(seed):
    """Images, truth and detections of one category; ids are texts, scores are often equal, some have no partner."""
    rng = np.random.default_rng(seed)
    ids = [f"{number:03}" if seed % 2 else int(number) for number in rng.permutation(40)[:9]]
    images = {i: {"id": i, "height": HEIGHT, "width": WIDTH} for i in ids}
    truth, detections = [], []
    for i in ids:
        boxes = [random_box(rng) for _ in range(rng.integers(0, 5))]
        for box in boxes:
            truth.append({
                "id": len(truth) + 1, "image_id": i, "category_id": 5, "bbox": [float(v) for v in box],
                "area": float(box[2] * box[3] * rng.choice([1, 5, 40])), "segmentation": segmentation(rng, box),
                "iscrowd": int(rng.random() < 0.2),
            })  # fmt: skip
        for _ in range(rng.integers(0, 9)):
            box = boxes[rng.integers(len(boxes))] if boxes and rng.random() < 0.7 else random_box(rng)
            moved = [box[0] + int(rng.integers(0, 3)), box[1] + int(rng.integers(0, 3)), box[2], box[3]]
            score = float(rng.integers(5)) / 4 if seed % 3 else float(rng.random())
            detections.append({
                "id": len(detections) + 1, "image_id": i, "category_id": 5, "iscrowd": 0, "score": score,
                "bbox": moved, "area": float(moved[2] * moved[3]),
                "segmentation": encode_masks(random_mask(rng, moved)[None])[0],
            })  # fmt: skip
    return images, truth, detections


def both(monkeypatch, *arguments, **others):
    found = []
    for value in ("0", "1"):
        monkeypatch.setenv(SWITCH, value)
        found.append(category_precision(*arguments, **others))
    return found


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_bits_are_those_of_pycocotools(monkeypatch, faster, kind):
    values = []
    for seed in range(12):
        images, truth, detections = problem(seed)
        limits = {"max_detections": [100, 3][seed % 2], "iou_type": kind}
        plain, fast = both(monkeypatch, truth, detections, images, **limits)
        assert plain.shape == (10, 101, 4) and plain.dtype == np.float64
        np.testing.assert_array_equal(fast, plain)
        some = sorted(images, key=str)[::2]
        plain, fast = both(monkeypatch, truth, detections, images, not_exhaustive=frozenset(some), **limits)
        np.testing.assert_array_equal(fast, plain)
        values.append(plain[plain > -1].mean())
    assert 0.02 < np.mean(values) < 0.98, "the noise must neither be nothing nor destroy everything"


def test_nothing_found_and_nothing_to_find(monkeypatch, faster):
    images, truth, detections = problem(1)
    for arguments, value in (((truth, []), 0), (([], detections), -1)):
        plain, fast = both(monkeypatch, *arguments, images, iou_type="segm", max_detections=100)
        np.testing.assert_array_equal(fast, plain)
        assert plain.max() == value


def test_annotations_stay_as_they_are(faster):
    images, truth, detections = problem(1)
    before = json.dumps([list(images.values()), truth, detections])
    category_precision(truth, detections, images, iou_type="segm", max_detections=100, not_exhaustive=frozenset(images))
    assert json.dumps([list(images.values()), truth, detections]) == before


@pytest.mark.parametrize("metric_class", [InstanceAP, LvisAP])
def test_results_are_the_same_and_the_log_says_whose(tmp_path, monkeypatch, faster, caplog, metric_class):
    images, truth, detections = problem(2)
    content = {
        "images": [i | {"neg_category_ids": [5], "not_exhaustive_category_ids": [5]} for i in images.values()],
        "annotations": truth, "categories": [{"id": 5, "name": "five", "frequency": "r"}],
    }  # fmt: skip
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    metric = metric_class(coco_json=path, category_ids=[5])
    for i in images:
        own = [d for d in detections if d["image_id"] == i]
        masks = np.array([mask_api.decode(d["segmentation"]) for d in own], bool).reshape(-1, HEIGHT, WIDTH)
        boxes = np.array([d["bbox"] for d in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        metric.update(i, [0] * len(own), [d["score"] for d in own], masks, boxes)
    results = []
    for value in ("0", "1"):
        monkeypatch.setenv(SWITCH, value)
        with caplog.at_level(logging.INFO, logger="mask2former"):
            results.append(metric.compute())
    assert str(results[0]) == str(results[1]) and 1 < results[0]["segm"]["AP"] < 99
    told = [message.partition(" by ") for message in caplog.messages]
    assert [start for start, _, _ in told] == [f"{kind} AP of 9 images" for kind in ("segm", "bbox")] * 2
    assert told[0][2] == "pycocotools (MASK2FORMER_FASTER_COCO_EVAL=0 switches faster-coco-eval off)"
    assert told[2][2].startswith("faster-coco-eval 1.")


@pytest.mark.skipif(not (ROOT / "datasets/sample").exists(), reason="datasets/sample is not there")
def test_predictions_of_the_bundled_model(tmp_path, monkeypatch, faster):
    """All numbers of both; truth is what the model is most sure of when it sees the pictures larger."""
    files = sorted((ROOT / "datasets/sample/val2017").glob("*.jpg"))[:4]
    larger, smaller = (
        Predictor.from_file(ROOT / "demo/models/panoptic.safetensors", shortest=shortest) for shortest in (160, 128)
    )
    things = [c.id for c in larger.categories if c.is_thing]
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": str(i)} for i in things]}
    found = [smaller(file, "instance") for file in files]
    for number, file in enumerate(files):
        content["images"].append(
            {"id": number, "height": found[number].masks.shape[1], "width": found[number].masks.shape[2]}
        )
        sure = larger(file, "instance").to_coco_json(number)[:8]
        content["annotations"] += [a | {"id": 0, "area": int(mask_api.area(a["segmentation"]))} for a in sure]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    metric = InstanceAP(coco_json=tmp_path / "truth.json", category_ids=things)
    for number, one in enumerate(found):
        labels = [things.index(i) for i in one.dataset_category_ids]
        metric.update(number, labels, one.scores, one.masks, one.boxes)
    results = []
    for value in ("0", "1"):
        monkeypatch.setenv(SWITCH, value)
        results.append(metric.compute())
    assert str(results[0]) == str(results[1])
    assert 1 < results[0]["segm"]["AP"] < 99 and 1 < results[0]["bbox"]["AP"] < 99


@pytest.mark.parametrize(
    ("version", "switch", "is_faster", "account"),
    [
        ("1.8.0", None, True, "faster-coco-eval 1.8.0"),
        ("2.0rc1", None, True, "faster-coco-eval 2.0rc1"),
        ("1.10.3.post1", "1", True, "faster-coco-eval 1.10.3.post1"),
        ("1.8.0", "0", False, "pycocotools (MASK2FORMER_FASTER_COCO_EVAL=0 switches faster-coco-eval off)"),
        ("1.7.9", None, False, "pycocotools (faster-coco-eval 1.7.9 is older than 1.8)"),
        (None, None, False, "pycocotools (faster-coco-eval, which is faster, is not installed)"),
    ],
)
def test_which_one_is_used(monkeypatch, version, switch, is_faster, account):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(coco_matching, "version", installed)
    monkeypatch.delenv(SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(SWITCH, switch)
    coco_matching._installed_library.cache_clear()
    try:
        assert matching_library("segm") == matching_library("bbox") == (is_faster, account)
        assert matching_library("boundary") == (False, "pycocotools")
    finally:
        coco_matching._installed_library.cache_clear()
