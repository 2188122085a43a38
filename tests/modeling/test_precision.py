"""Numerical modes: what is float32 in each, and that PyTorch's settings are put back."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier, Event
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.pixel_decoders import deformable
from mask2former.modeling.pixel_decoders.deformable import MSDeformAttn
from mask2former.modeling.precision import float32_products, forward_mode
from mask2former.ops.ms_deform_attn import ms_deform_attn_fused_reference
from tests.tiny import random_image, random_target, tiny_model

BACKBONES = ("swin", "resnet")
HAS_NEWER_WORDS = hasattr(torch.backends.cuda.matmul, "fp32_precision")
HALF_STEP = 2**-8  # relative, of bfloat16


def settings() -> list[Any]:
    """All of PyTorch's settings for products of float32, in the older and, where there are, the newer words."""
    backends: Any = torch.backends
    found = [torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32]
    if HAS_NEWER_WORDS:
        gpu, cpu = backends.cudnn, backends.mkldnn
        libraries = (backends.cuda.matmul, gpu.conv, gpu.rnn, cpu.matmul, cpu.conv, cpu.rnn)
        found += [library.fp32_precision for library in libraries]
    return found


@contextmanager
def changed_settings() -> Iterator[None]:
    """Puts PyTorch's settings for products of matrices back."""
    backends: Any = torch.backends
    libraries = (backends.cuda.matmul, backends.mkldnn.matmul) if HAS_NEWER_WORDS else ()
    before = [library.fp32_precision for library in libraries]
    yield
    torch.set_float32_matmul_precision("highest")
    for library, precision in zip(libraries, before, strict=True):
        library.fp32_precision = precision


@pytest.fixture(autouse=True)
def _settings_stay() -> Iterator[None]:
    before = settings()
    yield
    assert settings() == before


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def batch(model: Mask2Former) -> Tensor:
    return model.batch_images([random_image(64, 96), random_image(50, 70)])


@torch.no_grad()
def final(model: Mask2Former, images: Tensor) -> tuple[Tensor, Tensor]:
    return model.predict(images)[-1]


# ---- float32


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("precision", ["strict", "tf32"])
def test_float32_modes_give_the_published_bits_on_a_cpu(backbone: str, precision: Any) -> None:
    model = tiny_model(backbone=backbone).eval()
    images = batch(model)
    expected = final(model, images)
    model.precision = precision
    torch.testing.assert_close(final(model, images), expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(final(model, images), expected, rtol=0, atol=0)


def test_strict_is_not_what_the_process_is_set_to() -> None:
    """With "medium", PyTorch computes products of float32 in bfloat16 on CPUs that can."""
    model = tiny_model().eval()
    images = batch(model)
    expected = final(model, images)
    model.precision = "strict"
    with changed_settings():
        torch.set_float32_matmul_precision("medium")
        torch.testing.assert_close(final(model, images), expected, rtol=0, atol=0)
        assert torch.get_float32_matmul_precision() == "medium"


def test_the_settings_of_each_mode() -> None:
    with float32_products("strict"):
        assert settings()[:3] == ["highest", False, False]
        assert set(settings()[3:]) <= {"ieee"}
    for precision in ("tf32", "fast"):
        with float32_products(precision):  # type: ignore[arg-type]
            assert settings()[:3] == ["high", True, True]
            assert set(settings()[3:]) <= {"tf32"}
    before = settings()
    with float32_products(None):
        assert settings() == before


@pytest.mark.skipif(not HAS_NEWER_WORDS, reason="PyTorch before 2.9 has the older settings only")
def test_settings_that_only_the_newer_words_can_say_are_put_back() -> None:
    matmul: Any = torch.backends.cuda.matmul
    other: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = other.fp32_precision
    with changed_settings():
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):
            torch.get_float32_matmul_precision()
        with float32_products("strict"):
            assert matmul.fp32_precision == "ieee"
            assert torch.get_float32_matmul_precision() == "highest"
        assert matmul.fp32_precision == "tf32"
        assert other.fp32_precision == before


def test_settings_and_autocast_are_put_back_after_an_error() -> None:
    before = settings()
    with pytest.raises(KeyError), forward_mode("fast", "cpu"):
        assert torch.is_autocast_enabled("cpu")
        raise KeyError
    assert not torch.is_autocast_enabled("cpu")
    assert settings() == before
    model = tiny_model().eval()
    model.precision = "tf32"
    with pytest.raises(RuntimeError, match="channels"):
        model.predict(torch.zeros(1, 5, 64, 64))
    assert settings() == before


def test_a_mode_inside_of_another_is_an_error_and_not_a_deadlock() -> None:
    with float32_products("strict"):
        with float32_products("strict"):
            pass
        assert torch.get_float32_matmul_precision() == "highest"
        with pytest.raises(RuntimeError, match="precision must be the same"), float32_products("fast"):
            pass
    with float32_products("tf32"), float32_products("fast"):
        pass


def test_threads_share_settings_that_are_equal_and_wait_for_others() -> None:
    together, strict_is_done = Barrier(2), Event()
    found: list[Any] = []

    def strict() -> None:
        with float32_products("strict"):
            together.wait(10)  # both are inside
            found.append(torch.get_float32_matmul_precision())
            together.wait(10)
        together.wait(10)

    def other() -> None:
        together_done.wait(10)
        with float32_products("tf32"):
            found.append((strict_is_done.is_set(), torch.get_float32_matmul_precision()))

    together_done = Event()
    with ThreadPoolExecutor(3) as pool:
        waiting = pool.submit(other)
        with float32_products("strict"):
            together_done.set()  # the other thread has to wait until we are done
            partner = pool.submit(strict)
            together.wait(10)
            together.wait(10)
            strict_is_done.set()
        together.wait(10)
        partner.result()
        waiting.result()
    assert found == ["highest", (True, "high")]


# ---- fast


def recorded(model: nn.Module, run: Callable[[], Any]) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Every normalisation with its input and output, before anything works on it in place."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    kinds = (nn.LayerNorm, nn.GroupNorm)
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs[0], output.clone())))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


def test_fast_computes_the_pixel_decoder_in_bfloat16_and_gives_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().eval()
    images = batch(model)
    plain = final(model, images)
    model.precision = "fast"
    seen: list[tuple[torch.dtype, ...]] = []
    fused = deformable.ms_deform_attn_fused

    def noting(value: Tensor, shapes: Any, offsets: Tensor, logits: Tensor) -> Tensor:
        seen.append((value.dtype, offsets.dtype))
        result = fused(value, shapes, offsets, logits)
        expected = ms_deform_attn_fused_reference(value.double(), shapes, offsets.double(), logits.double())
        torch.testing.assert_close(result.double(), expected, rtol=HALF_STEP, atol=1e-3)  # softmax is float32
        return result

    monkeypatch.setattr(deformable, "ms_deform_attn_fused", noting)
    found = final(model, images)
    assert seen == [(torch.bfloat16, torch.float32)]
    assert {logits.dtype for logits in found} == {torch.float32}
    assert {logits.dtype for p in model.predict_with_queries(images)[:1] for logits in p} == {torch.float32}
    assert model.predict_with_queries(images)[1].dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for logits, others in zip(found, plain, strict=True):
        assert not torch.equal(logits, others)
        assert (logits - others).abs().max() < 0.03 * others.abs().max()
    pixels = model.sem_seg_head.pixel_features(model.backbone(images))
    assert {x.dtype for x in (pixels.mask_features, *pixels.levels)} == {torch.bfloat16}


def test_fast_is_the_same_inside_of_the_callers_autocast() -> None:
    model = tiny_model().eval()
    model.precision = "fast"
    images = batch(model)
    expected = final(model, images)
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(final(model, images), expected, rtol=0, atol=0)


def test_sampling_coordinates_have_more_than_the_digits_of_bfloat16() -> None:
    """An offset of 9.03 pixels on a steep ramp whose values, and results, bfloat16 can tell apart."""
    attention = MSDeformAttn(dim=4, num_levels=1, num_heads=1, num_points=1)
    with torch.no_grad():
        for projection in (attention.value_proj, attention.output_proj):
            projection.weight.copy_(torch.eye(4))
        attention.sampling_offsets.bias.copy_(torch.tensor([9.03, 0.0]))
    ramp = 64.0 * (torch.arange(16.0) - 12)
    value = ramp[:, None].expand(16, 4)[None].to(torch.bfloat16)  # (B, S, C)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sampled = attention(value, torch.zeros(16, 4), [(1, 16)])
    assert sampled.dtype == torch.bfloat16
    assert sampled[0, 3, 0].item() == pytest.approx(64 * 0.03, abs=0.02)  # column 3 reads at 12.03; bfloat16: at 12


@pytest.mark.parametrize("backbone", BACKBONES)
def test_statistics_of_normalisations_are_float32(backbone: str) -> None:
    """Tokens of mean 300 and deviation about 3: bfloat16 has 300 and 302, which moves a result by a deviation."""
    model = tiny_model(backbone=backbone).eval()
    model.precision = "fast"
    encoder = model.sem_seg_head.pixel_decoder.transformer.encoder
    with torch.no_grad():
        for layer in encoder.layers:
            layer.self_attn.output_proj.bias += 300
            layer.linear2.bias += 300
    calls = recorded(model, lambda: final(model, batch(model)))
    halves = 0
    for module, x, output in calls:
        weight, bias = module.weight.double(), module.bias.double()  # type: ignore[union-attr,operator]
        if isinstance(module, nn.LayerNorm):
            expected = F.layer_norm(x.double(), module.normalized_shape, weight, bias, module.eps)  # type: ignore[arg-type]
        else:
            expected = F.group_norm(x.double(), 32, weight, bias)  # type: ignore[arg-type]
        torch.testing.assert_close(output.double(), expected, rtol=HALF_STEP, atol=2e-3)
        halves += x.dtype == output.dtype == torch.bfloat16
    assert halves >= 7  # two of the encoder layer, five of the convolutions


@pytest.mark.parametrize("backbone", BACKBONES)
def test_fast_losses_and_gradients_are_float32_and_complete(backbone: str) -> None:
    model = tiny_model(backbone=backbone)
    images, targets = [random_image(64, 96)] * 2, [random_target(3, 64, 96), random_target(1, 64, 96)]
    losses: dict[str, dict[str, Tensor]] = {}
    for precision in (None, "fast"):
        model.precision = precision  # type: ignore[assignment]
        losses[str(precision)] = model.losses(images, targets, torch.Generator().manual_seed(0))
    assert {loss.dtype for loss in losses["fast"].values()} == {torch.float32}
    for name, loss in losses["fast"].items():
        assert loss.item() == pytest.approx(losses["None"][name].item(), rel=0.05), name
    assert losses["fast"]["loss_ce"] != losses["None"]["loss_ce"]
    torch.stack(list(losses["fast"].values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_other_words_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="precision must be one of strict, tf32, fast or None, got 'half'"):
        model.precision = "half"  # type: ignore[assignment]
    assert model.precision is None


def test_the_published_mode_comes_back() -> None:
    model = tiny_model().eval()
    images = batch(model)
    expected = final(model, images)
    model.precision = "fast"
    final(model, images)
    model.precision = None
    torch.testing.assert_close(final(model, images), expected, rtol=0, atol=0)
