"""From a Detectron2 config and its checkpoint to predictions and a model file, as with the embedded engine."""

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import MetadataCatalog

from mask2former.d2 import Trainer, export_model, predictor_from_config
from mask2former.d2.predictor import categories_of
from mask2former.predictor import Predictor
from tests.d2.conftest import REPOSITORY

PICTURE = REPOSITORY / "demo/pictures/yellow_bus.jpg"


@pytest.fixture
def cfg(tiny_cfg, tmp_path):
    """With weights."""
    path = tmp_path / "weights.pth"
    torch.save({"model": Trainer.build_model(tiny_cfg).state_dict()}, path)
    tiny_cfg.merge_from_list(["MODEL.WEIGHTS", str(path)])
    return tiny_cfg


def test_model_file_predicts_as_the_config_does(cfg, tmp_path):
    path = tmp_path / "model.safetensors"
    description = export_model(cfg, path, dtype=torch.float32, notes={"by": "a test"})
    assert description.notes == {"by": "a test"}
    ours, file = predictor_from_config(cfg), Predictor.from_file(path)
    assert ours.settings == file.settings
    assert ours.settings.shortest == 64
    assert ours.categories == file.categories
    assert ours.categories[0].name == "person"
    assert np.array_equal(ours(PICTURE, "semantic").labels, file(PICTURE, "semantic").labels)


def test_the_embedded_engine_makes_the_same_predictor(cfg, tmp_path):
    pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed, see requirements-train.txt")
    from mask2former.engine import predictor
    from mask2former.engine.config import get_config

    cfg.merge_from_list(["DATASETS.TRAIN", "('coco_sample_train_panoptic_with_sem_seg',)", "DATASETS.TEST", "()"])
    dump = tmp_path / "config.yaml"
    dump.write_text(cfg.dump())
    ours, other = predictor_from_config(cfg), predictor.predictor_from_config(get_config(dump))
    assert ours.settings == other.settings
    assert ours.categories == other.categories
    assert ours.image_format == other.image_format
    assert np.array_equal(ours(PICTURE, "semantic").labels, other(PICTURE, "semantic").labels)


def test_weights_are_needed(tiny_cfg):
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS must name a checkpoint to predict with, got ''"):
        predictor_from_config(tiny_cfg)


def test_metadata_must_name_the_models_classes():
    metadata = MetadataCatalog.get("coco_sample_train_panoptic_with_sem_seg")
    with pytest.raises(ValueError, match=r"must name MODEL\.SEM_SEG_HEAD\.NUM_CLASSES = 7 classes, got"):
        categories_of(metadata, 7)
