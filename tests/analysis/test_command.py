"""``python -m mask2former analyze``: what it prints, where its images come from, and what it says when it cannot."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from mask2former.__main__ import main
from mask2former.analysis.images import fixed_input_size, images_of_test_set
from mask2former.analysis.operations import count_operations
from mask2former.analysis.parts import PartSize, module_tree, part_sizes
from mask2former.analysis.tasks import shape_model
from mask2former.build import build_model
from mask2former.engine.config import get_config
from mask2former.modeling.layers import ConvNorm, FrozenBatchNorm2d
from tests import tiny
from tests.configs import CONFIGS

TINY = str(CONFIGS / "quick_schedules/coco_sample_panoptic_tiny.yaml")  # its images are in this repository
R50 = str(CONFIGS / "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml")
ADE20K = str(CONFIGS / "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml")


def run(*words: str) -> int:
    return main(["analyze", *words])


def results(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_sizes_of_parts() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(ConvNorm(3, 4, 1, norm=FrozenBatchNorm2d(4)), nn.Linear(4, 5))
            self.backbone[1].bias.requires_grad_(False)
            self.sem_seg_head = nn.Module()
            self.sem_seg_head.pixel_decoder = nn.BatchNorm2d(6)
            self.sem_seg_head.predictor = self.backbone[1]  # shared
            self.register_buffer("mean", torch.zeros(3), persistent=False)

    assert part_sizes(Model()) == {
        "backbone": PartSize(trainable=12 + 20, fixed=5, frozen_norm=16),
        "sem_seg_head.pixel_decoder": PartSize(trainable=12, other_constants=13),
        "other": PartSize(other_constants=3),
    }


def test_the_tree_ends_at_its_depth() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, 1))
    assert module_tree(model, 0) == {"name": "", "class": "Sequential", "parameters": 13, "children": []}
    tree = module_tree(model, 1)
    assert [(child["name"], child["class"], child["parameters"]) for child in tree["children"]] == [
        ("0", "Sequential", 9),
        ("1", "Linear", 4),
    ]
    assert [child["class"] for child in module_tree(model, 2)["children"][0]["children"]] == ["Linear", "ReLU"]


def test_all_tasks_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tasks", "flop", "activation", "parameter", "structure", "throughput", "--size", "60", "70"]
    found = results(capsys, "--config-file", TINY, *words, "--repeats", "1", "--device", "cpu")
    assert found["inputs"] == {
        "source": "made up", "images": 1, "sizes": 1, "mean_pixels": 64 * 96, "padded_size": [64, 96],
    }  # fmt: skip
    model = shape_model(get_config(TINY))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert found["parameter"]["total"]["trainable"] == found["structure"]["parameters"] == parameters
    assert sum(part["trainable"] for part in found["parameter"]["parts"].values()) == parameters
    counter = count_operations(model, (64, 96))
    assert found["flop"]["mean"] == counter.flops[""].total()
    assert found["activation"]["mean"] == counter.activations[""]
    assert found["flop"]["standard_deviation"] == 0
    speed = found["throughput"]
    assert speed["seconds"] > 0 and speed["images_per_second"] == pytest.approx(1 / speed["seconds"])
    assert (speed["repeats"], speed["pictures"], speed["weights"]) == (1, 1, None)


def test_the_text_has_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config-file", TINY, "--tasks", "flop", "parameter", "structure", "--size", "64", "64", "-n", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "one image, made up; resized and padded: 64x64 (height x width)"
    assert "in all                      3,198,033      0         0           12,145" in lines
    assert "  backbone: SwinTransformer 1,428,619" in lines
    total = count_operations(shape_model(get_config(TINY)), (64, 64)).flops[""].total()
    assert f"mean {total / 1e9:.1f} G; prediction of the last layer" in lines


def test_images_are_the_first_of_the_test_set(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = get_config(TINY)
    name, images = images_of_test_set(cfg, 2)
    found = results(capsys, "--config-file", TINY, "--tasks", "flop", "-n", "2", "--all-layers")
    assert found["inputs"]["source"] == f"the first ones of {name}"
    assert found["inputs"]["images"] == len(images) == 2
    sizes = [tuple(-(-side // 32) * 32 for side in image.size) for image in images]
    assert all(min(image.size) == 256 or max(image.size) == 384 for image in images)
    model = shape_model(cfg)
    totals = [count_operations(model, (size[0], size[1]), all_layers=True).flops[""].total() for size in sizes]
    assert found["flop"]["mean"] == pytest.approx(sum(totals) / 2)
    assert found["flop"]["all_layers"] is True
    assert images[0].pixels(cfg).shape == (3, *images[0].size)


def test_the_fixed_size_is_that_of_the_training() -> None:
    assert fixed_input_size(get_config(R50)) == (1024, 1024)
    assert fixed_input_size(get_config(ADE20K)) == (512, 512)
    with pytest.raises(ValueError, match="use --size H W"):
        fixed_input_size(get_config(ADE20K, ["INPUT.CROP.ENABLED", "False"]))


def test_weights_are_those_of_the_model(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(build_model(tiny.architecture()).state_dict(), tmp_path / "other.pth")
    words = ["--config-file", TINY, "--tasks", "throughput", "--size", "32", "32", "--device", "cpu"]
    assert run(*words, "--weights", str(tmp_path / "other.pth")) == 2
    assert "other.pth" in capsys.readouterr().err
    assert run(*words, "--weights", str(tmp_path / "none.pth")) == 2
    assert "none.pth" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-file", TINY, "--device", "nowhere"], "--device must be one that can be used here, got nowhere"),
        (["--config-file", "none.yaml"], "none.yaml: the config file cannot be read"),
        (["--config-file", TINY, "MODEL.NONE", "1"], "there is no key MODEL.NONE"),
        (["--config-file", TINY, "MODEL.META_ARCHITECTURE", "RCNN"], "MODEL.META_ARCHITECTURE must be"),
        (["--config-file", TINY, "DATASETS.TEST", "()"], "DATASETS.TEST must name a data set"),
        (["--config-file", TINY, "DATASETS.TEST", "('none',)"], "no data set is registered as 'none'"),
        (["--config-file", R50], "--size H W and --use-fixed-input-size need no data"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    words: list[str], message: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert run(*words) == 2
    text = capsys.readouterr().err
    assert text.startswith("python -m mask2former analyze: ") and message in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config-file"),
        (["--config-file", TINY, "--tasks", "flops"], "invalid choice: 'flops'"),
        (["--config-file", TINY, "--size", "0", "32"], "must be a whole number of at least 1, got 0"),
        (["--config-file", TINY, "--size", "32"], "expected 2 arguments"),
        (["--config-file", TINY, "--size", "32", "32", "--use-fixed-input-size"], "not allowed with argument"),
        (["--config-file", TINY, "-n", "none"], "must be a whole number of at least 1, got none"),
        (["--config-file", TINY, "--depth", "-1"], "must be a whole number of at least 0, got -1"),
        (["--config-file", TINY, "--repeats", "0"], "must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
