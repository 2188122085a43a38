"""Detectron2 builds, trains and loads backbones of timm as the core does."""

import logging
from functools import partial

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytest.importorskip("timm", reason="timm is not installed (requirements-timm.txt)")

import timm
from detectron2.modeling import build_model

from mask2former import build
from mask2former.config import architecture_arguments
from mask2former.d2 import Trainer

# both were trained with a mean and a standard deviation of a half
HALF = ["MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3]
CONVNEXT = [*HALF, "MODEL.BACKBONE.NAME", "TimmBackbone", "MODEL.TIMM.NAME", "test_convnext.r160_in1k"]
VIT = [
    *HALF,
    *("MODEL.BACKBONE.NAME", "TimmSimplePyramid", "MODEL.TIMM.NAME", "test_vit.r160_in1k"),
    *("MODEL.TIMM.PYRAMID_CHANNELS", 32, "INPUT.FORMAT", "BGR"),
]


@pytest.mark.parametrize("words", [CONVNEXT, VIT], ids=["convnext", "vit"])
def test_predictions_are_those_of_the_core(tiny_cfg, words):
    tiny_cfg.merge_from_list(words)
    ours, core = build_model(tiny_cfg).eval(), build.build_model(architecture_arguments(tiny_cfg)).eval()
    core.load_state_dict(ours.state_dict(), strict=True)
    assert {n: (s.channels, s.stride) for n, s in ours.backbone.output_shape().items()} == {
        n: (core.backbone.out_channels[n], core.backbone.out_strides[n]) for n in ("res2", "res3", "res4", "res5")
    }
    images = [torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)]
    assert torch.equal(ours.batch_images(images), core.batch_images(images))
    with torch.no_grad():
        batch = core.batch_images(images)
        torch.testing.assert_close(ours.predict(batch)[-1], core.predict(batch)[-1], rtol=0, atol=0)


def test_another_mean_is_refused(tiny_cfg):
    tiny_cfg.merge_from_list([*CONVNEXT, "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]])
    with pytest.raises(ValueError, match=r"PIXEL_MEAN must be \[127.5, 127.5, 127.5\], .*test_convnext.r160_in1k"):
        build_model(tiny_cfg)


def test_a_frozen_backbone_starts_from_weights_of_timm_and_keeps_them(tiny_cfg, monkeypatch, tmp_path, caplog):
    weights = timm.create_model("test_vit").state_dict()
    torch.save(weights, tmp_path / "published.pth")
    published = {"file": str(tmp_path / "published.pth")}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, pretrained_cfg_overlay=published))
    tiny_cfg.merge_from_list(
        [
            *VIT,
            *("MODEL.TIMM.FROZEN", True, "MODEL.WEIGHTS", "timm://test_vit.r160_in1k"),
            *("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "DATASETS.TEST", (), "TEST.EVAL_PERIOD", 0),
        ]
    )
    trainer = Trainer(tiny_cfg)
    with caplog.at_level(logging.WARNING):
        trainer.resume_or_load(resume=False)
    assert "MODEL.WEIGHTS timm://test_vit.r160_in1k: " in caplog.text
    pyramid = trainer.model.backbone.pyramid.levels["res4"][0].weight.clone()
    trainer.train()
    saved = torch.load(f"{tiny_cfg.OUTPUT_DIR}/model_final.pth", weights_only=False)["model"]
    backbone = trainer.model.backbone
    assert not torch.equal(backbone.pyramid.levels["res4"][0].weight, pyramid)
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
        assert torch.equal(saved[f"backbone.model.{name}"], weights[name]), name
