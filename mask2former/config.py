"""The one translation from a config to core arguments.

A config is any object whose nested attributes are the keys: Detectron2's CfgNode or another engine's node.
It must hold Detectron2's own keys and those of `DEFAULTS`. Every function returns a dict of plain values
(numbers, strings, booleans, lists, None) that `json.dumps` takes, and raises ValueError, naming key, rule and
value, for a setting that this project does not have: each key of `DEFAULTS` is obeyed or refused.
"""

from typing import Any

from mask2former.config_keys import DEFAULTS as DEFAULTS
from mask2former.config_model import IMAGE_FORMATS, TIMM_BACKBONES, backbone_arguments, decoder_arguments
from mask2former.config_model import bifpn_arguments as bifpn_arguments
from mask2former.config_model import criterion_arguments as criterion_arguments
from mask2former.config_model import encoder_fpn_arguments as encoder_fpn_arguments
from mask2former.config_model import fpn_arguments as fpn_arguments
from mask2former.config_model import pixel_classifier_arguments as pixel_classifier_arguments
from mask2former.config_model import pixel_decoder_arguments as pixel_decoder_arguments
from mask2former.config_model import resnet_arguments as resnet_arguments
from mask2former.config_model import standard_decoder_arguments as standard_decoder_arguments
from mask2former.config_model import swin_arguments as swin_arguments
from mask2former.config_model import timm_arguments as timm_arguments
from mask2former.config_model import timm_pyramid_arguments as timm_pyramid_arguments
from mask2former.config_model import transformer_decoder_arguments as transformer_decoder_arguments
from mask2former.config_values import at_least, one_of, require, value_of
from mask2former.modeling.backbones.timm_backbone import normalization
from mask2former.modeling.precision import PRECISIONS

_BACKBONE_STRIDE = 32  # of res5, in all backbones
_FLIPS = ("horizontal", "vertical", "none")
_CROPS = ("absolute", "absolute_range", "relative", "relative_range")
_MAPPERS = {
    "mask_former_semantic": ("semantic", "resize_crop_color"),
    "mask_former_panoptic": ("panoptic", "resize_crop_color"),
    "mask_former_instance": ("instance", "resize_crop_color"),
    "coco_panoptic_lsj": ("panoptic", "lsj"),
    "coco_instance_lsj": ("instance", "lsj"),
}


def input_arguments(cfg: Any) -> dict[str, Any]:
    """How a model takes its image. A negative MASK_FORMER.SIZE_DIVISIBILITY means the backbone's stride.

    A backbone of timm must get its image as it was trained to, unless MODEL.TIMM.NORMALIZATION is "config".

    Raises:
        ModuleNotFoundError: if that is to be checked and timm is not installed.
    """
    if cfg.MODEL.BACKBONE.NAME in TIMM_BACKBONES and cfg.MODEL.TIMM.NORMALIZATION == "timm":
        _check_normalization(cfg)
    divisibility = cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
    return {
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "size_divisibility": _BACKBONE_STRIDE if divisibility < 0 else divisibility,
        "image_format": one_of(cfg, "INPUT.FORMAT", IMAGE_FORMATS),
    }


def _check_normalization(cfg: Any) -> None:
    """Refuse another mean or standard deviation than timm's: what the config says is what the model gets."""
    name, order = cfg.MODEL.TIMM.NAME, cfg.INPUT.FORMAT
    for part, wanted in normalization(name, order).items():
        key = f"MODEL.{part.upper()}"
        value = value_of(cfg, key)
        if len(value) != 3 or max(abs(a - b) for a, b in zip(value, wanted, strict=True)) > 1e-3:
            raise ValueError(
                f"{key} must be {wanted}, in INPUT.FORMAT {order} what MODEL.TIMM.NAME {name} was trained with, got "
                f"{value}; MODEL.TIMM.NORMALIZATION 'config' takes any"
            )


def precision_arguments(cfg: Any) -> dict[str, Any]:
    """MODEL.MASK_FORMER.PRECISION: the numerical mode of training and inference; None: as published."""
    value = cfg.MODEL.MASK_FORMER.PRECISION
    if value not in ("", *PRECISIONS):
        raise ValueError(f"MODEL.MASK_FORMER.PRECISION must be one of {', '.join(PRECISIONS)} or empty, got {value!r}")
    return {"precision": value or None}


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
        "top_k": at_least(cfg, "TEST.DETECTIONS_PER_IMAGE", 1),
        "score_threshold": test.SCORE_THRESHOLD,
        "matrix_nms_sigma": at_least(cfg, "MODEL.MASK_FORMER.TEST.MATRIX_NMS_SIGMA", 0),
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
    source, recipe = _MAPPERS[one_of(cfg, "INPUT.DATASET_MAPPER_NAME", _MAPPERS)]
    is_lsj = recipe == "lsj"
    return {
        "source": source,
        "recipe": recipe,
        "augmentation": _lsj_arguments(cfg) if is_lsj else _resize_crop_color_arguments(cfg, source),
        "image_format": one_of(cfg, "INPUT.FORMAT", IMAGE_FORMATS),
        "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        "size_divisibility": -1 if is_lsj else cfg.INPUT.SIZE_DIVISIBILITY,
    }


def _lsj_arguments(cfg: Any) -> dict[str, Any]:
    return {
        "image_size": cfg.INPUT.IMAGE_SIZE,
        "min_scale": cfg.INPUT.MIN_SCALE,
        "max_scale": cfg.INPUT.MAX_SCALE,
        "flip": one_of(cfg, "INPUT.RANDOM_FLIP", _FLIPS),
    }


def _resize_crop_color_arguments(cfg: Any, source: str) -> dict[str, Any]:
    crop = cfg.INPUT.CROP
    return {
        "min_sizes": list(cfg.INPUT.MIN_SIZE_TRAIN),
        "max_size": cfg.INPUT.MAX_SIZE_TRAIN,
        "sampling": one_of(cfg, "INPUT.MIN_SIZE_TRAIN_SAMPLING", ("choice", "range")),
        "crop_type": one_of(cfg, "INPUT.CROP.TYPE", _CROPS),
        "crop_size": list(crop.SIZE) if crop.ENABLED else None,
        # Published instance mapper: a plain crop. Instances have no map of categories to constrain.
        "single_category_max_area": 1.0 if source == "instance" else crop.SINGLE_CATEGORY_MAX_AREA,
        "color_aug": cfg.INPUT.COLOR_AUG_SSD,
        "flip": one_of(cfg, "INPUT.RANDOM_FLIP", _FLIPS),
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
        "max_size": at_least(cfg, "TEST.AUG.MAX_SIZE", 1),
        "flip": cfg.TEST.AUG.FLIP,
    }


def optimizer_arguments(cfg: Any) -> dict[str, Any]:
    """SOLVER -> optimizer and parameter groups; `momentum` is for SGD."""
    solver = cfg.SOLVER
    return {
        "optimizer": one_of(cfg, "SOLVER.OPTIMIZER", ("ADAMW", "SGD")),
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
    name = one_of(cfg, "SOLVER.LR_SCHEDULER_NAME", names)
    if name == "WarmupCosineLR":
        require(cfg, "SOLVER.BASE_LR_END", 0.0)
    require(cfg, "SOLVER.RESCALE_INTERVAL", False)
    solver = cfg.SOLVER
    return {
        "name": name,
        "max_iter": solver.MAX_ITER,
        "steps": list(solver.STEPS),
        "gamma": solver.GAMMA,
        "warmup_iters": solver.WARMUP_ITERS,
        "warmup_factor": solver.WARMUP_FACTOR,
        "warmup_method": one_of(cfg, "SOLVER.WARMUP_METHOD", ("linear", "constant")),
        "poly_power": solver.POLY_LR_POWER,
        "poly_constant_ending": solver.POLY_LR_CONSTANT_ENDING,
    }


def clip_arguments(cfg: Any) -> dict[str, Any]:
    """SOLVER.CLIP_GRADIENTS -> clipping of the whole model's norm, each tensor's norm or each value."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    return {
        "enabled": clip.ENABLED,
        "type": one_of(cfg, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ("full_model", "norm", "value")),
        "value": clip.CLIP_VALUE,
        "norm_type": clip.NORM_TYPE,
    }


def step_arguments(cfg: Any) -> dict[str, Any]:
    """How one optimizer step is computed.

    Returns:
        accumulation_steps: batches that it sums up. amp_dtype: the autocast type around the model, None for none.
        precision: the mode that the model itself computes in, None for none; it takes the place of SOLVER.AMP.
    """
    dtype = one_of(cfg, "SOLVER.AMP.DTYPE", ("float16", "bfloat16"))
    precision = precision_arguments(cfg)["precision"]
    return {
        "accumulation_steps": at_least(cfg, "SOLVER.ACCUMULATION_STEPS", 1),
        "amp_dtype": dtype if cfg.SOLVER.AMP.ENABLED and precision is None else None,
        "precision": precision,
    }


def scaled_to_processes(cfg: Any, processes: int) -> dict[str, Any]:
    """What SOLVER.REFERENCE_WORLD_SIZE asks for: a config for so many processes, used with another number of them.

    Each process keeps its images, so that batch and learning rate grow with the processes, and the iterations shrink
    (Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 2.1).

    Returns:
        New values of keys, none if nothing changes.

    Raises:
        ValueError: if the batch of the config cannot be shared out among its processes.
    """
    reference = at_least(cfg, "SOLVER.REFERENCE_WORLD_SIZE", 0)
    if reference in (0, processes):
        return {}
    solver = cfg.SOLVER
    if solver.IMS_PER_BATCH % reference:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of SOLVER.REFERENCE_WORLD_SIZE = {reference}, got "
            f"{solver.IMS_PER_BATCH}"
        )
    factor = processes / reference
    shrinking = ("SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")
    return {
        "SOLVER.REFERENCE_WORLD_SIZE": processes,
        "SOLVER.IMS_PER_BATCH": round(solver.IMS_PER_BATCH * factor),
        "SOLVER.BASE_LR": solver.BASE_LR * factor,
        "SOLVER.STEPS": tuple(round(step / factor) for step in solver.STEPS),
        **{key: round(value_of(cfg, key) / factor) for key in shrinking},
    }


def start_arguments(cfg: Any) -> dict[str, Any]:
    """The weights that a training starts from, and the data set that they were trained on; None: none, not told."""
    return {"weights": cfg.MODEL.WEIGHTS or None, "source_dataset": cfg.MODEL.WEIGHTS_DATASET or None}


def run_arguments(cfg: Any) -> dict[str, Any]:
    """How a training runs, and what it writes besides its last weights.

    Returns:
        compile: backbone and head are compiled, the losses are not.
        ema_decay: of the average of the weights over time, None without one. checkpoints_kept: the last so many,
        None for all. wandb_project: where Weights & Biases gets the numbers, None for nowhere.
    """
    ema = cfg.SOLVER.EMA
    if not 0 < ema.DECAY < 1:
        raise ValueError(f"SOLVER.EMA.DECAY must be between 0 and 1, got {ema.DECAY!r}")
    return {
        "compile": bool(cfg.SOLVER.COMPILE),
        "ema_decay": ema.DECAY if ema.ENABLED else None,
        "checkpoints_kept": at_least(cfg, "SOLVER.CHECKPOINTS_KEPT", 0) or None,
        "wandb_project": cfg.LOGGING.WANDB_PROJECT or None,
    }


def architecture_arguments(cfg: Any) -> dict[str, Any]:
    """Everything that rebuilds the model without its config: the arguments above and each part's core name.

    Raises:
        ValueError: if the config describes no mask transformer, or one with a part that is not known here.
    """
    require(cfg, "MODEL.META_ARCHITECTURE", "MaskFormer")
    return {
        "backbone": backbone_arguments(cfg),
        **decoder_arguments(cfg),
        "criterion": criterion_arguments(cfg),
        "input": input_arguments(cfg),
    }
