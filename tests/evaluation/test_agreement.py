"""All metrics of one evaluation against panopticapi, pycocotools and plain loops over real, distorted annotations.

The annotations are those of datasets/sample and, where $DETECTRON2_DATASETS has it, of coco_panoptic_mini. Predictions
are made of them: shifted, eroded, merged, dropped and relabelled.
"""

import contextlib
import copy
import io
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mask2former.data import catalog, read_label_map, read_panoptic_ids
from mask2former.data.targets import mask_from_segmentation
from mask2former.evaluation.tasks import make_tasks, merged_results
from mask2former.modeling.postprocessing import masks_to_boxes

pytest.importorskip("pycocotools", reason="instance AP needs pycocotools")
ALL_ON = {"panoptic_on": True, "instance_on": True, "semantic_on": True}
HAS_MINI = (Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "coco_panoptic_mini").is_dir()
SETS = [
    "coco_sample",
    pytest.param(
        "coco_mini",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not HAS_MINI, reason="$DETECTRON2_DATASETS has no coco_panoptic_mini"),
        ],
    ),
]


def shifted(mask, down, right):
    """The mask moved, with nothing coming in from the other side."""
    height, width = mask.shape
    out = np.zeros_like(mask)
    out[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = mask[
        max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
    ]
    return out


def eroded(mask, times):
    """Without its pixels that have a neighbour, diagonal ones too, outside; as many times."""
    for _ in range(times):
        mask = mask & shifted(mask, 0, 1) & shifted(mask, 0, -1)
        mask = mask & shifted(mask, 1, 0) & shifted(mask, -1, 0)
    return mask


def noisy_segments(rng, masks, labels, pool):
    """(mask, label) of a prediction, in an order in which later ones are in front."""
    found = []
    for mask, label in zip(masks, labels, strict=True):
        fate = rng.random()
        if fate < 0.1:
            continue
        out = shifted(mask, *rng.integers(-4, 5, 2).tolist())
        if fate < 0.5:
            out = eroded(out, int(rng.integers(1, 4)))
        if fate > 0.95 and found:
            found[-1] = (found[-1][0] | out, found[-1][1])
        elif out.any():
            found.append((out, label if rng.random() < 0.9 else int(rng.choice(pool))))
    return found


def panoptic_prediction(rng, record):
    truth, rows = read_panoptic_ids(record["pan_seg_file_name"]), record["segments_info"]
    labels = [row["category_id"] for row in rows]
    found = noisy_segments(rng, [truth == row["id"] for row in rows], labels, labels)
    ids = np.zeros_like(truth)
    for number, (mask, _) in enumerate(found, start=1):
        ids[mask] = number
    seen = set(np.unique(ids).tolist())
    segments = [{"id": n, "category_id": label} for n, (_, label) in enumerate(found, start=1) if n in seen]
    return SimpleNamespace(ids=torch.from_numpy(ids), segments=segments)


def instance_prediction(rng, annotations, size):
    masks = [mask_from_segmentation(a["segmentation"], *size) for a in annotations]
    labels = [a["category_id"] for a in annotations]
    found = noisy_segments(rng, masks, labels, labels) + noisy_segments(rng, masks[:2], labels[:2], labels)
    stack = torch.zeros(len(found), *size, dtype=torch.bool)
    for place, (mask, _) in enumerate(found):
        stack[place] = torch.from_numpy(mask)
    scores = torch.from_numpy(np.round(rng.random(len(found)), 2))  # some are equal
    labels = torch.tensor([label for _, label in found], dtype=torch.int64)
    return SimpleNamespace(labels=labels, scores=scores, masks=stack, boxes=masks_to_boxes(stack))


def semantic_prediction(rng, record):
    labels = read_label_map(record["sem_seg_file_name"]).astype(np.int64)
    moved = np.roll(labels, rng.integers(-4, 5, 2), (0, 1))
    height, width = labels.shape
    blocks = np.kron(rng.random((height // 16 + 1, width // 16 + 1)) < 0.2, np.ones((16, 16), bool))[:height, :width]
    moved[blocks] = rng.choice(np.unique(labels[labels != 255]), int(blocks.sum()))
    moved[moved == 255] = 0
    return torch.zeros(133, height, width, dtype=torch.uint8).scatter_(0, torch.from_numpy(moved)[None], 1)


@pytest.fixture(scope="module", params=SETS)
def evaluated(request):
    """Records, predictions, ground truth of instances, results."""
    entry = catalog.get(f"{request.param}_val_panoptic_with_sem_seg")
    records = entry.load()
    if request.param == "coco_sample":
        records = records[:6]
    instances = {record["image_id"]: record for record in catalog.get(f"{request.param}_val").load()}
    rng = np.random.default_rng(0)
    tasks = make_tasks(entry.name, entry.metadata, ALL_ON, with_boundary=True)
    predictions = []
    for record in records:
        annotations = instances[record["image_id"]]["annotations"]
        result = SimpleNamespace(
            panoptic=panoptic_prediction(rng, record),
            instances=instance_prediction(rng, annotations, (record["height"], record["width"])),
            semantic=semantic_prediction(rng, record),
        )
        predictions.append(result)
        for task in tasks:
            task.update(record, result)
    results = merged_results(tasks, lambda part: [part])
    assert list(results) == ["panoptic_seg", "boundary_panoptic_seg", "segm", "bbox", "boundary", "sem_seg"]
    detections = tasks[1].metrics["instances"].results
    return SimpleNamespace(
        entry=entry, records=records, predictions=predictions, results=results, detections=detections
    )


def names(evaluated):
    return [category.name for category in evaluated.entry.metadata.categories]


def save_ids(ids, path):
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(path)


def test_pq_equals_panopticapi(evaluated, tmp_path):
    peer = pytest.importorskip("panopticapi.evaluation", reason="panopticapi is not installed")
    categories = {i: {"isthing": int(c.is_thing)} for i, c in enumerate(evaluated.entry.metadata.categories)}
    pairs = []
    for record, result in zip(evaluated.records, evaluated.predictions, strict=True):
        name = Path(record["pan_seg_file_name"]).name
        save_ids(result.panoptic.ids.numpy(), tmp_path / name)
        truth = read_panoptic_ids(record["pan_seg_file_name"])
        rows = [row | {"area": int((truth == row["id"]).sum())} for row in record["segments_info"]]
        entry = {"image_id": record["image_id"], "file_name": name}
        predicted = entry | {"segments_info": copy.deepcopy(result.panoptic.segments)}
        pairs.append((entry | {"segments_info": rows}, predicted))
    folder = Path(evaluated.records[0]["pan_seg_file_name"]).parent
    with contextlib.redirect_stdout(io.StringIO()):
        stat = peer.pq_compute_single_core(0, pairs, str(folder), str(tmp_path), categories)
    found = evaluated.results["panoptic_seg"]
    for suffix, is_thing in (("", None), ("_th", True), ("_st", False)):
        averages, _ = stat.pq_average(categories, isthing=is_thing)
        for key in ("pq", "sq", "rq"):
            assert found[f"{key.upper()}{suffix}"] == pytest.approx(100 * averages[key], abs=1e-9)
    _, of_classes = stat.pq_average(categories, isthing=None)
    for label, name in enumerate(names(evaluated)):
        value = found[f"PQ-{name}"]
        assert (0 if math.isnan(value) else value) == pytest.approx(100 * of_classes[label]["pq"], abs=1e-9)
    assert 10 < found["PQ"] < 90


def naive_rim(mask):
    return mask & ~eroded(mask, max(1, round(0.02 * math.hypot(*mask.shape))))


def test_boundary_pq_equals_its_definition(evaluated):
    """Pairs of masks, one by one, with min(IoU of masks, IoU of boundary regions); void does not count."""
    metadata = evaluated.entry.metadata
    iou, hits, wrong, missed = (np.zeros(metadata.num_classes) for _ in range(4))
    for record, result in zip(evaluated.records, evaluated.predictions, strict=True):
        truth, ids = read_panoptic_ids(record["pan_seg_file_name"]), result.panoptic.ids.numpy()
        predicted = [(s["category_id"], ids == s["id"]) for s in result.panoptic.segments]
        rims = [naive_rim(mask) for _, mask in predicted]
        is_matched = [False] * len(predicted)
        for row in record["segments_info"]:
            if row["iscrowd"]:
                continue
            mask = truth == row["id"]
            rim = naive_rim(mask)
            best = 0.0
            for i, (label, other) in enumerate(predicted):
                if label != row["category_id"] or not (mask & other).any():
                    continue
                of_masks = (mask & other).sum() / (mask | (other & (truth != 0))).sum()
                of_rims = (rim & rims[i]).sum() / max((rim | (rims[i] & (truth != 0))).sum(), 1)
                if min(of_masks, of_rims) > 0.5:
                    best = min(of_masks, of_rims)
                    is_matched[i] = True
            iou[row["category_id"]] += best
            hits[row["category_id"]] += best > 0
            missed[row["category_id"]] += best == 0
        for (label, mask), matched in zip(predicted, is_matched, strict=True):
            ignored = truth == 0
            for row in record["segments_info"]:
                if row["iscrowd"] and row["category_id"] == label:
                    ignored = ignored | (truth == row["id"])
            wrong[label] += not matched and (mask & ignored).sum() <= 0.5 * mask.sum()
    weight = hits + wrong / 2 + missed / 2
    quality = 100 * iou[weight > 0] / weight[weight > 0]
    found = evaluated.results["boundary_panoptic_seg"]
    assert found["PQ"] == pytest.approx(quality.mean(), abs=1e-9)
    classes = np.array([found[f"PQ-{name}"] for name in names(evaluated)])
    np.testing.assert_allclose(classes[weight > 0], quality, atol=1e-9)
    assert np.isnan(classes[weight == 0]).all()
    assert 3 < found["PQ"] < evaluated.results["panoptic_seg"]["PQ"] - 3


def coco_evaluation(evaluated, kind, eval_class=None):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    drop = {"bbox": ("boundary",), "segm": ("boundary", "bbox")}[kind]  # with "bbox" loadRes takes the box's area
    detections = [{k: v for k, v in d.items() if k not in drop} for d in copy.deepcopy(evaluated.detections)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(evaluated.entry.metadata.instances_json))
        evaluation = (eval_class or COCOeval)(truth, truth.loadRes(detections), kind)
        evaluation.params.imgIds = [record["image_id"] for record in evaluated.records]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def assert_equal_ap(evaluated, found, evaluation):
    keys = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    for key, value in zip(keys, evaluation.stats, strict=False):
        assert found[key] == pytest.approx(100 * value if value >= 0 else math.nan, abs=1e-9, nan_ok=True), key
    things = [c for c in evaluated.entry.metadata.categories if c.is_thing]
    for k, category_id in enumerate(evaluation.params.catIds):
        precision = evaluation.eval["precision"][:, :, k, 0, -1]
        precision = precision[precision > -1]
        expected = 100 * precision.mean() if precision.size else math.nan
        name = next(c.name for c in things if c.id == category_id)
        assert found[f"AP-{name}"] == pytest.approx(expected, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_ap_equals_pycocotools(evaluated, kind):
    assert_equal_ap(evaluated, evaluated.results[kind], coco_evaluation(evaluated, kind))
    assert 10 < evaluated.results[kind]["AP"] < 90


def test_boundary_ap_equals_its_definition(evaluated):
    """pycocotools with an IoU of our own: min of masks and boundary regions, pixel by pixel."""
    from pycocotools import mask as mask_api
    from pycocotools.cocoeval import COCOeval

    class NaiveBoundaryEval(COCOeval):
        def computeIoU(self, image_id, category_id):  # noqa: N802
            truth = self._gts[image_id, category_id]
            order = np.argsort([-d["score"] for d in self._dts[image_id, category_id]], kind="mergesort")
            found = [self._dts[image_id, category_id][i] for i in order[:100]]
            table = np.zeros((len(found), len(truth)))
            pairs = [[mask_api.decode(a["segmentation"]).astype(bool) for a in group] for group in (found, truth)]
            rims = [[naive_rim(mask) for mask in masks] for masks in pairs]
            for (i, j), _ in np.ndenumerate(table):
                table[i, j] = min(
                    (a[i] & b[j]).sum() / max((a[i] if truth[j]["iscrowd"] else a[i] | b[j]).sum(), 1)
                    for a, b in (pairs, rims)
                )
            return table if table.size else []

    found = evaluated.results["boundary"]
    assert_equal_ap(evaluated, found, coco_evaluation(evaluated, "segm", NaiveBoundaryEval))
    assert 5 < found["AP"] < evaluated.results["segm"]["AP"]


def test_miou_equals_a_naive_loop(evaluated):
    hits, union = np.zeros(133), np.zeros(133)
    seen = set()
    for record, result in zip(evaluated.records, evaluated.predictions, strict=True):
        truth = read_label_map(record["sem_seg_file_name"])
        predicted = np.where(truth == 255, 255, result.semantic.argmax(0).numpy())
        present = set(np.unique(truth).tolist()) - {255}
        seen |= present
        for label in present | set(np.unique(predicted).tolist()) - {255}:
            hits[label] += ((truth == label) & (predicted == label)).sum()
            union[label] += ((truth == label) | (predicted == label)).sum()
    expected = 100 * np.mean([hits[label] / union[label] for label in sorted(seen)])
    assert evaluated.results["sem_seg"]["mIoU"] == pytest.approx(expected, abs=1e-9)
    assert 10 < expected < 90
