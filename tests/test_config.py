"""The translation from a config to core arguments, with a plain attribute object and without Detectron2."""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest

from mask2former import config
from mask2former.config import DEFAULTS
from mask2former.engine.defaults import DETECTRON2_DEFAULTS
from tests.configs import TRANSLATIONS

# What the published COCO panoptic R50 config changes of Detectron2's defaults.
DETECTRON2_KEYS: dict[str, Any] = {
    **DETECTRON2_DEFAULTS,
    "MODEL.META_ARCHITECTURE": "MaskFormer",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.SEM_SEG_HEAD.NAME": "MaskFormerHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 133,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 256,
    "DATASETS.TRAIN": ["coco_2017_train_panoptic"],
    "INPUT.FORMAT": "RGB",
    "SOLVER.MAX_ITER": 368750,
    "SOLVER.BASE_LR": 1e-4,
    "SOLVER.WEIGHT_DECAY": 0.05,
    "SOLVER.STEPS": (327778, 355092),
    "SOLVER.WARMUP_FACTOR": 1.0,
    "SOLVER.WARMUP_ITERS": 10,
    "SOLVER.REFERENCE_WORLD_SIZE": 0,
    "SOLVER.CHECKPOINT_PERIOD": 5000,
    "TEST.EVAL_PERIOD": 5000,
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.01,
    "SOLVER.AMP.ENABLED": True,
}

# What the published COCO panoptic R50 config changes of DEFAULTS.
PUBLISHED: dict[str, Any] = {
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "MSDeformAttnPixelDecoder",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 6,
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "multi_scale_pixel_decoder",
    "MODEL.MASK_FORMER.DEC_LAYERS": 10,
    "MODEL.MASK_FORMER.DROPOUT": 0.0,
    "MODEL.MASK_FORMER.CLASS_WEIGHT": 2.0,
    "MODEL.MASK_FORMER.MASK_WEIGHT": 5.0,
    "MODEL.MASK_FORMER.DICE_WEIGHT": 5.0,
    "INPUT.DATASET_MAPPER_NAME": "coco_panoptic_lsj",
}

SWIN = {"MODEL.BACKBONE.NAME": "D2SwinTransformer"}
SEMANTIC_CROP = {
    "INPUT.DATASET_MAPPER_NAME": "mask_former_semantic",
    "INPUT.CROP.ENABLED": True,
    "INPUT.CROP.TYPE": "absolute",
    "INPUT.CROP.SIZE": [512, 512],
    "INPUT.SIZE_DIVISIBILITY": 512,
    "INPUT.COLOR_AUG_SSD": True,
}

BIFPN = {"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BiFPNPixelDecoder"}
STANDARD = {
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": "StandardTransformerDecoder",
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "transformer_encoder",
}
PER_PIXEL = {"MODEL.SEM_SEG_HEAD.NAME": "PerPixelBaselineHead", "INPUT.DATASET_MAPPER_NAME": "mask_former_semantic"}
PER_PIXEL_PLUS = {
    **STANDARD,
    **PER_PIXEL,
    "MODEL.SEM_SEG_HEAD.NAME": "PerPixelBaselinePlusHead",
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 133,
}

# Keys of DEFAULTS that change nothing, each with the reason why it is accepted all the same.
WITHOUT_EFFECT = {
    "MODEL.RESNETS.RES5_MULTI_GRID": "acts on a dilated res5 only, which is refused; published files set it",
}


def make_config(*changes: Mapping[str, Any]) -> SimpleNamespace:
    """An attribute tree of the published COCO panoptic R50 config and `changes` to it."""
    tree = SimpleNamespace()
    values: dict[str, Any] = {**DETECTRON2_KEYS, **DEFAULTS, **PUBLISHED}
    for change in changes:
        assert change.keys() <= values.keys(), "a test changes a key that does not exist"
        values.update(change)
    for key, value in values.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            if not hasattr(node, section):
                setattr(node, section, SimpleNamespace())
            node = getattr(node, section)
        setattr(node, name, deepcopy(value))
    return tree


def all_outcomes(cfg: Any) -> list[Any]:
    """What each translation gives or says."""
    outcomes: list[Any] = []
    for translate in TRANSLATIONS:
        try:
            outcomes.append(translate(cfg))
        except ValueError as error:
            outcomes.append(str(error))
    return outcomes


def another_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {str: "another", list: ["res3"], type(None): 0.5}[type(value)]


def has_effect(key: str) -> bool:
    default, changed = {key: DEFAULTS[key]}, {key: another_value(DEFAULTS[key])}
    return any(
        all_outcomes(make_config(scenario, default)) != all_outcomes(make_config(scenario, changed))
        for scenario in ({}, SEMANTIC_CROP, BIFPN)
    )


@pytest.mark.parametrize("key", sorted(DEFAULTS.keys() - WITHOUT_EFFECT.keys()))
def test_every_key_changes_something(key: str) -> None:
    assert has_effect(key), f"{key}: a key that nothing reads does not exist"


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_excused_keys_are_really_without_effect(key: str) -> None:
    assert not has_effect(key)


@pytest.mark.parametrize("translate", TRANSLATIONS, ids=lambda translate: translate.__name__)
@pytest.mark.parametrize("change", [{}, SWIN, SEMANTIC_CROP], ids=["r50", "swin", "semantic"])
def test_results_are_plain_values_of_their_own(
    translate: Callable[[Any], dict[str, Any]], change: dict[str, Any]
) -> None:
    cfg = make_config(change)
    before = deepcopy(cfg)
    arguments = translate(cfg)
    assert json.loads(json.dumps(arguments)) == arguments
    for value in arguments.values():
        if isinstance(value, list):
            value.clear()
    assert cfg == before


def test_architecture_of_the_published_r50_config() -> None:
    assert config.architecture_arguments(make_config()) == {
        "backbone": {
            "name": "resnet",
            "depth": 50,
            "norm": "FrozenBN",
            "stride_in_1x1": False,
            "out_features": ["res2", "res3", "res4", "res5"],
            "stem_out_channels": 64,
            "res2_out_channels": 256,
            "freeze_at": 0,
        },
        "pixel_decoder": {
            "name": "deformable",
            "conv_dim": 256,
            "mask_dim": 256,
            "norm": "GN",
            "transformer_in_features": ["res3", "res4", "res5"],
            "num_layers": 6,
            "num_heads": 8,
            "num_points": 4,
            "dim_feedforward": 1024,
            "dropout": 0.0,
            "common_stride": 4,
            "checkpoint_activations": False,
            "in_features": ["res2", "res3", "res4", "res5"],
        },
        "transformer_decoder": {
            "name": "masked_attention",
            "in_channels": 256,
            "num_classes": 133,
            "hidden_dim": 256,
            "num_queries": 100,
            "num_heads": 8,
            "dim_feedforward": 2048,
            "num_layers": 9,
            "pre_norm": False,
            "mask_dim": 256,
            "enforce_input_projection": False,
            "cross_attention": "masked",
            "feature_scales": "round_robin",
            "learnable_queries": True,
            "self_attention_first": False,
            "dropout": 0.0,
            "num_test_layers": None,
        },
        "criterion": {
            "num_classes": 133,
            "no_object_weight": 0.1,
            "class_weight": 2.0,
            "mask_weight": 5.0,
            "dice_weight": 5.0,
            "num_points": 12544,
            "oversample_ratio": 3.0,
            "importance_sample_ratio": 0.75,
            "deep_supervision": True,
            "match_on": "points",
            "loss_on": "points",
        },
        "input": {
            "pixel_mean": [123.675, 116.28, 103.53],
            "pixel_std": [58.395, 57.12, 57.375],
            "size_divisibility": 32,
            "image_format": "RGB",
        },
    }


@pytest.mark.parametrize(
    ("registered", "name"),
    [
        ("BasePixelDecoder", "fpn"),
        ("SemanticFPNPixelDecoder", "semantic_fpn"),
        ("FaPNPixelDecoder", "fapn"),
        ("BiFPNPixelDecoder", "bifpn"),
        ("TransformerEncoderPixelDecoder", "transformer_encoder"),
    ],
)
def test_pixel_decoders_by_name(registered: str, name: str) -> None:
    change = {"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": registered, "MODEL.SEM_SEG_HEAD.BIFPN_REPEATS": 2}
    architecture = config.architecture_arguments(make_config(change))
    expected = {
        "name": name,
        "conv_dim": 256,
        "mask_dim": 256,
        "norm": "GN",
        "common_stride": 4,
        "in_features": ["res2", "res3", "res4", "res5"],
    }
    own: dict[str, Any] = {
        "bifpn": {"num_repeats": 2},
        "transformer_encoder": {
            "num_layers": 6,
            "num_heads": 8,
            "dim_feedforward": 2048,
            "dropout": 0.0,
            "pre_norm": False,
        },
    }
    assert architecture["pixel_decoder"] == expected | own.get(name, {})
    assert architecture["transformer_decoder"]["name"] == "masked_attention"


def test_standard_decoder() -> None:
    changes = {"MODEL.MASK_FORMER.DROPOUT": 0.1, "MODEL.MASK_FORMER.ENC_LAYERS": 2, "MODEL.SEM_SEG_HEAD.MASK_DIM": 64}
    found = config.architecture_arguments(make_config(STANDARD, changes))["transformer_decoder"]
    assert found == {
        "name": "standard",
        "in_feature": "transformer_encoder",
        "in_channels": 256,
        "num_classes": 133,
        "mask_classification": True,
        "hidden_dim": 256,
        "num_queries": 100,
        "num_heads": 8,
        "dim_feedforward": 2048,
        "num_encoder_layers": 2,
        "num_layers": 10,
        "dropout": 0.1,
        "pre_norm": False,
        "mask_dim": 64,
        "enforce_input_projection": False,
    }
    for in_feature, channels in (("pixel_embedding", 64), ("res5", None)):
        change = {"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": in_feature}
        found = config.standard_decoder_arguments(make_config(STANDARD, changes, change))
        assert (found["in_feature"], found.get("in_channels")) == (in_feature, channels)


def test_a_map_that_no_part_gives_is_refused() -> None:
    for name in ("BasePixelDecoder", "SemanticFPNPixelDecoder", "BiFPNPixelDecoder", "FaPNPixelDecoder"):
        with pytest.raises(ValueError, match=rf"IN_FEATURE must be .*{name}.* got 'transformer_encoder'"):
            config.standard_decoder_arguments(make_config(STANDARD, {"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": name}))
    for value in ("multi_scale_pixel_decoder", "res9"):
        with pytest.raises(ValueError, match=rf"IN_FEATURE must be one of transformer_encoder, .* got '{value}'"):
            change = {"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": value}
            config.architecture_arguments(make_config(STANDARD, change))


def test_per_pixel_heads() -> None:
    change = {"MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": 0.5, "MODEL.MASK_FORMER.DEEP_SUPERVISION": False}
    criterion = {"name": "per_pixel", "num_classes": 133, "loss_weight": 0.5, "deep_supervision": False}
    plain = config.architecture_arguments(make_config(PER_PIXEL, change))
    assert plain["criterion"] == criterion
    assert plain["transformer_decoder"] == {"name": "pixel_classifier", "num_classes": 133, "mask_dim": 256}
    plus = config.architecture_arguments(make_config(PER_PIXEL_PLUS, change))
    assert plus["criterion"] == criterion
    assert plus["transformer_decoder"]["name"] == "standard"
    assert plus["transformer_decoder"]["mask_classification"] is False


@pytest.mark.parametrize("head", [PER_PIXEL, PER_PIXEL_PLUS], ids=["baseline", "plus"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MODEL.MASK_FORMER.TEST.PANOPTIC_ON": True}, "TEST.PANOPTIC_ON must be False, .*classifies pixels, got True"),
        ({"MODEL.MASK_FORMER.TEST.INSTANCE_ON": True}, "TEST.INSTANCE_ON must be False, .*classifies pixels, got True"),
        (
            {"INPUT.DATASET_MAPPER_NAME": "coco_instance_lsj"},
            "INPUT.DATASET_MAPPER_NAME must give each pixel a class with PerPixel.* got 'coco_instance_lsj'",
        ),
    ],
)
def test_per_pixel_heads_refuse_other_tasks(head: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.architecture_arguments(make_config(head, change))


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 100, "133, .*with PerPixelBaselinePlusHead, one for each class"),
        ("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "MultiScaleMaskedTransformerDecoder", "'StandardTr.*'"),
    ],
)
def test_per_pixel_queries_are_the_classes(key: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be {rule}.* got {value!r}"):
        config.architecture_arguments(make_config(PER_PIXEL_PLUS, {key: value}))


VARIANTS = {
    "CROSS_ATTENTION": "smca",
    "FEATURE_SCALES": "stride_8",
    "LEARNABLE_QUERIES": False,
    "SELF_ATTENTION_FIRST": True,
    "DECODER_DROPOUT": 0.1,
    "TEST.DECODER_LAYERS": 3,
}
ON_MASKS = {"MATCH_ON": "masks", "LOSS_ON": "masks"}


def variant(**changes: Any) -> dict[str, Any]:
    return {f"MODEL.MASK_FORMER.{key.replace('__', '.')}": value for key, value in changes.items()}


def test_variants_of_the_masked_decoder_and_the_losses() -> None:
    architecture = config.architecture_arguments(make_config(variant(**VARIANTS), variant(**ON_MASKS)))
    decoder, criterion = architecture["transformer_decoder"], architecture["criterion"]
    names = ("cross_attention", "feature_scales", "learnable_queries", "self_attention_first", "dropout")
    assert [decoder[name] for name in names] == ["smca", "stride_8", False, True, 0.1]
    assert decoder["num_test_layers"] == 3
    assert (criterion["match_on"], criterion["loss_on"]) == ("masks", "masks")


@pytest.mark.parametrize("number", [-1, -7, 0, 1, 9])
def test_layers_that_run_in_tests(number: int) -> None:
    found = config.transformer_decoder_arguments(make_config(variant(TEST__DECODER_LAYERS=number)))
    assert found["num_test_layers"] == (None if number < 0 else number)


@pytest.mark.parametrize(("number", "learnable", "least"), [(10, True, 0), (0, False, 1), (10, False, 1)])
def test_layers_that_there_are_not_are_refused(number: int, learnable: bool, least: int) -> None:
    changes = variant(TEST__DECODER_LAYERS=number, LEARNABLE_QUERIES=learnable)
    with pytest.raises(ValueError, match=rf"TEST.DECODER_LAYERS must be in \[{least}, 9\], .* got {number}"):
        config.transformer_decoder_arguments(make_config(changes))


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("CROSS_ATTENTION", "deformable", "one of masked, plain, smca, mask_pooling"),
        ("FEATURE_SCALES", "stride_4", "one of round_robin, stride_32, stride_16, stride_8, all"),
        ("DECODER_DROPOUT", 1.0, "at least 0 and below 1"),
        ("DECODER_DROPOUT", -0.1, "at least 0 and below 1"),
        ("MATCH_ON", "boxes", "one of points, masks"),
        ("LOSS_ON", "boxes", "one of points, masks"),
    ],
)
def test_unknown_variants_are_refused(key: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=f"MODEL.MASK_FORMER.{key} must be {rule}, got {value!r}"):
        config.architecture_arguments(make_config(variant(**{key: value})))


@pytest.mark.parametrize("key", VARIANTS)
@pytest.mark.parametrize(
    ("base", "name"), [(STANDARD, "StandardTransformerDecoder"), (PER_PIXEL, "PerPixelBaselineHead")]
)
def test_other_decoders_refuse_what_they_have_not(base: dict[str, Any], name: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"MODEL.MASK_FORMER.{key} must be .* with {name}, got"):
        config.architecture_arguments(make_config(base, variant(**{key: VARIANTS[key]})))


@pytest.mark.parametrize("key", ON_MASKS)
@pytest.mark.parametrize("head", [PER_PIXEL, PER_PIXEL_PLUS], ids=["baseline", "plus"])
def test_per_pixel_heads_have_no_masks_to_look_at(head: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be 'points', .*classifies pixels, got 'masks'"):
        config.architecture_arguments(make_config(head, variant(**{key: "masks"})))


def test_narrow_resnet_needs_equal_stem_and_bottleneck_widths() -> None:
    stem, res2 = {"MODEL.RESNETS.STEM_OUT_CHANNELS": 16}, {"MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
    with pytest.raises(ValueError, match=r"MODEL.RESNETS.WIDTH_PER_GROUP must be 16.* got 64"):
        config.resnet_arguments(make_config(stem, res2))
    arguments = config.resnet_arguments(make_config(stem, res2, {"MODEL.RESNETS.WIDTH_PER_GROUP": 16}))
    assert (arguments["stem_out_channels"], arguments["res2_out_channels"]) == (16, 64)


def test_swin_tiny_is_the_default_swin() -> None:
    assert config.architecture_arguments(make_config(SWIN))["backbone"] == {
        "name": "swin",
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "qk_scale": None,
        "drop_rate": 0.0,
        "attn_drop_rate": 0.0,
        "drop_path_rate": 0.3,
        "patch_size": 4,
        "patch_norm": True,
        "ape": False,
        "pretrain_image_size": 224,
        "out_features": ["res2", "res3", "res4", "res5"],
        "use_checkpoint": False,
    }


def test_solver_of_the_published_coco_configs() -> None:
    cfg = make_config()
    assert config.optimizer_arguments(cfg) == {
        "optimizer": "ADAMW",
        "base_lr": 1e-4,
        "weight_decay": 0.05,
        "weight_decay_norm": 0.0,
        "weight_decay_embed": 0.0,
        "backbone_multiplier": 0.1,
        "momentum": 0.9,
    }
    assert config.schedule_arguments(cfg) == {
        "name": "WarmupMultiStepLR",
        "max_iter": 368750,
        "steps": [327778, 355092],
        "gamma": 0.1,
        "warmup_iters": 10,
        "warmup_factor": 1.0,
        "warmup_method": "linear",
        "poly_power": 0.9,
        "poly_constant_ending": 0.0,
    }
    assert config.clip_arguments(cfg) == {
        "enabled": True,
        "type": "full_model",
        "value": 0.01,
        "norm_type": 2.0,
    }
    assert config.step_arguments(cfg) == {"accumulation_steps": 1, "amp_dtype": "float16", "precision": None}
    assert config.step_arguments(make_config({"SOLVER.AMP.ENABLED": False}))["amp_dtype"] is None


@pytest.mark.parametrize("precision", ["strict", "tf32", "fast"])
def test_precision_takes_the_place_of_mixed_precision(precision: str) -> None:
    cfg = make_config({"MODEL.MASK_FORMER.PRECISION": precision, "SOLVER.AMP.ENABLED": True})
    assert config.precision_arguments(cfg) == {"precision": precision}
    assert config.step_arguments(cfg) == {"accumulation_steps": 1, "amp_dtype": None, "precision": precision}
    assert config.precision_arguments(make_config()) == {"precision": None}


def test_inference_defaults() -> None:
    assert config.inference_arguments(make_config()) == {
        "semantic_on": True,
        "instance_on": False,
        "panoptic_on": False,
        "object_mask_threshold": 0.0,
        "overlap_threshold": 0.0,
        "sem_seg_postprocessing_before_inference": False,
        "top_k": 100,
        "score_threshold": 0.0,
        "matrix_nms_sigma": 0.0,
    }
    assert config.test_resize_arguments(make_config()) == {"shortest": 800, "longest": 1333}


@pytest.mark.parametrize("task", ["INSTANCE_ON", "PANOPTIC_ON"])
def test_instance_and_panoptic_force_masks_of_the_images_size(task: str) -> None:
    arguments = config.inference_arguments(make_config({f"MODEL.MASK_FORMER.TEST.{task}": True}))
    assert arguments["sem_seg_postprocessing_before_inference"] is True


@pytest.mark.parametrize(
    ("nheads", "own_heads", "expected"), [(8, 8, 8), (4, 8, 4), (8, 16, 16), (4, 2, 2)]
)
def test_heads_of_the_pixel_decoder(nheads: int, own_heads: int, expected: int) -> None:
    own_key = "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS"
    cfg = make_config({"MODEL.MASK_FORMER.NHEADS": nheads, own_key: own_heads})
    assert config.pixel_decoder_arguments(cfg)["num_heads"] == expected
    assert config.transformer_decoder_arguments(cfg)["num_heads"] == nheads


def test_feed_forward_widths_are_two_settings() -> None:
    cfg = make_config({"MODEL.MASK_FORMER.DIM_FEEDFORWARD": 512})
    assert config.transformer_decoder_arguments(cfg)["dim_feedforward"] == 512
    assert config.pixel_decoder_arguments(cfg)["dim_feedforward"] == 1024


def test_negative_size_divisibility_is_the_backbones_stride() -> None:
    cfg = make_config({"MODEL.MASK_FORMER.SIZE_DIVISIBILITY": -1})
    assert config.input_arguments(cfg)["size_divisibility"] == 32
    cfg = make_config({"MODEL.MASK_FORMER.SIZE_DIVISIBILITY": 64})
    assert config.input_arguments(cfg)["size_divisibility"] == 64


@pytest.mark.parametrize(
    ("name", "source", "recipe"),
    [
        ("mask_former_semantic", "semantic", "resize_crop_color"),
        ("mask_former_panoptic", "panoptic", "resize_crop_color"),
        ("mask_former_instance", "instance", "resize_crop_color"),
        ("coco_panoptic_lsj", "panoptic", "lsj"),
        ("coco_instance_lsj", "instance", "lsj"),
    ],
)
def test_published_mappers(name: str, source: str, recipe: str) -> None:
    arguments = config.mapper_arguments(make_config({"INPUT.DATASET_MAPPER_NAME": name}))
    assert (arguments["source"], arguments["recipe"]) == (source, recipe)


def test_large_scale_jittering_pads_to_nothing_but_its_own_size() -> None:
    assert config.mapper_arguments(make_config({"INPUT.SIZE_DIVISIBILITY": 512})) == {
        "source": "panoptic",
        "recipe": "lsj",
        "augmentation": {"image_size": 1024, "min_scale": 0.1, "max_scale": 2.0, "flip": "horizontal"},
        "image_format": "RGB",
        "num_classes": 133,
        "ignore_label": 255,
        "size_divisibility": -1,
    }


def test_semantic_mapper() -> None:
    limited = {"INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": 0.75, "INPUT.RANDOM_FLIP": "none"}
    assert config.mapper_arguments(make_config(SEMANTIC_CROP, limited)) == {
        "source": "semantic",
        "recipe": "resize_crop_color",
        "augmentation": {
            "min_sizes": [800],
            "max_size": 1333,
            "sampling": "choice",
            "crop_type": "absolute",
            "crop_size": [512, 512],
            "single_category_max_area": 0.75,
            "color_aug": True,
            "flip": "none",
        },
        "image_format": "RGB",
        "num_classes": 133,
        "ignore_label": 255,
        "size_divisibility": 512,
    }
    uncropped = config.mapper_arguments(make_config(SEMANTIC_CROP, {"INPUT.CROP.ENABLED": False}))
    assert uncropped["augmentation"]["crop_size"] is None


def test_instance_mapper_crops_without_looking_at_categories() -> None:
    limited = {"INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": 0.75}
    change = {"INPUT.DATASET_MAPPER_NAME": "mask_former_instance", **limited}
    augmentation = config.mapper_arguments(make_config(SEMANTIC_CROP, change))["augmentation"]
    assert augmentation["single_category_max_area"] == 1.0
    assert augmentation["crop_size"] == [512, 512]


@pytest.mark.parametrize(
    ("translate", "key", "value", "known"),
    [
        (config.resnet_arguments, "MODEL.RESNETS.NUM_GROUPS", 32, "1"),
        (config.resnet_arguments, "MODEL.RESNETS.WIDTH_PER_GROUP", 8, "64"),
        (config.resnet_arguments, "MODEL.RESNETS.RES4_DILATION", 2, "1"),
        (config.resnet_arguments, "MODEL.RESNETS.RES5_DILATION", 2, "1"),
        (config.resnet_arguments, "MODEL.RESNETS.DEFORM_ON_PER_STAGE", (False, True, True, True), "False"),
        (config.resnet_arguments, "MODEL.RESNETS.STEM_TYPE", "deeplab", "basic"),
        (config.resnet_arguments, "MODEL.RESNETS.DEPTH", 18, "50, 101, 152"),
        (config.resnet_arguments, "MODEL.RESNETS.NORM", "GN", "FrozenBN, BN, SyncBN"),
        (config.resnet_arguments, "MODEL.RESNETS.OUT_FEATURES", ["stem"], "res2, res3, res4, res5"),
        (config.resnet_arguments, "MODEL.RESNETS.OUT_FEATURES", [], "res2, res3, res4, res5"),
        (config.resnet_arguments, "MODEL.BACKBONE.FREEZE_AT", 6, "0, 1, 2, 3, 4, 5"),
        (config.swin_arguments, "MODEL.SWIN.OUT_FEATURES", ["res6"], "res2, res3, res4, res5"),
        (
            config.pixel_decoder_arguments,
            "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES",
            ["p5"],
            "res2, res3, res4, res5",
        ),
        (config.transformer_decoder_arguments, "MODEL.MASK_FORMER.DEC_LAYERS", 1, "2"),
        (config.transformer_decoder_arguments, "MODEL.MASK_FORMER.ENC_LAYERS", 6, "0"),
        (
            config.transformer_decoder_arguments,
            "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE",
            "res5",
            "multi_scale_pixel_decoder",
        ),
        (config.input_arguments, "INPUT.FORMAT", "YUV", "RGB, BGR"),
        (config.inference_arguments, "TEST.DETECTIONS_PER_IMAGE", 0, "1"),
        (
            config.mapper_arguments,
            "INPUT.DATASET_MAPPER_NAME",
            "my_mapper",
            "mask_former_semantic, mask_former_panoptic, mask_former_instance, coco_panoptic_lsj, "
            "coco_instance_lsj",
        ),
        (config.mapper_arguments, "INPUT.RANDOM_FLIP", "both", "horizontal, vertical, none"),
        (config.optimizer_arguments, "SOLVER.OPTIMIZER", "LION", "ADAMW, SGD"),
        (
            config.schedule_arguments,
            "SOLVER.LR_SCHEDULER_NAME",
            "StepLR",
            "WarmupMultiStepLR, WarmupPolyLR, WarmupCosineLR",
        ),
        (config.schedule_arguments, "SOLVER.WARMUP_METHOD", "burnin", "linear, constant"),
        (config.schedule_arguments, "SOLVER.RESCALE_INTERVAL", True, "False"),
        (config.clip_arguments, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "agc", "full_model, norm, value"),
        (config.step_arguments, "SOLVER.AMP.DTYPE", "float64", "float16, bfloat16"),
        (config.step_arguments, "SOLVER.ACCUMULATION_STEPS", 0, "1"),
        (config.precision_arguments, "MODEL.MASK_FORMER.PRECISION", "half", "strict, tf32, fast or empty"),
        (config.step_arguments, "MODEL.MASK_FORMER.PRECISION", "bfloat16", "strict, tf32, fast or empty"),
        (config.architecture_arguments, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MaskFormer"),
        (
            config.architecture_arguments,
            "MODEL.SEM_SEG_HEAD.NAME",
            "SemSegFPNHead",
            "MaskFormerHead, PerPixelBaselineHead, PerPixelBaselinePlusHead",
        ),
        (
            config.architecture_arguments,
            "MODEL.BACKBONE.NAME",
            "build_vit_backbone",
            "build_resnet_backbone, D2SwinTransformer, TimmBackbone, TimmSimplePyramid",
        ),
        (
            config.architecture_arguments,
            "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME",
            "MyPixelDecoder",
            "MSDeformAttnPixelDecoder, BasePixelDecoder, TransformerEncoderPixelDecoder, SemanticFPNPixelDecoder, "
            "BiFPNPixelDecoder, FaPNPixelDecoder",
        ),
        (
            config.architecture_arguments,
            "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
            "MyDecoder",
            "MultiScaleMaskedTransformerDecoder, StandardTransformerDecoder",
        ),
    ],
)
def test_refusals_name_key_rule_and_value(
    translate: Callable[[Any], dict[str, Any]], key: str, value: Any, known: str
) -> None:
    translate(make_config())
    with pytest.raises(ValueError) as refused:
        translate(make_config({key: value}))
    shown = list(value) if isinstance(value, tuple) else value
    message = str(refused.value)
    assert message.startswith(f"{key} must be ")
    assert known in message.split(", got ")[0]
    assert message.endswith(f"got {shown!r}")


def test_crop_settings_are_checked_where_they_are_used() -> None:
    change = {"INPUT.CROP.TYPE": "circle", "INPUT.MIN_SIZE_TRAIN_SAMPLING": "all"}
    config.mapper_arguments(make_config(change))  # large-scale jittering reads neither
    for key, value in change.items():
        with pytest.raises(ValueError, match=f"{key} must be .* got '{value}'"):
            config.mapper_arguments(make_config(SEMANTIC_CROP, {key: value}))


def test_cosine_schedule_ends_at_zero() -> None:
    cosine = {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR"}
    end = {"SOLVER.BASE_LR_END": 1e-6}
    assert config.schedule_arguments(make_config(cosine))["name"] == "WarmupCosineLR"
    assert config.schedule_arguments(make_config(end))["name"] == "WarmupMultiStepLR"
    with pytest.raises(ValueError, match=r"SOLVER.BASE_LR_END must be 0.0.* got 1e-06"):
        config.schedule_arguments(make_config(cosine, end))


def test_activation_checkpointing_is_obeyed_by_the_deformable_decoder_and_refused_by_others() -> None:
    key = "MODEL.MASK_FORMER.CHECKPOINT_ACTIVATIONS"
    assert config.architecture_arguments(make_config({key: True}))["pixel_decoder"]["checkpoint_activations"] is True
    for name in ("BasePixelDecoder", "SemanticFPNPixelDecoder", "BiFPNPixelDecoder", "FaPNPixelDecoder"):
        cfg = make_config({key: True, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": name})
        with pytest.raises(ValueError, match=f"{key} must be False.* with {name}, got True"):
            config.decoder_arguments(cfg)


def test_scaling_to_other_numbers_of_processes() -> None:
    assert config.scaled_to_processes(make_config(), 3) == {}
    made_for_eight = {"SOLVER.REFERENCE_WORLD_SIZE": 8, "SOLVER.IMS_PER_BATCH": 16, "SOLVER.STEPS": (8000, 9000)}
    cfg = make_config(made_for_eight, {"SOLVER.MAX_ITER": 10000, "SOLVER.BASE_LR": 4e-4, "SOLVER.WARMUP_ITERS": 10})
    assert config.scaled_to_processes(cfg, 8) == {}
    found = config.scaled_to_processes(cfg, 2)
    assert found["SOLVER.IMS_PER_BATCH"] == 4
    assert found["SOLVER.BASE_LR"] == 1e-4
    assert found["SOLVER.STEPS"] == (32000, 36000)
    assert (found["SOLVER.MAX_ITER"], found["SOLVER.WARMUP_ITERS"]) == (40000, 40)
    with pytest.raises(ValueError, match=r"multiple of SOLVER\.REFERENCE_WORLD_SIZE = 5, got 16"):
        config.scaled_to_processes(make_config({"SOLVER.REFERENCE_WORLD_SIZE": 5}), 2)
