"""Detectron2 loads this project's and published-style YAML files, with the published values."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config

from mask2former import config
from mask2former.build import build_model
from mask2former.config import DEFAULTS
from mask2former.d2.config import add_maskformer2_config, get_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
LEAFS = [path for path in FILES if path.name.startswith("maskformer2_")] + [
    path for path in FILES if path.parent.name == "quick_schedules"
]

R50 = {
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/torchvision/R-50.pkl",
}
SWIN_TINY = {
    "MODEL.BACKBONE.NAME": "D2SwinTransformer",
    "MODEL.SWIN.EMBED_DIM": 96,
    "MODEL.SWIN.DEPTHS": [2, 2, 6, 2],
    "MODEL.SWIN.NUM_HEADS": [3, 6, 12, 24],
    "MODEL.SWIN.WINDOW_SIZE": 7,
    "MODEL.SWIN.PRETRAIN_IMG_SIZE": 224,
    "MODEL.WEIGHTS": "swin_tiny_patch4_window7_224.pkl",
}
SWIN_BASE = {
    **SWIN_TINY,
    "MODEL.SWIN.EMBED_DIM": 128,
    "MODEL.SWIN.DEPTHS": [2, 2, 18, 2],
    "MODEL.SWIN.NUM_HEADS": [4, 8, 16, 32],
    "MODEL.SWIN.WINDOW_SIZE": 12,
    "MODEL.SWIN.PRETRAIN_IMG_SIZE": 384,
    "MODEL.WEIGHTS": "swin_base_patch4_window12_384.pkl",
}
BACKBONES: dict[str, dict[str, Any]] = {
    "maskformer2_R50_bs16_50ep": R50,
    "maskformer2_R101_bs16_50ep": {**R50, "MODEL.RESNETS.DEPTH": 101, "MODEL.WEIGHTS": "R-101.pkl"},
    "swin/maskformer2_swin_tiny_bs16_50ep": SWIN_TINY,
    "swin/maskformer2_swin_small_bs16_50ep": {
        **SWIN_TINY,
        "MODEL.SWIN.DEPTHS": [2, 2, 18, 2],
        "MODEL.WEIGHTS": "swin_small_patch4_window7_224.pkl",
    },
    "swin/maskformer2_swin_base_384_bs16_50ep": SWIN_BASE,
    "swin/maskformer2_swin_base_IN21k_384_bs16_50ep": {
        **SWIN_BASE,
        "MODEL.WEIGHTS": "swin_base_patch4_window12_384_22k.pkl",
    },
    "swin/maskformer2_swin_large_IN21k_384_bs16_100ep": {
        **SWIN_BASE,
        "MODEL.SWIN.EMBED_DIM": 192,
        "MODEL.SWIN.NUM_HEADS": [6, 12, 24, 48],
        "MODEL.WEIGHTS": "swin_large_patch4_window12_384_22k.pkl",
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 200,
        "SOLVER.MAX_ITER": 737500,
        "SOLVER.STEPS": [655556, 710184],
    },
}
TASKS: dict[str, dict[str, Any]] = {
    "panoptic": {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 133,
        "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": True,
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON": True,
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": True,
        "INPUT.DATASET_MAPPER_NAME": "coco_panoptic_lsj",
        "DATASETS.TRAIN": ["coco_2017_train_panoptic"],
        "DATASETS.TEST": ["coco_2017_val_panoptic_with_sem_seg"],
    },
    "instance": {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 80,
        "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": False,
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON": True,
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": False,
        "INPUT.DATASET_MAPPER_NAME": "coco_instance_lsj",
        "DATASETS.TRAIN": ["coco_2017_train"],
        "DATASETS.TEST": ["coco_2017_val"],
    },
}
# What all published COCO configs share, unless a backbone says otherwise.
COMMON: dict[str, Any] = {
    "MODEL.META_ARCHITECTURE": "MaskFormer",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.STEM_TYPE": "basic",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.SWIN.DROP_PATH_RATE": 0.3,
    "MODEL.SWIN.APE": False,
    "MODEL.SWIN.PATCH_NORM": True,
    "MODEL.SEM_SEG_HEAD.NAME": "MaskFormerHead",
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": 255,
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": 1.0,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 256,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 256,
    "MODEL.SEM_SEG_HEAD.NORM": "GN",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "MSDeformAttnPixelDecoder",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 6,
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "multi_scale_pixel_decoder",
    "MODEL.MASK_FORMER.DEEP_SUPERVISION": True,
    "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": 0.1,
    "MODEL.MASK_FORMER.CLASS_WEIGHT": 2.0,
    "MODEL.MASK_FORMER.MASK_WEIGHT": 5.0,
    "MODEL.MASK_FORMER.DICE_WEIGHT": 5.0,
    "MODEL.MASK_FORMER.NHEADS": 8,
    "MODEL.MASK_FORMER.DROPOUT": 0.0,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 2048,
    "MODEL.MASK_FORMER.ENC_LAYERS": 0,
    "MODEL.MASK_FORMER.DEC_LAYERS": 10,
    "MODEL.MASK_FORMER.PRE_NORM": False,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 256,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 100,
    "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": False,
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": 32,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 12544,
    "MODEL.MASK_FORMER.OVERSAMPLE_RATIO": 3.0,
    "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO": 0.75,
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": 0.8,
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": 0.8,
    "INPUT.FORMAT": "RGB",
    "INPUT.IMAGE_SIZE": 1024,
    "INPUT.MIN_SCALE": 0.1,
    "INPUT.MAX_SCALE": 2.0,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    "INPUT.RANDOM_FLIP": "horizontal",
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 1e-4,
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.WEIGHT_DECAY": 0.05,
    "SOLVER.WEIGHT_DECAY_NORM": 0.0,
    "SOLVER.WEIGHT_DECAY_EMBED": 0.0,
    "SOLVER.BACKBONE_MULTIPLIER": 0.1,
    "SOLVER.MAX_ITER": 368750,
    "SOLVER.STEPS": [327778, 355092],
    "SOLVER.GAMMA": 0.1,
    "SOLVER.WARMUP_ITERS": 10,
    "SOLVER.WARMUP_FACTOR": 1.0,
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.01,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": 2.0,
    "SOLVER.AMP.ENABLED": True,
    "SOLVER.CHECKPOINT_PERIOD": 5000,
    "DATALOADER.NUM_WORKERS": 4,
    "TEST.EVAL_PERIOD": 5000,
    "TEST.DETECTIONS_PER_IMAGE": 100,
    "TEST.AUG.ENABLED": False,
}


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def value_of(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return list(cfg) if isinstance(cfg, tuple) else cfg


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, value in tree.items():
        keys.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return keys


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", BACKBONES)
def test_coco_config_has_the_published_values(task: str, name: str) -> None:
    cfg = get_config(CONFIGS / f"coco/{task}-segmentation/{name}.yaml")
    expected = {**COMMON, **TASKS[task], **BACKBONES[name]}
    assert {key: value_of(cfg, key) for key in expected} == expected


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
    assert not {key: value for key, value in own.items() if value_of(inherited, key) == value}


@pytest.mark.parametrize("path", LEAFS, ids=name_of)
def test_every_translation_takes_every_config(path: Path) -> None:
    cfg = get_config(path)
    cfg.freeze()
    for translate in (
        config.architecture_arguments,
        config.inference_arguments,
        config.mapper_arguments,
        config.test_resize_arguments,
        config.optimizer_arguments,
        config.schedule_arguments,
        config.clip_arguments,
        config.step_arguments,
    ):
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
    assert {key: value_of(cfg, key) for key in expected} == expected
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
    with pytest.raises(KeyError):
        value_of(get_cfg(), key)


@pytest.mark.parametrize("with_deeplab", [False, True])
def test_adding_keys_gives_their_defaults_and_keeps_others(with_deeplab: bool) -> None:
    cfg = get_cfg()
    if with_deeplab:
        add_deeplab_config(cfg)
    cfg.MODEL.SWIN = CfgNode({"EMBED_DIM": 48, "OTHER_PROJECTS_KEY": 7})
    others = {key: value for key, value in flatten(cfg).items() if key not in DEFAULTS}
    add_maskformer2_config(cfg)
    assert {key: value_of(cfg, key) for key in DEFAULTS} == DEFAULTS
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


def test_published_style_file_that_calls_python_loads(tmp_path: Path) -> None:
    write(
        tmp_path / "base.yaml",
        """
MODEL:
  META_ARCHITECTURE: "MaskFormer"
  RESNETS:
    STEM_TYPE: "basic"
    RES5_MULTI_GRID: [1, 1, 1]
DATASETS:
  TRAIN: ("made_up_train",)
SOLVER:
  LR_SCHEDULER_NAME: "WarmupPolyLR"
VERSION: 2
""",
    )
    leaf = write(
        tmp_path / "leaf.yaml",
        """
_BASE_: base.yaml
INPUT:
  MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * 640) for x in range(5, 21)]"]
  DATASET_MAPPER_NAME: "mask_former_semantic"
""",
    )
    cfg = get_config(leaf)
    sizes = [320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960, 1024, 1088, 1152, 1216, 1280]
    assert config.mapper_arguments(cfg)["augmentation"]["min_sizes"] == sizes
    assert config.schedule_arguments(cfg)["name"] == "WarmupPolyLR"
    assert cfg.DATASETS.TRAIN == ("made_up_train",)


@pytest.mark.parametrize("path", LEAFS[:1] + LEAFS[-1:], ids=name_of)
def test_dumped_config_loads_again(path: Path, tmp_path: Path) -> None:
    cfg = get_config(path)
    assert "ASPP_CHANNELS" in cfg.dump()
    again = get_config(write(tmp_path / "config.yaml", cfg.dump()))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


def test_overrides_win() -> None:
    path = LEAFS[0]
    cfg = get_config(path, ["SOLVER.BASE_LR", "0.001", "MODEL.SWIN.QK_SCALE", "0.5"])
    assert cfg.SOLVER.BASE_LR == 0.001
    assert config.swin_arguments(cfg)["qk_scale"] == 0.5
    with pytest.raises(ValueError, match=r"pairs of key and value, got \['SOLVER.BASE_LR'\]"):
        get_config(path, ["SOLVER.BASE_LR"])


def test_config_of_another_model_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "config.yaml", "VERSION: 2\nMODEL:\n  META_ARCHITECTURE: GeneralizedRCNN\n")
    with pytest.raises(ValueError, match=r"META_ARCHITECTURE must be 'MaskFormer'.* got 'GeneralizedRCNN'"):
        config.architecture_arguments(get_config(path))
