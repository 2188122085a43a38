"""Which tasks a data set has, hand-checked results on the miniatures, and sets with hardly anything."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mask2former.data import catalog
from mask2former.data.catalog import Category, DatasetMetadata
from mask2former.evaluation.tasks import TASKS_OF_KIND, evaluated_tasks, make_tasks, merged_results
from mask2former.modeling.postprocessing import masks_to_boxes
from tests import miniatures
from tests.miniatures.scene import colors_of, save, save_json

pytest.importorskip("pycocotools", reason="instance AP needs pycocotools")
ALL_ON = {"panoptic_on": True, "instance_on": True, "semantic_on": True}


# ---- hand-checked values
#
# The first validation scene of a miniature is 64 x 56: above 64 x 12 pixels of one stuff class, below 60 x 44 of
# another, on which stand two objects of a class "many", 12 x 14 = 168 and 15 x 10 = 150 pixels, one of a class "one",
# 168 pixels, and, in some data sets, a crowd of "many", 160 pixels. The rest, 4 x 44, is void. The prediction has
# everything right but for the upper four rows, 48 pixels, of the first object, which it takes for the lower stuff;
# the crowd it has not found.

FIRST_IOU = 120 / 168  # 0.714: reached at five of the ten thresholds 0.5, 0.55, ... 0.95

# Three classes are perfect. Of "many" two are matched: (0.714 + 1) / 2. The lower stuff loses nothing in the panoptic
# prediction, where the 48 pixels are void. The crowd is neither right nor wrong.
PQ_MANY = 100 * (FIRST_IOU + 1) / 2
PANOPTIC = {"PQ": (300 + PQ_MANY) / 4, "PQ_th": (100 + PQ_MANY) / 2, "PQ_st": 100, "RQ": 100, "SQ": (300 + PQ_MANY) / 4}

# "one" is perfect. "many" is at five thresholds; at the other five the first object, with the better score, is wrong
# and the second right: precision 1/2 up to recall 1/2, which are 51 of 101 points. All objects are smaller than 32 x
# 32.
AP_MANY = 100 * (5 * 1 + 5 * 51 / 101 / 2) / 10
AP_ALL = (100 + AP_MANY) / 2
INSTANCES = {"AP": AP_ALL, "AP50": 100, "AP75": (100 + 100 * 51 / 101 / 2) / 2, "APs": AP_ALL}
# In LVIS's miniature "many" is common, "one" frequent.
LVIS = INSTANCES | {"APc": AP_MANY, "APf": 100}

# The upper stuff and "one" are perfect. The label maps give the crowd to "many": 168 + 150 + 160 = 478 pixels, 430 of
# them found; the lower stuff is 60 * 44 - 478 - 168 = 1994 pixels and 2042 in the prediction.
WITH_CROWD = 100 * (1 + 1 + 430 / 478 + 1994 / 2042) / 4
# Without a crowd: 318 pixels, 270 found; 60 * 44 - 318 - 168 = 2154 pixels, 2202 in the prediction.
WITHOUT_CROWD = 100 * (1 + 1 + 270 / 318 + 2154 / 2202) / 4

# Cityscapes' AP of "car": 1 at five overlaps. At the others, by rising score, (recall, precision) are (1/2, 1/2),
# (0, 0) and, always, (0, 1); each is as wide as half the distance of its neighbours: 1/4, 1/4 and 0. The area is 1/8.
AP_CAR = 100 * (5 * 1 + 5 / 8) / 10
CITYSCAPES_AP = {"AP": (100 + AP_CAR) / 2, "AP50": 100, "AP-car": AP_CAR, "AP-person": 100}
# iIoU: no pixel is wrongly called a car. Both cars weigh the same, and of the first one 120 of 168 pixels are found.
# Each of the four classes is in a group of its own.
IIOU = 100 * (1 + (FIRST_IOU + 1) / 2) / 2
CITYSCAPES_IOU = {"IoU": WITH_CROWD, "IoU_sup": WITH_CROWD, "iIoU": IIOU, "iIoU_sup": IIOU}

EXPECTED = {
    "coco_2017_val": (miniatures.coco, {"segm": INSTANCES, "bbox": INSTANCES}),
    "coco_2017_val_panoptic_with_sem_seg": (
        miniatures.coco,
        {"panoptic_seg": PANOPTIC, "segm": INSTANCES, "bbox": INSTANCES, "sem_seg": {"mIoU": WITH_CROWD}},
    ),
    "coco_2017_test_stuff_10k_sem_seg": (miniatures.coco_stuff_prepared, {"sem_seg": {"mIoU": WITHOUT_CROWD}}),
    "ade20k_sem_seg_val": (miniatures.ade20k_prepared, {"sem_seg": {"mIoU": WITHOUT_CROWD}}),
    "ade20k_full_sem_seg_val": (miniatures.ade20k_full_prepared, {"sem_seg": {"mIoU": WITHOUT_CROWD}}),
    "ade20k_instance_val": (miniatures.ade20k_prepared, {"segm": INSTANCES, "bbox": INSTANCES}),
    "ade20k_panoptic_val": (
        miniatures.ade20k_prepared,
        {"panoptic_seg": PANOPTIC, "segm": INSTANCES, "bbox": INSTANCES, "sem_seg": {"mIoU": WITHOUT_CROWD}},
    ),
    "cityscapes_fine_instance_seg_val": (miniatures.cityscapes, {"segm": CITYSCAPES_AP}),
    "cityscapes_fine_sem_seg_val": (miniatures.cityscapes, {"sem_seg": CITYSCAPES_IOU}),
    "cityscapes_fine_panoptic_val": (
        miniatures.cityscapes,
        {"panoptic_seg": PANOPTIC, "segm": CITYSCAPES_AP, "sem_seg": CITYSCAPES_IOU},
    ),
    "mapillary_vistas_sem_seg_val": (miniatures.mapillary_raw, {"sem_seg": {"mIoU": WITH_CROWD}}),
    "mapillary_vistas_panoptic_val": (
        miniatures.mapillary_raw,
        {"panoptic_seg": PANOPTIC, "sem_seg": {"mIoU": WITH_CROWD}},
    ),
    "mapillary_vistas_instance_val": (miniatures.mapillary_prepared, {"segm": INSTANCES, "bbox": INSTANCES}),
    "lvis_v1_val": (miniatures.lvis, {"segm": LVIS, "bbox": LVIS}),
}


def prediction(scene, metadata):
    """See above, with the labels of the data set."""
    label = {i: metadata.contiguous_ids.get(c.id) for i, c in enumerate(scene.categories)}
    objects = [region for region in scene.regions if not region.is_crowd][-3:]
    first = objects[0]
    lost = scene.mask(first) & (np.arange(scene.size[0]) < first.box[1] + 4)[:, None]
    found = [(region, scene.mask(region) & ~lost) for region in scene.regions if not region.is_crowd]
    ids = sum(number * mask for number, (_, mask) in enumerate(found, start=1))
    segments = [{"id": n, "category_id": label[region.category]} for n, (region, _) in enumerate(found, start=1)]
    masks = torch.from_numpy(np.stack([mask for region, mask in found if region in objects]))
    instances = SimpleNamespace(
        labels=torch.tensor([label[region.category] for region in objects]),
        scores=torch.tensor([0.9, 0.8, 0.7]), masks=masks, boxes=masks_to_boxes(masks),
    )  # fmt: skip
    semantic = None
    if len(found) > 3 and None not in {label[region.category] for region in scene.regions}:
        lower = scene.regions[1].category
        labels = scene.label_map(lower, np.int64)
        labels[lost] = lower
        table = torch.tensor([label[i] for i in range(len(scene.categories))])
        semantic = one_hot(table[torch.from_numpy(labels)], metadata.num_classes)
    panoptic = SimpleNamespace(ids=torch.from_numpy(ids), segments=segments)
    return SimpleNamespace(panoptic=panoptic, instances=instances, semantic=semantic)


def one_hot(labels, count):
    return torch.zeros(count, *labels.shape, dtype=torch.uint8).scatter_(0, labels[None].long(), 1)


@pytest.mark.parametrize("name", EXPECTED)
def test_results_on_miniatures_are_those_found_by_hand(tmp_path, monkeypatch, name):
    writer, expected = EXPECTED[name]
    scenes = writer(tmp_path)
    scene = scenes["test" if "stuff_10k" in name else "val"][0]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    entry = catalog.get(name)
    (record,) = (r for r in entry.load() if scene.name in Path(r["file_name"]).name)
    tasks = make_tasks(name, entry.metadata, ALL_ON)
    for task in tasks:
        task.update(record, prediction(scene, entry.metadata))
    results = merged_results(tasks, lambda part: [part])
    assert list(results) == list(expected)
    for task, numbers in expected.items():
        for metric, value in numbers.items():
            assert results[task][metric] == pytest.approx(value, abs=1e-9), (task, metric)


def test_every_published_kind_has_hand_checked_values():
    published = {
        "coco", "coco_panoptic_seg", "sem_seg", "ade20k_panoptic_seg", "cityscapes_instance", "cityscapes_sem_seg",
        "cityscapes_panoptic_seg", "mapillary_vistas_panoptic_seg", "lvis",
    }  # fmt: skip
    assert {catalog.get(name).metadata.evaluator_type for name in EXPECTED} == published == set(TASKS_OF_KIND)


# ---- which tasks


def metadata_of(kind, *, things=2, stuff=1, **files):
    categories = [Category(10 + i, f"class {i}", i < things, (0, 0, 0)) for i in range(things + stuff)]
    return DatasetMetadata(categories=tuple(categories), evaluator_type=kind, **files)


FILES = {"instances_json": Path("i.json"), "sem_seg_root": Path("s")}


@pytest.mark.parametrize(
    ("metadata", "off", "tasks"),
    [
        (metadata_of("coco_panoptic_seg", **FILES), [], ["panoptic", "instance", "semantic"]),
        (metadata_of("coco_panoptic_seg"), [], ["panoptic"]),
        (metadata_of("coco_panoptic_seg", things=0, **FILES), [], ["panoptic", "semantic"]),
        (metadata_of("ade20k_panoptic_seg", **FILES), ["panoptic"], ["instance", "semantic"]),
        (metadata_of("mapillary_vistas_panoptic_seg", **FILES), ["instance"], ["panoptic", "semantic"]),
        (metadata_of("cityscapes_panoptic_seg"), [], ["panoptic", "cityscapes_instance", "cityscapes_semantic"]),
        (metadata_of("cityscapes_panoptic_seg"), ["instance", "semantic"], ["panoptic"]),
        (metadata_of("coco"), ["semantic", "panoptic"], ["instance"]),
        (metadata_of("lvis"), [], ["lvis"]),
        (metadata_of("sem_seg"), [], ["semantic"]),
    ],
)
def test_data_set_and_switches_decide(metadata, off, tasks):
    settings = ALL_ON | {f"{name}_on": False for name in off}
    assert evaluated_tasks("some", metadata, settings) == tasks


def test_refusals():
    with pytest.raises(ValueError, match=r"evaluator_type of data set 'some' must be one of .*got 'keypoints'"):
        evaluated_tasks("some", metadata_of("keypoints"), ALL_ON)
    with pytest.raises(ValueError, match="switches none on"):
        evaluated_tasks("some", metadata_of("lvis"), ALL_ON | {"instance_on": False})
    with pytest.raises(ValueError, match="instances_json"):
        make_tasks("some", metadata_of("coco"), ALL_ON)


def test_names_that_occur_twice_are_told_apart(tmp_path):
    categories = tuple(Category(i, "door", False, (0, 0, 0)) for i in (4, 7))
    metadata = DatasetMetadata(categories=categories, evaluator_type="sem_seg")
    (task,) = make_tasks("some", metadata, ALL_ON)
    save(tmp_path / "labels.png", np.array([[0, 1]], np.uint8))
    task.update({"sem_seg_file_name": tmp_path / "labels.png"}, SimpleNamespace(semantic=torch.eye(2)[:, None]))
    assert task.results()["sem_seg"]["IoU-door (7)"] == 100


def test_instances_of_one_query_have_one_mask(tmp_path, monkeypatch):
    scene = miniatures.coco(tmp_path)["val"][0]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    entry = catalog.get("coco_2017_val")
    (record,) = (r for r in entry.load() if scene.name in Path(r["file_name"]).name)
    stuff = Category(10**6, "stuff", False, (0, 0, 0))  # left out, wherever it stands
    metadata = replace(entry.metadata, categories=(stuff, *entry.metadata.categories))
    found = prediction(scene, entry.metadata).instances
    order = torch.tensor([2, 0, 1, 0, 2])
    labels = 1 + found.labels[torch.tensor([2, 0, 1, 2, 0])]
    labels[2] = 0
    repeated = SimpleNamespace(
        labels=labels, scores=torch.linspace(0.9, 0.5, 5), masks=found.masks[order], boxes=found.boxes[order]
    )
    with_queries = SimpleNamespace(**vars(repeated), queries=torch.tensor([40, 7, 9, 7, 40]))
    saved = []
    for instances in (repeated, with_queries):
        (task,) = make_tasks("some", metadata, ALL_ON)
        taken = task.take(SimpleNamespace(instances=instances))
        assert len(taken.masks) == (4 if instances is repeated else 2)
        task.count(record, taken)
        saved.append(task.metrics["instances"].results)
    assert len(saved[0]) == 4 and saved[0] == saved[1]


def test_labels_are_as_good_as_scores(tmp_path):
    metadata = metadata_of("sem_seg")
    save(tmp_path / "labels.png", np.array([[0, 1, 2], [2, 1, 0]], np.uint8))
    scores = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for semantic in (scores, scores.argmax(0), scores.argmax(0).int()):
        (task,) = make_tasks("some", metadata, ALL_ON)
        task.update({"sem_seg_file_name": tmp_path / "labels.png"}, SimpleNamespace(semantic=semantic))
        results.append(task.results())
    assert results[0] == results[1] == results[2] and 0 < results[0]["sem_seg"]["pACC"] < 100


# ---- numbers, not crashes


def panoptic_set(folder, labels, metadata):
    """One image of four columns, the last void; labels of the others."""
    ids = np.zeros((8, 8), int)
    ids[:, :6] = np.repeat([1, 2, 3], 2)
    save(folder / "panoptic.png", colors_of(ids))
    semantic = np.full((8, 8), 255, np.uint8)
    semantic[:, :6] = np.repeat(labels, 2)
    save(folder / "labels.png", semantic)
    things = [c.id for c in metadata.categories if c.is_thing]
    save_json(folder / "instances.json", {
        "images": [{"id": 1, "height": 8, "width": 8}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": metadata.categories[label].id, "bbox": [2 * n - 2, 0, 2, 8],
             "area": 16, "segmentation": [[2 * n - 2, 0, 2 * n, 0, 2 * n, 8, 2 * n - 2, 8]]}
            for n, label in enumerate(labels, start=1) if metadata.categories[label].id in things
        ],
        "categories": [{"id": c.id, "name": c.name} for c in metadata.categories],
    })  # fmt: skip
    rows = [{"id": n, "category_id": label, "iscrowd": 0} for n, label in enumerate(labels, start=1)]
    return {
        "image_id": 1, "pan_seg_file_name": folder / "panoptic.png", "segments_info": rows,
        "sem_seg_file_name": folder / "labels.png",
    }  # fmt: skip


def nothing(size, count):
    """A model that finds neither segments nor instances."""
    masks = torch.zeros(0, *size, dtype=torch.bool)
    return SimpleNamespace(
        panoptic=SimpleNamespace(ids=torch.zeros(size, dtype=torch.int32), segments=[]),
        instances=SimpleNamespace(
            labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0), masks=masks, boxes=torch.zeros(0, 4)
        ),
        semantic=torch.zeros(count, *size),
    )


def everything(record, labels, count):
    ids = torch.zeros(8, 8, dtype=torch.int64)
    ids[:, :6] = torch.tensor([1, 2, 3]).repeat_interleave(2)
    masks = torch.stack([ids == n for n in (1, 2, 3)])
    table = torch.tensor([0, *labels])
    return SimpleNamespace(
        panoptic=SimpleNamespace(ids=ids, segments=record["segments_info"]),
        instances=SimpleNamespace(
            labels=torch.tensor(labels), scores=torch.tensor([0.9, 0.8, 0.7]), masks=masks, boxes=masks_to_boxes(masks)
        ),
        semantic=one_hot(table[ids], count),
    )


@pytest.mark.parametrize(("things", "stuff"), [(3, 0), (0, 3), (2, 1)], ids=["things only", "stuff only", "both"])
@pytest.mark.parametrize("finds", [False, True], ids=["nothing found", "everything found"])
def test_panoptic_sets_of_any_kind_give_numbers(tmp_path, things, stuff, finds):
    files = {"instances_json": tmp_path / "instances.json", "sem_seg_root": tmp_path}
    metadata = metadata_of("coco_panoptic_seg", things=things, stuff=stuff, **files)
    labels = [0, 1, 2]
    record = panoptic_set(tmp_path, labels, metadata)
    tasks = make_tasks("some", metadata, ALL_ON, with_boundary=True)
    result = everything(record, labels, 3) if finds else nothing((8, 8), 3)
    for task in tasks:
        task.update(record, result)
    results = merged_results(tasks, lambda part: [part])
    value = 100 if finds else 0
    for name in ("panoptic_seg", "boundary_panoptic_seg"):
        assert results[name]["PQ"] == value
        for part, count in (("th", things), ("st", stuff)):
            found = results[name][f"PQ_{part}"]
            assert found == value if count else math.isnan(found)
    assert ("segm" in results) == (things > 0)
    if things:
        assert results["segm"]["AP"] == results["bbox"]["AP"] == results["boundary"]["AP"] == pytest.approx(value)
    # a semantic map has a class everywhere: without a guess the first one, which is right for a third
    assert results["sem_seg"]["mIoU"] == pytest.approx(100 if finds else 100 / 9)
    json.dumps(results)


@pytest.mark.parametrize("name", ["cityscapes_fine_panoptic_val", "lvis_v1_val", "ade20k_panoptic_val"])
def test_nothing_found_is_zero_in_other_sets(tmp_path, monkeypatch, name):
    EXPECTED[name][0](tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    entry = catalog.get(name)
    tasks = make_tasks(name, entry.metadata, ALL_ON, with_boundary=True)
    for record in entry.load():
        for task in tasks:
            task.update(record, nothing((record["height"], record["width"]), entry.metadata.num_classes))
    results = merged_results(tasks, lambda part: [part])
    assert results["segm"]["AP"] == 0
    for name in ("panoptic_seg", "boundary_panoptic_seg", "boundary"):
        if name in results:
            assert results[name].get("PQ", results[name].get("AP")) == 0


@pytest.mark.parametrize("name", ["coco_2017_val_panoptic_with_sem_seg", "cityscapes_fine_panoptic_val", "lvis_v1_val"])
def test_no_image_at_all_is_not_a_number(tmp_path, monkeypatch, name):
    EXPECTED[name][0](tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    results = merged_results(make_tasks(name, catalog.get(name).metadata, ALL_ON), lambda part: [part])
    assert all(math.isnan(value) for numbers in results.values() for value in numbers.values())
