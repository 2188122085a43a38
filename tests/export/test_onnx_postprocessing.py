"""The tensor-only forms as ONNX, without a network: onnxruntime gives the same, where nothing is found, too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.export.graph import OUTPUTS
from mask2former.export.postprocessing import instance_tensors, panoptic_tensors, semantic_labels
from tests.export.test_postprocessing import CASES, IS_THING, Prediction

pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

QUERIES = 14


class _Results(nn.Module):
    """From logits to the outputs of a task, for a canvas of four times the size of the mask logits."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task

    def forward(self, class_logits: Tensor, mask_logits: Tensor) -> tuple[Tensor, ...]:
        canvas = (4 * mask_logits.shape[1], 4 * mask_logits.shape[2])
        prediction = (class_logits, mask_logits, canvas, (canvas[0] - 2, canvas[1] - 23))
        if self.task == "semantic":
            return (semantic_labels(*prediction),)
        if self.task == "panoptic":
            return panoptic_tensors(
                *prediction, is_thing=IS_THING, object_mask_threshold=0.6, overlap_threshold=0.5
            )
        return instance_tensors(
            *prediction, top_k=20, is_thing=IS_THING, score_threshold=0.1, matrix_nms_sigma=2.0
        )


@pytest.fixture(scope="module", params=["panoptic", "instance", "semantic"])
def module_and_session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = tmp_path_factory.mktemp("onnx") / "results.onnx"
    module = _Results(request.param)
    dim = torch.export.Dim.DYNAMIC
    shapes = ({}, {1: dim, 2: dim})
    names = {"input_names": ["class_logits", "mask_logits"], "output_names": list(OUTPUTS[request.param])}
    example = (torch.zeros(QUERIES, 5), torch.zeros(QUERIES, 9, 15))
    program = torch.export.export(module, example, dynamic_shapes=shapes)
    converted = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False, **names)
    assert converted is not None
    path.write_bytes(converted.model_proto.SerializeToString())
    return module, onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _with_all_queries(prediction: Prediction) -> Prediction:
    """With more queries that see nothing."""
    missing = QUERIES - len(prediction[0])
    nothing = torch.tensor([0.0, 0, 0, 0, 30]).expand(missing, 5)
    return torch.cat([prediction[0], nothing]), F.pad(prediction[1], (0, 0, 0, 0, 0, missing), value=-9.0)


@pytest.mark.parametrize("size", [(8, 16), (24, 8)])
def test_onnxruntime_equals_pytorch(module_and_session: Any, size: tuple[int, int]) -> None:
    module, session = module_and_session
    for name, case in CASES.items():
        if module.task == "semantic" and not name.startswith("random"):
            continue  # all scores are nearly zero, and of equal ones any class is right
        class_logits, masks = _with_all_queries(case)
        masks = F.interpolate(masks[None], size, mode="nearest")[0]
        found = session.run(None, {"class_logits": class_logits.numpy(), "mask_logits": masks.numpy()})
        expected = module(class_logits, masks)
        assert len(found) == len(expected)
        for x, y in zip(found, expected, strict=True):
            assert x.shape == y.shape, name
            assert x.dtype == y.numpy().dtype, name
            if x.dtype == np.float32:
                np.testing.assert_allclose(x, y.numpy(), atol=1e-5, err_msg=name)
            else:
                assert (x != y.numpy()).sum() <= x.size // 1000, name
