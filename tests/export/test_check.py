"""What `--check` compares, on results written by hand."""

import numpy as np
import pytest
import torch

from mask2former.checkpoint import ModelDescription, PredictionSettings
from mask2former.export.check import Comparison, agreement, compare, made_up_picture, reference
from mask2former.export.files import module_runner
from mask2former.export.graph import SegmentationGraph
from tests.tiny import architecture, categories, lively_model, picture


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Wide, tall and square as the real ones, with a twentieth of the pixels."""
    monkeypatch.setattr("mask2former.export.check.SIZES", ((54, 71), (87, 58), (64, 64)))


LEFT = np.array([[1, 1, 0, 0]] * 4, dtype=np.bool_)
RIGHT = ~LEFT


def _instances(masks, labels, scores):
    return {"masks": np.stack(masks), "labels": np.array(labels), "scores": np.array(scores, dtype=np.float32)}


def test_instances_are_matched_by_class_and_mask_and_not_by_order():
    expected = _instances([LEFT, RIGHT], [1, 1], [0.5, 0.5])
    found = _instances([RIGHT, LEFT], [1, 1], [0.5, 0.25])
    assert agreement("instance", found, expected) == ([1.0, 1.0], [0.25, 0.0])


@pytest.mark.parametrize("labels", [[1], [2, 1], [1, 1, 1]])
def test_one_missing_another_class_and_one_too_many_have_iou_0(labels):
    masks = [LEFT, RIGHT, RIGHT][: len(labels)]
    expected = _instances([LEFT, RIGHT], [1, 1], [0.5, 0.5])
    ious, _ = agreement("instance", _instances(masks, labels, [0.5] * len(labels)), expected)
    assert min(ious) == 0


def test_panoptic_segments_are_compared_by_their_pixels():
    expected = {"ids": LEFT * 1 + RIGHT * 2, "categories": np.array([3, 0]), "scores": np.array([0.5, 0.5])}
    other = expected["ids"].copy()
    other[0, 0] = 2
    ious, differences = agreement("panoptic", {**expected, "ids": other}, expected)
    assert ious == [7 / 8, 8 / 9]
    assert differences == [0, 0]


def test_semantic_classes_that_only_one_of_them_has_count():
    ious, differences = agreement("semantic", {"labels": LEFT * 1}, {"labels": np.zeros_like(LEFT) * 1})
    assert (ious, differences) == ([0.5, 0.0], [])


@pytest.mark.parametrize(("iou", "difference", "agrees"), [(0.999, 1e-3, True), (0.9989, 0, False), (1, 1.1e-3, False)])
def test_limits(iou, difference, agrees):
    comparison = Comparison(size=(1, 2), compared=3, iou=iou, score_difference=difference, seconds=(0.1, 0.2))
    assert comparison.agrees is agrees


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_graph_in_pytorch_equals_the_model(task, image_format):
    model = lively_model().eval()
    settings = PredictionSettings(object_mask_threshold=0.3, overlap_threshold=0.2, top_k=9)
    description = ModelDescription(
        architecture=architecture(image_format=image_format), categories=categories(), settings=settings
    )
    run = module_runner(SegmentationGraph(model, description, task))
    found = list(compare(run, model, description, task, made_up_picture()))
    assert all(c.agrees and c.compared for c in found)
    assert len({c.size for c in found}) == 3


def test_matrix_nms_is_in_the_program():
    model = lively_model().eval()
    image = torch.from_numpy(picture(48, 64).transpose(2, 0, 1).copy())[None].float()  # (1, 3, 48, 64)
    scores = {}
    for sigma in (0.0, 2.0):
        settings = PredictionSettings(matrix_nms_sigma=sigma)
        description = ModelDescription(architecture=architecture(), categories=categories(), settings=settings)
        graph = SegmentationGraph(model, description, "instance")
        assert all(c.agrees for c in compare(module_runner(graph), model, description, "instance", made_up_picture()))
        with torch.no_grad():
            scores[sigma] = graph(image)["scores"]
    assert scores[2.0].sum() < 0.9 * scores[0.0].sum()


def test_a_file_of_another_model_does_not_agree():
    model, other = lively_model().eval(), lively_model().eval()
    with torch.no_grad():
        other.sem_seg_head.predictor.class_embed.bias[0] += 0.5
    settings = PredictionSettings(object_mask_threshold=0.3, overlap_threshold=0.2, top_k=9)
    description = ModelDescription(architecture=architecture(), categories=categories(), settings=settings)
    run = module_runner(SegmentationGraph(other, description, "instance"))
    assert not all(c.agrees for c in compare(run, model, description, "instance", made_up_picture()))


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_float16_weights_are_close(task):
    model = lively_model().eval()
    description = ModelDescription(
        architecture=architecture(),
        categories=categories(),
        settings=PredictionSettings(object_mask_threshold=0.3, overlap_threshold=0.2, top_k=9),
    )
    graph = SegmentationGraph(model, description, task, dtype=torch.float16)
    half = {name for name, p in graph.named_parameters() if p.dtype == torch.float16}
    assert "network.backbone.patch_embed.proj.weight" in half
    assert "network.sem_seg_head.predictor.transformer_self_attention_layers.0.self_attn.in_proj_weight" in half
    assert not {name for name in half if "norm" in name or "query" in name}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    image = np.ascontiguousarray(made_up_picture()[:90, :131].transpose(2, 0, 1)[None], dtype=np.float32)
    found, expected = module_runner(graph)(image), reference(model, description, task, image)
    assert len(expected["scores"])
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=0.02)
    assert found["scores"].dtype == np.float32
