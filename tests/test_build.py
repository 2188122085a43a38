"""Building models from plain descriptions."""

import copy
import json

import pytest
import torch

from mask2former.build import PRESETS, build_model, preset
from tests import tiny


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_plain_data_with_the_wanted_sizes(name: str) -> None:
    architecture = preset(name, num_classes=11, num_queries=13)
    assert json.loads(json.dumps(architecture)) == architecture
    assert architecture["transformer_decoder"]["num_classes"] == architecture["criterion"]["num_classes"] == 11
    assert architecture["transformer_decoder"]["num_queries"] == 13


def test_a_changed_preset_does_not_change_the_next_one() -> None:
    preset("swin_small", num_classes=2)["backbone"]["depths"].append(9)
    assert preset("swin_small", num_classes=2)["backbone"]["depths"] == [2, 2, 18, 2]


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"name must be one of .*'r50'.*got 'r18'"):
        preset("r18", num_classes=2)


def test_build_reads_every_part_and_leaves_the_description_alone() -> None:
    architecture = tiny.architecture(num_classes=3, num_queries=4, criterion={"num_points": 17})
    architecture["input"] = {"size_divisibility": 8, "pixel_mean": [1.0, 2.0, 3.0], "image_format": "BGR"}
    before = copy.deepcopy(architecture)
    model = build_model(architecture)
    assert architecture == before
    assert model.training
    assert model.size_divisibility == 8
    assert model.pixel_mean.flatten().tolist() == [1, 2, 3]
    assert model.criterion.num_points == 17
    prediction = model.eval()(torch.randn(1, 3, 40, 48))[-1]
    assert prediction.class_logits.shape == (1, 4, 4)
    assert prediction.mask_logits.shape == (1, 4, 10, 12)


def test_in_features_choose_the_inputs_of_the_pixel_decoder() -> None:
    architecture = tiny.architecture()
    architecture["pixel_decoder"]["in_features"] = ["res2", "res4", "res5"]
    architecture["pixel_decoder"]["transformer_in_features"] = ["res4", "res5"]
    model = build_model(architecture).eval()
    _, levels = model.sem_seg_head.pixel_decoder(model.backbone(torch.randn(1, 3, 64, 64)))
    assert [x.shape[-1] for x in levels] == [2, 4, 16]


@pytest.mark.parametrize("part", ["backbone", "pixel_decoder", "transformer_decoder", "criterion", "input"])
def test_missing_part(part: str) -> None:
    architecture = tiny.architecture()
    del architecture[part]
    with pytest.raises(ValueError, match=rf"architecture must describe every part, missing: \['{part}'\]"):
        build_model(architecture)


@pytest.mark.parametrize("part", ["backbone", "pixel_decoder", "transformer_decoder"])
@pytest.mark.parametrize("name", ["vgg", None])
def test_unknown_part(part: str, name: str | None) -> None:
    architecture = tiny.architecture()
    architecture[part]["name"] = name
    with pytest.raises(ValueError, match=rf"architecture\['{part}'\]\['name'\] must be one of .*got {name!r}"):
        build_model(architecture)


@pytest.mark.parametrize("part", ["backbone", "pixel_decoder", "transformer_decoder", "criterion", "input"])
def test_unknown_argument(part: str) -> None:
    architecture = tiny.architecture()
    architecture[part]["colour"] = 1
    with pytest.raises(TypeError, match="colour"):
        build_model(architecture)
