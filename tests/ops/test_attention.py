"""The kernels of attention against softmax in double precision, and when models use them."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mask2former.modeling.backbones import SwinTransformer
from mask2former.modeling.backbones.swin import _shifted_window_mask
from mask2former.modeling.layers import Attention
from mask2former.ops import _extension, attention

pytestmark = pytest.mark.skipif(
    not attention._has_kernels, reason="the extension is not built, or the processor has no AVX2"
)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=2e-5)


# ---- sequences


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, blocked: Tensor | None) -> Tensor:
    q, k, v = (x.double().unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, M, length, C/M)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, M, Q, S)
    if blocked is not None:
        scores = scores.masked_fill(blocked.unsqueeze(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def sequences(B: int, Q: int, S: int, C: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    return spread * torch.randn(B, Q, C), torch.randn(B, S, C), torch.randn(B, S, C)


def all_but_one(B: int, Q: int, S: int) -> Tensor:
    blocked = torch.ones(B, Q, S, dtype=torch.bool)
    return blocked.scatter_(2, torch.randint(S, (B, Q, 1)), False)


@pytest.mark.parametrize(
    ("B", "Q", "S", "heads", "channels"),
    [
        (1, 100, 1000, 8, 32),
        (2, 7, 145, 3, 8),
        (1, 1, 1, 1, 8),
        (2, 1, 300, 2, 16),
        (1, 250, 144, 1, 48),
        (3, 5, 17, 2, 3),  # channels of a head that are no multiple of anything
        (1, 13, 289, 1, 20),
    ],
)
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_attention(B: int, Q: int, S: int, heads: int, channels: int, spread: float) -> None:
    q, k, v = sequences(B, Q, S, heads * channels, spread)
    some = torch.rand(B, Q, S) < 0.7
    for blocked in (None, some & ~some.all(-1, keepdim=True), all_but_one(B, Q, S)):
        found = attention.attention(q, k, v, heads, blocked)
        # at large spreads the float32 scores themselves are rounded
        expected = softmax_attention(q, k, v, heads, blocked)
        assert found.shape == q.shape
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=2e-5 * spread)


def test_attention_to_one_key_is_its_value() -> None:
    q, k, v = sequences(2, 9, 400, 64, spread=50.0)
    blocked = all_but_one(2, 9, 400)
    kept = (~blocked).int().argmax(-1, keepdim=True).expand(-1, -1, 64)  # (B, Q, C)
    assert torch.equal(attention.attention(q, k, v, 4, blocked), v.gather(1, kept))


def test_attention_of_views() -> None:
    qkv = torch.randn(2, 40, 3 * 32)
    q, k, v = qkv.chunk(3, dim=-1)
    close(attention.attention(q, k, v, 4), softmax_attention(q, k, v, 4, None))
    k = torch.randn(2, 32, 50).transpose(1, 2)
    blocked = (torch.rand(2, 50, 40) < 0.5).transpose(1, 2)
    blocked = blocked & ~blocked.all(-1, keepdim=True)
    close(attention.attention(q, k, k, 4, blocked), softmax_attention(q, k, k, 4, blocked))


def test_large_scores_do_not_overflow_and_rows_without_keys_do_no_harm() -> None:
    q, k, v = sequences(1, 20, 300, 8, spread=1e4)
    blocked = torch.zeros(1, 20, 300, dtype=torch.bool)
    blocked[0, 3] = True
    blocked[0, 4, :290] = True  # nothing in the first blocks of keys
    found, expected = attention.attention(q, k, v, 1, blocked), attention.attention(q, k, v, 1)
    others = [i for i in range(20) if i not in (3, 4)]
    assert torch.equal(found[:, others], expected[:, others])
    assert found[:, others].isfinite().all()
    close(found[:, 4:5], attention.attention(q[:, 4:5], k[:, 290:], v[:, 290:], 1))


def test_what_is_not_a_number_stays_in_its_row() -> None:
    q, k, v = sequences(1, 30, 200, 32)
    clean = attention.attention(q, k, v, 2)
    q[0, 7, 20] = torch.nan  # of the second head
    found = attention.attention(q, k, v, 2)
    assert found[0, 7, 16:].isnan().all()
    found[0, 7, 16:] = clean[0, 7, 16:]
    assert torch.equal(found, clean)


# ---- windows


def regions_along(length: int, side: int, shift: int) -> Tensor:
    """(windows, side) bool: which tokens of a shifted axis came from its other end."""
    padded = -(-length // side) * side
    return (torch.arange(padded) + shift >= padded).view(-1, side)


def softmax_windows(
    qkv: Tensor, qkv_bias: Tensor | None, position_bias: Tensor, heads: int, side: int, shift: int, scale: float
) -> Tensor:
    """Window by window, as the paper describes it, in double precision."""
    B, H, W, C = *qkv.shape[:3], qkv.shape[3] // 3
    rows, cols = -(-H // side), -(-W // side)
    padded = torch.zeros(B, rows * side, cols * side, 3 * C, dtype=torch.float64)
    if qkv_bias is not None:
        padded += qkv_bias
    padded[:, :H, :W] = qkv
    padded = padded.roll((-shift, -shift), dims=(1, 2))
    out = torch.empty(B, rows * side, cols * side, C, dtype=torch.float64)
    wraps_y, wraps_x = regions_along(H, side, shift), regions_along(W, side, shift)
    for i in range(rows):
        for j in range(cols):
            part = (slice(None), slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side))
            q, k, v = padded[part].flatten(1, 2).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, M, T, C/M)
            region = (2 * wraps_y[i][:, None] + wraps_x[j]).flatten()  # (T)
            scores = scale * q @ k.transpose(-1, -2) + position_bias - 100.0 * (region[:, None] != region)
            out[part] = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, side, side, C)
    return out.roll((shift, shift), dims=(1, 2))[:, :H, :W]


@pytest.mark.parametrize(("H", "W", "side"), [(14, 21, 7), (9, 16, 7), (3, 2, 7), (13, 30, 12), (1, 25, 5), (6, 4, 1)])
@pytest.mark.parametrize(("heads", "channels"), [(3, 32), (2, 8), (1, 5)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_shifted", [True, False])
def test_window_attention(
    H: int, W: int, side: int, heads: int, channels: int, has_bias: bool, is_shifted: bool
) -> None:
    C, T, shift = heads * channels, side * side, side // 2 if is_shifted else 0
    qkv, bias = torch.randn(2, H, W, 3 * C), torch.randn(3 * C) if has_bias else None
    position_bias = torch.randn(T, T, heads).permute(2, 0, 1)
    for scale in (None, 0.7):
        arguments = {"num_heads": heads, "side": side, "shift": shift, "scale": scale}
        found = attention.window_attention(qkv, bias, position_bias, **arguments)  # type: ignore[arg-type]
        used = channels**-0.5 if scale is None else scale
        close(found, softmax_windows(qkv, bias, position_bias, heads, side, shift, used))


def test_the_regions_of_the_test_are_those_of_the_model() -> None:
    H, W, side = 9, 16, 7
    wraps_y, wraps_x = regions_along(H, side, side // 2), regions_along(W, side, side // 2)
    region = (2 * wraps_y[:, None, :, None] + wraps_x[None, :, None, :]).reshape(-1, side * side)  # (windows, T)
    expected = _shifted_window_mask(H, W, side, torch.device("cpu"))
    assert torch.equal(region[:, :, None] != region[:, None, :], expected)


# ---- both


def test_threads_do_not_change_a_bit() -> None:
    q, k, v = sequences(1, 100, 700, 64)
    blocked, qkv, position_bias = all_but_one(1, 100, 700), torch.randn(1, 20, 23, 96), torch.randn(2, 49, 49)

    def results() -> list[Tensor]:
        windows = attention.window_attention(qkv, None, position_bias, num_heads=2, side=7, shift=3)
        return [attention.attention(q, k, v, 2, blocked), attention.attention(q, k, v, 2), windows]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(2)
        assert all(torch.equal(one, other) for one, other in zip(alone, results(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_direct_calls_check_their_arguments() -> None:
    q, k, v = sequences(2, 3, 4, 8)
    entry = torch.ops.mask2former.attention
    with pytest.raises(ValueError, match=r"q and k must be \(B, Q, C\) and \(B, S, C\), S at least 1, got"):
        entry(q[0], k, v, 2, None)
    with pytest.raises(ValueError, match="S at least 1"):
        entry(q, k[:, :0], v[:, :0], 2, None)
    with pytest.raises(ValueError, match=r"k must be float32 on the CPU and have shape \[2, 4, 8\], got"):
        entry(q, k.double(), v, 2, None)
    with pytest.raises(ValueError, match=r"v must be float32 on the CPU and have shape \[2, 4, 8\], got .*\[2, 3, 8\]"):
        entry(q, k, v[:, :3], 2, None)
    with pytest.raises(ValueError, match="num_heads must divide 8 channels, got 3"):
        entry(q, k, v, 3, None)
    with pytest.raises(ValueError, match=r"blocked must be bool on the CPU and have shape \[2, 3, 4\], got"):
        entry(q, k, v, 2, torch.zeros(2, 1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="blocked must be bool"):
        entry(q, k, v, 2, torch.zeros(2, 3, 4))
    assert entry(q[:, :0], k, v, 2, None).shape == (2, 0, 8)


def test_direct_calls_of_windows_check_their_arguments() -> None:
    qkv, position_bias = torch.zeros(1, 5, 6, 24), torch.zeros(2, 9, 9)

    def call(qkv: Tensor, bias: Tensor | None, position_bias: Tensor, *numbers: int) -> Tensor:
        return torch.ops.mask2former.window_attention(qkv, bias, position_bias, *numbers, 1.0)

    with pytest.raises(ValueError, match=r"qkv must have shape \(B, H, W, 3 C\), got \[5, 6, 24\]"):
        call(qkv[0], None, position_bias, 2, 3, 1)
    with pytest.raises(ValueError, match=r"qkv must be float32"):
        call(qkv.double(), None, position_bias, 2, 3, 1)
    with pytest.raises(ValueError, match="num_heads must divide 8 channels, got 3"):
        call(qkv, None, position_bias, 3, 3, 1)
    for side, shift in ((0, 0), (3, 3), (3, -1)):
        with pytest.raises(ValueError, match=rf"shift in \[0, side\), got {side} and {shift}"):
            call(qkv, None, position_bias, 2, side, shift)
    with pytest.raises(ValueError, match=r"position_bias must be float32 .* \[2, 16, 16\], got .*\[2, 9, 9\]"):
        call(qkv, None, position_bias, 2, 4, 1)
    with pytest.raises(ValueError, match=r"qkv_bias must be float32 .* \[24\], got .*\[8\]"):
        call(qkv, torch.zeros(8), position_bias, 2, 3, 1)
    assert call(qkv[:0], None, position_bias, 2, 3, 1).shape == (0, 5, 6, 8)


# ---- in models


def swin(**changes: Any) -> SwinTransformer:
    sizes = {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 5, "out_features": ["res2", "res3"]}
    backbone = SwinTransformer(**{**sizes, **changes})
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(0, 0.3)
    return backbone.eval()


def count_calls(function: str, run: Any) -> int:
    with mock.patch.object(attention, function, wraps=getattr(attention, function)) as spy:
        run()
    return spy.call_count


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("qk_scale", [None, 0.6])
@torch.no_grad()
def test_swin_with_and_without_kernels(qkv_bias: bool, qk_scale: float | None) -> None:
    backbone, image = swin(qkv_bias=qkv_bias, qk_scale=qk_scale), torch.randn(2, 3, 60, 93)
    found = backbone(image)
    assert count_calls("window_attention", lambda: backbone(image)) == 4
    with mock.patch.object(attention, "_has_kernels", False):
        expected = backbone(image)
        assert count_calls("window_attention", lambda: backbone(image)) == 0
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_layer_with_and_without_kernels() -> None:
    layer, (q, k, v) = Attention(dim=32, num_heads=4), sequences(2, 11, 200, 32)
    for blocked in (None, all_but_one(2, 11, 200)):
        found = layer(q, k, v, blocked)
        assert count_calls("attention", lambda mask=blocked: layer(q, k, v, mask)) == 1
        with mock.patch.object(attention, "_has_kernels", False):
            close(found, layer(q, k, v, blocked))


def test_when_they_are_used() -> None:
    layer, (q, k, v) = Attention(dim=32, num_heads=4, dropout=0.5).eval(), sequences(2, 11, 20, 32)
    backbone, image = swin(attn_drop_rate=0.5), torch.randn(1, 3, 40, 40)
    bias = torch.randn(2, 4, 11, 20)

    def calls() -> tuple[int, int]:
        heads = count_calls("attention", lambda: layer(q, k, v))
        return heads, count_calls("window_attention", lambda: backbone(image))

    assert calls() == (0, 0)  # gradients
    with torch.inference_mode():
        assert calls() == (1, 4)
        assert count_calls("attention", lambda: layer(q, k, v, attn_bias=bias)) == 0
        with _extension.reference_only():
            assert calls() == (0, 0)
        with torch.autocast("cpu", torch.bfloat16):
            assert calls() == (0, 0)
        layer.train()
        backbone.train()
        assert calls() == (0, 0)  # dropout of attention


def test_programs_have_ordinary_operators() -> None:
    layer, inputs = Attention(dim=32, num_heads=4).eval(), sequences(1, 11, 20, 32)
    with torch.no_grad():
        names = {str(node.target) for node in torch.export.export(layer, inputs).graph.nodes}
        assert any("scaled_dot_product_attention" in name for name in names)
        assert not any("mask2former" in name for name in names)
        graph = str(torch.jit.trace(layer, inputs).inlined_graph)
        assert "scaled_dot_product_attention" in graph
        assert "mask2former::attention" not in graph
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        close(compiled(*inputs), layer(*inputs))
