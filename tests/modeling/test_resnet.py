"""ResNet: shapes, strides, normalisation and freezing."""

import pytest
import torch
from torch import nn

from mask2former.modeling.backbones import ResNet
from mask2former.modeling.layers import ConvNorm, FrozenBatchNorm2d, make_norm
from tests.golden import fill_weights

TINY = {"depth": 50, "stem_out_channels": 8, "res2_out_channels": 16}


@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 65), (1, 1), (7, 200)])
def test_strides_and_channels(height: int, width: int) -> None:
    backbone = ResNet(**TINY).eval()
    outputs = backbone(torch.randn(2, 3, height, width))
    assert list(outputs) == ["res2", "res3", "res4", "res5"]
    assert backbone.out_channels == {"res2": 16, "res3": 32, "res4": 64, "res5": 128}
    assert backbone.out_strides == {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    for name, stride in backbone.out_strides.items():
        size = (-(-height // stride), -(-width // stride))
        assert outputs[name].shape == (2, backbone.out_channels[name], *size)


def test_out_features_choose_outputs() -> None:
    backbone = ResNet(**TINY, out_features=["res3", "res5"]).eval()
    image = torch.randn(1, 3, 64, 64)
    outputs = backbone(image)
    assert set(outputs) == {"res3", "res5"} == set(backbone.out_strides)
    complete = ResNet(**TINY).eval()
    complete.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(outputs["res5"], complete(image)["res5"])


@pytest.mark.parametrize(("depth", "blocks"), [(50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)), (152, (3, 8, 36, 3))])
def test_depth_sets_the_number_of_blocks(depth: int, blocks: tuple[int, ...]) -> None:
    backbone = ResNet(**{**TINY, "depth": depth})
    assert tuple(len(getattr(backbone, f"res{i}")) for i in range(2, 6)) == blocks


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_stride_in_1x1_moves_the_stride(stride_in_1x1: bool) -> None:
    backbone = ResNet(**TINY, stride_in_1x1=stride_in_1x1)
    for stage in ("res3", "res4", "res5"):
        block = getattr(backbone, stage)[0]
        strides = (block.conv1.stride[0], block.conv2.stride[0], block.shortcut.stride[0])
        assert strides == ((2, 1, 2) if stride_in_1x1 else (1, 2, 2))
    assert backbone.res2[0].conv1.stride == backbone.res2[0].conv2.stride == (1, 1)


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_frozen_norm_equals_norm_in_eval_mode(norm: str) -> None:
    frozen, other = ResNet(**TINY).eval(), ResNet(**TINY, norm=norm).eval()
    fill_weights(other)
    missing = frozen.load_state_dict(other.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing.unexpected_keys)
    image = torch.randn(2, 3, 40, 56)
    for name, expected in other(image).items():
        torch.testing.assert_close(frozen(image)[name], expected, rtol=1e-4, atol=1e-5)


def test_synchronised_norm_alone_on_a_cpu_trains_as_batch_norm() -> None:
    alone, batch = ResNet(**TINY, norm="SyncBN").train(), ResNet(**TINY, norm="BN").train()
    fill_weights(batch)
    alone.load_state_dict(batch.state_dict())
    image = torch.randn(2, 3, 40, 56)
    for backbone in (alone, batch):
        backbone(image)["res5"].square().sum().backward()
    for (name, found), expected in zip(alone.named_parameters(), batch.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad), name
    for (name, found), expected in zip(alone.named_buffers(), batch.buffers(), strict=True):
        assert torch.equal(found, expected), name


def test_frozen_norm_is_constant() -> None:
    frozen = FrozenBatchNorm2d(3)
    assert list(frozen.parameters()) == []
    before = {n: t.clone() for n, t in frozen.state_dict().items()}
    x = torch.randn(4, 3, 5, 5) * 7 + 2
    torch.testing.assert_close(frozen.train()(x), x, rtol=1e-5, atol=1e-5)  # statistics 0 and 1
    assert all(torch.equal(before[n], t) for n, t in frozen.state_dict().items())


def test_frozen_norm_keeps_half_type() -> None:
    assert FrozenBatchNorm2d(3)(torch.randn(1, 3, 2, 2).half()).dtype == torch.float16


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("freeze_at", [0, 1, 3, 5])
def test_freeze_at(norm: str, freeze_at: int) -> None:
    backbone = ResNet(**TINY, norm=norm, freeze_at=freeze_at)
    for index, name in enumerate(("stem", "res2", "res3", "res4", "res5")):
        part = getattr(backbone, name)
        is_frozen = index < freeze_at
        assert all(p.requires_grad != is_frozen for p in part.parameters())
        if is_frozen:
            assert not any(isinstance(m, nn.BatchNorm2d) for m in part.modules())
    statistics = {n: b.clone() for n, b in backbone.stem.named_buffers()}
    backbone.train()(torch.randn(2, 3, 32, 32))
    moved = any(not torch.equal(b, statistics[n]) for n, b in backbone.stem.named_buffers())
    assert moved == (norm == "BN" and freeze_at == 0)


def test_every_parameter_gets_a_gradient() -> None:
    backbone = ResNet(**TINY, norm="BN")
    outputs = backbone(torch.randn(2, 3, 64, 64))
    sum(x.square().mean() for x in outputs.values()).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 18}, r"depth must be one of \[50, 101, 152\], got 18"),
        ({"out_features": ["res6"]}, r"out_features must be among .*got \['res6'\]"),
        ({"freeze_at": 6}, "freeze_at must be from 0 to 5, got 6"),
        ({"freeze_at": -1}, "freeze_at must be from 0 to 5, got -1"),
        ({"norm": "LN"}, "name must be one of .*got 'LN'"),
    ],
)
def test_wrong_arguments(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(**{**TINY, **wrong})


def test_conv_norm_applies_convolution_norm_and_activation() -> None:
    x = torch.randn(2, 3, 6, 6)
    conv = ConvNorm(3, 32, 3, padding=1, norm=make_norm("GN", 32), activation=torch.relu)
    assert set(conv.state_dict()) == {"weight", "norm.weight", "norm.bias"}
    plain = nn.functional.conv2d(x, conv.weight, padding=1)
    torch.testing.assert_close(conv(x), nn.functional.group_norm(plain, 32).relu())
    bare = ConvNorm(3, 4, 1, bias=True, norm=make_norm("", 4))
    assert set(bare.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(bare(x), nn.functional.conv2d(x, bare.weight, bare.bias))
