"""Pixel decoders besides the deformable one: what all have in common, and what makes each of them different."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.pixel_decoders import (
    BiFPNPixelDecoder,
    FaPNPixelDecoder,
    FPNPixelDecoder,
    SemanticFPNPixelDecoder,
    TransformerEncoderPixelDecoder,
)
from mask2former.modeling.pixel_decoders.bifpn import WeightedFusion
from mask2former.modeling.position_encoding import sine_position_encoding
from tests.golden import fill_weights

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
CHANNELS = {"res2": 6, "res3": 8, "res4": 10, "res5": 12}
NAMES = ("res2", "res3", "res4", "res5")

SMALL: dict[type[nn.Module], dict[str, Any]] = {
    FPNPixelDecoder: {},
    TransformerEncoderPixelDecoder: {"num_layers": 2, "num_heads": 4, "dim_feedforward": 40},
    SemanticFPNPixelDecoder: {},
    BiFPNPixelDecoder: {"num_repeats": 2},
    FaPNPixelDecoder: {},
}
per_kind = pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.__name__)


def make(kind: type[nn.Module], **changes: Any) -> Any:
    arguments = {"in_channels": CHANNELS, "in_strides": STRIDES, "conv_dim": 32, "mask_dim": 20, **SMALL[kind]}
    decoder = kind(**{**arguments, **changes})
    fill_weights(decoder)
    for fusion in (m for m in decoder.modules() if isinstance(m, WeightedFusion)):
        fusion.weights.data = torch.linspace(0.5, 2, len(fusion.weights))  # a negative one takes its map out
    return decoder


def random_maps(height: int = 64, width: int = 96, batch: int = 2) -> dict[str, Tensor]:
    return {
        n: torch.randn(batch, CHANNELS[n], -(-height // s), -(-width // s), requires_grad=True)
        for n, s in STRIDES.items()
    }


@per_kind
@pytest.mark.parametrize("size", [(64, 96), (36, 100), (1, 1)])
def test_levels_are_the_three_coarsest_lowest_resolution_first(kind: type[nn.Module], size: tuple[int, int]) -> None:
    maps = random_maps(*size)
    mask_features, levels = make(kind)(maps)
    assert mask_features.shape == (2, 20, *maps["res2"].shape[2:])
    assert [x.shape for x in levels] == [(2, 32, *maps[n].shape[2:]) for n in ("res5", "res4", "res3")]
    assert all(x.isfinite().all() for x in (mask_features, *levels))


@per_kind
@pytest.mark.parametrize("norm", ["GN", ""])
def test_every_parameter_and_input_gets_a_gradient(kind: type[nn.Module], norm: str) -> None:
    decoder, maps = make(kind, norm=norm), random_maps()
    mask_features, levels = decoder(maps)
    sum((x * torch.randn_like(x)).sum() for x in (mask_features, *levels)).backward()
    assert [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(x.grad is not None and x.grad.any() for x in maps.values())


@per_kind
def test_fresh_weights_train(kind: type[nn.Module]) -> None:
    """No initial value, such as offsets of zero, keeps anything from its gradient."""
    torch.manual_seed(0)
    decoder = kind(in_channels=CHANNELS, in_strides=STRIDES, conv_dim=32, mask_dim=20, **SMALL[kind])
    mask_features, levels = decoder(random_maps())
    sum((x * torch.randn_like(x)).sum() for x in (mask_features, *levels)).backward()
    assert [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.any()] == []


@per_kind
def test_order_of_the_maps_does_not_matter_and_finer_ones_are_left_out(kind: type[nn.Module]) -> None:
    decoder, maps = make(kind), random_maps()
    expected = decoder(maps)
    torch.testing.assert_close(decoder(dict(reversed(maps.items()))), expected, rtol=0, atol=0)
    channels, strides = {"stem": 5, **CHANNELS}, {"stem": 2, **STRIDES}
    other = make(kind, in_channels=channels, in_strides=strides)
    torch.testing.assert_close(other({"stem": torch.randn(2, 5, 32, 48), **maps}), expected, rtol=0, atol=0)


@per_kind
def test_an_image_does_not_depend_on_the_others_of_its_batch(kind: type[nn.Module]) -> None:
    decoder, maps = make(kind), random_maps(batch=3)
    together, alone = decoder(maps), decoder({n: x[1:2] for n, x in maps.items()})
    torch.testing.assert_close(alone.mask_features[0], together.mask_features[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.levels[2][0], together.levels[2][1], rtol=1e-4, atol=1e-5)


@per_kind
def test_mixed_precision_stays_close(kind: type[nn.Module]) -> None:
    decoder, maps = make(kind), random_maps()
    expected = decoder(maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decoder(maps)
    pairs = [(found.mask_features, expected.mask_features), *zip(found.levels, expected.levels, strict=True)]
    for ours, exact in pairs:
        assert ours.isfinite().all()
        assert (ours.float() - exact).norm() < 0.1 * exact.norm()


@per_kind
def test_three_levels_are_enough_and_two_are_not(kind: type[nn.Module]) -> None:
    strides = {n: STRIDES[n] for n in NAMES[1:]}
    maps = random_maps()
    mask_features, levels = make(kind, in_strides=strides, common_stride=8)(maps)
    assert [x.shape[-1] for x in (mask_features, *levels)] == [12, 3, 6, 12]
    for wrong in ({"in_strides": strides}, {"in_strides": {n: STRIDES[n] for n in NAMES[2:]}, "common_stride": 16}):
        with pytest.raises(ValueError, match="in_strides must hold common_stride"):
            make(kind, **wrong)


def conv(part: nn.Module, x: Tensor, *, relu: bool) -> Tensor:
    """A convolution of any size, group normalisation and ReLU, from their parameters alone."""
    x = F.conv2d(x, part.weight, part.bias, padding=part.weight.shape[-1] // 2)
    x = F.group_norm(x, 32, part.norm.weight, part.norm.bias)
    return x.clamp(min=0) if relu else x


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def naive_fpn(decoder: nn.Module, maps: dict[str, Tensor], coarsest: Tensor) -> list[Tensor]:
    """Levels, coarsest first."""
    p5 = conv(decoder.layer_4, coarsest, relu=True)
    p4 = conv(decoder.layer_3, conv(decoder.adapter_3, maps["res4"], relu=False) + doubled(p5), relu=True)
    p3 = conv(decoder.layer_2, conv(decoder.adapter_2, maps["res3"], relu=False) + doubled(p4), relu=True)
    p2 = conv(decoder.layer_1, conv(decoder.adapter_1, maps["res2"], relu=False) + doubled(p3), relu=True)
    return [p5, p4, p3, p2]


def projected(decoder: nn.Module, x: Tensor) -> Tensor:
    weight = decoder.mask_features.weight[:, :, 0, 0]
    return torch.einsum("bchw,dc->bdhw", x, weight) + decoder.mask_features.bias[:, None, None]


def assert_features(found: Any, mask_features: Tensor, levels: list[Tensor]) -> None:
    torch.testing.assert_close(found.mask_features, mask_features, rtol=1e-4, atol=1e-4)
    assert len(found.levels) == len(levels)
    for ours, expected in zip(found.levels, levels, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_fpn_equals_its_formula() -> None:
    decoder, maps = make(FPNPixelDecoder), random_maps()
    levels = naive_fpn(decoder, maps, maps["res5"])
    assert_features(decoder(maps), projected(decoder, levels[3]), levels[:3])


def test_names_of_the_fpn_follow_the_published_scheme() -> None:
    names = {name.rsplit(".", 1)[0].removesuffix(".norm") for name in make(FPNPixelDecoder).state_dict()}
    scheme = {"adapter_1", "adapter_2", "adapter_3", "layer_1", "layer_2", "layer_3", "layer_4", "mask_features"}
    assert names == scheme
    encoded = set(make(TransformerEncoderPixelDecoder).state_dict())
    assert {"input_proj.weight", "transformer.encoder.layers.1.self_attn.in_proj_weight"} <= encoded
    assert {name.split(".")[0] for name in encoded} == scheme | {"input_proj", "transformer"}


@pytest.mark.parametrize("pre_norm", [False, True])
def test_transformer_encoder_equals_pytorchs(pre_norm: bool) -> None:
    """PyTorch's layer adds no positions, so each layer is called with the residual stream it would see."""
    decoder, maps = make(TransformerEncoderPixelDecoder, pre_norm=pre_norm), random_maps()
    x = F.conv2d(maps["res5"], decoder.input_proj.weight, decoder.input_proj.bias).flatten(2).transpose(1, 2)
    position = sine_position_encoding(2, 3, 32).flatten(1).t()
    for layer in decoder.transformer.encoder.layers:
        attention = nn.MultiheadAttention(32, 4, batch_first=True)
        attention.load_state_dict(layer.self_attn.state_dict())
        y = layer.norm1(x) if pre_norm else x
        x = x + attention(y + position, y + position, y)[0]
        x = x if pre_norm else layer.norm1(x)
        y = layer.norm2(x) if pre_norm else x
        x = x + layer.linear2(F.relu(layer.linear1(y)))
        x = x if pre_norm else layer.norm2(x)
    x = decoder.transformer.encoder.norm(x) if pre_norm else x
    encoded = x.transpose(1, 2).reshape(2, 32, 2, 3)
    levels = naive_fpn(decoder, maps, encoded)
    assert_features(decoder(maps), projected(decoder, levels[3]), [encoded, *levels[1:3]])


def test_dropout_of_the_encoder_acts_in_training_only() -> None:
    decoder, maps = make(TransformerEncoderPixelDecoder, dropout=0.5), random_maps()
    assert not torch.equal(decoder.train()(maps).mask_features, decoder(maps).mask_features)
    assert torch.equal(decoder.eval()(maps).mask_features, decoder(maps).mask_features)


def test_an_encoder_has_layers() -> None:
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        make(TransformerEncoderPixelDecoder, num_layers=0)


def test_semantic_fpn_equals_a_naive_sum() -> None:
    decoder, maps = make(SemanticFPNPixelDecoder), random_maps()
    levels = naive_fpn(decoder, maps, maps["res5"])
    total = torch.zeros(2, 32, 16, 24)
    for place, (level, stages) in enumerate(zip(levels, reversed(decoder.stages), strict=True)):
        assert len(stages) == (3, 2, 1, 1)[place]
        for stage in stages:
            level = conv(stage, level, relu=True)
            if level.shape[-1] < 24:
                level = F.interpolate(level, scale_factor=2, mode="bilinear")
        total = total + level
    assert_features(decoder(maps), projected(decoder, total), levels[:3])


def test_fusion_weights_are_positive_parts_that_sum_to_one() -> None:
    fusion = WeightedFusion(3, 32, "GN")
    torch.testing.assert_close(fusion.normalised_weights(), torch.full((3,), 1 / 3), rtol=0, atol=1e-4)
    with torch.no_grad():
        fusion.weights.copy_(torch.tensor([3.0, -2.0, 1.0]))
    torch.testing.assert_close(fusion.normalised_weights(), torch.tensor([0.75, 0.0, 0.25]), rtol=0, atol=1e-4)
    for values in ([5.0, 4.0, 0.1], [0.3, -1.0, 0.7], [100.0, 1.0, 1.0]):
        with torch.no_grad():
            fusion.weights.copy_(torch.tensor(values))
        assert abs(fusion.normalised_weights().sum().item() - 1) < 2e-4
    with torch.no_grad():
        fusion.weights.fill_(-1)
    assert torch.equal(fusion.normalised_weights(), torch.zeros(3))  # and no division by zero


def naive_fusion(fusion: WeightedFusion, maps: list[Tensor]) -> Tensor:
    positive = fusion.weights.clamp(min=0)
    B, C, h, w = maps[0].shape
    total = torch.zeros(B, C, h, w)
    for weight, level in zip(positive, maps, strict=True):
        total = total + weight / (positive.sum() + 1e-4) * level
    padded = F.pad(total, (1, 1, 1, 1))
    deep = torch.zeros(B, C, h, w)
    for i in range(3):
        for j in range(3):
            deep = deep + padded[:, :, i : i + h, j : j + w] * fusion.depthwise.weight[:, 0, i, j, None, None]
    x = conv(fusion.pointwise, deep, relu=False)
    return x * x.sigmoid()


def halved(x: Tensor) -> Tensor:
    """The largest of the 3x3 cells around each second one."""
    padded = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
    h, w = x.shape[-2:]
    shifted = [padded[:, :, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]
    return torch.stack(shifted).amax(0)


def test_bifpn_equals_a_naive_loop() -> None:
    decoder, maps = make(BiFPNPixelDecoder), random_maps()
    with torch.no_grad():
        for number, fusion in enumerate(m for m in decoder.modules() if isinstance(m, WeightedFusion)):
            values = torch.tensor([0.2, 1.5, -0.3] if number % 2 else [2.0, 0.5, 1.0])
            fusion.weights.copy_(values[: len(fusion.weights)])
    levels = [conv(p, maps[n], relu=False) for n, p in zip(NAMES, decoder.input_proj, strict=True)]
    for layer in decoder.layers:
        down_4 = naive_fusion(layer.top_down[2], [levels[2], doubled(levels[3])])
        down_3 = naive_fusion(layer.top_down[1], [levels[1], doubled(down_4)])
        out_2 = naive_fusion(layer.top_down[0], [levels[0], doubled(down_3)])
        out_3 = naive_fusion(layer.bottom_up[0], [levels[1], down_3, halved(out_2)])
        out_4 = naive_fusion(layer.bottom_up[1], [levels[2], down_4, halved(out_3)])
        out_5 = naive_fusion(layer.bottom_up[2], [levels[3], halved(out_4)])
        levels = [out_2, out_3, out_4, out_5]
    assert_features(decoder(maps), projected(decoder, levels[0]), levels[:0:-1])


def test_bifpn_refuses_no_repeats_and_gaps() -> None:
    with pytest.raises(ValueError, match="num_repeats must be at least 1, got 0"):
        make(BiFPNPixelDecoder, num_repeats=0)
    strides = {n: STRIDES[n] for n in ("res2", "res4", "res5")}
    with pytest.raises(ValueError, match=r"in_strides must double from level to level, got .*16"):
        make(BiFPNPixelDecoder, in_strides=strides)


def test_fapn_with_zero_offsets_equals_an_fpn_with_selection() -> None:
    decoder, maps = make(FaPNPixelDecoder), random_maps()
    for alignment in decoder.alignments:
        nn.init.zeros_(alignment.offset.weight)
        nn.init.zeros_(alignment.offset.bias)
    selected = []
    for name, selection in zip(NAMES, decoder.selections, strict=True):
        x = maps[name]
        importance = torch.sigmoid(
            x.flatten(2).mean(2) @ selection.importance.weight[:, :, 0, 0].t() + selection.importance.bias
        )
        selected.append(conv(selection.project, x * (1 + importance[:, :, None, None]), relu=False))
    levels = [conv(decoder.layers[3], selected[3], relu=True)]
    for number in (2, 1, 0):
        alignment = decoder.alignments[number]
        aligned = F.conv2d(doubled(levels[-1]), alignment.weight, alignment.bias, padding=1).clamp(min=0)
        levels.append(conv(decoder.layers[number], selected[number] + aligned, relu=True))
    assert_features(decoder(maps), projected(decoder, levels[3]), levels[:3])


def test_fapn_starts_without_offsets_and_moves_the_coarser_map_by_them() -> None:
    torch.manual_seed(0)
    fresh = FaPNPixelDecoder(in_channels=CHANNELS, in_strides=STRIDES, conv_dim=32, mask_dim=20)
    assert not any(p.any() for alignment in fresh.alignments for p in alignment.offset.parameters())
    alignment = fresh.alignments[0]
    with torch.no_grad():
        alignment.offset.bias[1::2] = 1.0  # every tap one pixel to the right
    coarse = torch.randn(1, 32, 6, 8)
    plain = F.conv2d(coarse, alignment.weight, alignment.bias, padding=1).relu()
    moved = alignment(torch.zeros_like(coarse), coarse)
    torch.testing.assert_close(moved[..., :-1], plain[..., 1:], rtol=1e-4, atol=1e-5)
