"""The embedded engine trains and evaluates other decoders and heads."""

import pytest

from mask2former.engine.trainer import Trainer

STANDARD = {
    "MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME": "StandardTransformerDecoder",
    "MODEL__MASK_FORMER__TRANSFORMER_IN_FEATURE": "res5",
    "MODEL__MASK_FORMER__DEC_LAYERS": 2,
    "MODEL__SEM_SEG_HEAD__PIXEL_DECODER_NAME": "BasePixelDecoder",
}
SEMANTIC = {
    "DATASETS__TRAIN": "('four_train_semantic',)",
    "DATASETS__TEST": "('four_val_semantic',)",
    "INPUT__DATASET_MAPPER_NAME": "mask_former_semantic",
    "INPUT__MIN_SIZE_TRAIN": "(64,)",
    "INPUT__CROP__ENABLED": True,
    "INPUT__CROP__TYPE": "absolute",
    "INPUT__CROP__SIZE": "(64, 64)",
    "MODEL__MASK_FORMER__TEST__PANOPTIC_ON": False,
    "MODEL__MASK_FORMER__TEST__INSTANCE_ON": False,
}
PLUS = {**STANDARD, **SEMANTIC, "MODEL__SEM_SEG_HEAD__NAME": "PerPixelBaselinePlusHead"}


def train(cfg):
    names = []
    trainer = Trainer(cfg, on_step=lambda _, result: names.append(set(result.losses)))
    trainer.train()
    return trainer, names


@pytest.mark.parametrize(
    ("changes", "losses"),
    [
        ({**SEMANTIC, "MODEL__SEM_SEG_HEAD__NAME": "PerPixelBaselineHead"}, {"loss_sem_seg"}),
        ({**PLUS, "MODEL__MASK_FORMER__NUM_OBJECT_QUERIES": 133}, {"loss_sem_seg", "loss_sem_seg_0"}),
    ],
    ids=["per pixel", "per pixel plus"],
)
def test_per_pixel_baselines_train_and_evaluate_semantic_segmentation(tiny, changes, losses):
    trainer, names = train(tiny.cfg(SOLVER__MAX_ITER=2, SOLVER__STEPS="(1,)", TEST__EVAL_PERIOD=2, **changes))
    assert names == [losses] * 2
    assert set(trainer.last_results) == {"sem_seg"}
    assert 0 <= trainer.last_results["sem_seg"]["mIoU"] <= 100


@pytest.mark.slow
def test_the_standard_decoder_trains_and_evaluates_every_task(tiny):
    trainer, names = train(tiny.cfg(SOLVER__MAX_ITER=2, SOLVER__STEPS="(1,)", TEST__EVAL_PERIOD=2, **STANDARD))
    assert {"loss_ce", "loss_mask_0", "loss_dice"} <= names[0]
    assert set(trainer.last_results) == {"panoptic_seg", "segm", "bbox", "sem_seg"}


def test_other_tasks_are_refused_before_anything_is_written(tiny):
    changes = {**PLUS, "MODEL__MASK_FORMER__NUM_OBJECT_QUERIES": 133, "MODEL__MASK_FORMER__TEST__PANOPTIC_ON": True}
    with pytest.raises(ValueError, match=r"TEST.PANOPTIC_ON must be False, .* PerPixelBaselinePlusHead"):
        Trainer(tiny.cfg(**changes))
    assert not (tiny.folder / "output").exists()
