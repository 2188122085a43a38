"""Backbones of timm in whole models: configs, training, weights of timm, model files; and without timm."""

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mask2former import config, finetune
from mask2former.build import build_model
from mask2former.checkpoint import (
    METADATA_KEY,
    ModelDescription,
    PredictionSettings,
    load_model_file,
    load_weights,
    save_model_file,
)
from mask2former.engine.config import get_config
from mask2former.engine.launch import run
from mask2former.engine.weights import load_start
from mask2former.engine.yaml_files import ConfigError
from mask2former.modeling.backbones.timm_backbone import pretrained_weights
from mask2former.modeling.mask2former import Mask2Former
from mask2former.predictor import PanopticPicture, Predictor
from mask2former.solver import make_optimizer, parameter_groups
from tests import tiny
from tests.configs import CONFIGS

R50 = CONFIGS / "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
CONVNEXT = ["MODEL.BACKBONE.NAME", "TimmBackbone", "MODEL.TIMM.NAME", "convnext_tiny.fb_in22k_ft_in1k"]
HALF = ["MODEL.BACKBONE.NAME", "TimmBackbone", "MODEL.TIMM.NAME", "test_convnext.r160_in1k"]
BGR = ["INPUT.FORMAT", "BGR"]


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm", reason="timm is not installed (requirements-timm.txt)")


@pytest.fixture
def no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)


def model_of(backbone: str, **arguments: Any) -> Mask2Former:
    architecture = tiny.architecture(backbone=backbone)
    architecture["backbone"] |= arguments
    return build_model(architecture)


def backward(model: Mask2Former) -> None:
    images = [tiny.random_image(64, 96), tiny.random_image(50, 64)]
    losses = model.losses(images, [tiny.random_target(2, 64, 96), tiny.random_target(1, 50, 64)])
    sum(losses.values()).backward()


# ---- configs


def test_a_config_is_translated() -> None:
    words = ["MODEL.TIMM.FROZEN", "True", "MODEL.TIMM.DROP_PATH_RATE", "0.2", "MODEL.TIMM.NORMALIZATION", "config"]
    cfg = get_config(R50, [*CONVNEXT, *words])
    arguments = {
        "model_name": "convnext_tiny.fb_in22k_ft_in1k",
        "out_features": ["res2", "res3", "res4", "res5"],
        "drop_path_rate": 0.2,
        "frozen": True,
        "image_format": "RGB",
    }
    assert config.architecture_arguments(cfg)["backbone"] == {"name": "timm", **arguments}
    cfg = get_config(R50, [*CONVNEXT, *words, "MODEL.BACKBONE.NAME", "TimmSimplePyramid", *BGR])
    assert config.architecture_arguments(cfg)["backbone"] == {
        "name": "timm_pyramid",
        "pyramid_channels": 256,
        **arguments,
        "image_format": "BGR",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL.TIMM.NORMALIZATION", "none"], "MODEL.TIMM.NORMALIZATION must be one of timm, config, got 'none'"),
        (["MODEL.TIMM.DROP_PATH_RATE", "1.0"], "DROP_PATH_RATE must be at least 0 and below 1, got 1.0"),
        (["MODEL.TIMM.OUT_FEATURES", "['res1']"], r"MODEL.TIMM.OUT_FEATURES must be some of .*got \['res1'\]"),
        (["MODEL.TIMM.PYRAMID_CHANNELS", "0"], "MODEL.TIMM.PYRAMID_CHANNELS must be at least 1, got 0"),
    ],
)
def test_other_values_are_refused(words: list[str], message: str) -> None:
    cfg = get_config(R50, [*CONVNEXT, "MODEL.BACKBONE.NAME", "TimmSimplePyramid", *words])
    with pytest.raises(ValueError, match=message):
        config.backbone_arguments(cfg)


def test_the_config_must_have_the_mean_that_timm_trained_with(timm: Any) -> None:
    inputs = config.input_arguments(get_config(R50, CONVNEXT))
    assert inputs["pixel_mean"] == [123.675, 116.28, 103.53]
    with pytest.raises(ValueError, match=r"PIXEL_MEAN must be \[103.53, 116.28, 123.675\], in INPUT.FORMAT BGR .*got "):
        config.input_arguments(get_config(R50, [*CONVNEXT, *BGR]))
    mean = ["MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"]
    with pytest.raises(ValueError, match=r"PIXEL_STD must be \[57.375, 57.12, 58.395\], in INPUT.FORMAT BGR .*got "):
        config.input_arguments(get_config(R50, [*CONVNEXT, *BGR, *mean]))
    std = ["MODEL.PIXEL_STD", "[57.375, 57.12, 58.395]"]
    assert config.input_arguments(get_config(R50, [*CONVNEXT, *BGR, *mean, *std]))["pixel_std"][0] == 57.375
    with pytest.raises(ValueError, match=r"must be \[127.5, 127.5, 127.5\], .*test_convnext.* 'config' takes any"):
        config.input_arguments(get_config(R50, HALF))
    inputs = config.input_arguments(get_config(R50, [*HALF, "MODEL.TIMM.NORMALIZATION", "config"]))
    assert inputs["pixel_mean"] == [123.675, 116.28, 103.53]


# ---- training


@pytest.mark.parametrize("backbone", ["timm", "timm_pyramid"])
def test_whole_models_have_a_gradient_for_every_parameter(timm: Any, backbone: str) -> None:
    model = model_of(backbone)
    backward(model)
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not [n for n in without if not n.startswith("backbone.model.head.norm.")]  # which older releases leave there


def test_a_frozen_backbone_stays_as_it_is_and_is_saved(timm: Any) -> None:
    model = model_of("timm_pyramid", frozen=True, drop_path_rate=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = make_optimizer(model, optimizer="ADAMW", momentum=0.9, **SETTINGS)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in model.backbone.model.parameters()}
    assert trained > {id(p) for p in model.backbone.pyramid.parameters()}
    backward(model)
    optimizer.step()
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert not [name for name in changed if name.startswith("backbone.model.")]
    assert "backbone.pyramid.levels.res4.0.weight" in changed
    assert "backbone.model.pos_embed" in after


SETTINGS = {
    "base_lr": 1.0,
    "weight_decay": 0.5,
    "weight_decay_norm": 0.25,
    "weight_decay_embed": 0.125,
    "backbone_multiplier": 0.1,
}


def test_learning_rates_and_weight_decays(timm: Any) -> None:
    model = model_of("timm_pyramid")
    rates = {
        id(p): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, **SETTINGS)
        for p in group["params"]
    }
    found = {name: rates[id(p)] for name, p in model.backbone.named_parameters()}
    assert found["model.pos_embed"] == (0.1, 0.0)
    assert found["model.blocks.0.attn.qkv.weight"] == (0.1, 0.5)
    assert found["model.blocks.0.norm1.weight"] == (0.1, 0.25)
    assert found["pyramid.levels.res2.0.weight"] == (1.0, 0.5)
    assert found["pyramid.levels.res4.1.weight"] == (1.0, 0.25)


# ---- weights


def own_weights(timm: Any, name: str, image_size: int = 160) -> dict[str, Tensor]:
    """What a file of timm has, classifier included."""
    torch.manual_seed(5)
    arguments = {"img_size": image_size} if "vit" in name else {}
    return timm.create_model(name, **arguments).state_dict()


@pytest.mark.parametrize(("backbone", "ending"), [("timm", "pth"), ("timm_pyramid", "safetensors")])
def test_a_file_of_timm_goes_into_the_backbone(timm: Any, backbone: str, ending: str, tmp_path: Path) -> None:
    name = tiny.BACKBONES[backbone]["model_name"]
    weights, path = own_weights(timm, name), tmp_path / f"model.{ending}"
    if ending == "pth":
        torch.save(weights, path)
    else:
        safetensors.torch.save_file(weights, path)
    model = model_of(backbone)
    report = finetune.load_start(model, path)
    for tensor_name, tensor in model.backbone.model.state_dict().items():
        assert torch.equal(tensor, weights[tensor_name]), tensor_name
    assert len(load_weights(model, path, strict=False).loaded) == len(report.copied)
    assert {n.split(".")[0] for n in report.unused} == ({"head"} if backbone == "timm" else {"norm", "head"})
    assert not [n for n in report.missing if n.startswith("backbone.model.")]


def test_position_tables_of_another_image_size_are_not_taken_silently(timm: Any) -> None:
    with pytest.raises(ValueError, match=r"backbone.model.pos_embed \(1, 37, 64\) in the file, \(1, 101, 64\)"):
        finetune.load_start(model_of("timm_pyramid"), own_weights(timm, "test_vit", 96))


def test_published_weights_by_name(
    timm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = own_weights(timm, "test_convnext")
    torch.save(weights, tmp_path / "published.pth")
    published = {"file": str(tmp_path / "published.pth")}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, pretrained_cfg_overlay=published))
    model = model_of("timm")
    cfg = get_config(R50, ["MODEL.WEIGHTS", "timm://test_convnext.r160_in1k"])
    with caplog.at_level(logging.INFO):
        load_start(model, cfg)
    assert "MODEL.WEIGHTS timm://test_convnext.r160_in1k: " in caplog.text
    for name, tensor in model.backbone.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_a_failed_download_is_one_line(timm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError("cannot find the requested files\nand more")

    model = model_of("timm")
    monkeypatch.setattr(timm, "create_model", fail)
    cfg = get_config(R50, ["MODEL.WEIGHTS", "timm://test_convnext.r160_in1k"])
    with pytest.raises(ConfigError) as caught:
        load_start(model, cfg)
    assert str(caught.value) == (
        "MODEL.WEIGHTS: timm://test_convnext.r160_in1k cannot be fetched: cannot find the requested files; fetch the "
        "weights of timm/test_convnext.r160_in1k at huggingface.co by other means and set MODEL.WEIGHTS to the file, "
        "which is called model.safetensors"
    )


def test_models_without_published_weights(timm: Any) -> None:
    with pytest.raises(ValueError, match=r"timm://ghostnet_050 has no weights: "):
        pretrained_weights("ghostnet_050")
    with pytest.raises(ValueError, match=r"must be a model of timm, .*, got 'nix'"):
        finetune.load_start(build_model(tiny.architecture()), "timm://nix")


# ---- model files


def test_model_files(timm: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    architecture = tiny.architecture(backbone="timm_pyramid", image_format="BGR")
    model = build_model(architecture).eval()
    description = ModelDescription(
        architecture=architecture, categories=tiny.categories(), settings=PredictionSettings(shortest=64, longest=96)
    )
    save_model_file(tmp_path / "model.safetensors", model, description, dtype=torch.float32)
    loaded, _ = load_model_file(tmp_path / "model.safetensors")
    tiny.assert_equal_states(loaded.state_dict(), model.state_dict())
    found = Predictor.from_file(tmp_path / "model.safetensors")(tiny.picture())
    assert isinstance(found, PanopticPicture)


# ---- without timm

INSTALL = r"backbones of timm need timm: pip install 'mask2former\[timm\]' or pip install timm"


def test_without_timm_a_model_is_not_built(no_timm: None) -> None:
    with pytest.raises(ModuleNotFoundError, match=INSTALL):
        model_of("timm")
    with pytest.raises(ModuleNotFoundError, match=INSTALL):
        config.architecture_arguments(get_config(R50, CONVNEXT))
    assert config.architecture_arguments(get_config(R50))["backbone"]["name"] == "resnet"


def test_without_timm_a_model_file_says_so(no_timm: None, tmp_path: Path) -> None:
    description = ModelDescription(architecture=tiny.architecture(backbone="timm"), categories=tiny.categories())
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, {METADATA_KEY: description.to_json()})
    with pytest.raises(ValueError, match=r"model.safetensors has a description that cannot be used: " + INSTALL):
        Predictor.from_file(path)


def test_without_timm_the_program_says_so(no_timm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"_BASE_: {R50}\nMODEL: {{BACKBONE: {{NAME: TimmBackbone}}, TIMM: {{NAME: test_resnet}}}}\n")
    words = ["OUTPUT_DIR", str(tmp_path / "out"), "MODEL.DEVICE", "cpu"]
    assert run(["--config-file", str(path), *words]) == 1
    said = capsys.readouterr()
    assert "ModuleNotFoundError: backbones of timm need timm: pip install" in said.out + said.err
