"""Counts of operators and modules: closed forms, PyTorch's own counter, and the published program as fvcore saw it."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from statistics import mean, pstdev
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mask2former.analysis.images import AnalysedImage
from mask2former.analysis.operations import OperationCounter, count_operations
from mask2former.analysis.tasks import analyse_operations, shape_model
from mask2former.build import build_model
from mask2former.engine.config import get_config
from mask2former.modeling.layers import Attention, FrozenBatchNorm2d
from mask2former.modeling.pixel_decoders.deformable import MSDeformAttn
from mask2former.ops._extension import extension, reference_only
from mask2former.ops.deform_conv import deform_conv2d, deform_conv2d_reference
from tests import tiny
from tests.configs import CONFIGS

R50 = CONFIGS / "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: object) -> Tensor:
        return self.function(*arguments)


def counted(module: nn.Module, *inputs: object, device: str = "meta") -> tuple[dict[str, int], int]:
    """FLOPs by kind and activations; inputs that are tuples are shapes."""
    tensors = [torch.zeros(i, device=device) if isinstance(i, tuple) else i for i in inputs]
    copy = deepcopy(module).to(device).eval()
    with torch.no_grad(), OperationCounter(copy) as counter:
        copy(*tensors)
    return {kind: number for kind, number in counter.flops[""].items() if number}, counter.activations[""]


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(
    ("module", "inputs", "flops", "activations"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), [(2, 6, 10, 12)], {"convolution": 480 * 27}, 480),
        (nn.ConvTranspose2d(6, 8, 2, stride=2), [(2, 6, 5, 7)], {"convolution": 70 * 6 * 8 * 4}, 8 * 280),
        (nn.Linear(5, 7), [(2, 3, 5)], {"matrix product": 6 * 5 * 7}, 42),
        (nn.Linear(5, 7, bias=False), [(2, 3, 5)], {"matrix product": 6 * 5 * 7}, 42),
        (Function(torch.matmul), [(2, 3, 5), (2, 5, 4)], {"matrix product": 2 * 3 * 5 * 4}, 24),
        (Function(torch.matmul), [(3, 5), (5,)], {"matrix product": 15}, 3),
        (Function(torch.baddbmm), [(2, 3, 4), (2, 3, 5), (2, 5, 4)], {"matrix product": 2 * 3 * 5 * 4}, 24),
        (
            Function(lambda q, m: torch.einsum("bqc,bchw->bqhw", q, m)),
            [(2, 3, 5), (2, 5, 4, 6)],
            {"matrix product": 2 * 3 * 5 * 24},
            2 * 3 * 24,
        ),
        # two heads of 4 channels, 3 queries, 5 keys: three projections in, one out; scores and sums
        (
            Attention(dim=8, num_heads=2),
            [(1, 3, 8), (1, 5, 8), (1, 5, 8)],
            {"matrix product": (3 + 5 + 5 + 3) * 64 + 2 * 3 * 5 * 8},
            (3 + 5 + 5 + 3) * 8 + 2 * 15 + 24,
        ),
        (nn.LayerNorm(5), [(2, 3, 5)], {"normalisation": 150}, 0),
        (nn.LayerNorm(5, elementwise_affine=False), [(2, 3, 5)], {"normalisation": 120}, 0),
        (nn.GroupNorm(2, 4), [(2, 4, 3, 5)], {"normalisation": 600}, 0),
        (nn.BatchNorm2d(4), [(2, 4, 3, 5)], {"normalisation": 240}, 0),
        (nn.BatchNorm2d(4, affine=False), [(2, 4, 3, 5)], {"normalisation": 120}, 0),
        (FrozenBatchNorm2d(4), [(2, 4, 3, 5)], {"normalisation": 240}, 0),
        (
            Function(partial(F.grid_sample, align_corners=False)),
            [(2, 3, 5, 7), (2, 4, 6, 2)],
            {"resampling": 4 * 2 * 3 * 24},
            0,
        ),
        (nn.Upsample(size=(8, 9), mode="bilinear"), [(1, 3, 4, 4)], {"resampling": 4 * 3 * 72}, 0),
        (nn.Upsample(size=(8, 9)), [(1, 3, 4, 4)], {"resampling": 3 * 72}, 0),
        (nn.AdaptiveAvgPool2d(2), [(1, 3, 8, 8)], {"resampling": 192}, 0),
        (nn.Sequential(nn.ReLU(), nn.Dropout(), nn.Softmax(-1)), [(2, 3)], {}, 0),
    ],
)
def test_closed_forms(
    module: nn.Module, inputs: list[tuple[int, ...]], flops: dict[str, int], activations: int, device: str
) -> None:
    assert counted(module, *inputs, device=device) == (flops, activations)


def deformable_attention() -> tuple[nn.Module, list[object], dict[str, int]]:
    """Of two levels, 20 + 6 cells, 8 channels in 2 heads, 3 points: four numbers are mixed, and the result weighted."""
    module = MSDeformAttn(dim=8, num_levels=2, num_heads=2, num_points=3)
    S, samples = 26, 2 * 2 * 3
    projections = 2 * S * 8 * (2 * samples + samples + 8 + 8)
    sampled_numbers = 2 * S * 2 * 3 * 8
    inputs: list[object] = [(2, S, 8), (2, S, 8), [(4, 5), (2, 3)]]
    return module, inputs, {"matrix product": projections, "deformable attention": 5 * sampled_numbers}


def test_deformable_attention_on_the_meta_device() -> None:
    module, inputs, expected = deformable_attention()
    assert counted(module, *inputs)[0] == expected


@pytest.mark.skipif(extension.module is None, reason="the kernels are not compiled here")
def test_deformable_attention_with_the_kernel_costs_what_it_costs_without() -> None:
    module, inputs, expected = deformable_attention()
    assert counted(module, *inputs, device="cpu")[0] == expected
    with reference_only():
        assert counted(module, *inputs, device="cpu")[0] == expected


def test_deformable_convolution() -> None:
    shapes = [(2, 6, 5, 7), (2, 18, 5, 7), (8, 6, 3, 3), (8,)]
    products, samples = 2 * 8 * 35 * 54, 2 * 35 * 54
    of_reference = counted(Function(deform_conv2d_reference), *shapes)[0]
    assert of_reference == {"matrix product": products, "resampling": 4 * samples}
    if find_spec("torchvision") is not None:
        total = {"convolution": products + 4 * samples}
        assert counted(Function(deform_conv2d), *shapes) == (total, 2 * 8 * 35)


def test_a_module_has_what_its_children_have_each_time_they_run() -> None:
    shared = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(shared, nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)), shared)
    with torch.no_grad(), OperationCounter(model) as counter:
        model(torch.zeros(3, 4))
    flops = {name: by_kind.total() for name, by_kind in counter.flops.items()}
    assert flops == {"": 3 * 48, "0": 96, "1": 48, "1.0": 24, "1.1": 24}
    assert counter.activations == {"": 12 + 6 + 12 + 12, "0": 24, "1": 18, "1.0": 6, "1.1": 12}


def test_nothing_is_left_on_the_model_not_even_after_an_error() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(RuntimeError), OperationCounter(model):
        model(torch.zeros(3, 5))
    with torch.no_grad(), OperationCounter(model) as counter:
        model(torch.zeros(3, 4))
    model(torch.zeros(3, 4))
    assert counter.flops[""].total() == 48


@pytest.mark.parametrize(("backbone", "all_layers"), [("swin", False), ("resnet", True)])
def test_products_of_a_model_are_those_of_pytorchs_counter(backbone: str, all_layers: bool) -> None:
    with torch.device("meta"):
        model = build_model(tiny.architecture(backbone=backbone)).eval()
    model.requires_grad_(False)  # PyTorch's counter wants gradients of what has any
    ours = count_operations(model, (64, 96), all_layers=all_layers).flops[""]
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        model(torch.empty(1, 3, 64, 96, device="meta"), all_layers)
    assert 2 * (ours["convolution"] + ours["matrix product"]) == theirs.get_total_flops()


def test_shapes_alone_cost_what_numbers_cost() -> None:
    model = build_model(tiny.architecture()).eval()
    real = count_operations(model, (64, 96))
    shapes = count_operations(model.to("meta"), (64, 96))
    assert real.flops == shapes.flops
    assert real.activations == shapes.activations


class OneConvolution(nn.Module):
    """Looks like a `Mask2Former` from outside."""

    size_divisibility = 32

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 2, 1)

    def forward(self, batch: Tensor, all_layers: bool) -> Tensor:
        return F.interpolate(self.backbone(batch), scale_factor=2)


def test_the_mean_is_that_over_the_padded_images() -> None:
    images = [AnalysedImage(size, size) for size in ((20, 30), (33, 96), (64, 96))]  # the last two are padded alike
    found: Any = analyse_operations(OneConvolution(), images, all_layers=False)  # type: ignore[arg-type]
    pixels = [32 * 32, 64 * 96, 64 * 96]
    assert found["flop"]["parts"] == {"backbone": 6 * mean(pixels), "other": 8 * mean(pixels)}
    assert found["flop"]["kinds"] == {"convolution": 6 * mean(pixels), "resampling": 8 * mean(pixels)}
    assert found["flop"]["mean"] == 14 * mean(pixels)
    assert found["flop"]["standard_deviation"] == pytest.approx(14 * pstdev(pixels))
    assert found["activation"]["mean"] == 2 * mean(pixels)
    assert found["activation"]["standard_deviation"] == pytest.approx(2 * pstdev(pixels))
    assert found["activation"]["parts"] == {"backbone": 2 * mean(pixels)}


def test_r50_has_the_flops_that_fvcore_gives_the_published_program() -> None:
    """79.7, 136.5 and 26.5 G, 242.8 in all: without weighting and, in the decoder, some of the attention's products."""
    counter = count_operations(shape_model(get_config(R50)), (800, 1216), all_layers=True)
    total = {name: by_kind.total() / 1e9 for name, by_kind in counter.flops.items()}
    assert total["backbone"] == pytest.approx(79.7, rel=0.001)
    assert total["sem_seg_head.pixel_decoder"] == pytest.approx(136.5, rel=0.005)
    assert total[""] == pytest.approx(242.8, rel=0.02)
