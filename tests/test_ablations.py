"""Whole models with each other decoder and head: built from plain data, trained for a step, stored, predicting."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mask2former.build import Architecture, build_criterion, build_model
from mask2former.checkpoint import ModelDescription, PredictionSettings, load_model_file, save_model_file
from mask2former.config import architecture_arguments
from mask2former.engine.config import get_config
from mask2former.inference import image_result, predict_image
from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.mask2former import SegmentationHead
from mask2former.modeling.per_pixel import PixelClassifier, PixelCriterion
from mask2former.predictor import Predictor, SemanticPicture
from mask2former.tta import TestAugmentation, augmented_result
from tests import tiny
from tests.configs import ABLATIONS, name_of, skip_without_timm

PYRAMID = {"conv_dim": 32, "mask_dim": 24}
PIXEL_DECODERS: dict[str, dict[str, Any]] = {
    "fpn": PYRAMID,
    "transformer_encoder": {**PYRAMID, "num_layers": 1, "num_heads": 4, "dim_feedforward": 48},
    "semantic_fpn": PYRAMID,
    "bifpn": {**PYRAMID, "num_repeats": 1},
    "fapn": PYRAMID,
}
MASKED: dict[str, Any] = {"name": "masked_attention", "num_queries": tiny.Q, "num_layers": 3}
STANDARD: dict[str, Any] = {"name": "standard", "num_layers": 2, "num_queries": tiny.Q}
PLUS: dict[str, Any] = {**STANDARD, "num_queries": tiny.K, "mask_classification": False}
PER_PIXEL = {"name": "per_pixel", "num_classes": tiny.K}


def model_of(pixel_decoder: str, decoder: dict[str, Any], criterion: dict[str, Any] | None = None) -> Architecture:
    whole = tiny.architecture()
    whole["pixel_decoder"] = {"name": pixel_decoder, **PIXEL_DECODERS[pixel_decoder]}
    # a map of the backbone tells its channels by itself
    channels = {None: 32, "transformer_encoder": 32, "pixel_embedding": 24}.get(decoder.get("in_feature"))
    sizes: dict[str, Any] = {"hidden_dim": 32, "num_heads": 4, "dim_feedforward": 48}
    if channels is not None:
        sizes["in_channels"] = channels
    if decoder["name"] == "pixel_classifier":
        sizes = {}
    whole["transformer_decoder"] = {"num_classes": tiny.K, "mask_dim": 24, **sizes, **decoder}
    whole["criterion"] = criterion or whole["criterion"]
    return whole


def variant(decoder: dict[str, Any], criterion: dict[str, Any] | None = None) -> Architecture:
    """The masked decoder with other options."""
    whole = tiny.architecture(criterion=criterion)
    whole["transformer_decoder"] |= decoder
    return whole


CLASSIFIER: dict[str, Any] = {"name": "pixel_classifier"}
MODELS = {
    **{name: model_of(name, MASKED) for name in PIXEL_DECODERS},
    "standard, encoded": model_of("transformer_encoder", {**STANDARD, "in_feature": "transformer_encoder"}),
    "standard, backbone": model_of("fpn", {**STANDARD, "in_feature": "res5", "num_encoder_layers": 1}),
    "standard, embedding": model_of("fpn", {**STANDARD, "in_feature": "pixel_embedding"}),
    "plain, 1/8": variant({"cross_attention": "plain", "feature_scales": "stride_8"}),
    "smca, all scales": variant({"cross_attention": "smca", "feature_scales": "all", "num_test_layers": 2}),
    "mask pooling": variant({"cross_attention": "mask_pooling", "dropout": 0.1, "self_attention_first": True}),
    "zero queries": variant({"learnable_queries": False}, {"match_on": "masks", "loss_on": "masks"}),
    "per pixel": model_of("fpn", CLASSIFIER, PER_PIXEL),
    "per pixel plus": model_of("fpn", {**PLUS, "in_feature": "res4"}, PER_PIXEL),
}
per_model = pytest.mark.parametrize("name", MODELS)


def segments(height: int, width: int) -> Any:
    """A partition of most of the image into three classes."""
    labels = torch.randint(-1, 3, (height, width))
    masks = torch.stack([labels == k for k in range(3)])
    return tiny.MaskTarget(torch.arange(3), masks)


@per_model
def test_losses_and_a_gradient_for_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(MODELS[name])
    losses = model.losses([tiny.random_image(64, 96), tiny.random_image(50, 64)], [segments(64, 96), segments(50, 64)])
    total = sum(losses.values())
    assert torch.isfinite(total) and total > 0
    total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["per pixel", "per pixel plus"])
def test_images_without_a_label_change_nothing(name: str) -> None:
    model = build_model(MODELS[name])
    empty = tiny.MaskTarget(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, 1, dtype=torch.bool))
    losses = model.losses([tiny.random_image(64, 64)], [empty])
    sum(losses.values()).backward()
    assert not any(loss.item() for loss in losses.values())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    "name", ["bifpn", "smca, all scales", "zero queries", "standard, backbone", "per pixel", "per pixel plus"]
)
def test_model_files_and_predictions(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(MODELS[name]).eval()
    description = ModelDescription(
        architecture=MODELS[name], categories=tiny.categories(), settings=PredictionSettings(tasks=("semantic",))
    )
    save_model_file(tmp_path / "model.safetensors", model, description, dtype=torch.float32)
    loaded, _ = load_model_file(tmp_path / "model.safetensors")
    tiny.assert_equal_states(loaded.state_dict(), model.state_dict())
    found = Predictor.from_file(tmp_path / "model.safetensors", shortest=64, longest=96)(tiny.picture())
    assert isinstance(found, SemanticPicture)
    assert found.labels.shape == (50, 70)
    assert 0 <= found.labels.min() <= found.labels.max() < tiny.K


def test_augmented_scores_are_the_mean_of_the_views_probabilities() -> None:
    torch.manual_seed(0)
    model, image = build_model(MODELS["per pixel"]).eval(), tiny.random_image(64, 96)
    settings = {"semantic_on": True, "panoptic_on": False, "instance_on": False}
    settings["sem_seg_postprocessing_before_inference"] = False
    views = TestAugmentation(min_sizes=(64,), max_size=96, flip=True)

    def scores(picture: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            result = image_result(*predict_image(model, picture, (30, 40)), settings, torch.Tensor).semantic
        assert result is not None
        return result

    found = augmented_result(model, image, (30, 40), settings, torch.Tensor, views).semantic
    torch.testing.assert_close(found, (scores(image) + scores(image.flip(2)).flip(2)) / 2)
    torch.testing.assert_close(scores(image).sum(0), torch.ones(30, 40))


def test_an_unknown_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\['in_feature'\] must be one of .*'res5'.* got 'res9'"):
        build_model(model_of("fpn", {**STANDARD, "in_feature": "res9"}))


def test_criteria_by_name() -> None:
    assert type(build_criterion({"num_classes": 3})) is SetCriterion
    assert type(build_criterion({"num_classes": 3, "name": "per_pixel"})) is PixelCriterion
    with pytest.raises(ValueError, match=r"must be one of .*'per_pixel', 'set'.*, got 'focal'"):
        build_criterion({"num_classes": 3, "name": "focal"})


@pytest.mark.parametrize("path", ABLATIONS, ids=name_of)
def test_the_embedded_engine_builds_every_config(path: Path) -> None:
    skip_without_timm(path)
    with torch.device("meta"):
        model = build_model(architecture_arguments(get_config(path)))
    head = model.sem_seg_head
    assert isinstance(head, SegmentationHead)
    assert isinstance(model.criterion, PixelCriterion if "per_pixel" in path.name else SetCriterion)
    assert isinstance(head.predictor, PixelClassifier) == (path.name == "per_pixel_baseline.yaml")
