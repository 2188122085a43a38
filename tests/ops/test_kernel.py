"""The compiled kernel equals the PyTorch reference, and PyTorch knows it as an operator."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mask2former.modeling.pixel_decoders import DeformablePixelDecoder
from mask2former.ops import _extension, ms_deform_attn, ms_deform_attn_fused
from mask2former.ops.ms_deform_attn import ms_deform_attn_fused_reference, ms_deform_attn_reference
from tests.golden import fill_weights, load_tensors

pytestmark = pytest.mark.skipif(
    _extension.extension.module is None,
    reason=f"no compiled kernel: {_extension.extension.reason}; to build it: python setup.py build_ext --inplace",
)

DEVICES = ["cpu"] + (["cuda"] if _extension.extension.archs and torch.cuda.is_available() else [])
Shapes = list[tuple[int, int]]
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "plain": (ms_deform_attn, ms_deform_attn_reference),
    "fused": (ms_deform_attn_fused, ms_deform_attn_fused_reference),
}
# Against the reference in float64, relative to the largest value of the tensor.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _inputs(
    case: str, B: int, Q: int, M: int, D: int, P: int, shapes: Shapes, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """Value, points and scores; many points are outside. The fused entry has a query a cell."""
    S, L = sum(h * w for h, w in shapes), len(shapes)
    sums = torch.promote_types(dtype, torch.float32)
    value = torch.randn(B, S, M, D).to(device, dtype)
    if case == "fused":
        points, scores = torch.randn(B, S, M, L, P, 2) * 3, torch.randn(B, S, M, L, P) * 3
    else:
        points, scores = torch.rand(B, Q, M, L, P, 2) * 1.6 - 0.3, torch.rand(B, Q, M, L, P)
    return [value, points.to(device, sums), scores.to(device, sums)]


def _results(op: Callable[..., Tensor], inputs: list[Tensor], shapes: Shapes, grad_output: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = op(leaves[0], shapes, *leaves[1:])
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def _compare(case: str, inputs: list[Tensor], shapes: Shapes) -> None:
    """Output and all gradients of the kernel against the reference in float64."""
    kernel, reference = CASES[case]
    value, points = inputs[:2]
    grad_output = torch.randn(value.shape[0], points.shape[1], value.shape[2] * value.shape[3]).to(value)
    with torch.profiler.profile() as profile:
        found = _results(kernel, inputs, shapes, grad_output)
    names = {event.name for event in profile.events()}
    assert {n for n in names if n.startswith("mask2former::")}, "the kernel was not used"
    exact = _results(reference, [x.double() for x in inputs], shapes, grad_output.double())
    for name, a, b, like in zip(("output", "value", "points", "scores"), found, exact, (value, *inputs), strict=True):
        assert a.shape == b.shape and a.dtype == like.dtype, name
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        difference = (a.double() - b).abs().max().item() if b.numel() else 0.0
        assert difference <= TOLERANCE[a.dtype] * scale, f"{name}: {difference} of {scale}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_reference(case: str, dtype: torch.dtype, device: str, data: Any) -> None:
    if device == "cpu" and dtype == torch.float16:
        pytest.skip("float16 on CPU is left to the reference")
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4))
    sizes = {
        "B": data.draw(st.integers(0, 3)),
        "Q": data.draw(st.sampled_from([0, 1, 5])),
        "M": data.draw(st.integers(1, 4)),
        "D": data.draw(st.sampled_from([1, 3, 7, 8, 16, 32, 48, 64])),
        "P": data.draw(st.integers(1, 5)),
    }
    torch.manual_seed(data.draw(st.integers(0, 999)))
    inputs = _inputs(case, **sizes, shapes=shapes, dtype=dtype, device=device)
    if data.draw(st.booleans()):
        inputs = [_not_contiguous(x) for x in inputs]
    _compare(case, inputs, shapes)


def _not_contiguous(x: Tensor) -> Tensor:
    """The same numbers with the first two axes swapped in memory, and gaps."""
    wide = torch.cat([x, x], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)
    return wide[..., : x.shape[-1]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("D", [24, 40, 72, 96, 130, 256])
def test_channel_counts_that_fill_vectors_in_part(case: str, D: int, device: str) -> None:
    shapes = [(3, 5), (2, 2)]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        _compare(case, _inputs(case, 2, 6, 2, D, 3, shapes, dtype, device), shapes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_locations_on_borders(dtype: torch.dtype, device: str) -> None:
    """Sizes are powers of two, so that both sides count the same pixels; a gradient at a kink is the right-hand one."""
    shapes = [(4, 8), (2, 1), (1, 1)]
    places = torch.tensor([-1e30, -9.0, -0.25, -0.125, 0.0, 0.125, 0.25, 0.5, 0.875, 1.0, 1.125, 3.0, 1e30])
    points = torch.cartesian_prod(places, places).view(1, -1, 1, 1, 1, 2).expand(2, -1, 2, 3, 2, 2)
    value = torch.randn(2, 35, 2, 8)
    scores = torch.rand(points.shape[:-1])
    inputs = [x.to(device, dtype) for x in (value, points, scores)]
    _compare("plain", inputs, shapes)


@pytest.mark.parametrize("device", DEVICES)
def test_golden_output_and_gradients(device: str) -> None:
    golden = load_tensors("ms_deform_attn")
    names = ("value", "sampling_locations", "attention_weights")
    inputs = [golden[n].to(device) for n in names]
    shapes = [(h, w) for h, w in golden["spatial_shapes"].tolist()]
    found = _results(ms_deform_attn, inputs, shapes, golden["grad_output"].to(device))
    expected = [golden["output"], *(golden[f"grad_{n}"] for n in names)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str, device: str) -> None:
    shapes = [(3, 4), (2, 2)]
    inputs = _inputs(case, 2, 3, 2, 3, 2, shapes, torch.float64, device)
    op = CASES[case][0]
    leaves = tuple(x.requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(lambda v, p, s: op(v, shapes, p, s), leaves, nondet_tol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(case: str, dtype: torch.dtype, device: str) -> None:
    shapes = [(3, 4), (2, 2)]
    inputs = _inputs(case, 2, 3, 2, 8, 2, shapes, dtype, device)
    name = {"plain": "ms_deform_attn", "fused": "ms_deform_attn_fused"}[case]
    flat = [3, 4, 2, 2]
    forward = getattr(torch.ops.mask2former, f"{name}_forward").default
    backward = getattr(torch.ops.mask2former, f"{name}_backward").default
    torch.library.opcheck(forward, (inputs[0], flat, *inputs[1:]))
    leaves = [x.requires_grad_() for x in inputs]
    # float32 gradients of a bfloat16 value are compared inside opcheck with float32's tolerance
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(forward, (leaves[0], flat, *leaves[1:]), test_utils=tests)
    grad_output = torch.randn_like(forward(leaves[0].detach(), flat, *leaves[1:]).detach())
    torch.library.opcheck(backward, (grad_output, inputs[0].detach(), flat, *(x.detach() for x in inputs[1:])))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("B", [1, 3])
def test_results_do_not_depend_on_the_number_of_threads(case: str, B: int) -> None:
    shapes = [(9, 7), (5, 4), (3, 2)]
    inputs = _inputs(case, B, 63, 2, 32, 4, shapes, torch.float32)
    grad_output = torch.randn(B, inputs[1].shape[1], 64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4, 7, 7):
            torch.set_num_threads(count)
            results.append(_results(CASES[case][0], inputs, shapes, grad_output))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_more_threads_than_one_are_used() -> None:
    """The kernel's OpenMP must be PyTorch's: a second pool would ignore set_num_threads, or none would be used."""
    code = """
import pathlib, torch
from mask2former.ops import ms_deform_attn_fused
torch.set_num_threads(3)
loaded = lambda: {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libomp" in line}
before = loaded()
x = torch.randn(1, 400, 2, 32)
ms_deform_attn_fused(x, [(20, 20)], torch.randn(1, 400, 2, 1, 4, 2), torch.randn(1, 400, 2, 1, 4))
assert loaded() == before, (before, loaded())
print(len(list(pathlib.Path("/proc/self/task").iterdir())))
"""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) >= 3


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    """ATEN_CPU_CAPABILITY is read once, so that each takes a process; the widest one here is always tested."""
    if torch.backends.cpu.get_cpu_capability().lower() == capability:
        pytest.skip("all other tests use it")
    order = ["DEFAULT", "AVX2", "AVX512"]  # older PyTorch says "NO AVX" for the first
    have = torch.backends.cpu.get_cpu_capability()
    if have not in order or order.index(have) < order.index(capability.upper()):
        pytest.skip(f"this machine has {have}")
    code = f"""
import torch
from tests.ops.test_kernel import _compare, _inputs
assert torch.backends.cpu.get_cpu_capability() in ({capability.upper()!r}, "NO AVX")
shapes = [(5, 6), (3, 3), (1, 2)]
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    for D in (3, 8, 16, 32, 72):
        for case in ("plain", "fused"):
            _compare(case, _inputs(case, 2, 7, 3, D, 3, shapes, dtype), shapes)
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_half_value_with_its_own_or_float32_points() -> None:
    shapes = [(5, 6), (3, 3)]
    value, offsets, logits = (x.bfloat16() for x in _inputs("fused", 2, 0, 2, 8, 4, shapes, torch.float32))
    half = ms_deform_attn_fused(value, shapes, offsets, logits)
    full = ms_deform_attn_fused(value, shapes, offsets.float(), logits.float())
    assert half.dtype == torch.bfloat16 and torch.equal(half, full)


@pytest.mark.parametrize("place", [0.5, 9.0])
def test_what_is_not_a_number_shows(place: float) -> None:
    value = torch.ones(1, 4, 1, 4)
    points = torch.full((1, 3, 1, 1, 1, 2), place)
    points[0, 1] = float("nan")
    scores = torch.ones(1, 3, 1, 1, 1)
    scores[0, 2] = float("nan")
    output = ms_deform_attn(value, [(2, 2)], points, scores)
    assert output[0, 0].isfinite().all() and output[0, 1:].isnan().all()


def test_infinite_cells_are_not_met_from_outside() -> None:
    value = torch.full((1, 4, 1, 16), float("inf"))
    output = ms_deform_attn(value, [(2, 2)], torch.full((1, 1, 1, 1, 1, 2), 3.0), torch.ones(1, 1, 1, 1, 1))
    assert (output == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_are_refused(case: str) -> None:
    shapes = [(2, 3)]
    leaves = [x.requires_grad_() for x in _inputs(case, 1, 2, 1, 4, 2, shapes, torch.float32)]
    output = CASES[case][0](leaves[0], shapes, *leaves[1:])
    (gradient,) = torch.autograd.grad(output.sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives; MASK2FORMER_KERNEL=0"):
        (gradient * torch.randn_like(gradient)).sum().backward()


def test_wrong_arguments_do_not_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(2, 3)]
    value, offsets, logits = _inputs("fused", 1, 0, 1, 4, 2, shapes, torch.float32)
    monkeypatch.setattr(torch.ops, "mask2former", None)
    for wrong in (value[0], value.double(), value.long(), value[:, :5], value.to("meta")):
        with pytest.raises(ValueError, match=r"must .*got"):
            ms_deform_attn_fused(wrong, shapes, offsets, logits)
    with pytest.raises(ValueError, match="offsets must have a query a cell of value, S = 6, got 5 queries"):
        ms_deform_attn_fused(value, shapes, offsets[:, :5], logits[:, :5])


def test_direct_calls_of_the_operator_are_checked() -> None:
    value, points, scores = _inputs("plain", 1, 2, 1, 4, 2, [(2, 3)], torch.float32)
    op = torch.ops.mask2former.ms_deform_attn_forward
    for arguments in (
        (value, [2, 4], points, scores),
        (value, [2], points, scores),
        (value, [2, 3], points[..., 0], scores),
        (value, [2, 3], points, scores[:, :1]),
        (value, [2, 3], points.double(), scores),
        (value, [-2, -3], points, scores),
    ):
        with pytest.raises(ValueError, match="must"):
            op(*arguments)
    with pytest.raises(ValueError, match="grad_output must be like the output"):
        torch.ops.mask2former.ms_deform_attn_backward(torch.ones(1, 2, 3), value, [2, 3], points, scores)


# ---- the pixel decoder


def _decoder() -> tuple[DeformablePixelDecoder, dict[str, Tensor]]:
    channels, strides = {"res2": 6, "res3": 8, "res4": 10, "res5": 12}, {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    decoder = DeformablePixelDecoder(
        in_channels=channels,
        in_strides=strides,
        conv_dim=32,
        mask_dim=20,
        num_layers=2,
        num_heads=4,
        dim_feedforward=40,
    )
    fill_weights(decoder)
    return decoder, {n: torch.randn(2, channels[n], 64 // s, 96 // s) for n, s in strides.items()}


def _gradients(decoder: Callable[..., Any], features: dict[str, Tensor]) -> list[Tensor]:
    leaves = {n: x.clone().requires_grad_() for n, x in features.items()}
    result = decoder(leaves)
    outputs = [result.mask_features, *result.levels]
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in outputs)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, list(leaves.values()))]


def test_pixel_decoder_equals_its_composition() -> None:
    decoder, features = _decoder()
    found = _gradients(decoder, features)
    with _extension.reference_only():
        expected = _gradients(decoder, features)
    assert not torch.equal(found[0], expected[0]), "both are the reference"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_pixel_decoder_compiles_in_one_graph(backend: str, kernel: bool) -> None:
    decoder, features = _decoder()
    torch._dynamo.reset()
    nodes: list[str] = []

    def record(module: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes.extend(str(node.target) for node in module.graph.nodes)
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    def run() -> None:
        compiled = torch.compile(decoder, fullgraph=True, backend=record)
        for a, b in zip(_gradients(compiled, features), _gradients(decoder, features), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())

    if kernel:
        run()
    else:
        with _extension.reference_only():
            run()
    # older PyTorch cannot tell compiling from exporting, and gets the reference for both
    expected = kernel and hasattr(torch.compiler, "is_exporting")
    assert any("ms_deform_attn_fused_forward" in node for node in nodes) == expected


def test_several_image_sizes_share_a_graph() -> None:
    decoder, features = _decoder()
    torch._dynamo.reset()
    compiled = torch.compile(decoder, fullgraph=True, backend="eager", dynamic=True)
    for scale in (1, 2, 3):
        larger = {n: torch.nn.functional.interpolate(x, scale_factor=scale) for n, x in features.items()}
        torch.testing.assert_close(compiled(larger).mask_features, decoder(larger).mask_features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_pixel_decoder_is_the_plain_composition(strict: bool) -> None:
    if strict and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("this PyTorch's strict export does not take torch.autocast")
    decoder, features = _decoder()
    program = torch.export.export(decoder, (features,), strict=strict)
    assert not any("mask2former" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(
        program.module()(features).mask_features, decoder(features).mask_features, rtol=1e-4, atol=1e-4
    )


def test_traced_op_is_the_plain_composition() -> None:
    shapes = [(3, 4)]
    inputs = _inputs("plain", 1, 2, 2, 4, 2, shapes, torch.float32)
    traced = torch.jit.trace(lambda v, p, s: ms_deform_attn(v, shapes, p, s), tuple(inputs))
    assert "mask2former::" not in str(traced.graph)
