"""The published configs: every setting, and the sizes of their models, against the table of the published release."""

import re
from collections import Counter
from typing import Any

import pytest
import torch

from mask2former.build import build_model
from mask2former.config import architecture_arguments
from mask2former.data import catalog
from mask2former.engine.config import get_config
from mask2former.engine.defaults import is_ignored
from mask2former.engine.yaml_files import read_yaml
from mask2former.modeling.structures import MaskTarget
from tests.configs import CONFIGS, FILES, PUBLISHED, ROWS, flatten, name_of, plain_value_of, published_values

per_config = pytest.mark.parametrize("row", ROWS, ids=[row["config"] for row in ROWS])

BASES = {
    "coco": ("Base-COCO-{}Segmentation.yaml", ("Panoptic", "Instance")),
    "ade20k": ("Base-ADE20K-{}Segmentation.yaml", ("Semantic", "Panoptic", "Instance")),
    "cityscapes": ("Base-Cityscapes-{}Segmentation.yaml", ("Semantic", "Panoptic", "Instance")),
    "mapillary-vistas": ("Base-MapillaryVistas-{}Segmentation.yaml", ("Semantic", "Panoptic")),
}


def test_the_table_has_each_published_image_config_once() -> None:
    assert Counter("/".join(row["config"].split("/")[:2]) for row in ROWS) == {
        "coco/panoptic-segmentation": 7,
        "coco/instance-segmentation": 7,
        "ade20k/semantic-segmentation": 7,
        "ade20k/panoptic-segmentation": 2,
        "ade20k/instance-segmentation": 2,
        "cityscapes/semantic-segmentation": 6,
        "cityscapes/panoptic-segmentation": 6,
        "cityscapes/instance-segmentation": 6,
        "mapillary-vistas/semantic-segmentation": 2,
        "mapillary-vistas/panoptic-segmentation": 2,
    }
    assert len({row["config"] for row in ROWS}) == 47


def test_there_are_these_files_and_no_others() -> None:
    leafs = {name_of(path) for path in FILES if path.name.startswith("maskformer")}
    assert leafs == {row["config"] for row in ROWS}


@pytest.mark.parametrize("dataset", BASES)
def test_base_files_have_their_published_names(dataset: str) -> None:
    form, tasks = BASES[dataset]
    for task in tasks:
        assert (CONFIGS / dataset / f"{task.lower()}-segmentation" / form.format(task)).is_file()


@per_config
def test_every_setting_is_the_published_one(row: dict[str, Any]) -> None:
    cfg = get_config(CONFIGS / row["config"])
    expected = {key: value for key, value in published_values(row).items() if not is_ignored(key)}
    assert {key: plain_value_of(cfg, key) for key in expected} == expected


@pytest.mark.parametrize("task", PUBLISHED["tasks"])
def test_data_sets_are_known_and_fit_the_model(task: str) -> None:
    values = next(published_values(row) for row in ROWS if row["config"].startswith(f"{task}/"))
    for name in values["DATASETS.TRAIN"] + values["DATASETS.TEST"]:
        metadata = catalog.get(name).metadata
        assert metadata.num_classes == values["MODEL.SEM_SEG_HEAD.NUM_CLASSES"]
        assert metadata.ignore_label == values["MODEL.SEM_SEG_HEAD.IGNORE_VALUE"]


@per_config
def test_augmentation_of_test_images_is_set_up_where_it_was(row: dict[str, Any]) -> None:
    section = flatten(read_yaml(CONFIGS / row["config"])["TEST"], "TEST.")
    sizes = PUBLISHED["sizes"][row["size"]]
    assert {key: value for key, value in section.items() if "AUG" in key} == {
        key: value for key, value in sizes.items() if key.startswith("TEST.AUG.")
    }


@per_config
def test_the_model_has_the_published_size(row: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build_model(architecture_arguments(get_config(CONFIGS / row["config"])))
    assert len(model.state_dict()) == row["keys"]
    assert millions(model) == row["params_m"]
    assert millions(model.backbone) == row["backbone_m"]


def test_the_documentation_lists_each_with_its_size() -> None:
    text = (CONFIGS.parent / "docs/published_models.md").read_text("utf-8")
    listed, folder = [], ""
    for line in text.splitlines():
        if found := re.match(r"\| `configs/(\S+)/` \| parameters \|", line):
            folder = found[1]
        elif found := re.match(r"\| `(\S+)` \| (\S+) M \|.*/model_final_\w{6}\.pkl\) \|$", line):
            listed.append((f"{folder}/{found[1]}", found[2]))
    assert sorted(listed) == sorted((row["config"], f"{float(row['params_m']):.1f}") for row in ROWS)


def millions(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f}"


def test_a_model_with_synchronised_norm_trains_on_a_cpu() -> None:
    cfg = get_config(CONFIGS / "cityscapes/panoptic-segmentation/maskformer2_R50_bs16_90k.yaml")
    model = build_model(architecture_arguments(cfg)).train()
    mean = model.backbone.stem.conv1.norm.running_mean.clone()
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    losses = model.losses([image, image], [MaskTarget(torch.tensor([18]), torch.ones(1, 64, 96).bool())] * 2)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not torch.equal(model.backbone.stem.conv1.norm.running_mean, mean)
