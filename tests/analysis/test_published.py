"""FLOPs and parameters of whole configs against published values."""

import os
from pathlib import Path

import pytest

from mask2former.analysis.images import images_of_test_set
from mask2former.analysis.operations import count_operations
from mask2former.analysis.parts import part_sizes
from mask2former.analysis.tasks import analyse_operations, shape_model
from mask2former.engine.config import get_config
from tests.configs import ABLATIONS, CONFIGS, ROWS, name_of

PANOPTIC = CONFIGS / "coco/panoptic-segmentation"
MODELS = {
    "R50": "maskformer2_R50_bs16_50ep.yaml",
    "R101": "maskformer2_R101_bs16_50ep.yaml",
    "Swin-T": "swin/maskformer2_swin_tiny_bs16_50ep.yaml",
    "Swin-S": "swin/maskformer2_swin_small_bs16_50ep.yaml",
    "Swin-B": "swin/maskformer2_swin_base_384_bs16_50ep.yaml",
    "Swin-L": "swin/maskformer2_swin_large_IN21k_384_bs16_100ep.yaml",
}
# What fvcore counts in the published program, in G for an image of 800 x 1216.
OF_PUBLISHED_PROGRAM = {"R101": 315.0, "Swin-T": 249.4, "Swin-S": 335.9, "Swin-B": 506.2, "Swin-L": 943.2}
# The mean over images of COCO that the paper gives (table 1), in G.
IN_THE_PAPER = {"R50": 226, "R101": 293, "Swin-T": 232, "Swin-L": 868}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "published"), OF_PUBLISHED_PROGRAM.items())
def test_the_flops_that_fvcore_gives_the_published_program(name: str, published: float) -> None:
    counter = count_operations(shape_model(get_config(PANOPTIC / MODELS[name])), (800, 1216), all_layers=True)
    assert counter.flops[""].total() / 1e9 == pytest.approx(published, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "published"), IN_THE_PAPER.items())
def test_the_flops_of_the_paper(name: str, published: float) -> None:
    folder = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "coco_panoptic_mini"
    if not folder.is_dir():
        pytest.skip("needs images of COCO, coco_panoptic_mini in DETECTRON2_DATASETS")
    cfg = get_config(PANOPTIC / MODELS[name], ["DATASETS.TEST", "('coco_mini_val_panoptic_with_sem_seg',)"])
    found = analyse_operations(shape_model(cfg), images_of_test_set(cfg, 100)[1], all_layers=True)["flop"]
    assert found["mean"] / 1e9 == pytest.approx(published, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["config"])
def test_the_parameters_of_published_models(row: dict[str, str]) -> None:
    sizes = part_sizes(shape_model(get_config(CONFIGS / row["config"])))
    trainable = sum(part.trainable for part in sizes.values())
    assert f"{trainable / 1e6:.2f}" == row["params_m"]
    assert f"{sizes['backbone'].trainable / 1e6:.2f}" == row["backbone_m"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ABLATIONS, ids=name_of)
def test_every_ablation_can_be_counted(path: Path) -> None:
    counter = count_operations(shape_model(get_config(path)), (320, 480))
    assert {"backbone", "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"} <= counter.flops.keys()
    assert counter.activations["sem_seg_head.pixel_decoder"] > 0
