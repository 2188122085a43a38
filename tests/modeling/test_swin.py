"""Swin: any input size, independence of the batch, the shifted-window mask, stochastic depth, checkpointing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.modeling.backbones import SwinTransformer
from mask2former.modeling.backbones.swin import _PatchMerging, _shifted_window_mask, _WindowAttention
from tests.golden import fill_weights


def _swin(**changes: Any) -> SwinTransformer:
    arguments = {
        "embed_dim": 8,
        "depths": [2, 2, 1, 1],
        "num_heads": [1, 2, 2, 4],
        "window_size": 3,
        "drop_path_rate": 0.0,
    }
    backbone = SwinTransformer(**{**arguments, **changes})
    fill_weights(backbone)
    return backbone


@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 65), (1, 1), (5, 130), (31, 7)])
@pytest.mark.parametrize("window_size", [3, 12])
def test_any_size_gives_finite_maps_of_the_right_size(height: int, width: int, window_size: int) -> None:
    backbone = _swin(window_size=window_size).eval()
    outputs = backbone(torch.randn(2, 3, height, width))
    assert backbone.out_channels == {"res2": 8, "res3": 16, "res4": 32, "res5": 64}
    assert backbone.out_strides == {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    for name, stride in backbone.out_strides.items():
        size = (-(-height // stride), -(-width // stride))
        assert outputs[name].shape == (2, backbone.out_channels[name], *size)
        assert outputs[name].isfinite().all()


def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    backbone = _swin().eval()
    batch = torch.randn(3, 3, 44, 52)
    together = backbone(batch)
    for i in range(3):
        for name, alone in backbone(batch[i : i + 1]).items():
            torch.testing.assert_close(alone[0], together[name][i], rtol=1e-4, atol=1e-5)


def test_out_features_choose_outputs_and_norms() -> None:
    backbone = _swin(out_features=["res3", "res4"])
    assert set(backbone(torch.randn(1, 3, 32, 32))) == {"res3", "res4"}
    norms = {n.split(".")[0] for n in backbone.state_dict() if n.startswith("norm")}
    assert norms == {"norm1", "norm2"}


def test_it_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        backbone = SwinTransformer(embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12)
    assert all(tensor.is_meta for tensor in backbone.state_dict().values())


def _neighbours(height: int, width: int, side: int) -> Tensor:
    """(windows, T, T): tokens of a shifted window that wrapped around the border equally, token by token."""
    shift = side // 2
    padded_h, padded_w = height + -height % side, width + -width % side
    rows, cols = padded_h // side, padded_w // side
    result = torch.zeros(rows * cols, side * side, side * side, dtype=torch.bool)

    def original(window: int, token: int) -> tuple[int, int]:
        y = (window // cols) * side + token // side
        x = (window % cols) * side + token % side
        return y + shift, x + shift  # before the roll; beyond the padded size it came from the other side

    for window in range(rows * cols):
        for a in range(side * side):
            for b in range(side * side):
                (ya, xa), (yb, xb) = original(window, a), original(window, b)
                same_rows = (ya >= padded_h) == (yb >= padded_h)
                result[window, a, b] = same_rows and (xa >= padded_w) == (xb >= padded_w)
    return result


@pytest.mark.parametrize(("height", "width", "side"), [(6, 9, 3), (7, 7, 4), (2, 3, 4), (5, 1, 5), (8, 4, 2)])
def test_shifted_window_mask_equals_naive_definition(height: int, width: int, side: int) -> None:
    blocked = _shifted_window_mask(height, width, side, torch.device("cpu"))
    assert torch.equal(~blocked, _neighbours(height, width, side))


def test_window_attention_equals_naive_softmax() -> None:
    side, dim, heads = 2, 6, 3
    attention = _WindowAttention(dim, heads, side, True, None, 0.0, 0.0)
    fill_weights(attention)
    x, blocked = torch.randn(2, 4, side * side, dim), torch.rand(4, side * side, side * side) > 0.7
    blocked &= ~torch.eye(side * side, dtype=torch.bool)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    output = torch.zeros_like(x)
    for m in range(heads):
        channels = slice(m * dim // heads, (m + 1) * dim // heads)
        logits = q[..., channels] @ k[..., channels].transpose(-1, -2) / (dim // heads) ** 0.5
        for a in range(side * side):
            for b in range(side * side):
                dy, dx = a // side - b // side + side - 1, a % side - b % side + side - 1
                logits[..., a, b] += attention.relative_position_bias_table[dy * (2 * side - 1) + dx, m]
        logits = logits.masked_fill(blocked, float("-inf"))
        output[..., channels] = logits.softmax(-1) @ v[..., channels]
    torch.testing.assert_close(attention.project(attention(x, blocked)), attention.proj(output), rtol=1e-4, atol=1e-5)


def test_a_shifted_block_sees_across_window_borders() -> None:
    image = torch.randn(1, 3, 24, 24)
    changed_image = image.clone()
    changed_image[..., 12:16, 12:16] += 1  # one patch of the last window (side 3: patches 3 to 5)
    without = _swin(depths=[1], num_heads=[1], out_features=["res2"])
    with_shift = _swin(depths=[2], num_heads=[1], out_features=["res2"])

    def changed(backbone: SwinTransformer) -> Tensor:
        difference = (backbone.eval()(image)["res2"] - backbone(changed_image)["res2"]).abs().sum((0, 1))
        return difference > 1e-4

    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[3:, 3:] = True
    assert torch.equal(changed(without), inside)
    assert changed(with_shift)[~inside].any()
    # rolled tokens are no neighbours: the upper left corner is alone in its shifted window
    assert not changed(with_shift)[0].any()
    assert not changed(with_shift)[:, 0].any()


def test_patch_merging_order() -> None:
    merging = _PatchMerging(1)
    x = torch.arange(4.0).view(1, 2, 2, 1)  # 0 1 / 2 3
    merging.norm = torch.nn.Identity()
    merging.reduction = torch.nn.Identity()
    assert merging(x).flatten().tolist() == [0, 2, 1, 3]  # column by column
    odd = merging(torch.ones(1, 3, 1, 1))
    assert odd.shape == (1, 2, 1, 4)
    assert odd[0, 1, 0].tolist() == [1, 0, 0, 0]


def test_drop_path_keeps_the_expectation_and_acts_in_training_only() -> None:
    block = _swin(depths=[2], num_heads=[1], out_features=["res2"], drop_path_rate=0.4).layers[0].blocks[1]
    assert block.drop_path == pytest.approx(0.4)
    x = torch.ones(20000, 1, 1, 1)
    dropped = block.train()._drop(x)
    assert dropped.flatten().unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
    standard_error = (0.4 / 0.6 / 20000) ** 0.5
    assert abs(dropped.mean() - 1) < 4 * standard_error
    assert torch.equal(block.eval()._drop(x), x)


def test_drop_path_grows_linearly_from_zero() -> None:
    backbone = _swin(depths=[2, 2], num_heads=[1, 1], drop_path_rate=0.3, out_features=["res3"])
    rates = [block.drop_path for stage in backbone.layers for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_drop_path_drops_whole_branches_of_images() -> None:
    backbone = _swin(depths=[2], num_heads=[1], out_features=["res2"], drop_path_rate=0.5)
    batch = torch.randn(1, 3, 16, 16).expand(64, -1, -1, -1)
    assert len(backbone.train()(batch)["res2"].flatten(1).round(decimals=3).unique(dim=0)) == 4  # 2 branches
    assert len(backbone.eval()(batch)["res2"].flatten(1).round(decimals=3).unique(dim=0)) == 1


def test_checkpointing_changes_neither_numbers_nor_gradients() -> None:
    results = []
    for use_checkpoint in (False, True):
        backbone = _swin(use_checkpoint=use_checkpoint, drop_path_rate=0.5).train()
        torch.manual_seed(3)
        image = torch.randn(2, 3, 40, 40)
        outputs = backbone(image)
        sum(x.square().mean() for x in outputs.values()).backward()
        results.append((outputs, {n: p.grad for n, p in backbone.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_checkpointing_recomputes_the_blocks() -> None:
    backbone = _swin(use_checkpoint=True).train()
    calls: list[int] = []
    backbone.layers[0].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    backbone(torch.randn(1, 3, 16, 16))["res5"].sum().backward()
    assert len(calls) == 2


def test_absolute_position_embedding() -> None:
    with_ape, without = _swin(ape=True, pretrain_image_size=32).eval(), _swin().eval()
    assert with_ape.absolute_pos_embed is not None
    assert with_ape.absolute_pos_embed.shape == (1, 8, 8, 8)
    image = torch.randn(1, 3, 36, 52)
    assert not torch.allclose(with_ape(image)["res2"], without(image)["res2"])
    with torch.no_grad():
        with_ape.absolute_pos_embed.zero_()
    torch.testing.assert_close(with_ape(image), without(image))
    patches = []
    with_ape.pos_drop.register_forward_pre_hook(lambda _, inputs: patches.append(inputs[0]))
    with torch.no_grad():
        with_ape.absolute_pos_embed.copy_(torch.randn(1, 8, 8, 8))
        with_ape(image)
        without.pos_drop.register_forward_pre_hook(lambda _, inputs: patches.append(inputs[0]))
        without(image)
    expected = F.interpolate(with_ape.absolute_pos_embed, size=(9, 13), mode="bicubic", align_corners=False)
    torch.testing.assert_close((patches[0] - patches[1]).permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ape", [False, True])
def test_every_parameter_gets_a_gradient(ape: bool) -> None:
    backbone = _swin(ape=ape)
    outputs = backbone(torch.randn(2, 3, 100, 100))
    weights = [torch.randn_like(x) for x in outputs.values()]
    sum((x * w).sum() for x, w in zip(outputs.values(), weights, strict=True)).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("options", "absent"),
    [({"qkv_bias": False}, "layers.0.blocks.0.attn.qkv.bias"), ({"patch_norm": False}, "patch_embed.norm.weight")],
)
def test_switches_remove_parameters(options: dict[str, bool], absent: str) -> None:
    assert absent in _swin().state_dict()
    backbone = _swin(**options)
    assert absent not in backbone.state_dict()
    assert backbone(torch.randn(1, 3, 16, 16))["res5"].isfinite().all()


def test_qk_scale_replaces_the_default() -> None:
    image = torch.randn(1, 3, 32, 32)
    stage = {"depths": [1], "num_heads": [2], "out_features": ["res2"]}
    default, same, other = (_swin(**stage, qk_scale=s).eval()(image)["res2"] for s in (None, 0.5, 2.0))
    torch.testing.assert_close(default, same)  # 4 channels a head
    assert not torch.allclose(default, other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depths": [1] * 5, "num_heads": [1] * 5}, "depths and num_heads must hold .* 1 to 4 stages"),
        ({"depths": []}, "depths and num_heads must hold"),
        ({"num_heads": [1]}, r"depths and num_heads must hold .*got \[2, 2, 1, 1\] and \[1\]"),
        ({"out_features": ["stem"]}, r"out_features must be among .*got \['stem'\]"),
        ({"depths": [1], "num_heads": [1]}, r"out_features must be among \('res2',\)"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _swin(**wrong)
