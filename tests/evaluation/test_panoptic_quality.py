"""Panoptic quality against closed forms, a naive loop and panopticapi."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mask2former.evaluation.panoptic_quality import PanopticQuality

SAMPLE = Path(__file__).parents[2] / "datasets" / "sample"
IS_THING = [True, True, True, False, False, False]


def segment(segment_id, category, crowd=0):
    return {"id": segment_id, "category_id": category, "iscrowd": crowd}


def random_image(rng, *, height=40, width=50, crowds=True):
    """Blocky ground truth with void and crowds, and a prediction made from it by shifting and relabelling."""
    cells = rng.integers(0, 9, (height // 10, width // 10))
    target_ids = np.kron(cells, np.ones((10, 10), int)) * 1000
    target = [
        segment(int(i), int(rng.integers(6)), int(crowds and rng.random() < 0.25))
        for i in np.unique(target_ids)
        if i
    ]
    predicted_ids = np.roll(target_ids, rng.integers(0, 4, 2), (0, 1)) // 1000
    noise = rng.random(predicted_ids.shape) < 0.1
    predicted_ids[noise] = rng.integers(0, 12, int(noise.sum()))
    category = {s["id"] // 1000: s["category_id"] for s in target}
    predicted = [
        segment(int(i), category[i] if i in category and rng.random() < 0.8 else int(rng.integers(6)))
        for i in np.unique(predicted_ids)
        if i
    ]
    return predicted_ids, predicted, target_ids, target


def naive_counts(num_classes, predicted_ids, predicted, target_ids, target):
    """The definition, with one boolean mask per segment and a loop over pairs."""
    counts = np.zeros((4, num_classes))
    void = target_ids == 0
    hit_targets, hit_predictions = set(), set()
    for t in target:
        for p in predicted:
            if t["iscrowd"] or t["category_id"] != p["category_id"]:
                continue
            a, b = target_ids == t["id"], (predicted_ids == p["id"]) & ~void
            iou = (a & b).sum() / max((a | b).sum(), 1)
            if iou > 0.5:
                counts[0, t["category_id"]] += iou
                counts[1, t["category_id"]] += 1
                hit_targets.add(t["id"])
                hit_predictions.add(p["id"])
    for p in predicted:
        ignored = void.copy()
        for t in target:
            if t["iscrowd"] and t["category_id"] == p["category_id"]:
                ignored |= target_ids == t["id"]
        mask = predicted_ids == p["id"]
        if p["id"] not in hit_predictions and (mask & ignored).sum() / mask.sum() <= 0.5:
            counts[2, p["category_id"]] += 1
    for t in target:
        if t["id"] not in hit_targets and not t["iscrowd"]:
            counts[3, t["category_id"]] += 1
    return counts


@pytest.mark.parametrize("seed", range(12))
def test_counts_equal_a_naive_loop(seed):
    rng = np.random.default_rng(seed)
    metric, expected = PanopticQuality(is_thing=IS_THING), np.zeros((4, 6))
    for _ in range(4):
        image = random_image(rng)
        metric.update(*image)
        expected += naive_counts(6, *image)
    np.testing.assert_allclose(metric.counts, expected, rtol=1e-13)
    assert expected[1:].sum(1).min() > 0, "the test must contain hits, inventions and misses"


def test_perfect_prediction_is_100():
    ids = np.repeat([[0, 1, 2, 3]], 5, axis=0)
    segments = [segment(1, 0), segment(2, 0), segment(3, 4)]
    metric = PanopticQuality(is_thing=IS_THING)
    metric.update(ids, segments, ids, segments)
    assert set(metric.compute().values()) == {100.0}


def test_one_segment_in_closed_form():
    target, predicted = np.ones((1, 10), int), np.ones((1, 10), int)
    predicted[0, 8:] = 2  # segment 1 covers 8 of 10; segment 2 is invented
    metric = PanopticQuality(is_thing=[True])
    metric.update(predicted, [segment(1, 0), segment(2, 0)], target, [segment(1, 0)])
    results = metric.compute()
    assert results["SQ"] == pytest.approx(80)
    assert results["RQ"] == pytest.approx(100 / 1.5)
    assert results["PQ"] == pytest.approx(80 / 1.5)


def test_iou_of_exactly_one_half_does_not_match():
    target, predicted = np.ones((1, 4), int), np.array([[7, 7, 0, 0]])
    metric = PanopticQuality(is_thing=[True])
    metric.update(predicted, [segment(7, 0)], target, [segment(1, 0)])
    np.testing.assert_array_equal(metric.counts[:, 0], [0, 0, 1, 1])


def test_void_does_not_count_for_the_union():
    target, predicted = np.array([[1, 1, 0, 0, 0, 0]]), np.ones((1, 6), int)
    metric = PanopticQuality(is_thing=[True])
    metric.update(predicted, [segment(1, 0)], target, [segment(1, 0)])
    np.testing.assert_array_equal(metric.counts[:, 0], [1, 1, 0, 0])


@pytest.mark.parametrize(("on_void", "invented"), [(2, 1), (3, 0)])
def test_prediction_is_ignored_only_when_more_than_half_lies_on_void(on_void, invented):
    target = np.ones((1, 20), int)
    target[0, :on_void] = 0
    predicted = np.zeros((1, 20), int)
    predicted[0, :4] = 1
    metric = PanopticQuality(is_thing=[True, True])
    metric.update(predicted, [segment(1, 1)], target, [segment(1, 0)])
    assert metric.counts[2, 1] == invented


@pytest.mark.parametrize(("category", "invented"), [(0, 0), (1, 1)])
def test_crowd_excuses_predictions_of_its_own_category_only(category, invented):
    target = np.ones((4, 4), int)
    metric = PanopticQuality(is_thing=[True, True])
    metric.update(target, [segment(1, category)], target, [segment(1, 0, crowd=1)])
    np.testing.assert_array_equal(metric.counts[1:].sum(1), [0, invented, 0])


def test_no_predictions_give_zero():
    metric = PanopticQuality(is_thing=IS_THING)
    ids = np.ones((3, 3), int)
    metric.update(np.zeros_like(ids), [], ids, [segment(1, 0)])
    results = metric.compute()
    assert results["PQ"] == results["PQ_th"] == results["SQ"] == 0
    assert math.isnan(results["PQ_st"])


def test_all_void_and_unused_metric_are_nan():
    metric = PanopticQuality(is_thing=IS_THING)
    metric.update(np.zeros((1, 1), np.int32), [], np.zeros((1, 1), np.uint8), [])
    assert all(math.isnan(v) for v in metric.compute().values())
    assert list(metric.compute()) == ["PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st"]


def test_absent_categories_are_left_out_of_averages():
    ids = np.array([[1, 2]])
    metric = PanopticQuality(is_thing=[True] * 50)
    metric.update(ids, [segment(1, 0), segment(2, 1)], ids, [segment(1, 0), segment(2, 2)])
    assert metric.compute()["PQ"] == pytest.approx(100 / 3)  # 100, 0 (invented), 0 (missed)
    assert np.isnan(metric.per_category()[3:]).all()


def test_true_segment_without_a_pixel_is_missed():
    ids = np.ones((2, 2), int)
    metric = PanopticQuality(is_thing=[True])
    metric.update(ids, [segment(1, 0)], ids, [segment(1, 0), segment(2, 0)])
    np.testing.assert_array_equal(metric.counts[1:, 0], [1, 0, 1])


def test_merge_equals_one_run_and_leaves_the_other_alone():
    rng = np.random.default_rng(3)
    images = [random_image(rng) for _ in range(6)]
    joint, parts = PanopticQuality(is_thing=IS_THING), [PanopticQuality(is_thing=IS_THING) for _ in range(2)]
    for i, image in enumerate(images):
        joint.update(*image)
        parts[i % 2].update(*image)
    before = parts[1].counts.copy()
    parts[0].merge(parts[1])
    np.testing.assert_allclose(parts[0].counts, joint.counts, rtol=1e-14)
    np.testing.assert_array_equal(parts[1].counts, before)
    with pytest.raises(ValueError, match="is_thing"):
        joint.merge(PanopticQuality(is_thing=[True]))


def test_segment_objects_and_large_ids():
    ids = np.full((2, 2), 2**31 - 1)
    metric = PanopticQuality(is_thing=[True])
    metric.update(
        ids, [SimpleNamespace(id=2**31 - 1, category_id=0)], ids, [{"id": 2**31 - 1, "category_id": 0}]
    )
    assert metric.compute()["PQ"] == 100


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"predicted_ids": np.full((2, 2), 9)}, ValueError, r"predicted_ids.*predicted_segments.*\[9\]"),
        ({"target_ids": np.full((2, 2), 9)}, ValueError, r"target_ids.*target_segments.*\[9\]"),
        ({"predicted_segments": [segment(1, 0), segment(1, 0)]}, ValueError, "predicted_segments.*1 twice"),
        ({"predicted_segments": [segment(1, 0), segment(5, 0)]}, ValueError, r"pixel.*\[5\]"),
        ({"predicted_segments": [segment(1, 6)]}, ValueError, r"category_id.*\[0, 6\), got 6"),
        ({"target_segments": [segment(1, -1)]}, ValueError, "target_segments.*got -1"),
        ({"target_segments": [segment(0, 1)]}, ValueError, "void, got 0"),
        ({"predicted_ids": np.ones((2, 3), int)}, ValueError, "one shape"),
        ({"predicted_ids": np.ones((2, 2, 1), int)}, ValueError, r"\(H, W\)"),
        ({"predicted_ids": np.full((2, 2), -1)}, ValueError, "got -1"),
        ({"predicted_ids": np.ones((2, 2))}, TypeError, "float64"),
    ],
)
def test_wrong_input_is_named_and_changes_nothing(change, error, message):
    arguments = {
        "predicted_ids": np.ones((2, 2), int),
        "predicted_segments": [segment(1, 0)],
        "target_ids": np.ones((2, 2), int),
        "target_segments": [segment(1, 0)],
    }
    metric = PanopticQuality(is_thing=IS_THING)
    with pytest.raises(error, match=message):
        metric.update(**(arguments | change))
    assert not metric.counts.any()


def test_no_categories_are_refused():
    with pytest.raises(ValueError, match="is_thing"):
        PanopticQuality(is_thing=[])


# ---- panopticapi


def id_to_rgb(ids):
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def rgb_to_id(rgb):
    return rgb.astype(np.int64) @ np.array([1, 256, 65536])


def panopticapi_results(tmp_path, images, categories):
    """Runs panopticapi on one core. ``images``: tuples as update() takes them, with dataset category ids."""
    evaluation = pytest.importorskip("panopticapi.evaluation", reason="panopticapi is not installed")
    pairs = []
    for side in ("pred", "gt"):
        (tmp_path / side).mkdir()
    for i, (predicted_ids, predicted, target_ids, target) in enumerate(images):
        Image.fromarray(id_to_rgb(predicted_ids)).save(tmp_path / "pred" / f"{i}.png")
        Image.fromarray(id_to_rgb(target_ids)).save(tmp_path / "gt" / f"{i}.png")
        target = [dict(s, area=int((target_ids == s["id"]).sum())) for s in target]
        entry = {"image_id": i, "file_name": f"{i}.png"}
        pairs.append((entry | {"segments_info": target}, entry | {"segments_info": predicted}))
    folders = str(tmp_path / "gt"), str(tmp_path / "pred")
    stat = evaluation.pq_compute_single_core(0, pairs, *folders, categories)
    results = {}
    for suffix, flag in (("", None), ("_th", True), ("_st", False)):
        averages, per_class = stat.pq_average(categories, isthing=flag)
        results.update({f"{k.upper()}{suffix}": 100 * averages[k] for k in ("pq", "sq", "rq")})
        if flag is None:
            results["per_class"] = per_class
    return results


def perturbed(rng, ids, segments):
    """Shifts the map, splits and merges segments and swaps some categories, as a bad model would."""
    width = ids.shape[1]
    moved = np.roll(ids, rng.integers(-12, 13, 2), (0, 1))
    moved[:, : width // 20] = 0
    names = {int(i): n for n, i in enumerate(np.unique(moved[moved > 0]), start=1)}
    category = {s["id"]: s["category_id"] for s in segments}
    pool = sorted(set(category.values()))
    out, listed = np.zeros_like(ids), []
    for old, new in names.items():
        mask = moved == old
        label = category[old] if rng.random() < 0.85 else int(rng.choice(pool))
        parts = [mask]
        if rng.random() < 0.15:
            half = np.arange(width)[None] < np.median(np.nonzero(mask)[1])
            parts = [part for part in (mask & half, mask & ~half) if part.any()]
        for j, part in enumerate(parts):
            out[part] = new + 1000 * j
            listed.append({"id": new + 1000 * j, "category_id": label})
    return out, listed


def sample_images():
    """Predictions made from the ground truth of datasets/sample, or from random images without it."""
    rng = np.random.default_rng(0)
    path = SAMPLE / "annotations" / "panoptic_val2017.json"
    if not path.exists():
        images = [random_image(rng, height=120, width=160, crowds=False) for _ in range(20)]
        return images, {i: {"id": i, "isthing": int(flag)} for i, flag in enumerate(IS_THING)}
    annotation = json.loads(path.read_text())
    images = []
    for entry in annotation["annotations"]:
        with Image.open(SAMPLE / "panoptic_val2017" / entry["file_name"]) as png:
            ids = rgb_to_id(np.asarray(png.convert("RGB")))
        images.append((*perturbed(rng, ids, entry["segments_info"]), ids, entry["segments_info"]))
    return images, {c["id"]: c for c in annotation["categories"]}


def test_equals_panopticapi(tmp_path):
    images, categories = sample_images()
    expected = panopticapi_results(tmp_path, images, categories)
    contiguous = {category: k for k, category in enumerate(categories)}
    metric = PanopticQuality(is_thing=[bool(c["isthing"]) for c in categories.values()])

    def relabel(segments):
        return [dict(s, category_id=contiguous[s["category_id"]]) for s in segments]

    for predicted_ids, predicted, target_ids, target in images:
        metric.update(predicted_ids, relabel(predicted), target_ids, relabel(target))
    per_class = expected.pop("per_class")
    results = metric.compute()
    assert results == pytest.approx(expected, rel=1e-12)
    assert 5 < results["PQ"] < 95, "the perturbation must neither be empty nor destroy everything"
    rows = np.nan_to_num(metric.per_category())
    for category, k in contiguous.items():
        want = [100 * per_class[category][key] for key in ("pq", "sq", "rq")]
        np.testing.assert_allclose(rows[k], want, rtol=1e-12)
