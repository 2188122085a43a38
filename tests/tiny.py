"""The smallest complete models, and pictures and targets for them."""

import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mask2former.build import Architecture, build_model
from mask2former.data.catalog import Category
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.structures import MaskTarget
from mask2former.predictor import PanopticPicture, PictureResult, Predictor
from tests.golden import fill_weights

K = 4
Q = 8

BACKBONES: dict[str, dict[str, Any]] = {
    "swin": {
        "name": "swin",
        "embed_dim": 16,
        "depths": [2, 1, 1, 1],
        "num_heads": [1, 2, 2, 4],
        "window_size": 3,
        "drop_path_rate": 0.0,
    },
    "resnet": {"name": "resnet", "depth": 50, "stem_out_channels": 8, "res2_out_channels": 16},
    "timm": {"name": "timm", "model_name": "test_convnext.r160_in1k"},  # for tests that have timm, and the next
    "timm_pyramid": {"name": "timm_pyramid", "model_name": "test_vit.r160_in1k", "pyramid_channels": 32},
}


def architecture(
    num_classes: int = K,
    num_queries: int = Q,
    *,
    backbone: str = "swin",
    criterion: dict[str, Any] | None = None,
    **inputs: Any,
) -> Architecture:
    """All parts of the full architecture, each as small as it goes; other keyword arguments are those of the input."""
    return {
        "backbone": dict(BACKBONES[backbone]),
        "pixel_decoder": {
            "name": "deformable",
            "conv_dim": 64,
            "mask_dim": 24,
            "num_layers": 1,
            "num_heads": 4,
            "num_points": 2,
            "dim_feedforward": 48,
        },
        "transformer_decoder": {
            "name": "masked_attention",
            "in_channels": 64,
            "hidden_dim": 32,
            "mask_dim": 24,
            "num_classes": num_classes,
            "num_queries": num_queries,
            "num_heads": 4,
            "dim_feedforward": 48,
            "num_layers": 3,
        },
        "criterion": {"num_classes": num_classes, "num_points": 64, **(criterion or {})},
        "input": inputs,
    }


def categories(count: int = K) -> tuple[Category, ...]:
    """Things and stuff by turns."""
    return tuple(Category(10 + i, f"class {i} é", i % 2 == 0, (i, 40 * i, 255)) for i in range(count))


def picture(height: int = 50, width: int = 70, seed: int = 0) -> np.ndarray:
    """Blobs of colour, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def random_image(height: int, width: int) -> Tensor:
    """(3, H, W) uint8."""
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def random_target(count: int, height: int, width: int, num_classes: int = K) -> MaskTarget:
    """Random labels, and masks of random pixels."""
    labels = torch.randint(num_classes, (count,))
    return MaskTarget(labels, torch.rand(count, height, width) > 0.5)


def tiny_model(*, backbone: str = "swin", **criterion: Any) -> Mask2Former:
    """Weights that follow from their names; other keyword arguments are those of the criterion."""
    model = build_model(architecture(backbone=backbone, criterion=criterion))
    fill_weights(model)
    return model


def fresh_model(num_classes: int = K, num_queries: int = Q) -> Mask2Former:
    """Always the same random weights."""
    torch.manual_seed(99)
    return build_model(architecture(num_classes, num_queries))


def assert_equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Same names, types and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def lively_model() -> Mask2Former:
    """Random weights with which `picture` has several segments, of more than one class and different scores."""
    return copy.deepcopy(_lively_model())


def lively_predictor(**changes: Any) -> Predictor:
    """A predictor with `lively_model`; changes are its arguments."""
    values: dict[str, Any] = {"shortest": 64, "longest": 160, "object_mask_threshold": 0.3, "overlap_threshold": 0.15}
    return Predictor(lively_model(), **{"categories": categories(), **values, **changes})


def assert_same_pictures(a: PictureResult, b: PictureResult) -> None:
    """Same kind, types and bits."""
    assert type(a) is type(b)
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other)
            assert value.dtype == other.dtype, name
        else:
            assert value == other, name


@cache
def _lively_model() -> Mask2Former:
    for seed in range(23, 100):
        model = _with_contrast(seed)
        predictor = Predictor(model, categories=categories(), shortest=64, longest=160, overlap_threshold=0.15)
        result = predictor(picture(), "panoptic", threshold=0.3)
        assert isinstance(result, PanopticPicture)
        if len(result.segments) >= 5 and len({s.category_id for s in result.segments}) >= 3:
            return model
    raise AssertionError("no seed gives a lively model: has the initialisation changed?")


def _with_contrast(seed: int) -> Mask2Former:
    torch.manual_seed(seed)
    model = build_model(architecture())
    decoder = model.sem_seg_head.predictor
    with torch.no_grad():
        decoder.query_feat.weight.normal_(0, 3)
        decoder.class_embed.weight *= 8
        decoder.class_embed.bias[-1] = -2.0
        decoder.mask_embed.layers[-1].weight *= 12
        model.sem_seg_head.pixel_decoder.mask_features.weight *= 3
    return model
