"""The YAML files of configs/: their names, and that each says only what is new. Without Detectron2."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mask2former.config import DEFAULTS

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
SWIN_TINY = CONFIGS / "coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml"

PUBLISHED_LEAFS = {
    f"coco/{task}-segmentation/{name}.yaml"
    for task in ("panoptic", "instance")
    for name in (
        "maskformer2_R50_bs16_50ep",
        "maskformer2_R101_bs16_50ep",
        "swin/maskformer2_swin_tiny_bs16_50ep",
        "swin/maskformer2_swin_small_bs16_50ep",
        "swin/maskformer2_swin_base_384_bs16_50ep",
        "swin/maskformer2_swin_base_IN21k_384_bs16_50ep",
        "swin/maskformer2_swin_large_IN21k_384_bs16_100ep",
    )
}


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def own_keys(path: Path) -> tuple[list[Path], dict[str, Any]]:
    """The bases of a file and its own dotted keys."""
    tree = yaml.safe_load(path.read_text())
    bases = tree.pop("_BASE_", [])
    bases = bases if isinstance(bases, list) else [bases]
    return [path.parent / base for base in bases], flatten(tree)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, value in tree.items():
        keys.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return keys


def inherited_keys(path: Path) -> dict[str, Any]:
    """The dotted keys that a file's bases give, a later base over an earlier one."""
    keys: dict[str, Any] = {}
    for base in own_keys(path)[0]:
        keys.update(resolved_keys(base))
    return keys


def resolved_keys(path: Path) -> dict[str, Any]:
    return {**inherited_keys(path), **own_keys(path)[1]}


def test_every_published_coco_config_is_there() -> None:
    leafs = {name_of(path) for path in FILES if path.name.startswith("maskformer2_")}
    assert leafs == PUBLISHED_LEAFS


@pytest.mark.parametrize("task", ["Panoptic", "Instance"])
def test_base_files_have_their_published_names(task: str) -> None:
    assert (CONFIGS / f"coco/{task.lower()}-segmentation/Base-COCO-{task}Segmentation.yaml").is_file()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_says_only_what_bases_and_defaults_do_not(path: Path) -> None:
    _, own = own_keys(path)
    inherited = {**DEFAULTS, **inherited_keys(path)}
    assert not {key: value for key, value in own.items() if key in inherited and inherited[key] == value}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_calls_no_python_and_names_no_machine_path(path: Path) -> None:
    assert "!!" not in path.read_text()
    assert not [value for value in own_keys(path)[1].values() if str(value).startswith(("/", "~"))]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_numbers_are_numbers(path: Path) -> None:
    """YAML reads 1e-4 without a point as a string."""
    for key, value in own_keys(path)[1].items():
        assert not (isinstance(value, str) and value[:1].isdigit()), f"{key}: {value!r} is a string"


def test_no_file_is_a_copy_of_another() -> None:
    resolved = [str(resolved_keys(path)) for path in FILES if path.name != "maskformer2_R50_bs16_50ep.yaml"]
    assert len(set(resolved)) == len(resolved)


def test_every_fragment_is_used() -> None:
    used = {base.resolve() for path in FILES for base in own_keys(path)[0]}
    shared = ("common/", "coco/schedule")
    fragments = {path for path in FILES if name_of(path).startswith(shared) or path.name.startswith("Base")}
    assert not [name_of(path) for path in fragments - used]


def test_training_reference_changes_just_what_its_description_says() -> None:
    published = resolved_keys(SWIN_TINY)
    reference = resolved_keys(CONFIGS / "quick_schedules/coco_mini16_panoptic_tiny.yaml")
    assert published.keys() <= reference.keys()
    changed = {key for key in reference if key not in published or published[key] != reference[key]}
    assert {key: reference[key] for key in sorted(changed)} == {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.SWIN.EMBED_DIM": 32,
        "MODEL.SWIN.DEPTHS": [1, 1, 2, 1],
        "MODEL.SWIN.NUM_HEADS": [1, 2, 4, 8],
        "MODEL.SWIN.DROP_PATH_RATE": 0.0,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 128,
        "MODEL.SEM_SEG_HEAD.MASK_DIM": 128,
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 2,
        "MODEL.MASK_FORMER.HIDDEN_DIM": 128,
        "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 512,
        "MODEL.MASK_FORMER.DEC_LAYERS": 4,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 50,
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 2048,
        "INPUT.IMAGE_SIZE": 256,
        "INPUT.MIN_SCALE": 0.9,
        "INPUT.MAX_SCALE": 1.1,
        "INPUT.MIN_SIZE_TEST": 256,
        "INPUT.MAX_SIZE_TEST": 384,
        "DATALOADER.NUM_WORKERS": 0,
        "DATASETS.TRAIN": ["coco_mini_train16_panoptic_with_sem_seg"],
        "DATASETS.TEST": ["coco_mini_train16_panoptic_with_sem_seg"],
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.BASE_LR": 0.0005,
        "SOLVER.BACKBONE_MULTIPLIER": 1.0,
        "SOLVER.MAX_ITER": 600,
        "SOLVER.STEPS": [540],
        "SOLVER.AMP.ENABLED": False,
        "SEED": 1,
    }
