"""The core's ResNet against Detectron2's, with the same weights."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone

from mask2former.modeling.backbones import ResNet
from tests.golden import fill_weights


def _pair(depth: int, norm: str, stride_in_1x1: bool, freeze_at: int = 0) -> tuple[nn.Module, ResNet]:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = stride_in_1x1
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    theirs = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    ours = ResNet(depth=depth, norm=norm, stride_in_1x1=stride_in_1x1, freeze_at=freeze_at)
    return theirs, ours


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in module.state_dict().items()}


@pytest.mark.parametrize(
    ("norm", "stride_in_1x1"), [("FrozenBN", False), ("FrozenBN", True), ("BN", False), ("SyncBN", False)]
)
def test_resnet_50_gives_the_same_numbers(norm: str, stride_in_1x1: bool) -> None:
    theirs, ours = _pair(50, norm, stride_in_1x1)
    assert _shapes(theirs) == _shapes(ours)
    fill_weights(ours)
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected, found = theirs.eval()(image), ours.eval()(image)
    assert set(found) == set(expected)
    for name, features in expected.items():
        torch.testing.assert_close(found[name], features, rtol=1e-5, atol=1e-5)
    specification: dict[str, Any] = theirs.output_shape()  # type: ignore[operator]
    assert ours.out_channels == {n: s.channels for n, s in specification.items()}
    assert ours.out_strides == {n: s.stride for n, s in specification.items()}


@pytest.mark.parametrize("depth", [101, 152])
def test_deeper_resnets_have_the_same_names(depth: int) -> None:
    theirs, ours = _pair(depth, "FrozenBN", False)
    assert _shapes(theirs) == _shapes(ours)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("freeze_at", [1, 2])
def test_freezing_freezes_the_same(norm: str, freeze_at: int) -> None:
    theirs, ours = _pair(50, norm, False, freeze_at)
    assert _shapes(theirs) == _shapes(ours)

    def trainable(module: nn.Module) -> set[str]:
        return {n for n, p in module.named_parameters() if p.requires_grad}

    assert trainable(theirs) == trainable(ours)


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_batch_norm_trains_the_same(norm: str) -> None:
    theirs, ours = _pair(50, norm, False)
    fill_weights(ours)
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(2, 3, 64, 64)
    expected, found = theirs.train()(image)["res3"], ours.train()(image)["res3"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    statistics = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        if name.startswith(("stem", "res2", "res3")):
            torch.testing.assert_close(buffer, statistics[name], rtol=1e-4, atol=1e-5)
