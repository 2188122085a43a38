"""The one translation from a config to core arguments.

A config is any object whose nested attributes are the keys: Detectron2's CfgNode or another engine's node.
It must hold Detectron2's own keys and those of `DEFAULTS`. Every function returns a dict of plain values
(numbers, strings, booleans, lists, None) that `json.dumps` takes, and raises ValueError, naming key, rule and
value, for a setting that this project does not have: each key of `DEFAULTS` is obeyed or refused.
"""

from collections.abc import Collection
from typing import Any

from mask2former.config_keys import DEFAULTS as DEFAULTS

_BACKBONE_STRIDE = 32  # of res5, in both backbones
_STAGES = ("res2", "res3", "res4", "res5")
_FORMATS = ("RGB", "BGR")
_FLIPS = ("horizontal", "vertical", "none")
_CROPS = ("absolute", "absolute_range", "relative", "relative_range")
# The one kind of ResNet built here, under MODEL.RESNETS.
_RESNET = {"STEM_TYPE": "basic", "NUM_GROUPS": 1, "DEFORM_ON_PER_STAGE": [False] * 4}
_NO_DILATION = {"RES4_DILATION": 1, "RES5_DILATION": 1}
_BACKBONES = {"build_resnet_backbone": "resnet", "D2SwinTransformer": "swin"}
_PIXEL_DECODERS = {"MSDeformAttnPixelDecoder": "deformable"}
_DECODERS = {"MultiScaleMaskedTransformerDecoder": "masked_attention"}
_MAPPERS = {
    "mask_former_semantic": ("semantic", "resize_crop_color"),
    "mask_former_panoptic": ("panoptic", "resize_crop_color"),
    "mask_former_instance": ("instance", "resize_crop_color"),
    "coco_panoptic_lsj": ("panoptic", "lsj"),
    "coco_instance_lsj": ("instance", "lsj"),
}


def resnet_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.RESNETS and MODEL.BACKBONE.FREEZE_AT -> arguments of the core's ResNet.

    The core has one setting for the widths of the stem and of res2's bottlenecks, so they must be equal.
    """
    resnet = cfg.MODEL.RESNETS
    for key, supported in (_RESNET | _NO_DILATION | {"WIDTH_PER_GROUP": resnet.STEM_OUT_CHANNELS}).items():
        _require(cfg, f"MODEL.RESNETS.{key}", supported)
    return {
        "depth": _one_of(cfg, "MODEL.RESNETS.DEPTH", (50, 101, 152)),
        "norm": _one_of(cfg, "MODEL.RESNETS.NORM", ("FrozenBN", "BN", "SyncBN")),
        "stride_in_1x1": resnet.STRIDE_IN_1X1,
        "out_features": _subset_of(cfg, "MODEL.RESNETS.OUT_FEATURES", _STAGES),
        "stem_out_channels": resnet.STEM_OUT_CHANNELS,
        "res2_out_channels": resnet.RES2_OUT_CHANNELS,
        "freeze_at": _one_of(cfg, "MODEL.BACKBONE.FREEZE_AT", tuple(range(6))),
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
        "out_features": _subset_of(cfg, "MODEL.SWIN.OUT_FEATURES", _STAGES),
        "use_checkpoint": swin.USE_CHECKPOINT,
    }


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
        "transformer_in_features": _subset_of(cfg, in_features_key, head.IN_FEATURES),
        "num_layers": head.TRANSFORMER_ENC_LAYERS,
        "num_heads": former.NHEADS if own_heads == 8 else own_heads,
        "num_points": head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
        "dim_feedforward": former.ENCODER_DIM_FEEDFORWARD,
        "dropout": former.DROPOUT,
        "common_stride": head.COMMON_STRIDE,
        "in_features": list(head.IN_FEATURES),
    }


def transformer_decoder_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.MASK_FORMER -> arguments of the masked-attention decoder (no dropout, as published).

    `num_layers` is DEC_LAYERS - 1: the prediction from the learned queries alone counts as a layer.
    """
    _require(cfg, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "multi_scale_pixel_decoder")
    _require(cfg, "MODEL.MASK_FORMER.ENC_LAYERS", 0)
    former = cfg.MODEL.MASK_FORMER
    return {
        "in_channels": cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM,
        "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        "hidden_dim": former.HIDDEN_DIM,
        "num_queries": former.NUM_OBJECT_QUERIES,
        "num_heads": former.NHEADS,
        "dim_feedforward": former.DIM_FEEDFORWARD,
        "num_layers": _at_least(cfg, "MODEL.MASK_FORMER.DEC_LAYERS", 2) - 1,
        "pre_norm": former.PRE_NORM,
        "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
        "enforce_input_projection": former.ENFORCE_INPUT_PROJ,
    }


def criterion_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.MASK_FORMER -> arguments of matcher and losses; the three weights act in both."""
    former = cfg.MODEL.MASK_FORMER
    return {
        "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        "no_object_weight": former.NO_OBJECT_WEIGHT,
        "class_weight": former.CLASS_WEIGHT,
        "mask_weight": former.MASK_WEIGHT,
        "dice_weight": former.DICE_WEIGHT,
        "num_points": former.TRAIN_NUM_POINTS,
        "oversample_ratio": former.OVERSAMPLE_RATIO,
        "importance_sample_ratio": former.IMPORTANCE_SAMPLE_RATIO,
        "deep_supervision": former.DEEP_SUPERVISION,
    }


def input_arguments(cfg: Any) -> dict[str, Any]:
    """How a model takes its image. A negative MASK_FORMER.SIZE_DIVISIBILITY means the backbone's stride."""
    divisibility = cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
    return {
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "size_divisibility": _BACKBONE_STRIDE if divisibility < 0 else divisibility,
        "image_format": _one_of(cfg, "INPUT.FORMAT", _FORMATS),
    }


def inference_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.MASK_FORMER.TEST -> which results to compute and how.

    `sem_seg_postprocessing_before_inference` is forced where panoptic or instance results are on, which need
    masks of the image's own size.
    """
    test = cfg.MODEL.MASK_FORMER.TEST
    before = test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE
    return {
        "semantic_on": test.SEMANTIC_ON,
        "instance_on": test.INSTANCE_ON,
        "panoptic_on": test.PANOPTIC_ON,
        "object_mask_threshold": test.OBJECT_MASK_THRESHOLD,
        "overlap_threshold": test.OVERLAP_THRESHOLD,
        "sem_seg_postprocessing_before_inference": before or test.PANOPTIC_ON or test.INSTANCE_ON,
        "top_k": _at_least(cfg, "TEST.DETECTIONS_PER_IMAGE", 1),
        "score_threshold": test.SCORE_THRESHOLD,
        "matrix_nms_sigma": _at_least(cfg, "MODEL.MASK_FORMER.TEST.MATRIX_NMS_SIGMA", 0),
    }


def evaluation_arguments(cfg: Any) -> dict[str, Any]:
    """Which metrics are computed besides those of the data set."""
    return {"with_boundary": cfg.MODEL.MASK_FORMER.TEST.BOUNDARY_METRICS}


def mapper_arguments(cfg: Any) -> dict[str, Any]:
    """INPUT -> the training mapper.

    Returns:
        source: of the targets, "semantic", "panoptic" or "instance". recipe: "lsj" (large-scale jittering) or
        "resize_crop_color". augmentation: keyword arguments of the recipe. size_divisibility: the mapper pads
        to it; -1 where it does not (always for "lsj", whose crop has one size).
    """
    source, recipe = _MAPPERS[_one_of(cfg, "INPUT.DATASET_MAPPER_NAME", _MAPPERS)]
    is_lsj = recipe == "lsj"
    return {
        "source": source,
        "recipe": recipe,
        "augmentation": _lsj_arguments(cfg) if is_lsj else _resize_crop_color_arguments(cfg, source),
        "image_format": _one_of(cfg, "INPUT.FORMAT", _FORMATS),
        "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        "size_divisibility": -1 if is_lsj else cfg.INPUT.SIZE_DIVISIBILITY,
    }


def _lsj_arguments(cfg: Any) -> dict[str, Any]:
    return {
        "image_size": cfg.INPUT.IMAGE_SIZE,
        "min_scale": cfg.INPUT.MIN_SCALE,
        "max_scale": cfg.INPUT.MAX_SCALE,
        "flip": _one_of(cfg, "INPUT.RANDOM_FLIP", _FLIPS),
    }


def _resize_crop_color_arguments(cfg: Any, source: str) -> dict[str, Any]:
    crop = cfg.INPUT.CROP
    return {
        "min_sizes": list(cfg.INPUT.MIN_SIZE_TRAIN),
        "max_size": cfg.INPUT.MAX_SIZE_TRAIN,
        "sampling": _one_of(cfg, "INPUT.MIN_SIZE_TRAIN_SAMPLING", ("choice", "range")),
        "crop_type": _one_of(cfg, "INPUT.CROP.TYPE", _CROPS),
        "crop_size": list(crop.SIZE) if crop.ENABLED else None,
        # Published instance mapper: a plain crop. Instances have no map of categories to constrain.
        "single_category_max_area": 1.0 if source == "instance" else crop.SINGLE_CATEGORY_MAX_AREA,
        "color_aug": cfg.INPUT.COLOR_AUG_SSD,
        "flip": _one_of(cfg, "INPUT.RANDOM_FLIP", _FLIPS),
    }


def custom_dataset_arguments(cfg: Any) -> dict[str, Any]:
    """DATASETS.CUSTOM -> what is to be registered, and what the training expects of it."""
    return {
        "datasets": [dict(row) if isinstance(row, dict) else row for row in cfg.DATASETS.CUSTOM],
        "trained": list(cfg.DATASETS.TRAIN),
        "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
    }


def test_resize_arguments(cfg: Any) -> dict[str, Any]:
    """The size of a test image: `shortest` side, unless the `longest` would exceed its bound."""
    return {"shortest": cfg.INPUT.MIN_SIZE_TEST, "longest": cfg.INPUT.MAX_SIZE_TEST}


def tta_arguments(cfg: Any) -> dict[str, Any]:
    """TEST.AUG -> the views of test-time augmentation, and whether it is enabled."""
    sizes = list(cfg.TEST.AUG.MIN_SIZES)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"TEST.AUG.MIN_SIZES must be at least one size of at least 1, got {sizes}")
    return {
        "enabled": cfg.TEST.AUG.ENABLED,
        "min_sizes": sizes,
        "max_size": _at_least(cfg, "TEST.AUG.MAX_SIZE", 1),
        "flip": cfg.TEST.AUG.FLIP,
    }


def optimizer_arguments(cfg: Any) -> dict[str, Any]:
    """SOLVER -> optimizer and parameter groups; `momentum` is for SGD."""
    solver = cfg.SOLVER
    return {
        "optimizer": _one_of(cfg, "SOLVER.OPTIMIZER", ("ADAMW", "SGD")),
        "base_lr": solver.BASE_LR,
        "weight_decay": solver.WEIGHT_DECAY,
        "weight_decay_norm": solver.WEIGHT_DECAY_NORM,
        "weight_decay_embed": solver.WEIGHT_DECAY_EMBED,
        "backbone_multiplier": solver.BACKBONE_MULTIPLIER,
        "momentum": solver.MOMENTUM,
    }


def schedule_arguments(cfg: Any) -> dict[str, Any]:
    """SOLVER -> the learning-rate schedule; the cosine ends at 0 and warm-up overlays the schedule."""
    names = ("WarmupMultiStepLR", "WarmupPolyLR", "WarmupCosineLR")
    name = _one_of(cfg, "SOLVER.LR_SCHEDULER_NAME", names)
    if name == "WarmupCosineLR":
        _require(cfg, "SOLVER.BASE_LR_END", 0.0)
    _require(cfg, "SOLVER.RESCALE_INTERVAL", False)
    solver = cfg.SOLVER
    return {
        "name": name,
        "max_iter": solver.MAX_ITER,
        "steps": list(solver.STEPS),
        "gamma": solver.GAMMA,
        "warmup_iters": solver.WARMUP_ITERS,
        "warmup_factor": solver.WARMUP_FACTOR,
        "warmup_method": _one_of(cfg, "SOLVER.WARMUP_METHOD", ("linear", "constant")),
        "poly_power": solver.POLY_LR_POWER,
        "poly_constant_ending": solver.POLY_LR_CONSTANT_ENDING,
    }


def clip_arguments(cfg: Any) -> dict[str, Any]:
    """SOLVER.CLIP_GRADIENTS -> clipping of the whole model's norm, each tensor's norm or each value."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    return {
        "enabled": clip.ENABLED,
        "type": _one_of(cfg, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ("full_model", "norm", "value")),
        "value": clip.CLIP_VALUE,
        "norm_type": clip.NORM_TYPE,
    }


def step_arguments(cfg: Any) -> dict[str, Any]:
    """How one optimizer step is computed: batches that it sums up, and the autocast type (None: float32)."""
    dtype = _one_of(cfg, "SOLVER.AMP.DTYPE", ("float16", "bfloat16"))
    return {
        "accumulation_steps": _at_least(cfg, "SOLVER.ACCUMULATION_STEPS", 1),
        "amp_dtype": dtype if cfg.SOLVER.AMP.ENABLED else None,
    }


def start_arguments(cfg: Any) -> dict[str, Any]:
    """The weights that a training starts from, and the data set that they were trained on; None: none, not told."""
    return {"weights": cfg.MODEL.WEIGHTS or None, "source_dataset": cfg.MODEL.WEIGHTS_DATASET or None}


def run_arguments(cfg: Any) -> dict[str, Any]:
    """What a training writes besides its last weights.

    Returns:
        ema_decay: of the average of the weights over time, None without one. checkpoints_kept: the last so many,
        None for all. wandb_project: where Weights & Biases gets the numbers, None for nowhere.
    """
    ema = cfg.SOLVER.EMA
    if not 0 < ema.DECAY < 1:
        raise ValueError(f"SOLVER.EMA.DECAY must be between 0 and 1, got {ema.DECAY!r}")
    return {
        "ema_decay": ema.DECAY if ema.ENABLED else None,
        "checkpoints_kept": _at_least(cfg, "SOLVER.CHECKPOINTS_KEPT", 0) or None,
        "wandb_project": cfg.LOGGING.WANDB_PROJECT or None,
    }


def architecture_arguments(cfg: Any) -> dict[str, Any]:
    """Everything that rebuilds the model without its config: the arguments above and each part's core name.

    Raises:
        ValueError: if the config describes no mask transformer, or one with a part that is not known here.
    """
    _require(cfg, "MODEL.META_ARCHITECTURE", "MaskFormer")
    _require(cfg, "MODEL.SEM_SEG_HEAD.NAME", "MaskFormerHead")
    backbone = _BACKBONES[_one_of(cfg, "MODEL.BACKBONE.NAME", _BACKBONES)]
    pixel_decoder = _PIXEL_DECODERS[_one_of(cfg, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", _PIXEL_DECODERS)]
    decoder = _DECODERS[_one_of(cfg, "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", _DECODERS)]
    backbone_arguments = resnet_arguments(cfg) if backbone == "resnet" else swin_arguments(cfg)
    return {
        "backbone": {"name": backbone, **backbone_arguments},
        "pixel_decoder": {"name": pixel_decoder, **pixel_decoder_arguments(cfg)},
        "transformer_decoder": {"name": decoder, **transformer_decoder_arguments(cfg)},
        "criterion": criterion_arguments(cfg),
        "input": input_arguments(cfg),
    }


def _value(cfg: Any, key: str) -> Any:
    """The value of a dotted key, with a tuple turned into a list."""
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return list(cfg) if isinstance(cfg, tuple) else cfg


def _require(cfg: Any, key: str, supported: Any) -> None:
    value = _value(cfg, key)
    if value != supported:
        raise ValueError(f"{key} must be {supported!r}, the only value supported here, got {value!r}")


def _one_of(cfg: Any, key: str, known: Collection[Any]) -> Any:
    value = _value(cfg, key)
    if value not in known:
        raise ValueError(f"{key} must be one of {', '.join(map(str, known))}, got {value!r}")
    return value


def _subset_of(cfg: Any, key: str, known: Collection[str]) -> list[str]:
    values = list(_value(cfg, key))
    if not values or not set(values) <= set(known):
        raise ValueError(f"{key} must be some of {', '.join(known)}, got {values!r}")
    return values


def _at_least(cfg: Any, key: str, minimum: int) -> Any:
    value = _value(cfg, key)
    if value < minimum:
        raise ValueError(f"{key} must be at least {minimum}, got {value!r}")
    return value
