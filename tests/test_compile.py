"""PyTorch's compiler: the inference path is one graph, for images of all sizes, with the numbers of eager mode."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mask2former import training
from mask2former.build import build_model
from mask2former.modeling.mask2former import Mask2Former
from mask2former.ops import _extension
from mask2former.predictor import Predictor
from tests.golden import fill_weights
from tests.tiny import (
    architecture,
    assert_same_pictures,
    categories,
    lively_model,
    picture,
    random_image,
    random_target,
)

# There is another graph for squares, if the first picture is one; where Swin's windows fit exactly or are one row;
# and for so few pixels that PyTorch computes a convolution in another way. These two are alike in all of that.
SIZES = ((64, 128), (96, 160))


class Counter:
    """A compiler that runs graphs as they are, and notes their operators."""

    def __init__(self) -> None:
        self.graphs: list[set[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def small(backbone: str) -> Mask2Former:
    """As few layers as there can be: tracing them takes most of the time."""
    parts = architecture(backbone=backbone)
    parts["transformer_decoder"]["num_layers"] = 1
    if backbone == "swin":
        parts["backbone"] |= {"depths": [2, 1, 1], "num_heads": [1, 2, 2], "out_features": ["res2", "res3", "res4"]}
        parts["pixel_decoder"]["transformer_in_features"] = ["res3", "res4"]
    model = build_model(parts)
    fill_weights(model)
    return model.eval()


@pytest.mark.parametrize("backbone", ["resnet", pytest.param("swin", marks=pytest.mark.slow)])
@torch.no_grad()
def test_the_inference_path_is_one_graph_for_all_sizes(backbone: str) -> None:
    model, counter = small(backbone), Counter()
    compiled = torch.compile(model.predict, fullgraph=True, dynamic=True, backend=counter)
    for height, width in SIZES:
        batch = torch.randn(1, 3, height, width)
        for logits, expected in zip(compiled(batch)[-1], model.predict(batch)[-1], strict=True):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # of other operators, ops/fused.py
    assert len(counter.graphs) == 1
    if _extension.extension.module is not None:
        assert any("ms_deform_attn_fused_forward" in name for name in counter.graphs[0])


@pytest.mark.slow
def test_a_compiled_predictor_has_two_graphs_and_the_same_results_in_every_mode() -> None:
    """Modes and their settings are entered outside of the graphs, so that these have no breaks."""
    counter = Counter()
    for precision in (None, "fast"):
        plain = Predictor(lively_model(), categories=categories(), shortest=64, longest=400, precision=precision)  # type: ignore[arg-type]
        model = lively_model()
        predictor = Predictor(model, categories=categories(), shortest=64, longest=400, precision=precision)  # type: ignore[arg-type]
        model.compile(fullgraph=True, dynamic=True, backend=counter)
        for seed, size in enumerate(((50, 96), (60, 100))):
            pixels = picture(*size, seed=seed)
            assert_same_pictures(predictor(pixels, "semantic"), plain(pixels, "semantic"))
    assert len(counter.graphs) == 4


def test_the_predictor_compiles_on_demand_and_weights_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: calls.append(options) or call)
    model = small("swin")
    names = list(model.state_dict())
    assert Predictor(model, categories=categories()).model is model
    assert calls == []
    Predictor(model, categories=categories(), compile=True)
    assert calls == [{"dynamic": True}] * 2
    assert list(model.state_dict()) == names


def test_training_with_compiled_parts_is_the_same_training() -> None:
    model, counter = small("resnet").train(), Counter()
    images, targets = [random_image(64, 96)] * 2, [random_target(3, 64, 96), random_target(0, 64, 96)]

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(3)
        model.zero_grad()
        loss = training.sum_of(model.losses(images, targets))
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, gradients = step()
    model.compile(backend=counter)
    found, compiled_gradients = step()
    assert counter.graphs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == compiled_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["swin", "resnet"])
@torch.no_grad()
def test_the_default_compiler_gives_the_numbers_of_eager_mode(backbone: str) -> None:
    model = small(backbone)
    compiled = torch.compile(model.predict, fullgraph=True, dynamic=True)
    for height, width in SIZES:
        batch = torch.randn(1, 3, height, width)
        for logits, expected in zip(compiled(batch)[-1], model.predict(batch)[-1], strict=True):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
