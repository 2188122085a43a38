"""Every data set and task from start to end: raw miniature, prepare scripts, two training steps, evaluation.

The evaluation is then repeated with a model that knows the two validation pictures but takes the single object of
the second thing class on the second picture for one of the first class. Its metrics are worked out by hand below.
"""

import math
import runpy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mask2former.data import catalog
from mask2former.engine.config import get_config
from mask2former.engine.evaluation import evaluate
from mask2former.engine.trainer import Trainer
from mask2former.modeling.structures import MaskPrediction
from tests import miniatures

ROOT = Path(__file__).parents[2]
SURE = 20.0  # a logit whose probability is 1 within rounding
WRONG_SCORE = 0.9
SIZE_OF_A_CAR = 12794.0202738185  # in pixels, by cityscapesscripts' evalPixelLevelSemanticLabeling


class Case(NamedTuple):
    """A data set and a task.

    Attributes:
        train: name of the data set to train on.
        test: name of the one to evaluate on.
        write: writes the raw miniature.
        scripts: that prepare it.
        mapper: INPUT.DATASET_MAPPER_NAME.
        on: the results that are switched on.
        metrics: names of the groups of results.
    """

    train: str
    test: str
    write: object
    scripts: tuple
    mapper: str
    on: str
    metrics: set


PAN, INS, SEM = "panoptic_seg", {"segm", "bbox"}, "sem_seg"
ADE_SCRIPTS = ("prepare_ade20k_sem_seg", "prepare_ade20k_pan_seg", "prepare_ade20k_ins_seg")
CASES = {
    "ade20k semantic": Case("ade20k_sem_seg_train", "ade20k_sem_seg_val", miniatures.ade20k_raw, ADE_SCRIPTS[:1],
                            "mask_former_semantic", "semantic", {SEM}),
    "ade20k panoptic": Case("ade20k_panoptic_train", "ade20k_panoptic_val", miniatures.ade20k_raw, ADE_SCRIPTS,
                            "mask_former_panoptic", "semantic instance panoptic", {SEM, PAN, *INS}),
    "ade20k instance": Case("ade20k_instance_train", "ade20k_instance_val", miniatures.ade20k_raw, ADE_SCRIPTS[2:],
                            "mask_former_instance", "instance", INS),
    "ade20k full": Case("ade20k_full_sem_seg_train", "ade20k_full_sem_seg_val", miniatures.ade20k_full_raw,
                        ("prepare_ade20k_full_sem_seg",), "mask_former_semantic", "semantic", {SEM}),
    "cityscapes semantic": Case("cityscapes_fine_sem_seg_train", "cityscapes_fine_sem_seg_val", miniatures.cityscapes,
                                (), "mask_former_semantic", "semantic", {SEM}),
    "cityscapes panoptic": Case("cityscapes_fine_panoptic_train", "cityscapes_fine_panoptic_val",
                                miniatures.cityscapes, (), "mask_former_panoptic", "semantic instance panoptic",
                                {SEM, PAN, "segm"}),
    "cityscapes instance": Case("cityscapes_fine_instance_seg_train", "cityscapes_fine_instance_seg_val",
                                miniatures.cityscapes, (), "mask_former_instance", "instance", {"segm"}),
    "mapillary semantic": Case("mapillary_vistas_sem_seg_train", "mapillary_vistas_sem_seg_val",
                               miniatures.mapillary_raw, (), "mask_former_semantic", "semantic", {SEM}),
    "mapillary panoptic": Case("mapillary_vistas_panoptic_train", "mapillary_vistas_panoptic_val",
                               miniatures.mapillary_raw, (), "mask_former_panoptic", "semantic panoptic", {SEM, PAN}),
    "mapillary instance": Case("mapillary_vistas_instance_train", "mapillary_vistas_instance_val",
                               miniatures.mapillary_raw, ("prepare_mapillary_vistas_ins_seg",),
                               "mask_former_instance", "instance", INS),
    "coco panoptic": Case("coco_2017_train_panoptic", "coco_2017_val_panoptic_with_sem_seg", miniatures.coco,
                          ("prepare_coco_semantic_annos_from_panoptic_annos",), "coco_panoptic_lsj",
                          "semantic instance panoptic", {SEM, PAN, *INS}),
    "coco instance": Case("coco_2017_train", "coco_2017_val", miniatures.coco, (), "coco_instance_lsj", "instance",
                          INS),
    "coco semantic": Case("coco_2017_train_panoptic_with_sem_seg", "coco_2017_val_panoptic_with_sem_seg",
                          miniatures.coco, (), "mask_former_semantic", "semantic", {SEM}),
    "coco-stuff": Case("coco_2017_train_stuff_10k_sem_seg", "coco_2017_test_stuff_10k_sem_seg",
                       miniatures.coco_stuff_raw, ("prepare_coco_stuff_10k_sem_seg",), "mask_former_semantic",
                       "semantic", {SEM}),
    "lvis": Case("lvis_v1_train", "lvis_v1_val", miniatures.lvis, (), "coco_instance_lsj", "instance", INS),
}  # fmt: skip


def config_of(case, output, *, test_size):
    metadata = catalog.get(case.train).metadata
    overrides = {
        "OUTPUT_DIR": output,
        "DATASETS.TRAIN": f"('{case.train}',)",
        "DATASETS.TEST": f"('{case.test}',)",
        "INPUT.DATASET_MAPPER_NAME": case.mapper,
        "INPUT.IMAGE_SIZE": 64,
        "INPUT.MIN_SIZE_TRAIN": "(64, 80)",
        "INPUT.MAX_SIZE_TRAIN": 160,
        "INPUT.CROP.ENABLED": True,
        "INPUT.CROP.TYPE": "absolute",
        "INPUT.CROP.SIZE": "(64, 64)",
        "INPUT.SIZE_DIVISIBILITY": 64,
        "INPUT.MIN_SIZE_TEST": test_size,
        "INPUT.MAX_SIZE_TEST": test_size,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": metadata.num_classes,
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": metadata.ignore_label,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 10,
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 128,
        "MODEL.MASK_FORMER.TEST.SCORE_THRESHOLD": 0.5,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.STEPS": "(1,)",
        "TEST.EVAL_PERIOD": 2,
    }
    for task in ("semantic", "instance", "panoptic"):
        overrides[f"MODEL.MASK_FORMER.TEST.{task.upper()}_ON"] = task in case.on
    words = [str(word) for pair in overrides.items() for word in pair]
    return get_config(ROOT / "configs/quick_schedules/smoke.yaml", words)


class Oracle:
    """Instead of a model's `predict`: the content of the picture that has this height, with one mistake."""

    def __init__(self, scenes, metadata):
        self.labels, self.num_classes = metadata.contiguous_ids, metadata.num_classes
        self.scenes = {scene.size[0]: scene for scene in scenes}
        self.mistaken = scenes[1]

    def __call__(self, batch, *, all_layers):
        assert not all_layers
        height, width = batch.shape[2] // 4, batch.shape[3] // 4
        fitting = [scene for scene in self.scenes.values() if -(-4 * scene.size[0] // 32) * 32 == batch.shape[2]]
        scene = fitting[0]
        queries = [self._query(scene, region) for region in scene.regions]
        queries = [query for query in queries if query is not None]
        logits = torch.full((len(queries), self.num_classes + 1), -SURE)
        masks = torch.full((len(queries), height, width), -SURE)
        for query, (label, score, mask) in enumerate(queries):
            logits[query, label] = math.log(score)
            logits[query, -1] = math.log1p(-score) if score < 1 else -SURE
            masks[query, : mask.shape[0], : mask.shape[1]][torch.from_numpy(mask)] = SURE
        return [MaskPrediction(logits[None], masks[None])]

    def _query(self, scene, region):
        """(label, score, mask), None for a class that the data set does not have."""
        category, score = scene.categories[region.category], 1.0
        if scene is self.mistaken and region is single_object(scene):
            category, score = scene.categories[several_objects(scene)], WRONG_SCORE
        label = self.labels.get(category.id)
        return None if label is None else (label, score, scene.mask(region))


def single_object(scene):
    """The region that the oracle mistakes on the second picture; 847 classes of ADE20K are no things."""
    return [region for region in scene.regions if not region.is_crowd][-1]


def several_objects(scene):
    """The category with two objects on each picture."""
    return [region for region in scene.regions if not region.is_crowd][-2].category


def by_hand(scenes):
    """The oracle's metrics, by group. The first thing class has four objects and one false positive of the lowest
    score, the second one found and one missed object; stuff is right, and all masks are exact.
    """
    mistaken = sum(scenes[1].mask(single_object(scenes[1])).ravel())
    areas = {}
    for scene in scenes:
        for category, mask in scene.labels.items():
            areas[category] = areas.get(category, 0) + mask.sum()
    many, one = several_objects(scenes[0]), single_object(scenes[0]).category
    ious = dict.fromkeys(areas, 1.0)
    ious[many] = areas[many] / (areas[many] + mistaken)
    ious[one] = (areas[one] - mistaken) / areas[one]
    stuff = [1.0] * (len(areas) - 2)
    pq_things = [4 / (4 + 0.5 * 1), 1 / (1 + 0.5 * 1)]
    # Pixels of a single object weigh so much that together they count as one car of the usual size; false ones do not
    # weigh more. The class of the missed object has half of its two equal weights.
    by_object = [4 * SIZE_OF_A_CAR / (4 * SIZE_OF_A_CAR + mistaken), 0.5]
    miou = 100 * mean(list(ious.values()))
    return {
        PAN: {"PQ": 100 * mean(stuff + pq_things), "PQ_th": 100 * mean(pq_things), "SQ": 100.0, "PQ_st": 100.0},
        SEM: {"mIoU": miou},
        # recall 0.5 at precision 1: 51 of COCO's 101 places; half of the area under Cityscapes' curve
        "segm": {"AP": 100 * mean([1.0, 51 / 101])},
        "cityscapes segm": {"AP": 100 * mean([1.0, 0.5])},
        # each of the four classes is in a category of its own
        "cityscapes sem_seg": {"IoU": miou, "IoU_sup": miou, "iIoU": 100 * mean(by_object),
                               "iIoU_sup": 100 * mean(by_object)},
    }  # fmt: skip


def mean(numbers):
    return sum(numbers) / len(numbers)


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def prepared(request, tmp_path, monkeypatch):
    """(case, validation scenes), with the data set ready below $DETECTRON2_DATASETS."""
    case = CASES[request.param]
    root = tmp_path / "datasets"
    scenes = case.write(root)
    if request.param == "coco panoptic":  # the miniature brings what the script makes
        for half in ("train", "val"):
            for file in (root / "coco" / f"panoptic_semseg_{half}2017").iterdir():
                file.unlink()
    for script in case.scripts:
        main = runpy.run_path(str(ROOT / "datasets" / f"{script}.py"))["main"]
        assert main(["--root", str(root), "--workers", "1"]) == 0
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    return case, scenes.get("val") or scenes["test"]


def test_train_and_evaluate(prepared, tmp_path):
    case, scenes = prepared
    trainer = Trainer(config_of(case, tmp_path / "output", test_size=64))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert set(trainer.last_results) == case.metrics
    for number in ("PQ", "mIoU", "AP"):
        for group in trainer.last_results.values():
            assert 0 <= group.get(number, 0) <= 100

    trainer.model.predict = Oracle(scenes, catalog.get(case.test).metadata)
    # at four times the size of the pictures, where the model's masks have just that size
    results = evaluate(config_of(case, tmp_path / "oracle", test_size=256), trainer.model)
    assert set(results) == case.metrics
    expected = by_hand(scenes)
    for group in case.metrics - {"bbox"}:
        numbers = expected[group]
        if "cityscapes" in case.test:
            numbers = expected.get(f"cityscapes {group}", numbers)
        assert {name: results[group][name] for name in numbers} == pytest.approx(numbers, abs=1e-9)
