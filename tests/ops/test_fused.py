"""oneDNN's operators against ordinary ones, and when they are used."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mask2former.modeling.layers import ConvNorm, FrozenBatchNorm2d, Linear, make_norm
from mask2former.modeling.mask2former import Mask2Former
from mask2former.ops import fused
from tests.tiny import tiny_model

needs_operators = pytest.mark.skipif(not fused._has_operators, reason="this PyTorch or processor has no such operators")


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 191, 192, 700])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@torch.no_grad()
def test_linear(rows: int, has_bias: bool, activation: fused.Activation) -> None:
    x, weight, bias = torch.randn(2, rows, 40), torch.randn(24, 40), torch.randn(24) if has_bias else None
    plain = x @ weight.t() if bias is None else x @ weight.t() + bias
    plain = {"none": plain, "relu": F.relu(plain), "gelu": F.gelu(plain)}[activation]
    close(fused.linear(x, weight, bias, activation=activation), plain)
    residual = torch.randn(2, rows, 24)
    kept = residual.clone()
    close(fused.linear(x, weight, bias, activation=activation, residual=residual), plain + residual)
    assert torch.equal(residual, kept)


@torch.no_grad()
def test_linear_of_a_part_of_a_matrix_and_of_columns() -> None:
    weight, x = torch.randn(72, 24), torch.randn(24, 500).t()[None]
    close(fused.linear(x, weight[24:48], None), x @ weight[24:48].t())


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "stride", "padding"), [(1, 1, 0), (3, 2, 1), ((2, 5), (1, 3), (0, 2))])
@pytest.mark.parametrize("relu", [True, False])
@torch.no_grad()
def test_convolution(order: torch.memory_format, size: object, stride: object, padding: object, relu: bool) -> None:
    conv = nn.Conv2d(6, 10, size, stride, padding)  # type: ignore[arg-type]
    x = torch.randn(2, 6, 11, 14).contiguous(memory_format=order)
    for bias in (conv.bias, None):
        exact = [None if part is None else part.double() for part in (x, conv.weight, bias)]
        plain = F.conv2d(*exact, conv.stride, conv.padding)
        numbers = {"stride": conv.stride, "padding": conv.padding}
        found = fused.convolution(x, conv.weight, bias, relu=relu, **numbers)
        assert found.is_contiguous(memory_format=order)
        close(found, (plain.relu() if relu else plain).float())
        residual = torch.randn(plain.shape).contiguous(memory_format=order)
        kept = residual.clone()
        found = fused.convolution(x, conv.weight, bias, relu=relu, residual=residual, **numbers)
        assert torch.equal(residual, kept)
        sum_ = plain + residual
        close(found, (sum_.relu() if relu else sum_).float())


class _AnyMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


@needs_operators
def test_when_they_are_used() -> None:
    x = torch.randn(3, 4)
    assert not fused.fuses(x)  # gradients
    with torch.no_grad():
        assert fused.fuses(x)
        assert not fused.fuses(x.double())
        assert not fused.fuses(x.to("meta"))
        assert not fused.fuses(nn.Parameter(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert not fused.fuses(x)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not fused.fuses(x)
        with _AnyMode():
            assert not fused.fuses(x)
    with torch.inference_mode():
        assert fused.fuses(x)


@torch.no_grad()
def test_other_types_of_weights_are_refused_as_ever() -> None:
    layer, conv = Linear(4, 5).double(), conv_norm("GN").double()
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(300, 4))
    with pytest.raises(RuntimeError, match="type"):
        conv(torch.randn(1, 5, 9, 8))


@needs_operators
@torch.no_grad()
def test_programs_have_ordinary_operators() -> None:
    layer, x = Linear(4, 5, activation="relu"), torch.randn(300, 4)
    names = {str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes}
    assert not any("mkldnn" in name for name in names)
    assert "mkldnn" not in str(torch.jit.trace(layer, x).inlined_graph)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    close(compiled(x), layer(x))


def test_gradients_are_those_of_ordinary_operators() -> None:
    layer, x = Linear(4, 5, activation="gelu"), torch.randn(300, 4, dtype=torch.float64, requires_grad=True)
    layer.double()
    assert torch.autograd.gradcheck(lambda y: layer(y[:7]), (x,))


# ---- normalisation as a part of the convolution


def conv_norm(norm: str, *, bias: bool = False, activation: object = F.relu) -> ConvNorm:
    layer = ConvNorm(5, 32, 3, stride=2, padding=1, bias=bias, norm=make_norm(norm, 32), activation=activation)  # type: ignore[arg-type]
    for name, tensor in layer.norm.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0) if name != "bias" else tensor.normal_()
    return layer.eval()


def with_and_without_gradients(layer: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        found = layer(*inputs)
    return found, layer(*inputs).detach()


@pytest.mark.parametrize("activation", [None, F.relu, F.relu_, F.silu])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "GN"])
def test_normalised_convolution(norm: str, has_bias: bool, activation: object) -> None:
    layer, x = conv_norm(norm, bias=has_bias, activation=activation), torch.randn(2, 5, 9, 8)
    close(*with_and_without_gradients(layer, x))
    close(*with_and_without_gradients(layer, x, torch.randn(2, 32, 5, 4)))


def test_a_norm_that_learns_its_statistics_is_no_constant() -> None:
    layer, x = conv_norm("BN").train(), 3 + torch.randn(2, 5, 9, 8)
    before = layer.norm.running_mean.clone()
    with torch.no_grad():
        out = layer(x)
    assert not torch.equal(layer.norm.running_mean, before)
    assert (out == 0).float().mean() < 0.9  # normalised with its own mean


@torch.no_grad()
def test_every_change_of_a_weight_is_seen() -> None:
    layer, x = conv_norm("FrozenBN", activation=None), torch.randn(1, 5, 9, 8)
    layer.norm.bias.zero_()
    layer.norm.running_mean.zero_()
    out = layer(x)
    layer.weight.data.mul_(2)  # which no version counter tells
    close(layer(x), 2 * out)
    layer.norm.weight.data.mul_(2)
    close(layer(x), 4 * out)
    layer.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in layer.state_dict().items()})
    assert not layer(x).any()
    assert layer.double()(x.double()).dtype == torch.float64


def test_frozen_norm_is_its_formula() -> None:
    norm = FrozenBatchNorm2d(3)
    for tensor in norm.buffers():
        tensor.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, 4, 4)
    expected = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    close(norm(x), expected)


# ---- whole models


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_models_predict_the_same_with_and_without_gradients(backbone: str) -> None:
    whole: Mask2Former = tiny_model(backbone=backbone).eval()
    batch = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        found = whole.predict(batch, all_layers=True)
        features = whole.backbone(batch)
    for name, expected in whole.backbone(batch).items():
        torch.testing.assert_close(features[name], expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(found, whole.predict(batch, all_layers=True), strict=True):
        torch.testing.assert_close(one.class_logits, other.class_logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.mask_logits, other.mask_logits, rtol=1e-4, atol=1e-4)
