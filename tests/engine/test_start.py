"""Trainings of the embedded engine that start from other weights, and end with test-time augmentation."""

import json
import logging

import pytest
import torch

from mask2former.data import catalog
from mask2former.engine.config import get_config
from mask2former.engine.launch import train_or_evaluate
from mask2former.engine.trainer import Trainer
from mask2former.evaluation.reporting import flat
from mask2former.finetune import OWN_ENTRY

BIAS = "sem_seg_head.predictor.class_embed.bias"


@pytest.fixture
def three_classes():
    """A data set of three classes, of which two are COCO's."""
    name = "three_classes_for_test_start"
    if name not in catalog.names():
        metadata = catalog.get("four_train_semantic").metadata
        kept = tuple(
            category._replace(id=place, name=text)
            for place, (category, text) in enumerate(
                zip(metadata.categories, ["Teddy_Bear", "unicorn", "person"], strict=False)
            )
        )
        catalog.register(catalog.CatalogEntry(name, list, catalog.DatasetMetadata(categories=kept, evaluator_type="x")))
    return name


def test_a_training_names_its_classes_and_another_one_takes_their_rows(tiny, three_classes, caplog):
    trainer = Trainer(tiny.cfg(DATASETS__TEST="()"))
    state = trainer.state(3)
    names = [category.name for category in catalog.get("four_train_panoptic").metadata.categories]
    assert state[OWN_ENTRY]["categories"] == names
    state["model"][BIAS] = torch.arange(len(names) + 1.0)
    path = tiny.folder / "model.pth"
    torch.save(state, path)
    del state[OWN_ENTRY]
    torch.save(state, tiny.folder / "nameless.pth")

    changes = {
        "DATASETS__TRAIN": f"('{three_classes}',)",
        "DATASETS__TEST": "()",
        "MODEL__SEM_SEG_HEAD__NUM_CLASSES": 4,  # one more than the data set names
        "MODEL__MASK_FORMER__NUM_OBJECT_QUERIES": 7,
    }
    expected = [names.index("teddy bear"), names.index("person"), len(names)]
    by_key = {"MODEL__WEIGHTS": tiny.folder / "nameless.pth", "MODEL__WEIGHTS_DATASET": "coco_2017_val_panoptic"}
    for weights in ({"MODEL__WEIGHTS": path}, by_key):
        caplog.clear()
        trainer = Trainer(tiny.cfg(**changes, **weights))
        with caplog.at_level(logging.INFO, logger="mask2former"):
            trainer.resume_or_load(resume=False)
        bias = trainer.model.state_dict()[BIAS].tolist()
        assert [bias[0], bias[2], bias[4]] == expected
        assert "2 categories kept: Teddy_Bear, person" in caplog.text
        assert "2 categories new: unicorn, one without a name" in caplog.text
        assert "query_feat.weight (20 queries in the file, 7 in the model)" in caplog.text


def test_a_training_ends_with_test_time_augmentation_and_evaluation_repeats_it(tiny):
    name, whole = "one_for_test_start", catalog.get("four_val_semantic")
    if name not in catalog.names():
        catalog.register(catalog.CatalogEntry(name, lambda: whole.load()[:1], whole.metadata))
    views = {"TEST__AUG__ENABLED": True, "TEST__AUG__MIN_SIZES": "(48,)", "TEST__AUG__MAX_SIZE": 96}
    test = {"DATASETS__TEST": f"('{name}',)", "MODEL__MASK_FORMER__TEST__PANOPTIC_ON": False,
            "MODEL__MASK_FORMER__TEST__INSTANCE_ON": False}  # fmt: skip
    steps = {"SOLVER__MAX_ITER": 2, "TEST__EVAL_PERIOD": 1, "DATALOADER__NUM_WORKERS": 0}
    trainer = Trainer(tiny.cfg(**views, **test, **steps))
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert set(results) == {"sem_seg", "sem_seg_TTA"}
    assert results["sem_seg"] != results["sem_seg_TTA"]
    folder = tiny.folder / "output"
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "sem_seg/mIoU" in line] == [0, 1]
    assert [line["iteration"] for line in lines if "sem_seg_TTA/mIoU" in line] == [1]
    assert trainer.best[0] == "sem_seg/mIoU"
    again = get_config(folder / "config.yaml", ["MODEL.WEIGHTS", str(folder / "model_final.pth")])
    assert flat(train_or_evaluate(again, eval_only=True)) == pytest.approx(flat(results), nan_ok=True)
    for part in ("inference", "inference_TTA"):
        assert (folder / part / name / "results.json").is_file()
