"""Models of a few ten thousand parameters, and random images, predictions and targets for them."""

from typing import Any

import torch
from torch import Tensor

from mask2former.build import Architecture, build_model
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.structures import MaskPrediction, MaskTarget
from tests.golden import fill_weights

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
}


def tiny_architecture(
    *,
    backbone: str = "swin",
    num_classes: int = 5,
    num_queries: int = 7,
    num_points: int = 64,
    **criterion: Any,
) -> Architecture:
    """All parts of the full architecture, each as small as it goes."""
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
        "criterion": {"num_classes": num_classes, "num_points": num_points, **criterion},
        "input": {},
    }


def tiny_model(**options: Any) -> Mask2Former:
    """A tiny model with weights that follow from their names, options as in `tiny_architecture`."""
    model = build_model(tiny_architecture(**options))
    fill_weights(model)
    return model


def random_image(height: int, width: int) -> Tensor:
    """(3, H, W) uint8."""
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def random_target(count: int, height: int, width: int, num_classes: int = 5) -> MaskTarget:
    """Random labels, and masks of random pixels."""
    labels = torch.randint(num_classes, (count,))
    return MaskTarget(labels, torch.rand(count, height, width) > 0.5)


def random_predictions(
    layers: int, batch: int, queries: int, *, num_classes: int = 5, size: tuple[int, int] = (8, 12)
) -> list[MaskPrediction]:
    """Random logits that require a gradient."""
    return [
        MaskPrediction(
            (2 * torch.randn(batch, queries, num_classes + 1)).requires_grad_(),
            (3 * torch.randn(batch, queries, *size)).requires_grad_(),
        )
        for _ in range(layers)
    ]
