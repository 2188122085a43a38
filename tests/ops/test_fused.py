"""This project's kernels and oneDNN's operators against ordinary ones, and when they are used."""

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mask2former.modeling.layers import ConvNorm, FrozenBatchNorm2d, Linear, feed_forward, make_norm
from mask2former.modeling.mask2former import Mask2Former
from mask2former.ops import _extension, fused
from tests.tiny import tiny_model

needs_operators = pytest.mark.skipif(not fused._has_operators, reason="this PyTorch or processor has no such operators")
needs_kernels = pytest.mark.skipif(
    not fused._has_kernels, reason="the extension is not built, or the processor has no AVX2, or AVX-512 as well"
)


@pytest.fixture(autouse=True, params=["kernels", "operators"])
def _means(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test runs with what the machine has, and without this project's kernels."""
    if request.param == "kernels":
        if not fused._has_kernels:
            pytest.skip("no kernels of products here")
        yield
        return
    with _extension.reference_only():
        yield


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
@pytest.mark.parametrize(("size", "stride", "padding"), [(1, 1, 0), (1, 2, 0), (3, 2, 1), ((2, 5), (1, 3), (0, 2))])
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


@pytest.mark.parametrize("sizes", [(8, 8, 5, 7, 1), (16, 24, 4, 4, 2), (24, 40, 13, 30, 1)])
@pytest.mark.parametrize("relu", [True, False])
@torch.no_grad()
def test_winograd(sizes: tuple[int, int, int, int, int], relu: bool) -> None:
    C_in, C_out, H, W, B = sizes
    x = torch.randn(B, C_in, H, W).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(C_out, C_in, 3, 3) * (9 * C_in) ** -0.5
    for bias in (torch.randn(C_out), None):
        exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
        found = fused.convolution(x, weight, bias, padding=(1, 1), relu=relu)
        assert found.is_contiguous(memory_format=torch.channels_last)
        close(found, (exact.relu() if relu else exact).float())


@needs_kernels
def test_winograd_is_for_what_it_computes() -> None:
    x = torch.zeros(1, 16, 12, 12).contiguous(memory_format=torch.channels_last)

    def suits(weight: Tensor, stride: int = 1, padding: int = 1, x: Tensor = x) -> bool:
        return fused._suits_winograd(x, weight, (stride, stride), (padding, padding))

    assert suits(torch.zeros(24, 16, 3, 3))
    assert not suits(torch.zeros(24, 16, 3, 3), stride=2)
    assert not suits(torch.zeros(24, 16, 3, 3), padding=0)
    assert not suits(torch.zeros(24, 16, 1, 3))
    assert not suits(torch.zeros(20, 16, 3, 3))
    assert not suits(torch.zeros(40, 16, 3, 3))  # 144 pixels are few for the transformed weights of 40 channels


@pytest.mark.parametrize("rows", [1, 192, 301])
@pytest.mark.parametrize("sizes", [(40, 24, 33), (300, 530, 16)])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@torch.no_grad()
def test_feed_forward(rows: int, sizes: tuple[int, int, int], activation: fused.Activation) -> None:
    C_in, C_hidden, C_out = sizes
    first = Linear(C_in, C_hidden, activation=activation)
    second = Linear(C_hidden, C_out)
    x = torch.randn(2, rows, C_in)
    hidden = F.linear(x.double(), first.weight.double(), first.bias.double())
    hidden = {"none": hidden, "relu": F.relu(hidden), "gelu": F.gelu(hidden)}[activation]
    expected = F.linear(hidden, second.weight.double(), second.bias.double())
    close(feed_forward(first, second, x), expected.float())
    residual = torch.randn(2, rows, C_out)
    close(feed_forward(first, second, x, residual), (expected + residual).float())
    second.bias = None
    close(feed_forward(first, second, x, residual), (F.linear(hidden, second.weight.double()) + residual).float())


def norm_of(channels: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(channels, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("rows", [5, 100, 301])
@pytest.mark.parametrize("channels", [24, 35, 300])
@torch.no_grad()
def test_sums_and_normalisations_around_the_maps(rows: int, channels: int) -> None:
    first, second = Linear(channels, 44, activation="gelu"), Linear(44, channels)
    before, inside, after = norm_of(channels), norm_of(44), norm_of(channels)
    x, added = 3 * torch.randn(2, rows, channels) + 5, torch.randn(rows, channels)
    exact = [layer.double() for layer in copy.deepcopy([first, second, before, inside, after])]
    hidden = exact[0](exact[2](x.double() + added))
    close(first(x, added=added, before=before), hidden.float())
    close(first(x, added=added, before=before, after=inside), exact[3](hidden).float())
    close(second(hidden.float(), x, after=after), exact[4](exact[1](hidden) + x).float())
    result = exact[4](exact[1](exact[0](exact[2](x.double()))) + x)
    close(feed_forward(first, second, x, x, before=before, after=after), result.float())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("head", [16, 20, 32])
@torch.no_grad()
def test_heads_first(batch: int, head: int) -> None:
    linear, x = nn.Linear(24, 3 * head), torch.randn(batch, 250, 24)
    found = fused.heads_first(x, linear.weight, linear.bias, 3)
    close(found, linear(x).view(batch, 250, 3, head))
    if fused._use_kernels(x) and batch == 1 and head % 16 == 0:
        assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("queries", [7, 192, 200])
@torch.no_grad()
def test_product(order: torch.memory_format, queries: int) -> None:
    left, maps = torch.randn(2, queries, 40), torch.randn(2, 40, 9, 11).contiguous(memory_format=order)
    exact = torch.einsum("bqc,bchw->bqhw", left.double(), maps.double())
    close(fused.product(left, maps), exact.float())


@pytest.mark.parametrize(("size", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (1, 2, 1)])
@pytest.mark.parametrize("has_residual", [True, False])
@torch.no_grad()
def test_convolution_of_many_channels(size: int, stride: int, padding: int, has_residual: bool) -> None:
    x = torch.randn(2, 256, 9, 7).contiguous(memory_format=torch.channels_last)
    weight, bias, scale = torch.randn(40, 256, size, size) * 0.03, torch.randn(40), torch.randn(40)
    exact = F.conv2d(x.double(), weight.double() * scale[:, None, None, None], bias.double(), stride, padding)
    residual = torch.randn(exact.shape).contiguous(memory_format=torch.channels_last) if has_residual else None
    numbers = {"stride": (stride, stride), "padding": (padding, padding)}
    found = fused.convolution(x, weight, bias, residual=residual, relu=True, scale=scale, **numbers)
    close(found, (exact if residual is None else exact + residual).relu().float())


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("coarse_size", [None, (5, 4), (1, 1), (11, 14), (13, 20)])
@pytest.mark.parametrize("relu", [True, False])
@torch.no_grad()
def test_group_norm(order: torch.memory_format, coarse_size: tuple[int, int] | None, relu: bool) -> None:
    """Also of numbers that are far from zero for their spread."""
    x = (torch.randn(2, 24, 11, 14) + 100 * torch.randn(24, 1, 1)).contiguous(memory_format=order)
    norm = nn.GroupNorm(6, 24)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    exact = F.group_norm(x.double(), 6, norm.weight.double(), norm.bias.double(), norm.eps)
    coarse = None
    if coarse_size is not None:
        coarse = torch.randn(2, 24, *coarse_size).contiguous(memory_format=order)
        exact += F.interpolate(coarse.double(), (11, 14), mode="bilinear", align_corners=False)
    found = fused.group_norm(x, 6, norm.weight, norm.bias, norm.eps, coarse=coarse, relu=relu)
    assert found.is_contiguous(memory_format=order)
    close(found, (exact.relu() if relu else exact).float())


@needs_kernels
@torch.no_grad()
def test_a_row_does_not_depend_on_others_or_on_threads() -> None:
    x, weight, threads = torch.randn(700, 300), torch.randn(50, 300), torch.get_num_threads()
    whole = fused.linear(x, weight, None)
    assert torch.equal(fused.linear(x[200:], weight, None), whole[200:])
    try:
        torch.set_num_threads(1)
        assert torch.equal(fused.linear(x, weight, None), whole)
    finally:
        torch.set_num_threads(threads)


@needs_kernels
@torch.no_grad()
def test_what_is_not_a_number_stays_that(request: pytest.FixtureRequest) -> None:
    if "operators" in request.node.name:
        pytest.skip("oneDNN's ReLU makes 0 of what is not a number")
    x, weight = torch.randn(300, 16), torch.randn(8, 16)
    x[7, 3], x[9, 2] = torch.nan, torch.inf
    for activation in ("none", "relu", "gelu"):
        found = fused.linear(x, weight, None, activation=activation)
        assert found[7].isnan().all()
        assert found[:7].isfinite().all()
        assert not found[9].isfinite().all()


@needs_kernels
def test_direct_calls_check_their_arguments() -> None:
    entry, x, weight = torch.ops.mask2former, torch.zeros(3, 4), torch.zeros(5, 4)

    def linear(
        x: Tensor = x,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        activation: int = 0,
        added: Tensor | None = None,
        before: Sequence[Tensor] = (),
        heads: int = 0,
    ) -> Tensor:
        return entry.linear(x, weight, bias, residual, activation, added, before, 1e-5, [], 0.0, heads)

    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 4\), got \[3, 2\]"):
        linear(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"bias must have shape \(5\), got \[4\]"):
        linear(bias=torch.zeros(4))
    with pytest.raises(ValueError, match=r"residual must have shape \[3, 5\], got \[5\]"):
        linear(residual=torch.zeros(5))
    with pytest.raises(ValueError, match="activation must be from 0 to 3, got 7"):
        linear(activation=7)
    with pytest.raises(ValueError, match=r"added must have the last two sizes of x, \[3, 4\], got \[2, 4\]"):
        linear(added=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="norm_before must be empty or weight and bias, got 1 tensors"):
        linear(before=[torch.zeros(4)])
    with pytest.raises(ValueError, match="heads must divide the weight's rows"):
        linear(heads=5)
    with pytest.raises(ValueError, match="x must be float32"):
        linear(x.double())
    with pytest.raises(ValueError, match="weight2 must have 5 columns, got"):
        entry.feed_forward(x, weight, None, torch.zeros(2, 6), None, None, 1, [], 0.0, [], 0.0)
    maps = torch.zeros(1, 8, 4, 4)
    with pytest.raises(ValueError, match="multiples of 8 channels"):
        entry.convolution3x3(maps, torch.zeros(4, 8, 3, 3), None, None, False)
    with pytest.raises(ValueError, match="must agree"):
        entry.convolution3x3(maps, torch.zeros(8, 16, 3, 3), None, None, False)
    with pytest.raises(ValueError, match="must be as large as weight"):
        entry.convolution(maps, torch.zeros(8, 8, 5, 5), None, None, None, [1, 1], [0, 0], 0)
    dense = maps.contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="multiple of groups"):
        entry.group_norm_(dense, 3, torch.ones(8), torch.ones(8), 1e-5, None, False)
    assert linear(torch.zeros(0, 4)).shape == (0, 5)


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
        with torch.backends.mkldnn.flags(enabled=False), _extension.reference_only():
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
