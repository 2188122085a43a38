"""Builds models from plain numbers: presets for library users, and what model files and configs describe."""

import copy
from typing import Any

from torch import nn

from mask2former.modeling.backbones import ResNet, SwinTransformer, TimmBackbone, TimmPyramid
from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.mask2former import ALL_LEVELS, ENCODED, PIXEL_EMBEDDING, Mask2Former, SegmentationHead
from mask2former.modeling.per_pixel import PixelClassifier, PixelCriterion
from mask2former.modeling.pixel_decoders import (
    BiFPNPixelDecoder,
    DeformablePixelDecoder,
    FaPNPixelDecoder,
    FPNPixelDecoder,
    SemanticFPNPixelDecoder,
    TransformerEncoderPixelDecoder,
)
from mask2former.modeling.precision import Precision
from mask2former.modeling.transformer_decoders import MaskedAttentionDecoder, StandardDecoder

Architecture = dict[str, dict[str, Any]]
"""Keyword arguments of every part, by part, as `mask2former.config.architecture_arguments` gives them."""

_BACKBONES: dict[str, type[nn.Module]] = {
    "resnet": ResNet,
    "swin": SwinTransformer,
    "timm": TimmBackbone,
    "timm_pyramid": TimmPyramid,
}
_PIXEL_DECODERS: dict[str, type[nn.Module]] = {
    "deformable": DeformablePixelDecoder,
    "fpn": FPNPixelDecoder,
    "transformer_encoder": TransformerEncoderPixelDecoder,
    "semantic_fpn": SemanticFPNPixelDecoder,
    "bifpn": BiFPNPixelDecoder,
    "fapn": FaPNPixelDecoder,
}
_TRANSFORMER_DECODERS: dict[str, type[nn.Module]] = {
    "masked_attention": MaskedAttentionDecoder,
    "standard": StandardDecoder,
    "pixel_classifier": PixelClassifier,
}
_CRITERIA: dict[str, type[nn.Module]] = {"set": SetCriterion, "per_pixel": PixelCriterion}

PRESETS: dict[str, dict[str, Any]] = {
    "r50": {"name": "resnet", "depth": 50},
    "r101": {"name": "resnet", "depth": 101},
    "swin_tiny": {"name": "swin"},
    "swin_small": {"name": "swin", "depths": [2, 2, 18, 2]},
    "swin_base_384": {
        "name": "swin",
        "embed_dim": 128,
        "depths": [2, 2, 18, 2],
        "num_heads": [4, 8, 16, 32],
        "window_size": 12,
    },
    "swin_large_384": {
        "name": "swin",
        "embed_dim": 192,
        "depths": [2, 2, 18, 2],
        "num_heads": [6, 12, 24, 48],
        "window_size": 12,
    },
}


def preset(name: str, *, num_classes: int, num_queries: int = 100) -> Architecture:
    """The architecture of the published models.

    Args:
        name: of the backbone, see `PRESETS`.
        num_classes: K, without "no object".
        num_queries: Q; the published Swin-L models for COCO have 200.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"name must be one of {sorted(PRESETS)}, got {name!r}")
    return {
        "backbone": copy.deepcopy(PRESETS[name]),
        "pixel_decoder": {"name": "deformable"},
        "transformer_decoder": {
            "name": "masked_attention",
            "in_channels": 256,
            "num_classes": num_classes,
            "num_queries": num_queries,
        },
        "criterion": {"num_classes": num_classes},
        "input": {},
    }


def build_model(architecture: Architecture, precision: Precision | None = None) -> Mask2Former:
    """Build a model with random weights, in training mode.

    Args:
        architecture: from `preset`, a config or a model file; not changed.
        precision: what to compute in, see `Mask2Former.precision`.

    Raises:
        ValueError: if a part is missing, its name is unknown, or ``precision`` is another word.
        TypeError: if a part has an argument that its class does not know.
        ModuleNotFoundError: if the backbone is one of timm, which is not installed.
    """
    missing = {"backbone", "pixel_decoder", "transformer_decoder", "criterion", "input"} - set(architecture)
    if missing:
        raise ValueError(f"architecture must describe every part, missing: {sorted(missing)}")
    backbone = _make("backbone", _BACKBONES, architecture["backbone"])
    decoder = dict(architecture["pixel_decoder"])
    names = decoder.pop("in_features", list(backbone.out_channels))
    pixel_decoder = _make(
        "pixel_decoder",
        _PIXEL_DECODERS,
        decoder,
        in_channels={n: backbone.out_channels[n] for n in names},
        in_strides={n: backbone.out_strides[n] for n in names},
    )
    arguments = dict(architecture["transformer_decoder"])
    in_feature = arguments.pop("in_feature", ALL_LEVELS)
    known = {ALL_LEVELS, ENCODED, PIXEL_EMBEDDING, *backbone.out_channels}
    if in_feature not in known:
        raise ValueError(
            f"architecture['transformer_decoder']['in_feature'] must be one of {sorted(known)}, got {in_feature!r}"
        )
    attended = {"in_channels": backbone.out_channels[in_feature]} if in_feature in backbone.out_channels else {}
    predictor = _make("transformer_decoder", _TRANSFORMER_DECODERS, arguments, **attended)
    settings = {k: v for k, v in architecture["input"].items() if k != "image_format"}
    return Mask2Former(
        backbone=backbone,
        sem_seg_head=SegmentationHead(pixel_decoder=pixel_decoder, predictor=predictor, in_feature=in_feature),
        criterion=build_criterion(architecture["criterion"]),
        precision=precision,
        **settings,
    )


def build_criterion(arguments: dict[str, Any]) -> SetCriterion | PixelCriterion:
    """The training loss from its part of an architecture; without a "name" it is `SetCriterion`.

    Raises:
        ValueError: if the name is unknown.
    """
    return _make("criterion", _CRITERIA, {"name": "set", **arguments})


def _make(part: str, known: dict[str, type[nn.Module]], arguments: dict[str, Any], **derived: Any) -> Any:
    arguments = dict(arguments)
    name = arguments.pop("name", None)
    if name not in known:
        raise ValueError(f"architecture[{part!r}]['name'] must be one of {sorted(known)}, got {name!r}")
    return known[name](**arguments, **derived)
