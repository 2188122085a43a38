"""Detectron2 loads this project's and published-style YAML files, with the published values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model as detectron2_build_model
from detectron2.projects.deeplab import add_deeplab_config

from mask2former import config
from mask2former.build import build_model
from mask2former.config import DEFAULTS
from mask2former.d2.config import add_maskformer2_config, get_config
from tests.configs import (
    CONFIGS,
    FILES,
    LEAFS,
    ROWS,
    TRANSLATIONS,
    flatten,
    name_of,
    plain_value_of,
    published_sizes,
    published_values,
    write_published_style,
)

RUNNABLE = LEAFS + [path for path in FILES if path.parent.name == "quick_schedules"]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("row", ROWS, ids=[row["config"] for row in ROWS])
def test_published_config_has_the_published_settings_and_size(row: dict[str, Any]) -> None:
    cfg = get_config(CONFIGS / row["config"], ["MODEL.DEVICE", "meta"])
    expected = published_values(row)
    assert {key: plain_value_of(cfg, key) for key in expected} == expected
    with torch.device("meta"):
        model = detectron2_build_model(cfg)
    assert len(model.state_dict()) == row["keys"]
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == row["params_m"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_says_only_what_its_bases_and_detectron2_do_not(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    bases = tree.pop("_BASE_", [])
    inherited = get_cfg()
    add_maskformer2_config(inherited)
    for base in bases if isinstance(bases, list) else [bases]:
        inherited.merge_from_file(str(path.parent / base))
    own = flatten(tree)
    own.pop("VERSION", None)  # spares the warning that it is missing
    assert not {key: value for key, value in own.items() if plain_value_of(inherited, key) == value}


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
def test_every_translation_takes_every_config(path: Path) -> None:
    cfg = get_config(path)
    cfg.freeze()
    for translate in TRANSLATIONS:
        arguments = translate(cfg)
        assert json.loads(json.dumps(arguments)) == arguments


PANOPTIC = "_panoptic_with_sem_seg"


@pytest.mark.parametrize(
    ("name", "train", "test", "recipe", "tasks", "max_iter"),
    [
        ("coco_mini16_panoptic", f"mini_train16{PANOPTIC}", f"mini_train16{PANOPTIC}", "lsj", "sip", 600),
        ("coco_mini_panoptic", f"mini_train{PANOPTIC}", f"mini_val{PANOPTIC}", "lsj", "sip", 600),
        ("coco_mini_instance", "mini_train", "mini_val", "lsj", "i", 600),
        ("coco_mini_semantic", "mini_train_sem_seg", "mini_val_sem_seg", "resize_crop_color", "s", 600),
        ("coco_sample_panoptic", f"sample_train{PANOPTIC}", f"sample_val{PANOPTIC}", "lsj", "sip", 2000),
    ],
)
def test_quick_schedule(name: str, train: str, test: str, recipe: str, tasks: str, max_iter: int) -> None:
    cfg = get_config(CONFIGS / f"quick_schedules/{name}_tiny.yaml")
    expected = {
        "DATASETS.TRAIN": [f"coco_{train}"],
        "DATASETS.TEST": [f"coco_{test}"],
        "SOLVER.MAX_ITER": max_iter,
        "SOLVER.STEPS": [max_iter * 9 // 10],
    }
    assert {key: plain_value_of(cfg, key) for key in expected} == expected
    assert config.mapper_arguments(cfg)["recipe"] == recipe
    flags = config.inference_arguments(cfg)
    assert "".join(task[0] for task in ("semantic", "instance", "panoptic") if flags[f"{task}_on"]) == tasks


def test_tiny_model_has_the_size_of_the_training_reference() -> None:
    cfg = get_config(CONFIGS / "quick_schedules/coco_mini16_panoptic_tiny.yaml")
    model = build_model(config.architecture_arguments(cfg))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == 3.198


def test_smoke_config_reaches_checkpoint_and_evaluation() -> None:
    cfg = get_config(CONFIGS / "quick_schedules/smoke.yaml")
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (4, 2, 4)
    assert cfg.DATASETS.TRAIN == ("coco_sample_train_panoptic_with_sem_seg",)


@pytest.mark.parametrize("key", DEFAULTS)
def test_key_is_not_one_of_detectron2(key: str) -> None:
    assert key not in flatten(get_cfg())


@pytest.mark.parametrize("with_deeplab", [False, True])
def test_adding_keys_gives_their_defaults_and_keeps_others(with_deeplab: bool) -> None:
    cfg = get_cfg()
    if with_deeplab:
        add_deeplab_config(cfg)
    cfg.MODEL.SWIN = CfgNode({"EMBED_DIM": 48, "OTHER_PROJECTS_KEY": 7})
    others = {key: value for key, value in flatten(cfg).items() if key not in DEFAULTS}
    add_maskformer2_config(cfg)
    assert {key: plain_value_of(cfg, key) for key in DEFAULTS} == DEFAULTS
    assert {key: value for key, value in flatten(cfg).items() if key not in DEFAULTS} == others
    assert cfg.MODEL.SWIN.OTHER_PROJECTS_KEY == 7


def test_defaults_are_not_shared_with_a_config() -> None:
    cfg = get_cfg()
    add_maskformer2_config(cfg)
    cfg.MODEL.SWIN.DEPTHS.append(99)
    assert DEFAULTS["MODEL.SWIN.DEPTHS"] == [2, 2, 6, 2]


def test_frozen_config_is_not_changed() -> None:
    cfg = get_cfg()
    cfg.freeze()
    with pytest.raises(AttributeError):
        add_maskformer2_config(cfg)


@pytest.mark.parametrize("shortest", [512, 640, 1024, 2048])
def test_published_style_file_that_calls_python_loads(shortest: int, tmp_path: Path) -> None:
    cfg = get_config(write_published_style(tmp_path, shortest))
    assert config.mapper_arguments(cfg)["augmentation"]["min_sizes"] == published_sizes(shortest)
    assert config.schedule_arguments(cfg)["name"] == "WarmupPolyLR"
    assert cfg.DATASETS.TRAIN == ("made_up_train",)
    assert list(cfg.TEST.AUG.MIN_SIZES) == [256, 384]


@pytest.mark.parametrize("path", RUNNABLE[:1] + RUNNABLE[-1:], ids=name_of)
def test_dumped_config_loads_again(path: Path, tmp_path: Path) -> None:
    cfg = get_config(path)
    assert "ASPP_CHANNELS" in cfg.dump()
    again = get_config(write(tmp_path / "config.yaml", cfg.dump()))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


def test_overrides_win() -> None:
    path = RUNNABLE[0]
    cfg = get_config(path, ["SOLVER.BASE_LR", "0.001", "MODEL.SWIN.QK_SCALE", "0.5"])
    assert cfg.SOLVER.BASE_LR == 0.001
    assert config.swin_arguments(cfg)["qk_scale"] == 0.5
    with pytest.raises(ValueError, match=r"pairs of key and value, got \['SOLVER.BASE_LR'\]"):
        get_config(path, ["SOLVER.BASE_LR"])


def test_config_of_another_model_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "config.yaml", "VERSION: 2\nMODEL:\n  META_ARCHITECTURE: GeneralizedRCNN\n")
    with pytest.raises(ValueError, match=r"META_ARCHITECTURE must be 'MaskFormer'.* got 'GeneralizedRCNN'"):
        config.architecture_arguments(get_config(path))
