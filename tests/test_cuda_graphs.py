"""CUDA graphs: which there are, what they give, and that the forward pass can be captured."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.host_waits import PretendedGPU
from mask2former.build import build_model
from mask2former.cuda_graphs import CudaCapture, Forward, GraphedModel
from mask2former.modeling.mask2former import Mask2Former
from mask2former.predictor import Predictor
from tests.tiny import (
    architecture,
    assert_same_pictures,
    categories,
    lively_model,
    lively_predictor,
    picture,
    random_image,
    tiny_model,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


class Recorder:
    """Stands in for the capture: like a graph it has one buffer for the batch; notes what was captured."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, forward: Forward, example: Tensor) -> Forward:
        self.shapes.append(tuple(example.shape))
        buffer = torch.empty_like(example)

        def replay(batch: Tensor) -> Sequence[Tensor]:
            assert batch.shape == buffer.shape
            buffer.copy_(batch)
            return forward(buffer)

        return replay


def graphed(capacity: int = 4, model: Mask2Former | None = None) -> tuple[GraphedModel, Recorder]:
    recorder = Recorder()
    model = tiny_model().eval() if model is None else model.eval()
    return GraphedModel(model, capacity, capture=recorder), recorder


def batch_of(height: int, width: int, count: int = 1) -> Tensor:
    return torch.randn(count, 3, height, width)


def assert_equal_predictions(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@torch.no_grad()
def test_the_methods_are_those_of_the_model() -> None:
    model, recorder = graphed()
    for batch in (batch_of(32, 64), batch_of(32, 64), batch_of(64, 32, count=2)):
        for all_layers in (None, True):
            found = model.predict(batch, all_layers)
            expected = model.model.predict(batch, all_layers)
            assert len(found) == len(expected) == (4 if all_layers else 1)
            for a, b in zip(found, expected, strict=True):
                assert_equal_predictions(a, b)
        prediction, queries = model.predict_with_queries(batch)
        expected_prediction, expected_queries = model.model.predict_with_queries(batch)
        assert_equal_predictions([*prediction, queries], [*expected_prediction, expected_queries])
    assert recorder.shapes == [(1, 3, 32, 64)] * 3 + [(2, 3, 64, 32)] * 3


def test_images_that_are_padded_to_one_size_share_a_graph() -> None:
    model, recorder = graphed()
    for height, width in ((50, 70), (64, 96), (33, 65), (65, 96)):
        model.predict(model.batch_images([random_image(height, width)]))
    assert recorder.shapes == [(1, 3, 64, 96), (1, 3, 96, 96)]


def test_the_graph_that_was_not_used_for_the_longest_time_goes() -> None:
    model, recorder = graphed(capacity=2)
    a, b, c = (batch_of(32, 32 * width) for width in (1, 2, 3))
    for batch in (a, b, a, c):  # b goes
        model.predict(batch)
    assert recorder.shapes == [a.shape, b.shape, c.shape]
    model.predict(a)
    model.predict(c)
    assert len(recorder.shapes) == 3
    model.predict(b)  # a goes
    model.predict(c)
    assert recorder.shapes[3:] == [b.shape]
    model.predict(a)
    assert recorder.shapes[3:] == [b.shape, a.shape]


def test_room_is_made_before_a_capture() -> None:
    left: list[int] = []

    def capture(forward: Forward, example: Tensor) -> Forward:
        left.append(len(model._graphs))
        return forward

    model = GraphedModel(tiny_model().eval(), 1, capture=capture)
    for width in (32, 64, 96):
        model.predict(batch_of(32, width))
    assert left == [0, 0, 0]


def test_a_capture_that_fails_leaves_no_graph() -> None:
    def capture(forward: Forward, example: Tensor) -> Forward:
        raise torch.OutOfMemoryError("no")

    model = GraphedModel(tiny_model().eval(), 1, capture=capture)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            model.predict(batch_of(32, 32))
    assert not model._graphs


def test_each_mode_has_graphs_of_its_own() -> None:
    model, recorder = graphed(capacity=10)
    batch = batch_of(32, 32)

    def is_new() -> bool:
        before = len(recorder.shapes)
        model.predict(batch)
        first = len(recorder.shapes) > before
        model.predict(batch)
        assert len(recorder.shapes) == before + first
        return first

    assert is_new()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert is_new()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert is_new()
    finally:
        torch.set_float32_matmul_precision(before)
    for precision in ("strict", "fast"):
        model.model.precision = precision  # type: ignore[assignment]
        assert is_new()
    model.model.sem_seg_head.predictor.num_test_layers = 1
    assert is_new()
    model.model.sem_seg_head.predictor.num_test_layers = None
    torch.set_float32_matmul_precision("high")  # which "fast" does not read
    try:
        assert not is_new()
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_graph_reads_weights_that_autocast_has_converted_for_a_while() -> None:
    model, _ = graphed()
    caches: list[bool] = []
    model.model.backbone.register_forward_pre_hook(lambda *_: caches.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.predict(batch_of(32, 32))[-1].mask_logits
    assert logits.dtype == torch.bfloat16
    assert caches == [False]


def test_gradients_are_off_and_training_is_refused() -> None:
    model, _ = graphed()
    assert not model.predict(batch_of(32, 32))[-1].mask_logits.requires_grad
    model.model.train()
    with pytest.raises(RuntimeError, match="must be in evaluation mode"):
        model.predict(batch_of(32, 32))


def test_threads_get_their_own_results() -> None:
    model, recorder = graphed()
    batches = [batch_of(32, 32) for _ in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda batch: model.predict(batch)[-1], batches))
    assert len(recorder.shapes) == 1
    for batch, prediction in zip(batches, found, strict=True):
        with torch.no_grad():
            assert_equal_predictions(prediction, model.model.predict(batch)[-1])


def test_a_predictor_gives_the_same_results_with_graphs() -> None:
    plain, predictor = lively_predictor(), lively_predictor()
    predictor._forward, recorder = graphed(model=predictor.model)
    images = [picture(50, 70), picture(50, 70, seed=1), picture(60, 60)]
    for task in ("panoptic", "instance"):
        assert_same_pictures(predictor(images[0], task), plain(images[0], task))  # type: ignore[arg-type]
    for a, b in zip(predictor.batch(images, "semantic"), plain.batch(images, "semantic"), strict=True):
        assert_same_pictures(a, b)
    assert_same_pictures(predictor.with_queries(images[0])[0], plain.with_queries(images[0])[0])
    assert [shape[0] for shape in recorder.shapes] == [1, 2, 1, 1]  # one; two alike; the square; with queries


@pytest.mark.parametrize(("number", "device"), [(1, "cpu"), (-1, "cpu")])
def test_graphs_need_a_cuda_device(number: int, device: str) -> None:
    rule = rf"cuda_graphs must be at least 0, and 0 on a device that is no CUDA device, got {number} on {device}"
    with pytest.raises(ValueError, match=rule):
        Predictor(tiny_model(), categories=categories(), device=device, cuda_graphs=number)
    with pytest.raises(ValueError, match="model must be on a CUDA device, got one on cpu"):
        GraphedModel(tiny_model(), 1)
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        GraphedModel(tiny_model(), 0, capture=Recorder())


# ---- the capture itself


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        ("swin", {}),
        ("resnet", {}),
        ("swin", {"pixel_decoder": {"name": "fpn"}}),
        ("swin", {"pixel_decoder": {"name": "fapn"}}),
        ("swin", {"pixel_decoder": {"name": "bifpn"}}),
        ("swin", {"pixel_decoder": {"name": "semantic_fpn"}}),
        ("swin", {"transformer_decoder": {"cross_attention": "smca", "feature_scales": "all"}}),
        ("swin", {"transformer_decoder": {"cross_attention": "mask_pooling"}}),
        ("swin", {"transformer_decoder": {"learnable_queries": False}}),
        ("swin", {"backbone": {"ape": True}}),
    ],
)
def test_a_forward_pass_neither_waits_nor_copies_from_the_host(backbone: str, changes: dict[str, Any]) -> None:
    parts = architecture(backbone=backbone)
    for part, values in changes.items():
        parts[part] = {"conv_dim": 64, "mask_dim": 24} | values if part == "pixel_decoder" else parts[part] | values
    model = build_model(parts).eval()
    with PretendedGPU() as gpu, torch.inference_mode():
        model.to("cuda")
        batch = model.batch_images([random_image(64, 96)])
        gpu.clear()
        assert model.predict(batch)[-1].mask_logits.is_cuda
        model.predict_with_queries(batch)
    assert not gpu.copies
    assert not gpu.waits


def test_a_capture_warms_up_on_a_side_stream_and_copies_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA, whose graph runs the forward pass again; what a real one does is tested below."""
    events: list[str] = []
    outputs = [torch.zeros(2)]

    class Stream(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            return lambda *_: events.append(f"{self.name}.{name}")

    class Graph:
        def replay(self) -> None:
            events.append("replay")
            outputs[0] += 1

    @contextmanager
    def graph(graph: Graph, *, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        events.append(f"begin on {stream.name} in {pool}")
        yield
        events.append("end")

    def forward(batch: Tensor) -> Sequence[Tensor]:
        events.append("forward")
        return outputs

    for name, value in {
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda device: Stream(name="side"),
        "Event": lambda: Stream(name="event"),
        "current_stream": lambda *_: Stream(name="current"),
        "stream": lambda stream: nullcontext(events.append(f"on {stream.name}")),
        "device": lambda device: nullcontext(),
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    replay = CudaCapture(torch.device("cpu"))(forward, torch.ones(3))
    warm_up = ["side.wait_stream", "on side", *["forward"] * 3, "current.wait_stream"]
    assert events == [*warm_up, "begin on side in pool", "forward", "end"]
    events.clear()
    first, second = replay(torch.ones(3))[0], replay(torch.ones(3))[0]
    assert events == ["current.wait_event", "replay", "event.record"] * 2
    assert (first.tolist(), second.tolist()) == ([1, 1], [2, 2])


@needs_cuda
@pytest.mark.parametrize("precision", [None, "strict", "tf32", "fast"])
@torch.no_grad()
def test_graphs_on_a_gpu_give_what_the_model_gives(precision: Any) -> None:
    model = lively_model().eval().cuda()
    model.precision = precision
    found = GraphedModel(model, 2)
    tolerance = 0.05 if precision == "fast" else 1e-3  # of other kernels than those chosen for the first pass
    batches = [batch_of(32, 32 * width, count).cuda() for width, count in ((2, 1), (3, 1), (2, 2), (2, 1), (2, 1))]
    results = [found.predict(batch)[-1] for batch in batches]  # with three shapes, so that one is captured again
    for batch, prediction in zip(batches, results, strict=True):
        expected = model.predict(batch)[-1]
        for a, b in zip(prediction, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert len({prediction.mask_logits.data_ptr() for prediction in results}) == len(results)
    model.sem_seg_head.predictor.class_embed.bias += 1  # in place
    changed = found.predict(batches[-1])[-1].class_logits
    torch.testing.assert_close(changed, results[-1].class_logits + 1, rtol=tolerance, atol=tolerance)


@needs_cuda
def test_a_predictor_on_a_gpu_uses_graphs() -> None:
    plain, predictor = lively_predictor(device="cuda"), lively_predictor(device="cuda", cuda_graphs=2)
    for seed in range(3):
        found, expected = (p(picture(50, 70, seed), "semantic") for p in (predictor, plain))
        assert (found.labels != expected.labels).mean() < 0.01  # type: ignore[union-attr]
    assert isinstance(predictor._forward, GraphedModel)
    assert len(predictor._forward._graphs) == 1
