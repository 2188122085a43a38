"""The YAML files of configs/: their names, and that each says only what is new. Without Detectron2."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mask2former.config import DEFAULTS
from mask2former.engine.defaults import DETECTRON2_DEFAULTS
from tests.configs import ABLATIONS, CONFIGS, FILES, LEAFS, flatten, name_of

SWIN_TINY = CONFIGS / "coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml"


def own_keys(path: Path) -> tuple[list[Path], dict[str, Any]]:
    """The bases of a file and its own dotted keys."""
    tree = yaml.safe_load(path.read_text())
    bases = tree.pop("_BASE_", [])
    bases = bases if isinstance(bases, list) else [bases]
    return [path.parent / base for base in bases], flatten(tree)


def inherited_keys(path: Path) -> dict[str, Any]:
    """The dotted keys that a file's bases give, a later base over an earlier one."""
    keys: dict[str, Any] = {}
    for base in own_keys(path)[0]:
        keys.update(resolved_keys(base))
    return keys


def resolved_keys(path: Path) -> dict[str, Any]:
    return {**inherited_keys(path), **own_keys(path)[1]}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_says_only_what_bases_and_defaults_do_not(path: Path) -> None:
    _, own = own_keys(path)
    own.pop("VERSION", None)  # spares Detectron2's warning that it is missing
    inherited = {**DETECTRON2_DEFAULTS, **DEFAULTS, **inherited_keys(path)}
    assert not {key: value for key, value in own.items() if key in inherited and plain(inherited[key]) == value}


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


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
    """But those with a ResNet-50, which are their task's base under the published name."""
    resolved = {name_of(path): str(resolved_keys(path)) for path in FILES if "_R50_" not in path.name}
    assert len(set(resolved.values())) == len(resolved)


def test_every_fragment_is_used() -> None:
    used = {base.resolve() for path in FILES for base in own_keys(path)[0]}
    runnable = {path for path in FILES if path.name.startswith("maskformer") or path.parent.name == "quick_schedules"}
    assert not [name_of(path) for path in set(FILES) - runnable - set(ABLATIONS) - used]


@pytest.mark.parametrize("path", ABLATIONS, ids=name_of)
def test_ablation_changes_one_part_of_a_published_config_only(path: Path) -> None:
    """The backbone and the weights that it starts from, or decoders and head."""
    is_backbone = path.name.startswith("backbone_")
    of_head = ("MODEL.SEM_SEG_HEAD.", "MODEL.MASK_FORMER.")
    parts = ("MODEL.BACKBONE.", "MODEL.TIMM.", "MODEL.WEIGHTS") if is_backbone else of_head
    (published,) = (base for base in LEAFS if base.parent.parts[-2:] == path.parent.parts[-2:] and "_R50_" in base.name)
    own, rest = resolved_keys(path), resolved_keys(published)
    changed = {key for key in own if own[key] != rest.get(key)}
    assert rest.keys() <= own.keys()
    assert changed and all(key.startswith(parts) for key in changed)


def test_ablations_are_listed_with_the_numbers_of_the_paper() -> None:
    text = (CONFIGS / "ablations/README.md").read_text("utf-8")
    assert not [path.name for path in ABLATIONS if f"`{path.name}`" not in text]
    assert "| 43.5 | 51.8 | 45.6 |" in text


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
