"""The parts of the model from a config: backbones, decoders and losses. `mask2former.config` says what a config is."""

from typing import Any

from mask2former.config_keys import DEFAULTS
from mask2former.config_values import at_least, one_of, require, subset_of
from mask2former.modeling.criterion import MASK_PARTS
from mask2former.modeling.mask2former import ENCODED, PIXEL_EMBEDDING
from mask2former.modeling.transformer_decoders.masked_attention import CROSS_ATTENTIONS, FEATURE_SCALES

TIMM_BACKBONES = ("TimmBackbone", "TimmSimplePyramid")
IMAGE_FORMATS = ("RGB", "BGR")
PER_PIXEL = "PerPixelBaselineHead"
PER_PIXEL_PLUS = "PerPixelBaselinePlusHead"
_MASKS = "MaskFormerHead"
_STANDARD = "StandardTransformerDecoder"
# What the masked decoder alone obeys, under MODEL.MASK_FORMER.
_OF_MASKED_DECODER = (
    "CROSS_ATTENTION",
    "FEATURE_SCALES",
    "LEARNABLE_QUERIES",
    "SELF_ATTENTION_FIRST",
    "DECODER_DROPOUT",
    "TEST.DECODER_LAYERS",
)
_WITHOUT_ENCODER = ("BasePixelDecoder", "SemanticFPNPixelDecoder", "BiFPNPixelDecoder", "FaPNPixelDecoder")
_OBJECT_MAPPERS = ("mask_former_instance", "coco_instance_lsj")
_STAGES = ("res2", "res3", "res4", "res5")
# The one kind of ResNet built here, under MODEL.RESNETS.
_RESNET = {"STEM_TYPE": "basic", "NUM_GROUPS": 1, "DEFORM_ON_PER_STAGE": [False] * 4}
_NO_DILATION = {"RES4_DILATION": 1, "RES5_DILATION": 1}


def backbone_arguments(cfg: Any) -> dict[str, Any]:
    """The backbone that MODEL.BACKBONE.NAME names, with the core's "name"."""
    name, arguments = _BACKBONES[one_of(cfg, "MODEL.BACKBONE.NAME", _BACKBONES)]
    return {"name": name, **arguments(cfg)}


def decoder_arguments(cfg: Any) -> dict[str, Any]:
    """The two decoders that MODEL.SEM_SEG_HEAD.NAME, PIXEL_DECODER_NAME and TRANSFORMER_DECODER_NAME name.

    Returns:
        "pixel_decoder" and "transformer_decoder", each with the core's "name".
    """
    head = one_of(cfg, "MODEL.SEM_SEG_HEAD.NAME", (_MASKS, PER_PIXEL, PER_PIXEL_PLUS))
    pixels, pixel_arguments = _PIXEL_DECODERS[one_of(cfg, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", _PIXEL_DECODERS)]
    if head == PER_PIXEL:
        decoder, arguments = "pixel_classifier", pixel_classifier_arguments
    else:
        key = "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME"
        if head == PER_PIXEL_PLUS:
            require(cfg, key, _STANDARD, f"with {head}")
        decoder, arguments = _DECODERS[one_of(cfg, key, _DECODERS)]
    return {
        "pixel_decoder": {"name": pixels, **pixel_arguments(cfg)},
        "transformer_decoder": {"name": decoder, **arguments(cfg)},
    }


def resnet_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.RESNETS and MODEL.BACKBONE.FREEZE_AT -> arguments of the core's ResNet.

    The core has one setting for the widths of the stem and of res2's bottlenecks, so they must be equal.
    """
    resnet = cfg.MODEL.RESNETS
    for key, supported in (_RESNET | _NO_DILATION | {"WIDTH_PER_GROUP": resnet.STEM_OUT_CHANNELS}).items():
        require(cfg, f"MODEL.RESNETS.{key}", supported)
    return {
        "depth": one_of(cfg, "MODEL.RESNETS.DEPTH", (50, 101, 152)),
        "norm": one_of(cfg, "MODEL.RESNETS.NORM", ("FrozenBN", "BN", "SyncBN")),
        "stride_in_1x1": resnet.STRIDE_IN_1X1,
        "out_features": subset_of(cfg, "MODEL.RESNETS.OUT_FEATURES", _STAGES),
        "stem_out_channels": resnet.STEM_OUT_CHANNELS,
        "res2_out_channels": resnet.RES2_OUT_CHANNELS,
        "freeze_at": one_of(cfg, "MODEL.BACKBONE.FREEZE_AT", tuple(range(6))),
    }


def swin_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.SWIN -> arguments of the core's Swin transformer."""
    swin = cfg.MODEL.SWIN
    return {
        "embed_dim": swin.EMBED_DIM,
        "depths": list(swin.DEPTHS),
        "num_heads": list(swin.NUM_HEADS),
        "window_size": swin.WINDOW_SIZE,
        "mlp_ratio": swin.MLP_RATIO,
        "qkv_bias": swin.QKV_BIAS,
        "qk_scale": swin.QK_SCALE,
        "drop_rate": swin.DROP_RATE,
        "attn_drop_rate": swin.ATTN_DROP_RATE,
        "drop_path_rate": swin.DROP_PATH_RATE,
        "patch_size": swin.PATCH_SIZE,
        "patch_norm": swin.PATCH_NORM,
        "ape": swin.APE,
        "pretrain_image_size": swin.PRETRAIN_IMG_SIZE,
        "out_features": subset_of(cfg, "MODEL.SWIN.OUT_FEATURES", _STAGES),
        "use_checkpoint": swin.USE_CHECKPOINT,
    }


def timm_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.TIMM -> arguments of the core's backbone of timm."""
    one_of(cfg, "MODEL.TIMM.NORMALIZATION", ("timm", "config"))  # `input_arguments` obeys it
    timm = cfg.MODEL.TIMM
    if not 0 <= timm.DROP_PATH_RATE < 1:
        raise ValueError(f"MODEL.TIMM.DROP_PATH_RATE must be at least 0 and below 1, got {timm.DROP_PATH_RATE!r}")
    return {
        "model_name": timm.NAME,
        "out_features": subset_of(cfg, "MODEL.TIMM.OUT_FEATURES", _STAGES),
        "drop_path_rate": float(timm.DROP_PATH_RATE),
        "frozen": timm.FROZEN,
        "image_format": one_of(cfg, "INPUT.FORMAT", IMAGE_FORMATS),
    }


def timm_pyramid_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.TIMM -> arguments of the core's plain vision transformer of timm with a simple feature pyramid."""
    return {**timm_arguments(cfg), "pyramid_channels": at_least(cfg, "MODEL.TIMM.PYRAMID_CHANNELS", 1)}


def pixel_decoder_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.SEM_SEG_HEAD and MODEL.MASK_FORMER -> arguments of the deformable pixel decoder.

    `num_heads` is MODEL.MASK_FORMER.NHEADS as published, which never reads
    DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS; that key is obeyed where it differs from its default 8. The
    feed-forward width is ENCODER_DIM_FEEDFORWARD, not DIM_FEEDFORWARD, and DROPOUT acts here only.
    """
    head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    own_heads = head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS
    in_features_key = "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
    return {
        "conv_dim": head.CONVS_DIM,
        "mask_dim": head.MASK_DIM,
        "norm": head.NORM,
        "transformer_in_features": subset_of(cfg, in_features_key, head.IN_FEATURES),
        "num_layers": head.TRANSFORMER_ENC_LAYERS,
        "num_heads": former.NHEADS if own_heads == 8 else own_heads,
        "num_points": head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
        "dim_feedforward": former.ENCODER_DIM_FEEDFORWARD,
        "dropout": former.DROPOUT,
        "common_stride": head.COMMON_STRIDE,
        "checkpoint_activations": former.CHECKPOINT_ACTIVATIONS,
        "in_features": list(head.IN_FEATURES),
    }


def fpn_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.SEM_SEG_HEAD -> arguments of the FPN, which all pixel decoders but the deformable one share."""
    head = cfg.MODEL.SEM_SEG_HEAD
    _require_defaults(cfg, ("CHECKPOINT_ACTIVATIONS",), f"with {head.PIXEL_DECODER_NAME}")
    return {
        "conv_dim": head.CONVS_DIM,
        "mask_dim": head.MASK_DIM,
        "norm": head.NORM,
        "common_stride": head.COMMON_STRIDE,
        "in_features": list(head.IN_FEATURES),
    }


def encoder_fpn_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.SEM_SEG_HEAD and MODEL.MASK_FORMER -> arguments of the FPN with a transformer encoder.

    Its feed-forward width is DIM_FEEDFORWARD; ENCODER_DIM_FEEDFORWARD is that of the deformable encoder.
    """
    former = cfg.MODEL.MASK_FORMER
    return {
        **fpn_arguments(cfg),
        "num_layers": at_least(cfg, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1),
        "num_heads": former.NHEADS,
        "dim_feedforward": former.DIM_FEEDFORWARD,
        "dropout": former.DROPOUT,
        "pre_norm": former.PRE_NORM,
    }


def bifpn_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.SEM_SEG_HEAD -> arguments of the BiFPN."""
    return {**fpn_arguments(cfg), "num_repeats": at_least(cfg, "MODEL.SEM_SEG_HEAD.BIFPN_REPEATS", 1)}


def transformer_decoder_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.MASK_FORMER -> arguments of the masked-attention decoder; its dropout is DECODER_DROPOUT, not DROPOUT.

    `num_layers` is DEC_LAYERS - 1: the prediction from the learned queries alone counts as a layer.
    """
    require(cfg, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "multi_scale_pixel_decoder")
    require(cfg, "MODEL.MASK_FORMER.ENC_LAYERS", 0)
    former = cfg.MODEL.MASK_FORMER
    num_layers = at_least(cfg, "MODEL.MASK_FORMER.DEC_LAYERS", 2) - 1
    return {
        "in_channels": cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM,
        "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        "hidden_dim": former.HIDDEN_DIM,
        "num_queries": former.NUM_OBJECT_QUERIES,
        "num_heads": former.NHEADS,
        "dim_feedforward": former.DIM_FEEDFORWARD,
        "num_layers": num_layers,
        "pre_norm": former.PRE_NORM,
        "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
        "enforce_input_projection": former.ENFORCE_INPUT_PROJ,
        "cross_attention": one_of(cfg, "MODEL.MASK_FORMER.CROSS_ATTENTION", CROSS_ATTENTIONS),
        "feature_scales": one_of(cfg, "MODEL.MASK_FORMER.FEATURE_SCALES", FEATURE_SCALES),
        "learnable_queries": former.LEARNABLE_QUERIES,
        "self_attention_first": former.SELF_ATTENTION_FIRST,
        "dropout": _decoder_dropout(cfg),
        "num_test_layers": _num_test_layers(cfg, num_layers),
    }


def _decoder_dropout(cfg: Any) -> float:
    dropout = cfg.MODEL.MASK_FORMER.DECODER_DROPOUT
    if not 0 <= dropout < 1:
        raise ValueError(f"MODEL.MASK_FORMER.DECODER_DROPOUT must be at least 0 and below 1, got {dropout!r}")
    return float(dropout)


def _num_test_layers(cfg: Any, num_layers: int) -> int | None:
    """None: all. Without learnable queries there is nothing to predict from before the first layer."""
    number, least = cfg.MODEL.MASK_FORMER.TEST.DECODER_LAYERS, 0 if cfg.MODEL.MASK_FORMER.LEARNABLE_QUERIES else 1
    if number < 0:
        return None
    if not least <= number <= num_layers:
        raise ValueError(
            f"MODEL.MASK_FORMER.TEST.DECODER_LAYERS must be in [{least}, {num_layers}], up to DEC_LAYERS - 1, or "
            f"negative for all layers, got {number}"
        )
    return int(number)


def standard_decoder_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.MASK_FORMER -> arguments of the standard transformer decoder; "in_feature" is the map it attends to.

    "in_channels" is there unless that map is one of the backbone's. `num_layers` is DEC_LAYERS: there is no
    prediction from the queries alone.
    """
    _require_defaults(cfg, _OF_MASKED_DECODER, f"with {_STANDARD}")
    former, head = cfg.MODEL.MASK_FORMER, cfg.MODEL.SEM_SEG_HEAD
    known = (ENCODED, PIXEL_EMBEDDING, *dict.fromkeys((*_STAGES, *head.IN_FEATURES)))
    in_feature = one_of(cfg, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", known)
    if in_feature == ENCODED and head.PIXEL_DECODER_NAME in _WITHOUT_ENCODER:
        raise ValueError(
            f"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE must be a map that {head.PIXEL_DECODER_NAME} or the backbone "
            f"gives, got {in_feature!r}: this pixel decoder has no transformer encoder"
        )
    channels = {ENCODED: head.CONVS_DIM, PIXEL_EMBEDDING: head.MASK_DIM}
    classifies_masks = head.NAME != PER_PIXEL_PLUS
    if not classifies_masks:
        _check_per_pixel(cfg)
        require(cfg, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", head.NUM_CLASSES, f"with {head.NAME}, one for each class")
    return {
        "in_feature": in_feature,
        **({"in_channels": channels[in_feature]} if in_feature in channels else {}),
        "num_classes": head.NUM_CLASSES,
        "mask_classification": classifies_masks,
        "hidden_dim": former.HIDDEN_DIM,
        "num_queries": former.NUM_OBJECT_QUERIES,
        "num_heads": former.NHEADS,
        "dim_feedforward": former.DIM_FEEDFORWARD,
        "num_encoder_layers": at_least(cfg, "MODEL.MASK_FORMER.ENC_LAYERS", 0),
        "num_layers": at_least(cfg, "MODEL.MASK_FORMER.DEC_LAYERS", 1),
        "dropout": former.DROPOUT,
        "pre_norm": former.PRE_NORM,
        "mask_dim": head.MASK_DIM,
        "enforce_input_projection": former.ENFORCE_INPUT_PROJ,
    }


def pixel_classifier_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.SEM_SEG_HEAD -> arguments of the linear classifier of pixels."""
    _check_per_pixel(cfg)
    _require_defaults(cfg, _OF_MASKED_DECODER, f"with {PER_PIXEL}")
    return {"num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM}


def _check_per_pixel(cfg: Any) -> None:
    """Refuse what needs objects or segments: only semantic segmentation classifies pixels."""
    name = cfg.MODEL.SEM_SEG_HEAD.NAME
    _require_defaults(cfg, ("MATCH_ON", "LOSS_ON"), f"with {name}, which classifies pixels")
    for task in ("PANOPTIC_ON", "INSTANCE_ON"):
        require(cfg, f"MODEL.MASK_FORMER.TEST.{task}", False, f"with {name}, which classifies pixels")
    mapper = cfg.INPUT.DATASET_MAPPER_NAME
    if mapper in _OBJECT_MAPPERS:
        raise ValueError(
            f"INPUT.DATASET_MAPPER_NAME must give each pixel a class with {name}, got {mapper!r}, which gives objects"
        )


def _require_defaults(cfg: Any, keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        require(cfg, f"MODEL.MASK_FORMER.{key}", DEFAULTS[f"MODEL.MASK_FORMER.{key}"], where)


def criterion_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.MASK_FORMER -> arguments of matcher and losses; the three weights act in both.

    For heads that classify pixels those of their loss, with its "name".
    """
    former, head = cfg.MODEL.MASK_FORMER, cfg.MODEL.SEM_SEG_HEAD
    if head.NAME in (PER_PIXEL, PER_PIXEL_PLUS):
        return {
            "name": "per_pixel",
            "num_classes": head.NUM_CLASSES,
            "loss_weight": head.LOSS_WEIGHT,
            "deep_supervision": former.DEEP_SUPERVISION,
        }
    return {
        "num_classes": head.NUM_CLASSES,
        "no_object_weight": former.NO_OBJECT_WEIGHT,
        "class_weight": former.CLASS_WEIGHT,
        "mask_weight": former.MASK_WEIGHT,
        "dice_weight": former.DICE_WEIGHT,
        "num_points": former.TRAIN_NUM_POINTS,
        "oversample_ratio": former.OVERSAMPLE_RATIO,
        "importance_sample_ratio": former.IMPORTANCE_SAMPLE_RATIO,
        "deep_supervision": former.DEEP_SUPERVISION,
        "match_on": one_of(cfg, "MODEL.MASK_FORMER.MATCH_ON", MASK_PARTS),
        "loss_on": one_of(cfg, "MODEL.MASK_FORMER.LOSS_ON", MASK_PARTS),
    }


_BACKBONES = {
    "build_resnet_backbone": ("resnet", resnet_arguments),
    "D2SwinTransformer": ("swin", swin_arguments),
    "TimmBackbone": ("timm", timm_arguments),
    "TimmSimplePyramid": ("timm_pyramid", timm_pyramid_arguments),
}
_PIXEL_DECODERS = {
    "MSDeformAttnPixelDecoder": ("deformable", pixel_decoder_arguments),
    "BasePixelDecoder": ("fpn", fpn_arguments),
    "TransformerEncoderPixelDecoder": ("transformer_encoder", encoder_fpn_arguments),
    "SemanticFPNPixelDecoder": ("semantic_fpn", fpn_arguments),
    "BiFPNPixelDecoder": ("bifpn", bifpn_arguments),
    "FaPNPixelDecoder": ("fapn", fpn_arguments),
}
_DECODERS = {
    "MultiScaleMaskedTransformerDecoder": ("masked_attention", transformer_decoder_arguments),
    _STANDARD: ("standard", standard_decoder_arguments),
}
