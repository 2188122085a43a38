"""Test-time augmentation with Detectron2: the published class, the trainer, the same numbers as the other engine."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser

import mask2former
from mask2former.d2 import SemanticSegmentorWithTTA, Trainer, launch
from mask2former.d2.data import build_test_loader, register_datasets
from mask2former.data import catalog, read_image
from mask2former.inference import image_result, predict_image
from mask2former.tta import TestAugmentation, augmented_result


@pytest.fixture
def tta_cfg(tiny_cfg):
    """One test image, in both catalogs."""
    name, whole = "one_for_test_tta", catalog.get("coco_sample_val_panoptic_with_sem_seg")
    if name not in DatasetCatalog:
        catalog.register(catalog.CatalogEntry(name, lambda: whole.load()[:1], whole.metadata))
        register_datasets()
    tiny_cfg.DATASETS.TEST = (name,)
    tiny_cfg.TEST.AUG.ENABLED = True
    tiny_cfg.TEST.AUG.MIN_SIZES = (64, 48)
    tiny_cfg.TEST.AUG.MAX_SIZE = 96
    tiny_cfg.MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD = 0.0
    return tiny_cfg


@pytest.fixture
def model(tta_cfg):
    torch.manual_seed(0)
    return Trainer.build_model(tta_cfg).eval()


def test_the_published_name_is_there_and_loaded_when_asked_for():
    assert mask2former.SemanticSegmentorWithTTA is SemanticSegmentorWithTTA


def test_it_gives_the_core_s_numbers_in_detectron2_s_form(tta_cfg, model):
    inputs = next(iter(build_test_loader(tta_cfg, tta_cfg.DATASETS.TEST[0])))
    (found,) = SemanticSegmentorWithTTA(tta_cfg, model)(inputs)
    size = (inputs[0]["height"], inputs[0]["width"])
    expected = augmented_result(
        model,
        inputs[0]["image"],
        size,
        model.inference,
        lambda: model.is_thing,
        TestAugmentation(min_sizes=(64, 48), max_size=96, flip=True),
    )
    assert set(found) == {"sem_seg", "panoptic_seg", "instances"}
    assert torch.equal(found["sem_seg"], expected.semantic)
    assert torch.equal(found["panoptic_seg"][0], expected.panoptic.ids)
    assert [s["category_id"] for s in found["panoptic_seg"][1]] == [s.category_id for s in expected.panoptic.segments]
    assert torch.equal(found["instances"].scores, expected.instances.scores)
    assert found["instances"].image_size == size


def test_one_view_of_the_test_size_is_the_plain_result(tta_cfg, model):
    tta_cfg.TEST.AUG.MIN_SIZES = (64,)
    tta_cfg.TEST.AUG.FLIP = False
    inputs = next(iter(build_test_loader(tta_cfg, tta_cfg.DATASETS.TEST[0])))
    with torch.no_grad():
        (plain,) = model(inputs)
    (found,) = SemanticSegmentorWithTTA(tta_cfg, model)(inputs)
    assert torch.equal(found["sem_seg"], plain["sem_seg"])
    assert torch.equal(found["panoptic_seg"][0], plain["panoptic_seg"][0])
    assert found["panoptic_seg"][1] == plain["panoptic_seg"][1]
    assert torch.equal(found["instances"].pred_masks, plain["instances"].pred_masks)


def test_an_image_that_is_only_named_is_read_at_its_own_size(tta_cfg, model):
    tta_cfg.TEST.AUG.MIN_SIZES = (48,)
    tta_cfg.TEST.AUG.FLIP = False
    (inputs,) = next(iter(build_test_loader(tta_cfg, tta_cfg.DATASETS.TEST[0])))
    (found,) = SemanticSegmentorWithTTA(tta_cfg, model)([{"file_name": inputs["file_name"]}])
    pixels = read_image(inputs["file_name"])
    assert found["sem_seg"].shape[1:] == pixels.shape[:2]
    whole = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    size = TestAugmentation(min_sizes=(48,), max_size=96, flip=False).sizes(*pixels.shape[:2])[0]
    from mask2former.tta import _resized

    with torch.no_grad():
        view = predict_image(model, _resized(whole, size), pixels.shape[:2])
    expected = image_result(*view, model.inference, lambda: model.is_thing)
    assert torch.equal(found["sem_seg"], expected.semantic)


def test_another_model_is_refused(tta_cfg):
    with pytest.raises(ValueError, match="must be a MaskFormer, got Linear"):
        SemanticSegmentorWithTTA(tta_cfg, torch.nn.Linear(1, 1))


def test_a_training_ends_with_it_and_both_engines_report_the_same(tta_cfg, tmp_path):
    tta_cfg.SOLVER.MAX_ITER = 1
    tta_cfg.DATALOADER.NUM_WORKERS = 0
    torch.manual_seed(0)
    trainer = Trainer(tta_cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    output = Path(tta_cfg.OUTPUT_DIR)
    results = trainer._last_eval_results
    plain = {"panoptic_seg", "segm", "bbox", "sem_seg"}
    assert set(results) == plain | {f"{name}_TTA" for name in plain}
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    names = set().union(*lines)
    assert {"panoptic_seg/PQ", "panoptic_seg_TTA/PQ", "sem_seg_TTA/mIoU", "segm_TTA/AP50"} <= names
    name = tta_cfg.DATASETS.TEST[0]
    assert (output / "inference_TTA" / name / "coco_instances_results.json").is_file()

    tta_cfg.MODEL.WEIGHTS = str(output / "model_final.pth")
    (tmp_path / "config.yaml").write_text(tta_cfg.dump())
    arguments = ["--config-file", str(tmp_path / "config.yaml"), "--eval-only", "OUTPUT_DIR", str(tmp_path / "again")]
    again = launch.run(default_argument_parser().parse_args(arguments))
    assert_equal_results(again, results)

    pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed, see requirements-train.txt")
    from mask2former.engine.config import get_config
    from mask2former.engine.launch import train_or_evaluate

    overrides = ["OUTPUT_DIR", str(tmp_path / "embedded"), "DATASETS.TRAIN", f"('{name}',)"]
    cfg = get_config(tmp_path / "config.yaml", overrides)
    assert_equal_results(train_or_evaluate(cfg, eval_only=True), results)


def assert_equal_results(a, b):
    assert a.keys() == b.keys()
    for task in b:
        for name, value in b[task].items():
            assert a[task][name] == pytest.approx(value, abs=1e-6, nan_ok=True), (task, name)
