"""The YAML files of configs/ and the table of what the published ones resolve to, for the tests of both engines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mask2former import config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))

# From the inventory of the published release: what all configs have in common, then the parts that a row of
# "configs" names. Parameters are in millions, as text with two decimals.
PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "data/published_configs.json").read_text("utf-8"))
ROWS: list[dict[str, Any]] = PUBLISHED["configs"]
ABLATIONS = [path for path in FILES if "ablations" in path.parts and path.parent.name.endswith("-segmentation")]
LEAFS = [CONFIGS / row["config"] for row in ROWS]

TRANSLATIONS: list[Callable[[Any], dict[str, Any]]] = [
    config.resnet_arguments,
    config.swin_arguments,
    config.timm_arguments,
    config.timm_pyramid_arguments,
    config.pixel_decoder_arguments,
    config.fpn_arguments,
    config.encoder_fpn_arguments,
    config.bifpn_arguments,
    config.transformer_decoder_arguments,
    config.criterion_arguments,
    config.input_arguments,
    config.inference_arguments,
    config.precision_arguments,
    config.evaluation_arguments,
    config.mapper_arguments,
    config.custom_dataset_arguments,
    config.test_resize_arguments,
    config.optimizer_arguments,
    config.schedule_arguments,
    config.clip_arguments,
    config.step_arguments,
    config.run_arguments,
    config.start_arguments,
    config.tta_arguments,
    config.architecture_arguments,
]

# Two files that do what published ones do: Python in a tag, a tuple as text, keys that nothing reads.
PUBLISHED_STYLE_BASE = """
MODEL:
  META_ARCHITECTURE: "MaskFormer"
  RESNETS: {DEPTH: 50, STEM_TYPE: "basic", RES5_MULTI_GRID: [1, 1, 1]}
  SEM_SEG_HEAD: {LOSS_WEIGHT: 1.0}
  RPN: {NMS_THRESH: 0.5}
DATASETS:
  TRAIN: ("made_up_train",)
SOLVER:
  LR_SCHEDULER_NAME: "WarmupPolyLR"
TEST:
  AUG: {ENABLED: False, MIN_SIZES: [256, 384], MAX_SIZE: 3584, FLIP: True}
VERSION: 2
"""
PUBLISHED_STYLE_LEAF = """
_BASE_: base.yaml
INPUT:
  MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * SHORTEST) for x in range(5, 21)]"]
  DATASET_MAPPER_NAME: "mask_former_semantic"
"""


def name_of(path: Path) -> str:
    """A file's path below configs/."""
    return path.relative_to(CONFIGS).as_posix()


def skip_without_timm(path: Path) -> None:
    """Skip the test of a config that describes a backbone of timm where that is not installed."""
    if path.name.startswith("backbone_timm_"):
        pytest.importorskip("timm", reason="timm is not installed (requirements-timm.txt)")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts by dotted key."""
    keys: dict[str, Any] = {}
    for name, value in tree.items():
        keys.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return keys


def value_of(cfg: Any, key: str) -> Any:
    """The value of a dotted key of either engine's config."""
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg


def plain_value_of(cfg: Any, key: str) -> Any:
    """As `value_of`, with a tuple turned into a list."""
    value = value_of(cfg, key)
    return list(value) if isinstance(value, tuple) else value


def published_values(row: dict[str, Any]) -> dict[str, Any]:
    """What the config of a row of the table resolves to, by dotted key."""
    dataset, task = row["config"].split("/")[:2]
    shortest, longest = row["test"]
    values = {
        **PUBLISHED["constants"],
        **PUBLISHED["tasks"][f"{dataset}/{task}"],
        **PUBLISHED["schedules"][row["schedule"]],
        **PUBLISHED["sizes"][row["size"]],
        **PUBLISHED["backbones"][row["backbone"]],
        "MODEL.WEIGHTS": row["weights"],
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": row["classes"],
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": row["queries"],
        "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": row["semantic"],
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON": row["instance"],
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": row["panoptic"],
        "INPUT.MIN_SIZE_TEST": shortest,
        "INPUT.MAX_SIZE_TEST": longest,
        "SOLVER.MAX_ITER": row["iterations"],
    }
    if row["norm"] is not None:
        values["MODEL.RESNETS.NORM"] = row["norm"]
    if row["steps"] is not None:
        values["SOLVER.STEPS"] = row["steps"]
    return values


def write_published_style(folder: Path, shortest: int) -> Path:
    """Write a file whose training sizes an expression gives, and its base; returns the path."""
    (folder / "base.yaml").write_text(PUBLISHED_STYLE_BASE)
    path = folder / "leaf.yaml"
    path.write_text(PUBLISHED_STYLE_LEAF.replace("SHORTEST", str(shortest)))
    return path


def published_sizes(shortest: int) -> list[int]:
    """INPUT.MIN_SIZE_TRAIN of the published configs with this size."""
    lists = [sizes["INPUT.MIN_SIZE_TRAIN"] for sizes in PUBLISHED["sizes"].values() if "INPUT.MIN_SIZE_TRAIN" in sizes]
    return next(sizes for sizes in lists if sizes[5] == shortest)
