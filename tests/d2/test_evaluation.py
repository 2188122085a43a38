"""Evaluators: perfect predictions score 100, types and switches decide what is computed, processes add up."""

import json

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from mask2former.d2.evaluation import (
    InstanceEvaluator,
    InstanceSegEvaluator,
    LoaderWithProgress,
    PanopticEvaluator,
    SemanticEvaluator,
    build_evaluator,
    core_metadata,
)
from mask2former.data import catalog, read_label_map, read_panoptic_colors
from mask2former.data.targets import mask_from_rle, panoptic_ids
from mask2former.modeling.postprocessing import masks_to_boxes

PANOPTIC = "coco_sample_val_panoptic_with_sem_seg"
INSTANCE = "coco_sample_val"


def panoptic_truth(record):
    """The ground truth of a record in the form of a prediction."""
    ids = torch.from_numpy(panoptic_ids(read_panoptic_colors(record["pan_seg_file_name"])))
    segments = [{"id": s["id"], "category_id": s["category_id"]} for s in record["segments_info"]]
    return {"panoptic_seg": (ids, segments)}


def semantic_truth(record):
    labels = torch.from_numpy(read_label_map(record["sem_seg_file_name"])).long()
    return {"sem_seg": torch.nn.functional.one_hot(labels.clamp(max=132), 133).permute(2, 0, 1)}


def instance_truth(record, scale=1.0):
    size = (record["height"], record["width"])
    objects = [a for a in record["annotations"] if not a.get("iscrowd")]
    masks = [torch.from_numpy(mask_from_rle(a["segmentation"], *size)) for a in objects]
    masks = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool)
    return {
        "instances": Instances(
            size,
            pred_classes=torch.tensor([a["category_id"] for a in objects], dtype=torch.int64),
            scores=scale * torch.linspace(0.9, 0.5, len(objects)),
            pred_masks=masks,
            pred_boxes=Boxes(masks_to_boxes(masks)),
        )
    }


def feed(evaluator, records, make):
    evaluator.reset()
    for record in records:
        evaluator.process([record], [make(record)])
    return evaluator.evaluate()


def test_perfect_predictions_score_100():
    records = DatasetCatalog.get(PANOPTIC)[:6]
    # crowds are no targets: as predictions they would be false positives or ignored, so leave such images out
    records = [r for r in records if not any(s.get("iscrowd") for s in r["segments_info"])]
    assert len(records) >= 3
    result = feed(PanopticEvaluator(PANOPTIC, 133), records, panoptic_truth)["panoptic_seg"]
    assert result["PQ"] == pytest.approx(100)
    result = feed(SemanticEvaluator(PANOPTIC), records, semantic_truth)["sem_seg"]
    assert result["mIoU"] == pytest.approx(100)
    assert result["pACC"] == pytest.approx(100)
    records = DatasetCatalog.get(INSTANCE)[:6]
    result = feed(InstanceEvaluator(INSTANCE), records, instance_truth)
    assert result["segm"]["AP"] == pytest.approx(100)
    assert result["bbox"]["AP"] > 95  # boxes of the file are COCO's, a pixel apart from those of the masks


def test_instances_equal_detectron2s_own_evaluator(tmp_path):
    """Noisy predictions on all sample images: the same AP as COCOEvaluator, masks and boxes."""
    records = DatasetCatalog.get(INSTANCE)
    generator = torch.Generator().manual_seed(0)

    def noisy(record):
        instances = instance_truth(record)["instances"]
        shift = torch.randint(-6, 7, (1,), generator=generator).item()
        masks = instances.pred_masks.roll(shift, dims=2)
        keep = torch.rand(len(instances), generator=generator) > 0.2
        noisy = Instances(instances.image_size)
        noisy.pred_masks = masks
        noisy.pred_boxes = Boxes(masks_to_boxes(masks))
        noisy.scores = torch.rand(len(instances), generator=generator)
        noisy.pred_classes = instances.pred_classes
        return {"instances": noisy[keep]}

    predictions = {r["image_id"]: noisy(r) for r in records}
    own = feed(InstanceEvaluator(INSTANCE, str(tmp_path)), records, lambda r: predictions[r["image_id"]])
    theirs = feed(
        COCOEvaluator(INSTANCE, ("bbox", "segm"), distributed=False, use_fast_impl=False),
        records,
        lambda r: predictions[r["image_id"]],
    )
    for task in ("segm", "bbox"):
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
            assert own[task][name] == pytest.approx(theirs[task][name], abs=1e-9, nan_ok=True), (task, name)
    assert 5 < own["segm"]["AP"] < 95
    saved = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len(saved) == sum(len(p["instances"]) for p in predictions.values())


def test_metrics_of_two_processes_add_up(monkeypatch):
    """What comm.gather brings from two processes gives what one process gives alone."""
    records = DatasetCatalog.get(PANOPTIC)[:4]

    def shifted(record):
        ids, segments = panoptic_truth(record)["panoptic_seg"]
        moved = torch.roll(ids, 20, dims=1)
        present = set(moved.unique().tolist())
        return {"panoptic_seg": (moved, [s for s in segments if s["id"] in present])}

    alone = feed(PanopticEvaluator(PANOPTIC, 133), records, shifted)
    parts = [PanopticEvaluator(PANOPTIC, 133) for _ in range(2)]
    for part, share in zip(parts, (records[:1], records[1:]), strict=True):
        part.reset()
        for record in share:
            part.process([record], [shifted(record)])
    from mask2former.d2 import evaluation

    gathered = [[task.metrics for task in part.tasks] for part in parts]
    monkeypatch.setattr(evaluation.comm, "gather", lambda _: gathered)
    together = parts[0].evaluate()
    assert together["panoptic_seg"] == pytest.approx(alone["panoptic_seg"], rel=1e-12, nan_ok=True)
    assert 5 < together["panoptic_seg"]["PQ"] < 95


def test_errors_of_the_thread_come_with_the_name_of_the_image(caplog):
    record = DatasetCatalog.get(PANOPTIC)[0]
    output = panoptic_truth(record)
    evaluator = PanopticEvaluator(PANOPTIC, 133)
    evaluator.reset()
    evaluator.process([record | {"pan_seg_file_name": "nowhere.png"}], [output])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluator.evaluate()
    assert f"Evaluating image {record['file_name']} failed" in caplog.text
    evaluator.reset()
    evaluator.process([record], [output])
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] > 0


def test_queries_of_instances_only_save_time():
    """Results of the model say which query an instance is from; its mask is then encoded once."""
    (record, *_) = [r for r in DatasetCatalog.get(INSTANCE) if sum(not a["iscrowd"] for a in r["annotations"]) > 1]
    found = []
    for with_queries in (False, True):
        output = instance_truth(record)
        one = output["instances"][[0, 0, 1]]
        if with_queries:
            one.pred_queries = torch.tensor([4, 4, 2])
        evaluator = InstanceEvaluator(INSTANCE)
        evaluator.process([record], [{"instances": one}])
        found.append(evaluator.tasks[0].metrics["instances"].results)
    assert found[0] == found[1] and len(found[0]) == 3


def task_names(evaluator):
    return [type(task).__name__ for task in evaluator.tasks]


def test_config_and_data_set_decide_what_is_evaluated(tiny_cfg):
    every = ["PanopticTask", "InstanceTask", "SemanticTask"]
    assert task_names(build_evaluator(tiny_cfg, PANOPTIC)) == every
    tiny_cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    assert task_names(build_evaluator(tiny_cfg, PANOPTIC)) == every[1:]
    assert task_names(build_evaluator(tiny_cfg, INSTANCE)) == every[1:2]
    assert task_names(build_evaluator(tiny_cfg, "coco_sample_val_sem_seg")) == every[2:]


def test_a_panoptic_set_without_semantic_maps_is_not_evaluated_for_them(tiny_cfg):
    fields = MetadataCatalog.get(PANOPTIC).as_dict()
    left_out = ("name", "sem_seg_root")
    MetadataCatalog.get("panoptic_alone").set(**{k: v for k, v in fields.items() if k not in left_out})
    assert task_names(build_evaluator(tiny_cfg, "panoptic_alone")) == ["PanopticTask", "InstanceTask"]


def test_refusals(tiny_cfg):
    MetadataCatalog.get("of_unknown_type").evaluator_type = "keypoints"
    with pytest.raises(ValueError, match="evaluator_type"):
        build_evaluator(tiny_cfg, "of_unknown_type")
    tiny_cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = False
    with pytest.raises(ValueError, match="switches none on"):
        build_evaluator(tiny_cfg, INSTANCE)


def test_the_published_name_stays():
    assert InstanceSegEvaluator is InstanceEvaluator


def test_one_pass_feeds_all_metrics_and_everything_is_written(tiny_cfg, tmp_path):
    tiny_cfg.MODEL.MASK_FORMER.TEST.BOUNDARY_METRICS = True
    records = [r for r in DatasetCatalog.get(PANOPTIC)[:3] if not any(s["iscrowd"] for s in r["segments_info"])]
    instances = {r["image_id"]: r for r in DatasetCatalog.get(INSTANCE)}

    def everything(record):
        found = instance_truth(instances[record["image_id"]])
        return panoptic_truth(record) | semantic_truth(record) | found

    results = feed(build_evaluator(tiny_cfg, PANOPTIC, str(tmp_path)), records, everything)
    assert list(results) == ["panoptic_seg", "boundary_panoptic_seg", "segm", "bbox", "boundary", "sem_seg"]
    for task, name in (("boundary_panoptic_seg", "PQ"), ("boundary", "AP"), ("segm", "AP"), ("sem_seg", "mIoU")):
        assert results[task][name] == pytest.approx(100), task
    assert {p.name for p in tmp_path.iterdir()} >= {"results.json", "results.txt", "coco_instances_results.json"}
    assert json.loads((tmp_path / "results.json").read_text())["panoptic_seg"]["PQ"] == pytest.approx(100)


def test_no_predictions_give_zeros(tiny_cfg):
    records = DatasetCatalog.get(PANOPTIC)[:2]

    def nothing(record):
        size = (record["height"], record["width"])
        found = Instances(size)
        found.pred_classes, found.scores = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        found.pred_masks, found.pred_boxes = torch.zeros(0, *size, dtype=torch.bool), Boxes(torch.zeros(0, 4))
        ids = torch.zeros(size, dtype=torch.int32)
        return {"panoptic_seg": (ids, []), "instances": found, "sem_seg": torch.zeros(133, *size)}

    results = feed(build_evaluator(tiny_cfg, PANOPTIC), records, nothing)
    assert results["panoptic_seg"]["PQ"] == results["segm"]["AP"] == results["bbox"]["AP"] == 0


def test_loader_with_progress_passes_everything_on(caplog):
    class Loader(list):
        dataset = range(5)

    with caplog.at_level("INFO", logger="mask2former"):
        loader = LoaderWithProgress(Loader([[{"a": 1}], [{"b": 2}]]), "set")
        assert len(loader) == 2 and list(loader) == [[{"a": 1}], [{"b": 2}]]
    assert "Predicted 5 images of set" in caplog.text


def labels_of(metadata):
    return [(c.id, c.name, c.is_thing) for c in metadata.categories]


def test_metadata_of_sets_that_others_have_registered():
    things = {"thing_classes": ["cat", "cow"], "thing_dataset_id_to_contiguous_id": {7: 0, 3: 1}}
    MetadataCatalog.get("own_instances").set(**things, evaluator_type="coco", json_file="i.json")
    metadata = core_metadata("own_instances")
    assert labels_of(metadata) == [(7, "cat", True), (3, "cow", True)]
    assert str(metadata.instances_json) == "i.json"
    MetadataCatalog.get("own_lvis").set(thing_classes=["cat", "cow"], evaluator_type="lvis")
    assert labels_of(core_metadata("own_lvis")) == [(1, "cat", True), (2, "cow", True)]
    MetadataCatalog.get("own_panoptic").set(
        thing_classes=["cow"], thing_dataset_id_to_contiguous_id={30: 1}, stuff_classes=["sky", "cow"],
        stuff_dataset_id_to_contiguous_id={20: 0, 30: 1}, evaluator_type="coco_panoptic_seg", ignore_label=9,
    )  # fmt: skip
    metadata = core_metadata("own_panoptic", 3)
    assert labels_of(metadata) == [(20, "sky", False), (30, "cow", True), (2, "class 2", False)]
    assert metadata.ignore_label == 9
    with pytest.raises(ValueError, match="NUM_CLASSES = 1"):
        core_metadata("own_panoptic", 1)
    MetadataCatalog.get("own_stuff").set(stuff_classes=["sky"], evaluator_type="coco_panoptic_seg")
    with pytest.raises(ValueError, match="thing_dataset_id_to_contiguous_id"):
        core_metadata("own_stuff", 1)


def test_data_sets_of_detectron2_itself_are_those_of_the_core():
    for name in ("cityscapes_fine_instance_seg_val", "cityscapes_fine_panoptic_val", "lvis_v1_val", "coco_2017_val"):
        metadata = core_metadata(name)
        known = catalog.get(name).metadata
        assert labels_of(metadata) == labels_of(known), name
        assert (metadata.evaluator_type, metadata.ignore_label) == (known.evaluator_type, known.ignore_label)
