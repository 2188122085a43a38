"""Detectron2 builds every ablation as the core does, and trains and evaluates what classifies pixels."""

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.modeling import build_model

from mask2former import build
from mask2former.config import architecture_arguments
from mask2former.d2 import Trainer, get_config
from tests.configs import ABLATIONS, name_of, skip_without_timm

STANDARD = ["MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardTransformerDecoder"]


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("path", ABLATIONS, ids=name_of)
def test_config_builds_the_core_model(path):
    skip_without_timm(path)
    cfg = get_config(path, ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        ours, core = build_model(cfg), build.build_model(architecture_arguments(cfg))
    assert shapes(ours) == shapes(core)
    assert type(ours.criterion) is type(core.criterion)
    assert ours.sem_seg_head.in_feature == core.sem_seg_head.in_feature


@pytest.mark.parametrize(
    "words",
    [
        [*STANDARD, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res4"],
        [*STANDARD, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "pixel_embedding", "MODEL.SEM_SEG_HEAD.MASK_DIM", 64],
        [
            *STANDARD,
            *("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "transformer_encoder"),
            *("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "TransformerEncoderPixelDecoder"),
        ],
        [*STANDARD, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "transformer_encoder"],
        ["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BiFPNPixelDecoder"],
        [
            *("MODEL.MASK_FORMER.CROSS_ATTENTION", "smca", "MODEL.MASK_FORMER.FEATURE_SCALES", "all"),
            *("MODEL.MASK_FORMER.LEARNABLE_QUERIES", False, "MODEL.MASK_FORMER.SELF_ATTENTION_FIRST", True),
            *("MODEL.MASK_FORMER.DEC_LAYERS", 4, "MODEL.MASK_FORMER.TEST.DECODER_LAYERS", 2),
        ],
        ["MODEL.MASK_FORMER.CROSS_ATTENTION", "mask_pooling", "MODEL.MASK_FORMER.TEST.DECODER_LAYERS", 0],
    ],
    ids=["backbone", "embedding", "encoder", "deformable", "bifpn", "variants", "learned queries alone"],
)
def test_predictions_are_those_of_the_core(tiny_cfg, words):
    tiny_cfg.merge_from_list(words)
    ours, core = build_model(tiny_cfg).eval(), build.build_model(architecture_arguments(tiny_cfg)).eval()
    core.load_state_dict(ours.state_dict(), strict=True)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours.predict(image)[-1], core.predict(image)[-1], rtol=0, atol=0)


def per_pixel(cfg, *words):
    cfg.MODEL.MASK_FORMER.TEST.merge_from_list(["PANOPTIC_ON", False, "INSTANCE_ON", False])
    cfg.SOLVER.merge_from_list(["MAX_ITER", 2, "STEPS", (1,)])
    cfg.TEST.EVAL_PERIOD = 2
    cfg.merge_from_list(list(words))
    return cfg


@pytest.mark.parametrize("head", ["PerPixelBaselineHead", "PerPixelBaselinePlusHead"])
def test_per_pixel_baselines_train_and_evaluate_semantic_segmentation(tiny_cfg, head):
    words = [*STANDARD, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res5", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 133]
    cfg = per_pixel(tiny_cfg, "MODEL.SEM_SEG_HEAD.NAME", head, *(words if "Plus" in head else []))
    trainer = Trainer(cfg)
    trainer.train()
    results = trainer._last_eval_results
    assert set(results) == {"sem_seg"}
    assert 0 <= results["sem_seg"]["mIoU"] <= 100
    core = build.build_model(architecture_arguments(cfg))
    core.load_state_dict(trainer.model.state_dict(), strict=True)
    trainer.model.train()
    losses = trainer.model([{"image": torch.zeros(3, 64, 64)}])  # no instances: every pixel is ignored
    assert "loss_sem_seg" in losses and not any(loss.item() for loss in losses.values())


def test_other_tasks_are_refused(tiny_cfg):
    tiny_cfg.MODEL.SEM_SEG_HEAD.NAME = "PerPixelBaselineHead"
    with pytest.raises(ValueError, match=r"TEST.PANOPTIC_ON must be False, .* PerPixelBaselineHead"):
        build_model(tiny_cfg)


def test_a_map_that_the_backbone_does_not_give_is_refused(tiny_cfg):
    tiny_cfg.merge_from_list([*STANDARD, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res9"])
    with pytest.raises(ValueError, match=r"TRANSFORMER_IN_FEATURE must be one of .*res5.* got 'res9'"):
        build_model(tiny_cfg)


def test_a_pixel_decoder_without_an_encoder_cannot_give_its_map(tiny_cfg):
    tiny_cfg.merge_from_list([*STANDARD, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "transformer_encoder"])
    model = build_model(tiny_cfg).eval()
    head = model.sem_seg_head
    forward = head.pixel_decoder.forward_features
    head.pixel_decoder.forward_features = lambda maps: (forward(maps)[0], None, forward(maps)[2])
    with pytest.raises(ValueError, match="IN_FEATURE must be a map that there is, got 'transformer_encoder': MSDeform"):
        model.predict(torch.randn(1, 3, 64, 64))
