"""Attention, MLP, normalisation and position encoding against PyTorch and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mask2former.modeling.layers import MLP, Attention, ConvNorm, FrozenBatchNorm2d, fill_conv_xavier, make_norm
from mask2former.modeling.position_encoding import sine_position_encoding


def _pair(dim: int, heads: int) -> tuple[Attention, nn.MultiheadAttention]:
    ours, theirs = Attention(dim=dim, num_heads=heads), nn.MultiheadAttention(dim, heads, batch_first=True)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())  # the names agree
    return ours, theirs


@pytest.mark.parametrize("blocked_share", [None, 0.6])
def test_attention_equals_torch(blocked_share: float | None) -> None:
    ours, theirs = _pair(12, 3)
    query, key, value = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    blocked = None
    if blocked_share is not None:
        blocked = torch.rand(2, 5, 7) < blocked_share
        blocked[..., 0] = False
    mask = None if blocked is None else blocked.repeat_interleave(3, dim=0)
    expected, _ = theirs(query, key, value, attn_mask=mask)  # there, too, True is blocked
    torch.testing.assert_close(ours(query, key, value, blocked), expected, rtol=1e-5, atol=1e-6)


def test_blocked_keys_have_no_influence() -> None:
    attention, _ = _pair(8, 2)
    query, key = torch.randn(1, 3, 8), torch.randn(1, 4, 8)
    blocked = torch.zeros(1, 3, 4, dtype=torch.bool)
    blocked[:, 1, 2] = True
    changed = key.clone()
    changed[:, 2] += 10
    difference = (attention(query, key, key, blocked) - attention(query, changed, changed, blocked)).abs().sum(-1)
    assert difference[0, 1] == 0
    assert (difference[0, [0, 2]] > 0).all()


def test_attention_dropout_acts_in_training_only() -> None:
    attention = Attention(dim=8, num_heads=2, dropout=0.5)
    x = torch.randn(2, 6, 8)
    assert not torch.equal(attention.train()(x, x, x), attention(x, x, x))
    assert torch.equal(attention.eval()(x, x, x), attention(x, x, x))


def test_attention_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads = 3, got 8"):
        Attention(dim=8, num_heads=3)


def test_mlp_is_linear_relu_linear() -> None:
    mlp = MLP(in_dim=3, hidden_dim=5, out_dim=2, num_layers=3)
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(5, 3), (5, 5), (2, 5)]
    x = torch.randn(400, 3) * 10
    expected = mlp.layers[2](mlp.layers[1](mlp.layers[0](x).relu()).relu())
    torch.testing.assert_close(mlp(x), expected)
    assert (mlp(x) < 0).any()  # no ReLU at the end


def test_make_norm() -> None:
    assert make_norm("", 4) is None
    assert isinstance(make_norm("SyncBN", 4), nn.SyncBatchNorm)
    group_norm = make_norm("GN", 64)
    assert isinstance(group_norm, nn.GroupNorm)
    assert group_norm.num_groups == 32
    with pytest.raises(ValueError, match=r"name must be one of .*got 'XN'"):
        make_norm("XN", 4)


def test_fill_conv_xavier_has_variance_one_over_fan_in() -> None:
    conv = nn.Conv2d(64, 200, 3)
    fill_conv_xavier(conv)
    fan_in = 64 * 9
    assert conv.weight.var().item() == pytest.approx(1 / fan_in, rel=0.02)
    assert conv.weight.abs().max() <= (3 / fan_in) ** 0.5
    assert conv.bias is not None
    assert not conv.bias.any()


@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 4), (3, 5, 8), (4, 2, 12)])
def test_position_encoding_closed_form(height: int, width: int, channels: int) -> None:
    found = sine_position_encoding(height, width, channels)
    assert found.shape == (channels, height, width)
    assert found.dtype == torch.float32
    half = channels // 2
    for c in range(channels):
        feature = c % half
        frequency = 10000 ** (2 * (feature // 2) / half)
        wave = math.sin if feature % 2 == 0 else math.cos
        for i in range(height):
            for j in range(width):
                place, length = (i + 1, height) if c < half else (j + 1, width)
                expected = wave(2 * math.pi * place / (length + 1e-6) / frequency)
                assert found[c, i, j].item() == pytest.approx(expected, abs=2e-6)


def test_position_encoding_refuses_odd_channels() -> None:
    with pytest.raises(ValueError, match="channels must be a multiple of 4, got 6"):
        sine_position_encoding(2, 2, 6)


def test_a_frozen_normalisation_becomes_part_of_the_convolution_in_training() -> None:
    norm = FrozenBatchNorm2d(6)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    conv = ConvNorm(4, 6, 3, padding=1, norm=norm, activation=F.relu)
    x, residual = torch.randn(2, 4, 20, 24, requires_grad=True), torch.randn(2, 6, 20, 24, requires_grad=True)
    exact = F.conv2d(x.double(), conv.weight.double(), padding=1)
    exact = (norm.double()(exact) + residual.double()).relu()
    norm.float()
    found = conv(x, residual)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    leaves, weights = [x, residual, conv.weight], torch.randn(found.shape)
    wanted = torch.autograd.grad((exact * weights).sum(), leaves)
    for gradient, other in zip(torch.autograd.grad((found * weights).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)
