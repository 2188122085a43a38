"""Cityscapes' metrics against closed forms, naive loops over pixels and cityscapesscripts itself."""

import math
import pickle

import numpy as np
import pytest
from PIL import Image

from mask2former.evaluation import CityscapesAP, CityscapesIoU
from mask2former.evaluation.cityscapes_labels import CLASSES, VOID_LABEL_IDS

NAMES = [c.name for c in CLASSES]
OBJECTS = [c.name for c in CLASSES if c.mean_size is not None]
LABEL_IDS = {c.name: c.label_id for c in CLASSES}
TRAIN_IDS = np.full(34, 255, np.uint8)
TRAIN_IDS[[c.label_id for c in CLASSES]] = np.arange(19)
HEIGHT, WIDTH = 96, 160


def label_map(instance_ids):
    """Instance ids to labels 0..18, and 255."""
    return TRAIN_IDS[np.where(instance_ids >= 1000, instance_ids // 1000, instance_ids)]


def random_scene(rng):
    """Instance ids: areas of stuff and void, objects of all sizes, groups, caravans."""
    ids = np.kron(rng.choice([7, 8, 11, 13, 21, 23, 0, 3, 9], (6, 8)), np.ones((16, 20), int))
    for number in range(24):
        label = int(rng.choice([24, 25, 26, 27, 28, 29, 31, 32, 33]))
        y, x = int(rng.integers(HEIGHT - 4)), int(rng.integers(WIDTH - 4))
        h, w = int(rng.integers(4, 40)), int(rng.integers(4, 50))
        ids[y : y + h, x : x + w] = label if rng.random() < 0.15 else label * 1000 + number
    return ids.astype(np.int32)


def random_detections(rng, ids):
    """Shifted, doubled and relabelled objects, groups and void; scores of which some are equal."""
    labels, masks = [], []
    for value in np.unique(ids):
        label = int(value) // 1000 if value >= 1000 else int(value)
        for _ in range(int(rng.integers(0, 4))):
            masks.append(np.roll(ids == value, rng.integers(-2, 3, 2), (0, 1)))
            known = [i for i, name in enumerate(OBJECTS) if LABEL_IDS[name] == label]
            labels.append(known[0] if known and rng.random() < 0.9 else int(rng.integers(len(OBJECTS))))
    masks.append(np.zeros_like(ids, dtype=bool))
    labels.append(0)
    return np.array(labels), np.round(rng.random(len(masks)), 1), np.array(masks)


def random_labels(rng, target):
    """A segmentation made from the truth: shifted, and wrong in blocks."""
    moved = np.roll(target, rng.integers(-3, 4, 2), (0, 1)).astype(int)
    wrong = np.kron(rng.random((12, 20)) < 0.3, np.ones((8, 8), bool)) | (moved == 255)
    return np.where(wrong, np.kron(rng.integers(0, 19, (12, 20)), np.ones((8, 8), int)), moved)


# ---- IoU


def naive_iou(images):
    """The definition with boolean masks: pixels of void count nowhere; objects weigh mean size / size."""
    hit, wrong, missed = ({c.name: 0 for c in CLASSES} | {c.group: 0 for c in CLASSES} for _ in range(3))
    weighted_hit, weighted_missed = dict(hit), dict(hit)
    for predicted, target, ids in images:
        valid = target != 255
        for key in hit:
            members = [i for i, c in enumerate(CLASSES) if key in (c.name, c.group)]
            p, t = np.isin(predicted, members), np.isin(target, members)
            hit[key] += (p & t & valid).sum()
            wrong[key] += (p & ~t & valid).sum()
            missed[key] += (~p & t & valid).sum()
            for value in np.unique(ids[ids > 1000]):
                of_class = [c for c in CLASSES if c.label_id == value // 1000 and key in (c.name, c.group)]
                for c in of_class:
                    mask = ids == value
                    weight = c.mean_size / mask.sum()
                    weighted_hit[key] += weight * (mask & p).sum()
                    weighted_missed[key] += weight * (mask & ~p).sum()
    results = {}
    for suffix, keys in (("", NAMES), ("_sup", list(dict.fromkeys(c.group for c in CLASSES)))):
        with_objects = [k for k in keys if all(c.mean_size for c in CLASSES if k in (c.name, c.group))]
        iou = {k: divide(hit[k], hit[k] + wrong[k] + missed[k]) for k in keys}
        iiou = {k: divide(weighted_hit[k], weighted_hit[k] + wrong[k] + weighted_missed[k]) for k in with_objects}
        for name, values in ((f"IoU{suffix}", iou), (f"iIoU{suffix}", iiou)):
            results[name] = 100 * np.nanmean(list(values.values()))
            results |= {f"{name}-{k}": 100 * value for k, value in values.items()}
    return results


def divide(part, whole):
    return part / whole if whole else math.nan


@pytest.fixture(scope="module")
def iou_images():
    rng = np.random.default_rng(0)
    images = []
    for _ in range(4):
        ids = random_scene(rng)
        images.append((random_labels(rng, label_map(ids)), label_map(ids), ids))
    return images


def iou_of(images):
    metric = CityscapesIoU(class_names=NAMES)
    for image in images:
        metric.update(*image)
    return metric


def test_iou_equals_a_naive_loop(iou_images):
    results = iou_of(iou_images).compute()
    assert results == pytest.approx(naive_iou(iou_images), rel=1e-12, nan_ok=True)
    assert list(results)[:4] == ["IoU", "iIoU", "IoU_sup", "iIoU_sup"]
    assert 10 < results["iIoU"] < 90 and "iIoU-road" not in results and "iIoU_sup-human" in results


def test_iou_in_closed_form():
    # A car of 4 pixels of which 3 are found, one pixel of road taken for a truck, one of void for a car.
    ids = np.array([[26001, 26001, 26001, 26001, 7, 7, 3, 3]])
    predicted = np.array([[13, 13, 13, 0, 0, 14, 13, 0]])
    results = iou_of([(predicted, label_map(ids), ids)]).compute()
    assert results["IoU-car"] == pytest.approx(75)  # 3 of 4; the pixel on void does not count
    assert results["IoU-road"] == pytest.approx(100 / 3)  # 1 right, 1 missed, 1 wrong
    assert results["IoU-truck"] == 0 and math.isnan(results["IoU-bus"])
    assert results["IoU"] == pytest.approx((75 + 100 / 3) / 3)
    assert results["IoU_sup-vehicle"] == pytest.approx(60)  # 3 right, 1 missed, 1 wrong
    weight = 12794.0202738185 / 4
    assert results["iIoU-car"] == pytest.approx(75)
    assert results["iIoU_sup-vehicle"] == pytest.approx(100 * 3 * weight / (4 * weight + 1))


def test_iou_of_processes_adds_up(iou_images):
    whole, parts = iou_of(iou_images), [iou_of(iou_images[:1]), iou_of(iou_images[1:])]
    parts[0].merge(pickle.loads(pickle.dumps(parts[1])))
    assert parts[0].compute() == pytest.approx(whole.compute(), rel=1e-12, nan_ok=True)
    with pytest.raises(ValueError, match="class_names"):
        whole.merge(CityscapesIoU(class_names=NAMES[:3]))


def test_iou_without_anything_to_find_is_nan():
    ids = np.full((2, 2), 3)
    for images in ([], [(np.zeros((2, 2), int), label_map(ids), ids)]):
        assert all(math.isnan(value) for value in iou_of(images).compute().values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"predicted": np.full((2, 2), 19)}, ValueError, "predicted.*got 19"),
        ({"instance_ids": np.zeros((2, 3), int)}, ValueError, r"instance_ids.*\(2, 2\), got \(2, 3\)"),
        ({"instance_ids": np.zeros((2, 2))}, TypeError, "instance_ids.*float64"),
        ({"target": np.full((2, 2), 20)}, ValueError, "target.*got 20"),
    ],
)
def test_iou_names_wrong_input_and_stays_as_it_was(change, error, message):
    metric = CityscapesIoU(class_names=NAMES)
    arguments = {name: np.zeros((2, 2), int) for name in ("predicted", "target", "instance_ids")}
    with pytest.raises(error, match=message):
        metric.update(**(arguments | change))
    assert not metric.pixels.counts.any() and not metric.weighted.any()


def test_classes_that_are_not_of_cityscapes_are_refused():
    with pytest.raises(ValueError, match=r"class_names.*\['road', 'cow'\]"):
        CityscapesIoU(class_names=["road", "cow"])
    with pytest.raises(ValueError, match=r"have objects, got \['sky'\]"):
        CityscapesAP(class_names=["car", "sky"])


def test_iou_equals_cityscapesscripts(tmp_path, monkeypatch, iou_images):
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # gone from NumPy 2.4, cityscapesscripts 2.3 needs it
    peer = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", reason="cityscapesscripts is not installed"
    )
    files = {"pred": [], "labelIds": []}
    for number, (predicted, _, ids) in enumerate(iou_images):
        label_ids = np.where(ids >= 1000, ids // 1000, ids)
        for kind, pixels in (
            ("pred", np.array(list(LABEL_IDS.values()), np.uint8)[predicted]),
            ("labelIds", label_ids.astype(np.uint8)),
            ("instanceIds", ids.astype(np.uint16)),
        ):
            Image.fromarray(pixels).save(tmp_path / f"{number}_{kind}.png")
        for kind, paths in files.items():
            paths.append(str(tmp_path / f"{number}_{kind}.png"))
    monkeypatch.setattr(peer.args, "quiet", True)
    monkeypatch.setattr(peer.args, "JSONOutput", False)
    theirs = peer.evaluateImgLists(files["pred"], files["labelIds"], peer.args)
    results = iou_of(iou_images).compute()
    for name, key, average in (
        ("IoU", "classScores", "averageScoreClasses"),
        ("iIoU", "classInstScores", "averageScoreInstClasses"),
        ("IoU_sup", "categoryScores", "averageScoreCategories"),
        ("iIoU_sup", "categoryInstScores", "averageScoreInstCategories"),
    ):
        assert results[name] == pytest.approx(100 * theirs[average], abs=1e-9)
        for part, value in theirs[key].items():
            assert results.get(f"{name}-{part}", math.nan) == pytest.approx(100 * value, abs=1e-9, nan_ok=True), part


# ---- AP


def naive_ap(images):
    """The rules one by one, with boolean masks: AP by class and overlap."""
    overlaps = [0.5 + 0.05 * i for i in range(10)]
    table = np.full((len(OBJECTS), 10), np.nan)
    for k, name in enumerate(OBJECTS):
        for t, overlap in enumerate(overlaps):
            scores, rights, objects = [], [], 0
            for labels, all_scores, masks, ids in images:
                void = np.isin(ids, VOID_LABEL_IDS)
                same = [v for v in np.unique(ids) if (v // 1000 if v >= 1000 else v) == LABEL_IDS[name]]
                is_small = {v: (ids == v).sum() < 100 for v in same}
                mine = [(s, m) for label, s, m in zip(labels, all_scores, masks, strict=True) if label == k and m.any()]
                targets = [v for v in same if v >= 1000 and not is_small[v]]
                objects += len(targets)
                for v in targets:
                    fitting = sorted((s for s, m in mine if iou(m, ids == v) > overlap + 1e-12), reverse=True)
                    scores += fitting
                    rights += [True] + [False] * (len(fitting) - 1) if fitting else []
                for s, m in mine:
                    if any(iou(m, ids == v) > overlap + 1e-12 for v in same):
                        continue
                    ignored = (m & void).sum()
                    ignored += sum((m & (ids == v)).sum() * (int(v < 1000) + int(is_small[v])) for v in same)
                    if ignored / m.sum() <= overlap + 1e-12:
                        scores.append(s)
                        rights.append(False)
            if objects:
                table[k, t] = area_under_steps(np.array(scores), np.array(rights, bool), objects)
    return table


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def area_under_steps(scores, rights, objects):
    """Cityscapes' integral: a point for every different score, and (0, 1); each as wide as half its neighbours."""
    points = []
    for threshold in np.unique(scores):
        chosen = scores >= threshold
        points.append((rights[chosen].sum() / objects, rights[chosen].mean()))
    points.append((0.0, 1.0))
    area = 0.0
    for i, (_, precision) in enumerate(points):
        before = points[max(i - 1, 0)][0]
        after = points[i + 1][0] if i + 1 < len(points) else 0.0
        area += precision * (before - after) / 2
    return area


@pytest.fixture(scope="module")
def ap_images():
    rng = np.random.default_rng(1)
    scenes = [random_scene(rng) for _ in range(4)]
    return [(*random_detections(rng, ids), ids) for ids in scenes]


def ap_of(images, names=OBJECTS):
    metric = CityscapesAP(class_names=names)
    for image in images:
        metric.update(*image)
    return metric


def test_ap_equals_a_naive_loop(ap_images):
    table = 100 * naive_ap(ap_images)
    results = ap_of(ap_images).compute()
    for name, row in zip(OBJECTS, table, strict=True):
        assert results[f"AP-{name}"] == pytest.approx(row.mean(), rel=1e-12, nan_ok=True)
    assert results["AP"] == pytest.approx(np.nanmean(table), rel=1e-12)
    assert results["AP50"] == pytest.approx(np.nanmean(table[:, 0]), rel=1e-12)
    assert 10 < results["AP"] < 90


def test_ap_equals_cityscapesscripts(tmp_path, monkeypatch, ap_images):
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    peer = pytest.importorskip(
        "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling", reason="cityscapesscripts is not installed"
    )
    monkeypatch.setattr(peer, "writeDict2JSON", lambda *_: None)  # what it writes on the way, fails with NumPy 2
    predictions, truths = [], []
    for number, (labels, scores, masks, ids) in enumerate(ap_images):
        lines = []
        for i, (label, score, mask) in enumerate(zip(labels, scores, masks, strict=True)):
            Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"{number}_{i}.png")
            lines.append(f"{number}_{i}.png {LABEL_IDS[OBJECTS[label]]} {score}\n")
        (tmp_path / f"{number}.txt").write_text("".join(lines))
        Image.fromarray(ids.astype(np.uint16)).save(tmp_path / f"{number}_instanceIds.png")
        predictions.append(str(tmp_path / f"{number}.txt"))
        truths.append(str(tmp_path / f"{number}_instanceIds.png"))
    for name, value in (
        ("quiet", True), ("JSONOutput", False), ("predictionPath", str(tmp_path)),
        ("gtInstancesFile", str(tmp_path / "gtInstances.json")),
    ):  # fmt: skip
        monkeypatch.setattr(peer.args, name, value)
    theirs = peer.evaluateImgLists(predictions, truths, peer.args)["averages"]
    results = ap_of(ap_images).compute()
    assert results["AP"] == pytest.approx(100 * theirs["allAp"], abs=1e-9)
    assert results["AP50"] == pytest.approx(100 * theirs["allAp50%"], abs=1e-9)
    for name in OBJECTS:
        assert results[f"AP-{name}"] == pytest.approx(100 * theirs["classes"][name]["ap"], abs=1e-9, nan_ok=True)


def rectangle(y, x, h, w):
    mask = np.zeros((40, 60), bool)
    mask[y : y + h, x : x + w] = True
    return mask


def scene(areas):
    ids = np.full((40, 60), 7)
    for value, box in areas:
        ids[rectangle(*box)] = value
    return ids


def test_ap_of_one_object_found_of_two():
    # The found one has IoU 0.8 and counts at 0.5 ... 0.75 (0.8 is not above 0.8). There the points (recall, precision)
    # are (1/2, 1) and (0, 1), each with half of the step: 1/2. Mean over ten overlaps: 6/10 of it.
    ids = scene([(26001, (0, 0, 20, 10)), (26002, (0, 30, 20, 10))])
    results = ap_of([([0], [0.9], rectangle(0, 0, 16, 10)[None], ids)], ["car"]).compute()
    assert results == pytest.approx({"AP": 30, "AP50": 50, "AP-car": 30})


def test_ap_counts_the_second_prediction_of_an_object_as_wrong():
    # By falling score: right (recall 1, precision 1), wrong (1, 1/2). Points from the lowest score: (1, 1/2), (1, 1),
    # (0, 1), as wide as (1 - 1) / 2, (1 - 0) / 2 and (1 - 0) / 2: area 1.
    ids = scene([(26001, (0, 0, 20, 10))])
    masks = np.stack([rectangle(0, 0, 20, 10)] * 2)
    assert ap_of([([0, 0], [0.9, 0.8], masks, ids)], ["car"]).compute()["AP"] == pytest.approx(100)
    assert ap_of([([0, 0], [0.8, 0.8], masks, ids)], ["car"]).compute()["AP"] == pytest.approx(75)  # (1, 1/2), (0, 1)


@pytest.mark.parametrize(
    ("area", "is_ignored"),
    [
        ((3, (20, 0, 20, 10)), True),  # void
        ((26, (20, 0, 20, 10)), True),  # group of the class
        ((26002, (20, 0, 9, 11)), True),  # too small an object of the class
        ((24, (20, 0, 20, 10)), False),  # group of another class
        ((24001, (20, 0, 9, 11)), False),
        ((29001, (20, 0, 20, 10)), False),  # a single caravan is no void there
    ],
)
def test_ap_leaves_out_predictions_on_what_is_not_judged(area, is_ignored):
    ids = scene([(26001, (0, 0, 20, 10)), area])
    masks = np.stack([rectangle(0, 0, 20, 10), ids == area[0]])
    results = ap_of([([0, 0], [0.5, 0.9], masks, ids)], ["car"]).compute()
    # Wrong first, then right: points (1, 1/2), (0, 0), (0, 1) of widths 1/2, 1/2 and 0.
    assert results["AP"] == pytest.approx(100 if is_ignored else 25)


def test_ap_degenerate_cases():
    ids = scene([(26001, (0, 0, 20, 10))])
    nothing = ([], [], np.zeros((0, 40, 60), bool), ids)
    empty_mask = ([0], [0.5], np.zeros((1, 40, 60), bool), ids)
    wrong = ([0], [0.5], rectangle(20, 20, 5, 5)[None], ids)
    for image in (nothing, empty_mask, wrong):
        results = ap_of([image], ["car", "bus"]).compute()
        assert results["AP"] == results["AP-car"] == 0 and math.isnan(results["AP-bus"])
    on_void = ([0], [0.5], rectangle(20, 20, 5, 5)[None], np.where(rectangle(20, 20, 5, 5), 0, ids))
    assert ap_of([on_void], ["car"]).compute()["AP"] == 0
    for images in ([], [([0], [0.5], rectangle(0, 0, 5, 5)[None], np.full((40, 60), 7))]):
        assert all(math.isnan(value) for value in ap_of(images).compute().values())


def test_ap_of_processes_adds_up(ap_images):
    whole, parts = ap_of(ap_images), [ap_of(ap_images[:2]), ap_of(ap_images[2:])]
    parts[0].merge(pickle.loads(pickle.dumps(parts[1])))
    assert parts[0].compute() == pytest.approx(whole.compute(), rel=1e-12, nan_ok=True)
    with pytest.raises(ValueError, match="class_names"):
        whole.merge(CityscapesAP(class_names=["car"]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": [1]}, ValueError, r"labels.*\[0, 1\), got 1"),
        ({"labels": [0.0]}, TypeError, "labels.*float64"),
        ({"scores": [math.nan]}, ValueError, "scores.*nan"),
        ({"scores": [0.5, 0.5]}, ValueError, r"labels, scores and masks.*\(2,\)"),
        ({"masks": np.zeros((1, 40, 60), np.uint8)}, TypeError, "masks.*uint8"),
        ({"masks": np.zeros((1, 40, 61), bool)}, ValueError, r"labels, scores and masks.*61"),
        ({"instance_ids": np.zeros((40, 60))}, TypeError, "instance_ids.*float64"),
        ({"instance_ids": np.zeros((40, 60, 3), int)}, ValueError, r"instance_ids.*\(H, W\)"),
        ({"instance_ids": np.full((40, 60), -1)}, ValueError, "instance_ids.*-1"),
    ],
)
def test_ap_names_wrong_input_and_stays_as_it_was(change, error, message):
    metric = CityscapesAP(class_names=["car"])
    arguments = {
        "labels": [0],
        "scores": [0.5],
        "masks": rectangle(0, 0, 5, 5)[None],
        "instance_ids": scene([(26001, (0, 0, 20, 10))]),
    }
    with pytest.raises(error, match=message):
        metric.update(**(arguments | change))
    assert math.isnan(metric.compute()["AP"])
