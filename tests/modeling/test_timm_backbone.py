"""Backbones of timm: maps, gradients, freezing, image sizes and channel orders, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm", reason="timm is not installed (requirements-timm.txt)")

import timm

from mask2former.modeling.backbones import TimmBackbone, TimmPyramid
from mask2former.modeling.backbones.timm_backbone import normalization

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def plain(**arguments: Any) -> TimmPyramid:
    return TimmPyramid(**{"model_name": "test_vit", "pyramid_channels": 16, **arguments})


def without_gradient(module: nn.Module) -> list[str]:
    """But for a normalisation that older releases of timm leave in ConvNeXt's head."""
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is None and (parameter.requires_grad or not name.startswith("model.head.norm."))
    ]


def sizes(maps: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in maps.items()}


def ceil_sizes(channels: dict[str, int], height: int, width: int) -> dict[str, tuple[int, ...]]:
    return {name: (1, c, -(-height // STRIDES[name]), -(-width // STRIDES[name])) for name, c in channels.items()}


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("test_convnext.r160_in1k", [24, 32, 48, 64]),
        ("test_resnet", [32, 48, 192, 96]),  # also has a map of stride 2
    ],
)
def test_maps_of_four_strides_and_a_gradient_for_every_parameter(name: str, channels: list[int]) -> None:
    backbone = TimmBackbone(model_name=name)
    assert backbone.out_channels == dict(zip(STRIDES, channels, strict=True))
    assert backbone.out_strides == STRIDES
    assert sizes(backbone(torch.randn(1, 3, 50, 70))) == ceil_sizes(backbone.out_channels, 50, 70)
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert sizes(maps) == ceil_sizes(backbone.out_channels, 64, 96)
    sum(x.square().mean() for x in maps.values()).backward()
    assert without_gradient(backbone) == []


def test_the_maps_are_those_that_timm_gives() -> None:
    backbone = TimmBackbone(model_name="test_resnet").eval()
    theirs = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    theirs.load_state_dict(backbone.model.state_dict())
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for ours, expected in zip(backbone(image).values(), theirs(image), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("out_features", [["res3", "res2"], ["res4"]])
def test_what_no_output_needs_is_not_there(out_features: list[str]) -> None:
    whole = TimmBackbone(model_name="test_convnext")
    part = TimmBackbone(model_name="test_convnext", out_features=out_features)
    assert part.state_dict().keys() < whole.state_dict().keys()
    assert list(part.out_channels) == sorted(out_features) == list(part.out_strides)
    maps = part(torch.randn(1, 3, 32, 32))
    assert list(maps) == sorted(out_features)
    sum(x.square().mean() for x in maps.values()).backward()
    assert without_gradient(part) == []


def test_a_plain_transformer_gets_a_pyramid_at_any_size() -> None:
    backbone = plain()
    assert backbone.out_channels == dict.fromkeys(STRIDES, 16)
    assert backbone.out_strides == STRIDES
    for height, width in ((64, 96), (160, 64), (50, 70)):
        maps = backbone(torch.randn(1, 3, height, width))
        assert sizes(maps) == ceil_sizes(backbone.out_channels, height, width)
    sum(x.square().mean() for x in maps.values()).backward()
    assert without_gradient(backbone) == []


def test_the_pyramid_stands_on_the_last_map_of_timm() -> None:
    backbone = plain(out_features=["res4"]).eval()
    theirs = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    assert theirs.load_state_dict(backbone.model.state_dict(), strict=False).missing_keys == [
        "norm.weight",
        "norm.bias",
    ]
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        last = theirs.forward_intermediates(image, indices=[5], intermediates_only=True)[0]
        expected = backbone.pyramid.levels["res4"](last)
        torch.testing.assert_close(backbone(image)["res4"], expected)


def listed(patch: int, stride: int) -> str:
    """Puts a tiny vision transformer on timm's list, with a stride that it says to have; returns its name."""

    def model(pretrained: bool, pretrained_cfg: Any, pretrained_cfg_overlay: Any, cache_dir: Any, **own: Any) -> Any:
        vit = timm.models.VisionTransformer(
            img_size=5 * patch, patch_size=patch, embed_dim=16, depth=1, num_heads=2, **own
        )
        vit.feature_info[0]["reduction"] = stride
        vit.needless = nn.Linear(2, 2)
        return vit

    model.__name__ = f"made_up_vit_{patch}_{stride}"
    model.__module__ = "timm.models.vision_transformer"
    if not timm.is_model(model.__name__):
        timm.models.register_model(model)
    return model.__name__


def test_patches_of_14_pixels_cover_16() -> None:
    backbone = plain(model_name=listed(14, 14))
    seen = []
    backbone.model.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    for height, width in ((64, 96), (50, 70)):
        assert sizes(backbone(torch.randn(1, 3, height, width))) == ceil_sizes(backbone.out_channels, height, width)
    assert seen == [(1, 3, 56, 84), (1, 3, 56, 70)]


@pytest.mark.parametrize("size", [8, 32])
def test_patches_of_other_powers_of_two_stay_as_they_are(size: int) -> None:
    backbone = plain(model_name=listed(size, size))
    assert sizes(backbone(torch.randn(1, 3, 64, 96))) == ceil_sizes(backbone.out_channels, 64, 96)
    assert len(backbone.pyramid.levels[{8: "res3", 32: "res5"}[size]]) == 4  # nothing is resampled


def test_frozen_is_frozen() -> None:
    backbone = TimmBackbone(model_name="test_resnet", frozen=True, drop_path_rate=0.5)
    assert backbone.state_dict().keys() == TimmBackbone(model_name="test_resnet").state_dict().keys()
    assert not any(p.requires_grad for p in backbone.parameters())
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    image = torch.randn(2, 3, 32, 32)
    nn.ModuleList([backbone]).train()
    assert backbone.training and not any(module.training for module in backbone.model.modules())
    in_training = backbone(image)
    assert not any(x.requires_grad for x in in_training.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    evaluated = backbone.eval()(image)
    assert all(torch.equal(in_training[name], evaluated[name]) for name in STRIDES)


def test_not_frozen_is_not_frozen() -> None:
    backbone, image = TimmBackbone(model_name="test_resnet"), torch.randn(2, 3, 32, 32)
    before = backbone.model.bn1.running_mean.clone()
    backbone(image)
    assert not torch.equal(backbone.model.bn1.running_mean, before)
    dropping = plain(drop_path_rate=0.9)
    assert not torch.equal(dropping(image)["res4"], dropping(image)["res4"])


def test_the_pyramid_of_a_frozen_transformer_learns() -> None:
    backbone = plain(frozen=True).train()
    sum(x.square().mean() for x in backbone(torch.randn(1, 3, 32, 32)).values()).backward()
    with_gradient = {name.split(".")[0] for name, p in backbone.named_parameters() if p.grad is not None}
    assert with_gradient == {"pyramid"}
    assert all(p.grad is not None for p in backbone.pyramid.parameters())
    assert not backbone.model.training and backbone.pyramid.training


@pytest.mark.parametrize("build", [plain, lambda **arguments: TimmBackbone(model_name="test_resnet", **arguments)])
def test_models_of_timm_get_rgb(build: Any) -> None:
    rgb, bgr = build().eval(), build(image_format="BGR").eval()
    bgr.load_state_dict(rgb.state_dict())
    image = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        torch.testing.assert_close(bgr(image.flip(1)), rgb(image), rtol=0, atol=0)


def test_normalization_has_the_order_of_the_image() -> None:
    ours = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}
    assert normalization("convnext_tiny.fb_in22k_ft_in1k") == ours
    assert normalization("convnext_tiny", "BGR") == {name: values[::-1] for name, values in ours.items()}
    assert normalization("vit_base_patch16_224.augreg_in21k") == {
        "pixel_mean": [127.5, 127.5, 127.5],
        "pixel_std": [127.5, 127.5, 127.5],
    }


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (TimmBackbone, {"model_name": ""}, r"\(MODEL.TIMM.NAME\) must be a model of timm, .*, got ''"),
        (TimmBackbone, {"model_name": "convnext_tinny"}, r"must be a model of timm, .*, got 'convnext_tinny'"),
        (TimmBackbone, {"model_name": "test_vit.nix"}, "with one of its tags or none, got 'test_vit.nix'"),
        (
            TimmBackbone,
            {"model_name": "test_vit"},
            r"maps of the strides \[4, 8, 16, 32\], got 'test_vit' with \[16\]; TimmSimplePyramid",
        ),
        (
            TimmPyramid,
            {"model_name": "test_resnet"},
            r"have one stride, .* got 'test_resnet' with \[2, 4, 8, 16, 32\]; TimmBackbone",
        ),
        (
            TimmPyramid,
            {"model_name": "vit_relpos_small_patch16_224"},
            r"images of any size, got 'vit_relpos_small_patch16_224', which fails for 272x320: .*doesn't match",
        ),
        (TimmBackbone, {"model_name": "test_resnet", "out_features": []}, r"out_features must be some of .*, got \[\]"),
        (TimmPyramid, {"model_name": "test_vit", "out_features": ["p2"]}, r"out_features must be some of .*'p2'"),
        (TimmBackbone, {"model_name": "test_resnet", "image_format": "HSV"}, "'RGB' or 'BGR', got 'HSV'"),
        (
            TimmBackbone,
            {"model_name": "ghostnet_050", "drop_path_rate": 0.1},
            r"DROP_PATH_RATE\) must be 0 for 'ghostnet_050'.*0.1",
        ),
    ],
)
def test_what_cannot_be_is_refused(build: Any, arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build(**arguments)


def test_what_timm_keeps_needlessly_needs_no_gradient() -> None:
    with torch.inference_mode():  # whatever the caller's mode
        backbone = plain(model_name=listed(16, 16))
    found = {name: p.requires_grad for name, p in backbone.named_parameters()}
    assert {name for name, needed in found.items() if not needed} == {"model.needless.weight", "model.needless.bias"}
    assert len(found) > 20


def test_a_model_whose_maps_are_not_as_timm_says_is_refused() -> None:
    name = listed(8, 16)
    with pytest.raises(ValueError, match=rf"with maps of shape \(1, 16, 17, 20\), got '{name}' with \(1, 16, 34, 40\)"):
        plain(model_name=name)


def test_a_model_without_a_known_mean_needs_the_configs() -> None:
    with pytest.raises(ValueError, match="NORMALIZATION must be 'config' for 'made_up_vit_16_16', of which timm knows"):
        normalization(listed(16, 16))
