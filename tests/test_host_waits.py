"""How often the host waits for a GPU, counted on a pretended one: in a training step and after inference."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.host_waits import PretendedGPU
from mask2former import solver, training
from mask2former.inference import predict_image
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.postprocessing import (
    MaskGeometry,
    compact_instance_segmentation,
    instance_segmentation,
    panoptic_segmentation,
    semantic_labels,
)
from mask2former.modeling.structures import MaskPrediction, MaskTarget, PackedTarget
from mask2former.ops import _extension
from tests.tiny import fresh_model, lively_model, picture, random_image, random_target

IS_THING = torch.tensor([True, False, True, False])
MATCHING = {"copy to the host": 1}  # the costs of all layers and images


@pytest.fixture(autouse=True)
def _no_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extension with CUDA kernels would ask the driver what the pretended GPU is."""
    monkeypatch.setattr(_extension, "extension", dataclasses.replace(_extension.extension, archs=()))


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda x: x.sum().item(), {"_local_scalar_dense": 1}),
        (lambda x: bool(x.sum() > 0), {"_local_scalar_dense": 1}),
        (lambda x: float(x.sum()), {"_local_scalar_dense": 1}),
        (lambda x: x.tolist(), {"copy to the host": 1}),
        (lambda x: x.cpu().numpy(), {"copy to the host": 1}),
        (lambda x: torch.zeros(4).copy_(x), {"copy to the host": 1}),
        (lambda x: torch.tensor([1.0], device=x.device), {"copy to the GPU": 1}),
        (lambda x: torch.ones(4).to(x.device), {"copy to the GPU": 1}),
        (lambda x: x[torch.tensor([0, 1])], {"copy to the GPU": 1}),
        (lambda x: x.nonzero(), {"nonzero": 1}),
        (lambda x: x[x > 0.5], {"index by a mask": 1}),
        (lambda x: x.masked_select(x > 0.5), {"masked_select": 1}),
        (lambda x: x.unique(), {"_unique2": 1}),
        (lambda x: x.long().bincount(), {"bincount": 1}),
        (lambda x: torch.equal(x, x), {"equal": 1}),
        (lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=x.device)), {"repeat_interleave": 1}),
        (lambda x: torch.ones(4).pin_memory().to(x.device, non_blocking=True), {}),
        (lambda x: x.repeat_interleave(2), {}),
        (lambda x: torch.where(x > 0.5, x, 0).topk(2).values[x.argsort()[:1].clamp(max=1)], {}),
        (lambda x: x.new_zeros(4).index_add_(0, torch.arange(4, device=x.device), x) * 2 + 1, {}),
    ],
)
@pytest.mark.parametrize("is_inference", [False, True])
def test_what_makes_the_host_wait_is_counted(
    call: Callable[[Tensor], Any], waits: dict[str, int], is_inference: bool
) -> None:
    with PretendedGPU() as gpu, torch.inference_mode(is_inference):
        x = torch.rand(4, device="cuda")
        call(x)
    assert gpu.waits == waits


def test_tensors_of_two_devices_do_not_mix() -> None:
    with PretendedGPU(), pytest.raises(RuntimeError, match="must be on one device"):
        torch.rand(4, device="cuda") + torch.rand(4)


def batch(count: int) -> tuple[list[Tensor], list[MaskTarget | PackedTarget]]:
    """Images of two sizes, and targets of both kinds, the last one empty."""
    images = [random_image(64, 96 - 32 * (i % 2)) for i in range(count)]
    objects = torch.tensor([[0, 0, 1], [3, 0, 2]])
    packed = PackedTarget(objects, torch.randint(0, 3, (1, 64, 64), dtype=torch.uint8))
    return images, [random_target(3, 64, 96), packed, *(random_target(0, 64, 64) for _ in range(count - 2))]


def on_gpu(images: Sequence[Tensor]) -> list[Tensor]:
    """As the loader's pinned images come there: the host does not wait."""
    return [image.pin_memory().to("cuda", non_blocking=True) for image in images]


def test_a_training_step_waits_once() -> None:
    model, (images, targets) = fresh_model(), batch(3)
    settings = {"weight_decay": 0.05, "weight_decay_norm": 0.0, "weight_decay_embed": 0.0, "backbone_multiplier": 0.1}
    with PretendedGPU() as gpu:
        model.to("cuda")
        optimizer = solver.make_optimizer(model, optimizer="ADAMW", base_lr=1e-4, momentum=0.9, **settings)
        before = model.sem_seg_head.predictor.class_embed.bias.tolist()
        for _ in range(2):  # the first step makes the optimizer's state
            gpu.clear()
            optimizer.zero_grad()
            training.sum_of(model.losses(on_gpu(images), targets)).backward()
            solver.clip_gradients(model.parameters(), type="full_model", value=0.01, norm_type=2.0)
            optimizer.step()
            assert gpu.waits == MATCHING
        assert model.sem_seg_head.predictor.class_embed.bias.tolist() != before


def predicted(model: Mask2Former) -> tuple[MaskPrediction, MaskGeometry]:
    image = torch.from_numpy(picture(60, 90).transpose(2, 0, 1).copy())
    return predict_image(model, image, (120, 180))


def panoptic(prediction: MaskPrediction, geometry: MaskGeometry) -> list[Any]:
    result = panoptic_segmentation(
        *prediction, geometry, is_thing=IS_THING, object_mask_threshold=0.3, overlap_threshold=0.15
    )
    assert len(result.segments) > 2
    classes, scores = zip(*((s.category_id, s.score) for s in result.segments), strict=True)
    return [result.ids, result.queries, list(classes), list(scores)]


def instances(prediction: MaskPrediction, geometry: MaskGeometry) -> list[Any]:
    result = instance_segmentation(
        *prediction, geometry, top_k=20, is_thing=IS_THING, score_threshold=0.05, matrix_nms_sigma=2.0
    )
    assert len(result.scores) > 2
    return list(vars(result).values())


def compact(prediction: MaskPrediction, geometry: MaskGeometry) -> list[Any]:
    result = compact_instance_segmentation(*prediction, geometry, top_k=20, is_thing=IS_THING)
    return [result.labels, result.scores, result.boxes, result.areas, result.mask(0)]


def semantic(prediction: MaskPrediction, geometry: MaskGeometry) -> list[Any]:
    return [semantic_labels(*prediction, geometry)]


@pytest.mark.parametrize(
    ("task", "waits"),
    [
        # which queries are kept; then their scores, classes and areas, from which the segments are built
        (panoptic, {"nonzero": 1, "copy to the host": 1}),
        # which pairs of query and class are things and reach the threshold; which queries these are; which pairs still
        # reach it with their final scores
        (instances, {"nonzero": 2, "index by a mask": 1}),
        (compact, {"nonzero": 2, "index by a mask": 1}),
        (semantic, {}),
    ],
)
def test_an_image_waits_a_few_times(
    task: Callable[[MaskPrediction, MaskGeometry], list[Any]], waits: dict[str, int]
) -> None:
    model = lively_model().eval()
    with torch.inference_mode():
        expected = task(*predicted(model))
    with PretendedGPU() as gpu, torch.inference_mode():
        model.to("cuda")
        prediction, geometry = predicted(model)
        gpu.clear()
        found = task(prediction, geometry)
        assert gpu.waits == waits
        found = [x.cpu() if isinstance(x, Tensor) else x for x in found]
    assert_almost(found, expected)


def assert_almost(found: list[Any], expected: list[Any]) -> None:
    """Equal but for rounding, which decides few pixels."""
    for a, b in zip(found, expected, strict=True):
        if isinstance(a, list):
            assert a == pytest.approx(b, abs=1e-3) if isinstance(a[0], float) else a == b
        elif a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        else:
            assert (a != b).float().mean() < 0.01
